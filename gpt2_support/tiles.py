"""Operations on parts that fit the processor's cache, in threads; the caller gives the operation.

Attention works in tiles, some heads and a block of queries at a time. A tile compares its queries
only with the keys that they may see, so that half of the work of a long sequence is left out.
Elementwise operations work on blocks of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpt2_support import blas
from gpt2_support.hooks import INFERENCE, NO_HOOK, Hook

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable

    from jaxtyping import Float, Integer
    from numpy import ndarray

    from gpt2_support.shapes import AnyRows, Heads, Keys

QUERIES = 128  # queries of a tile
BLOCK = 1 << 18  # values of a block of rows
WORK = 64  # GELU of one value takes about as long as so many multiplications of a product


class Tile(NamedTuple):
    """The attention weights of some heads and a block of queries, (B, heads, queries, keys).

    `att` holds them before and after the hook.
    """

    heads: slice
    queries: slice
    att: tuple[Float[ndarray, "B h t s"], Float[ndarray, "B h t s"]]


def apply(
    attention: Callable[..., tuple[ndarray, tuple[ndarray, ndarray]]],
    q: Heads,
    k: Keys,
    v: Keys,
    positions: Integer[ndarray, "#B T"],
    hook: Hook = NO_HOOK,
) -> tuple[Heads, list[Tile]]:
    """Return attention(q, k, v, positions), (B, H, T, D), computed in tiles, and the tiles.

    Under INFERENCE no tiles are kept. A hook that changes the weights receives them whole, in one.
    """
    B, H, T, D = q.shape
    if hook.needs_whole("attn.att"):
        out, att = attention(q, k, v, positions, hook)
        return out, [Tile(slice(0, H), slice(0, T), att)]
    out = np.empty((B, T, H, D), q.dtype).swapaxes(1, 2)  # in this order merging heads is free
    tiles = []

    def apply_to_heads(heads: slice) -> None:
        for start in range(0, T, QUERIES):
            queries = slice(start, start + QUERIES)
            S = positions[:, queries].max() + 1
            q_, k_, v_ = q[:, heads, queries], k[:, heads, :S], v[:, heads, :S]
            out[:, heads, queries], att = attention(q_, k_, v_, positions[:, queries])
            if hook is not INFERENCE:
                tiles.append(Tile(heads, queries, att))

    blas.parallel_for(apply_to_heads, H, work=q.size * k.shape[2])
    if hook.is_recording:
        hook("attn.att", join(tiles, k.shape[2]))
    return out, tiles


def apply_backward(
    attention_backward: Callable[..., tuple[ndarray, ndarray, ndarray]],
    dout: Heads,
    q: Heads,
    k: Keys,
    v: Keys,
    tiles: list[Tile],
    hook: Hook = NO_HOOK,
) -> tuple[Heads, Keys, Keys]:
    """Return dq, dk, dv from `attention_backward`, summed over the tiles."""
    if hook.needs_whole("attn.att"):
        return attention_backward(dout, (q, k, v, tiles[0].att), hook)
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    starts = sorted({tile.heads.start for tile in tiles})

    def apply_to_group(part: slice) -> None:
        group = [tile for tile in tiles if tile.heads.start in starts[part]]
        for heads, queries, att in group:
            S = att[0].shape[-1]
            cache = q[:, heads, queries], k[:, heads, :S], v[:, heads, :S], att
            dq_, dk_, dv_ = attention_backward(dout[:, heads, queries], cache)
            dq[:, heads, queries] = dq_
            dk[:, heads, :S] += dk_
            dv[:, heads, :S] += dv_

    blas.parallel_for(apply_to_group, len(starts), work=q.size * k.shape[2])
    return dq, dk, dv


def join(tiles: list[Tile], n_keys: int) -> Float[ndarray, "B H T S"]:
    """Return the attention weights of all tiles as one array, with 0 for masked keys."""
    first = tiles[0].att[1]
    H = max(tile.heads.stop for tile in tiles)
    T = max(tile.queries.start + tile.att[1].shape[2] for tile in tiles)
    joined = np.zeros((len(first), H, T, n_keys), first.dtype)
    for heads, queries, (_, att) in tiles:
        joined[:, heads, queries, : att.shape[-1]] = att
    return joined


def apply_by_rows(
    operation: Callable[[AnyRows], tuple[AnyRows, Any]], x: AnyRows
) -> tuple[AnyRows, list[Any]]:
    """Return operation(x), (..., C), computed a block of rows at a time, and the blocks' caches."""
    blocks = blocks_of_rows(x)
    if len(blocks) == 1:
        out, cache = operation(x)
        return out, [cache]
    rows = x.reshape(-1, x.shape[-1])
    out, caches = np.empty_like(rows), [None] * len(blocks)

    def apply_to_blocks(part: slice) -> None:
        for i in range(part.start, part.stop):
            out[blocks[i]], caches[i] = operation(rows[blocks[i]])

    blas.parallel_for(apply_to_blocks, len(blocks), work=WORK * x.size)
    return out.reshape(x.shape), caches


def apply_by_rows_backward(
    operation_backward: Callable[[AnyRows, Any], AnyRows], dout: AnyRows, caches: list[Any]
) -> AnyRows:
    """Return operation_backward(dout, cache), (..., C), computed for each block of rows."""
    blocks = blocks_of_rows(dout)
    if len(blocks) == 1:
        return operation_backward(dout, caches[0])
    rows = dout.reshape(-1, dout.shape[-1])
    dx = np.empty_like(rows)

    def apply_to_blocks(part: slice) -> None:
        for block, cache in zip(blocks[part], caches[part], strict=True):
            dx[block] = operation_backward(rows[block], cache)

    blas.parallel_for(apply_to_blocks, len(blocks), work=WORK * dout.size)
    return dx.reshape(dout.shape)


def blocks_of_rows(x: AnyRows) -> list[slice]:
    """Cut the rows of x (..., C) into blocks of about BLOCK values."""
    n_rows, n = x.size // x.shape[-1], max(1, BLOCK // x.shape[-1])
    return [slice(start, start + n) for start in range(0, n_rows, n)]
