"""What a caller gives to the model, checked: ids, targets, prompts, sampling parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Collection
    from typing import Any, Protocol, SupportsFloat, runtime_checkable

    from jaxtyping import Integer
    from numpy import ndarray
    from numpy.typing import ArrayLike

    from gpt2_support.params import Config

    @runtime_checkable
    class Cache(Protocol):
        """Of a KVCache, the numbers of tokens read so far, one for each row."""

        length: Any


IGNORE_INDEX = -1  # a target that takes no part in the loss


def check_tokens(
    config: Config, tokens: ArrayLike, kv: Cache | None = None
) -> Integer[ndarray, "B T"]:
    """Return tokens (T,) or (B, T) as an array (B, T), or raise ValueError with value and limit."""
    tokens = np.asarray(tokens)
    if tokens.ndim not in (1, 2) or tokens.size == 0 or tokens.dtype.kind not in "iu":
        actual = f"shape {tokens.shape}, dtype {tokens.dtype}"
        raise ValueError(f"tokens must be whole numbers of shape (T,) or (B, T), found {actual}")
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= config.n_vocab:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary of {config.n_vocab}")
    tokens = np.atleast_2d(tokens)
    B, T = tokens.shape
    if kv is not None and len(kv.length) != B:
        raise ValueError(f"{B} rows of tokens, but the KV cache has {len(kv.length)}")
    end = T if kv is None else T + kv.length.max()
    if end > config.n_ctx:
        raise ValueError(f"position {end} exceeds n_ctx = {config.n_ctx}")
    return tokens


def check_targets(
    config: Config, tokens: ArrayLike, targets: ArrayLike
) -> tuple[Integer[ndarray, "B T"], Integer[ndarray, " B*T"]]:
    """Return tokens (B, T) and targets (B * T,), or raise ValueError with value and limit."""
    tokens, shape = check_tokens(config, tokens), np.shape(tokens)
    targets = np.asarray(targets)
    if targets.shape != shape or targets.dtype.kind not in "iu":
        raise ValueError(f"targets of shape {targets.shape} for tokens of shape {shape}")
    if targets.min() < IGNORE_INDEX or targets.max() >= config.n_vocab:
        bad = targets.min() if targets.min() < IGNORE_INDEX else targets.max()
        raise ValueError(f"target {bad} is outside the vocabulary of {config.n_vocab}")
    if (targets == IGNORE_INDEX).all():
        raise ValueError("every target is -1: there is no loss to take the mean of")
    return tokens, targets.ravel()


def check_prompts(
    config: Config, tokens: Collection[Any], n_tokens: int, eot: int | None
) -> tuple[list[list[int]], bool]:
    """Return the prompts as lists of ids, and whether `tokens` is a single prompt.

    An empty prompt becomes that of end-of-text alone. Raises ValueError with value and limit.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens = {n_tokens} is negative")
    is_single = all(np.ndim(token) == 0 for token in tokens)
    if not is_single and any(np.ndim(prompt) != 1 for prompt in tokens):
        raise ValueError("tokens are neither one list of ids nor a list of such lists")
    start = [] if eot is None else [eot]
    prompts = []
    for given in [tokens] if is_single else tokens:
        prompt: Any = given if len(given) else start
        if not len(prompt):
            raise ValueError("the prompt is empty, and there is no end-of-text token to start from")
        if len(prompt) > config.n_ctx:
            raise ValueError(f"prompt of {len(prompt)} tokens exceeds n_ctx = {config.n_ctx}")
        prompts.append(check_tokens(config, prompt)[0].tolist())
    return prompts, is_single


def check_sampling(
    temperature: SupportsFloat,
    top_k: int | None,
    top_p: SupportsFloat | None,
    repetition_penalty: SupportsFloat,
) -> None:
    """Raise ValueError, with value and limit, for a sampling parameter out of its range."""
    if not 0 <= float(temperature) < math.inf:
        raise ValueError(f"temperature = {temperature} is not a finite number of 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} is not 1 or more")
    if top_p is not None and not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p = {top_p} is not over 0 and at most 1")
    if not 0 < float(repetition_penalty) < math.inf:
        raise ValueError(f"repetition_penalty = {repetition_penalty} is not a finite number over 0")


def check_tokenizer(path: object, config: Config, n_vocab: int) -> None:
    """Raise ValueError if a tokenizer of n_vocab tokens has ids that the model at `path` lacks."""
    if n_vocab > config.n_vocab:
        actual = f"{n_vocab} tokens, the model only {config.n_vocab}"
        raise ValueError(f"{path}: the tokenizer has {actual}: they do not belong together")
