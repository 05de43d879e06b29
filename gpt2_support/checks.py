"""What a caller gives to the model, checked: ids, targets, prompts, sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_support.messages import preview
from gpt2_support.params import Config, whole_number

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from typing import Any, Protocol, SupportsFloat, SupportsIndex, runtime_checkable

    from jaxtyping import Float, Integer
    from numpy import ndarray
    from numpy.typing import ArrayLike

    from gpt2_support.params import Params

    @runtime_checkable
    class Cache(Protocol):
        """What is needed of a gpt2.KVCache."""

        buffer: Any
        length: Any


IGNORE_INDEX = -1  # a target that takes no part in the loss
TEXT = (str, bytes, bytearray, memoryview)


def check_params(params: object) -> None:
    """Raise ValueError, saying what to do, for what is no model."""
    if not isinstance(getattr(params, "config", None), Config):
        actual = preview(params if isinstance(params, str) else type(params).__name__)
        raise ValueError(f"params must be a model, as gpt2.load returns it, found {actual}")


def refuse_text(tokens: object) -> None:
    """Raise ValueError for a text or bytes in place of ids."""
    if isinstance(tokens, TEXT):
        raise ValueError(
            f"tokens must be ids, found {preview(repr(tokens))}: encoder.load(name).encode(text) "
            "makes ids of a text"
        )


def check_ids(params: Params, tokens: ArrayLike) -> Integer[ndarray, "*B T"]:
    """Return ids (T,) or (B, T), as many as there are, as an array; see `check_tokens`."""
    check_params(params)
    refuse_text(tokens)
    config, shapes = params.config, "tokens must be whole numbers of shape (T,) or (B, T)"
    tokens = to_array(tokens, shapes)
    if tokens.ndim not in (1, 2) or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{shapes}, found shape {tokens.shape}, dtype {tokens.dtype}")
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= config.n_vocab:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary of {config.n_vocab}")
    return tokens


def to_array(values: object, expected: str) -> ndarray:
    """Return values as an array; raise ValueError, with what is expected, if there is none."""
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{expected}, found rows of different lengths") from None


def check_tokens(
    params: Params, tokens: ArrayLike, kv: Cache | None = None
) -> Integer[ndarray, "B T"]:
    """Return tokens (T,) or (B, T) as an array (B, T), or raise ValueError with value and limit."""
    tokens = np.atleast_2d(check_ids(params, tokens))
    (B, T), config = tokens.shape, params.config
    if kv is not None:
        check_cache(params, kv, B)
    end = T if kv is None else T + kv.length.max()
    if end > config.n_ctx:
        raise ValueError(f"{end} tokens exceed n_ctx = {config.n_ctx}")
    return tokens


def check_cache(params: Params, kv: Cache, n_rows: int) -> None:
    """Raise ValueError unless kv is a KVCache of this model and its dtype, and of so many rows."""
    config, dtype = params.config, params.flat.dtype
    make = f"gpt2.KVCache(params.config, {n_rows}, params.flat.dtype) makes one"
    if not all(isinstance(getattr(kv, name, 0), np.ndarray) for name in ("buffer", "length")):
        raise ValueError(f"kv must be a KV cache, found {preview(type(kv).__name__)}: {make}")
    if len(kv.length) != n_rows:
        raise ValueError(f"{n_rows} rows of tokens, but the KV cache has {len(kv.length)}")
    head = config.n_head, config.n_ctx, config.n_embd // config.n_head
    expected = config.n_layer, 2, n_rows, *head
    if kv.buffer.shape != expected:
        actual = f"{kv.buffer.shape}, expected {expected}"
        raise ValueError(f"the KV cache is that of another model: its shape is {actual}")
    if kv.buffer.dtype != dtype:
        actual = f"{kv.buffer.dtype}, the parameters {dtype}"
        raise ValueError(f"the KV cache has dtype {actual}: {make}")


def check_targets(
    params: Params, tokens: ArrayLike, targets: ArrayLike, n_counted: float | None = None
) -> tuple[Integer[ndarray, "B T"], Integer[ndarray, " B*T"], float]:
    """Return tokens (B, T), targets (B * T,) and, unless it is given, how many targets count.

    Raises ValueError with value and limit.
    """
    tokens, shape = check_tokens(params, tokens), np.shape(tokens)
    n_vocab = params.config.n_vocab
    expected = f"targets must be whole numbers of the tokens' shape {shape}"
    targets = to_array(targets, expected)
    if targets.shape != shape or targets.dtype.kind not in "iu":
        raise ValueError(f"{expected}, found shape {targets.shape}, dtype {targets.dtype}")
    low, high = targets.min(), targets.max()
    if low < IGNORE_INDEX or high >= n_vocab:
        bad = low if low < IGNORE_INDEX else high
        raise ValueError(f"target {bad} is outside the vocabulary of {n_vocab}")
    n_counted = float(n_counted or np.count_nonzero(targets != IGNORE_INDEX))
    if not n_counted:
        raise ValueError("every target is -1: there is no loss to take the mean of")
    return tokens, targets.ravel(), n_counted


def check_grads(params: Params, grads: Params | None) -> Params:
    """Return grads, by default zeros; raise ValueError if they are those of another model."""
    if grads is None:
        return params.zeros_like()
    if getattr(grads, "config", None) != params.config:
        raise ValueError("grads are not those of this model: params.zeros_like() makes some")
    return grads


def check_dlogits(params: Params, tokens: ArrayLike, dlogits: ArrayLike) -> Float[ndarray, "N V"]:
    """Return dlogits as rows; raises ValueError unless it has the shape of the logits."""
    shape = *np.shape(tokens), params.config.n_vocab
    expected = f"dlogits must be numbers of the logits' shape {shape}"
    array = to_array(dlogits, expected)
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise ValueError(f"{expected}, found shape {array.shape}, dtype {array.dtype}")
    return array.astype(params.flat.dtype, copy=False).reshape(-1, shape[-1])


def check_prompts(params: Params, tokens: object, eot: int | None) -> tuple[list[list[int]], bool]:
    """Return the prompts as lists of ids, and whether `tokens` is a single prompt.

    An empty prompt becomes that of end-of-text alone. Raises ValueError with value and limit.
    """
    given = to_lists(tokens)
    are_prompts = [isinstance(x, list) for x in given] if isinstance(given, list) else [False]
    if any(are_prompts) and not all(are_prompts):
        raise ValueError("tokens are neither one list of ids nor a list of such lists")
    is_single, n_ctx = not any(are_prompts), params.config.n_ctx
    prompts = []
    for ids in [given] if is_single else given:
        if ids == [] and eot is None:
            raise ValueError("the prompt is empty, and there is no end-of-text token to start from")
        ids = [eot] if ids == [] else ids
        if isinstance(ids, list) and len(ids) > n_ctx:
            raise ValueError(f"prompt of {len(ids)} tokens exceeds n_ctx = {n_ctx}")
        batch = check_tokens(params, ids)
        if len(batch) > 1 or any(isinstance(id, list) for id in ids):
            raise ValueError("tokens are neither one list of ids nor a list of such lists")
        prompts.append(batch[0].tolist())
    return prompts, is_single


def to_lists(tokens: Any) -> Any:
    """Return ids, or prompts of ids, as lists of plain numbers: any array, iterable or iterator."""
    refuse_text(tokens)
    if hasattr(tokens, "__array__"):
        return np.asarray(tokens).tolist()
    return [to_lists(item) for item in tokens] if isinstance(tokens, Iterable) else tokens


def check_whole(name: str, value: object, low: int = 0) -> int:
    """Return a whole number of `low` or more as an int, or raise ValueError."""
    n = whole_number(value)
    if n is None:
        raise ValueError(f"{name} = {preview(repr(value))} is not a whole number")
    if n < low:
        raise ValueError(f"{name} = {n} is {f'not {low} or more' if low else 'negative'}")
    return n


def to_float(value: Any) -> float:
    """Return a number of any type as a float; NaN for what is none or too large."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


class Sampling(NamedTuple):
    """How an id is drawn from logits: see gpt2.next_token_probs and apply_repetition_penalty."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0


GREEDY = Sampling()  # the most probable id, always
PENALTIES = "a number from 0.001 to 1000"  # which overflow no float32


def is_penalty(value: float) -> bool:
    """Tell whether a number is one of PENALTIES."""
    return 0.001 <= value <= 1000


def check_sampling(
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    seed: int | None = None,
    repetition_penalty: SupportsFloat = 1.0,
) -> Sampling:
    """Return the sampling parameters as floats and ints; raise ValueError with value and limit."""
    t, p, penalty = to_float(temperature), to_float(top_p), to_float(repetition_penalty)
    if not 0 <= t < math.inf:
        raise ValueError(f"temperature = {temperature} is not a finite number of 0 or more")
    if top_p is not None and not 0 < p <= 1:
        raise ValueError(f"top_p = {top_p} is not over 0 and at most 1")
    if not is_penalty(penalty):
        raise ValueError(f"repetition_penalty = {repetition_penalty} is not {PENALTIES}")
    k = None if top_k is None else check_whole("top_k", top_k, 1)
    seed = None if seed is None else check_whole("seed", seed)
    return Sampling(t, k, None if top_p is None else p, seed, penalty)


def check_vocabulary(
    params: Params, n_vocab: int | None, eot: int | str | None
) -> tuple[int, int | None]:
    """Return how many ids may be drawn, and which ends a text, by default the last of those.

    Raises ValueError with value and limit.
    """
    check_params(params)
    config = params.config
    n = config.n_vocab if n_vocab is None else check_whole("n_vocab", n_vocab, 1)
    if n > config.n_vocab:
        raise ValueError(f"n_vocab = {n} exceeds the model's, {config.n_vocab}")
    if isinstance(eot, str) and eot == "last":
        return n, n - 1
    end = whole_number(eot)
    if eot is not None and (end is None or end >= n):
        raise ValueError(f"eot = {eot!r} is not an id of the vocabulary of {n}, 'last' or None")
    return n, end


def check_tokenizer(path: object, config: Config, n_vocab: int) -> None:
    """Raise ValueError if a tokenizer of n_vocab tokens has ids that the model at `path` lacks."""
    if n_vocab > config.n_vocab:
        actual = f"{n_vocab} tokens, the model only {config.n_vocab}"
        raise ValueError(f"{path}: the tokenizer has {actual}: they do not belong together")


def check_writable(params: Params) -> None:
    """Raise ValueError if parameters are read-only, as those that are mapped from a file."""
    if not params.flat.flags.writeable:
        raise ValueError("the parameters are read-only, as gpt2.load returns them: train a copy of "
                         "them, params.copy()")  # fmt: skip
