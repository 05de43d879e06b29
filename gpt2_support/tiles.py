"""Attention in tiles: some heads and a block of queries at a time, in threads.

A tile compares its queries only with the keys that they may see, so that half of the work of a
long sequence is left out, and its scores fit the cache. The operation itself is the caller's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_support import blas

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable

    from jaxtyping import Float, Integer
    from numpy import ndarray

    Queries = Float[ndarray, "B H T D"]
    Keys = Float[ndarray, "B H S D"]

QUERIES = 128  # queries of a tile


class Tile(NamedTuple):
    """The attention weights of some heads and a block of queries: att (B, heads, queries, keys).

    With dropout also their part of its mask.
    """

    heads: slice
    queries: slice
    att: Float[ndarray, "B h t s"]
    mask: Float[ndarray, "B h t s"] | None


def apply(
    attention: Callable[..., tuple[ndarray, ndarray]],
    q: Queries,
    k: Keys,
    v: Keys,
    positions: Integer[ndarray, "#B T"],
    mask: Float[ndarray, "B H T S"] | None = None,
) -> tuple[Queries, list[Tile]]:
    """Return out (B, H, T, D) of attention(q, k, v, positions, mask) -> out, att, and its tiles."""
    B, H, T, D = q.shape
    out = np.empty((B, T, H, D), q.dtype).swapaxes(1, 2)  # in this order merging heads is free
    tiles = []

    def apply_to_heads(heads: slice) -> None:
        for start in range(0, T, QUERIES):
            queries = slice(start, start + QUERIES)
            S = positions[:, queries].max() + 1
            part = None if mask is None else mask[:, heads, queries, :S]
            q_, k_, v_ = q[:, heads, queries], k[:, heads, :S], v[:, heads, :S]
            out[:, heads, queries], att = attention(q_, k_, v_, positions[:, queries], part)
            tiles.append(Tile(heads, queries, att, part))

    blas.parallel_for(apply_to_heads, H, work=q.size * k.shape[2])
    return out, tiles


def apply_backward(
    attention_backward: Callable[..., tuple[ndarray, ndarray, ndarray]],
    dout: Queries,
    q: Queries,
    k: Keys,
    v: Keys,
    tiles: list[Tile],
) -> tuple[Queries, Keys, Keys]:
    """Return dq, dk, dv of attention_backward(dout, (q, k, v, att), mask) -> dq, dk, dv."""
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    starts = sorted({tile.heads.start for tile in tiles})

    def apply_to_group(part: slice) -> None:
        group = [tile for tile in tiles if tile.heads.start in starts[part]]
        for heads, queries, att, mask in group:
            S = att.shape[-1]
            cache = q[:, heads, queries], k[:, heads, :S], v[:, heads, :S], att
            dq_, dk_, dv_ = attention_backward(dout[:, heads, queries], cache, mask)
            dq[:, heads, queries] = dq_
            dk[:, heads, :S] += dk_
            dv[:, heads, :S] += dv_

    blas.parallel_for(apply_to_group, len(starts), work=q.size * k.shape[2])
    return dq, dk, dv


def join(tiles: list[Tile], n_keys: int) -> Float[ndarray, "B H T S"]:
    """Return the attention weights of all tiles as one array, with 0 for masked keys."""
    B, _, _, _ = tiles[0].att.shape
    H = max(tile.heads.stop for tile in tiles)
    T = max(tile.queries.start + tile.att.shape[2] for tile in tiles)
    joined = np.zeros((B, H, T, n_keys), tiles[0].att.dtype)
    for heads, queries, att, _ in tiles:
        joined[:, heads, queries, : att.shape[-1]] = att
    return joined
