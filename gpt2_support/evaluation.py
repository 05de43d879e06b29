"""How well a model predicts a text: the windows that it is read in, and the figures."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_support import blas
from gpt2_support.checks import IGNORE_INDEX, check_ids
from gpt2_support.distributed import ProcessGroup
from gpt2_support.messages import BarStream

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias, TypeVar

    from jaxtyping import Float, Integer
    from numpy import ndarray

    from gpt2_support.params import Params
    from gpt2_support.shapes import Batch

    T = TypeVar("T")
    Losses: TypeAlias = Callable[[Batch], Float[ndarray, "B T"]]

TOKENS_PER_BATCH = 2048


@dataclass
class Evaluation:
    """How well a model predicts `n_tokens` tokens, which are `n_bytes` bytes of text."""

    nats: float  # in total
    n_tokens: int
    n_bytes: int
    squares: float = math.nan  # the sum of the squares of the tokens' nats

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.n_tokens

    @property
    def standard_error(self) -> float:
        """Of the loss, as if the tokens were independent of each other."""
        return standard_error(self.n_tokens, self.nats, self.squares)

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as nats per token are not."""
        return self.nats / math.log(2) / max(1, self.n_bytes)

    def __str__(self) -> str:
        return (
            f"{self.loss:.4f} nats per token, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits per byte"
        )


class Windows:
    """Batches of windows of seq_len tokens, one every `stride` (by default, and at most, seq_len).

    Each of the N - 1 tokens after the first is a target once, in the first window that reaches it:
    a smaller stride gives it more context, and takes more time. A window has seq_len + 1 tokens
    with the last target: the usual recipe for perplexity, whose windows of L tokens give a loss to
    L - 1 of them, is seq_len = L - 1 here. All other targets are IGNORE_INDEX.
    Raises ValueError if there are not two tokens, or for a stride outside 1 to seq_len.
    """

    def __init__(
        self,
        tokens: Integer[ndarray, " N"],
        seq_len: int,
        stride: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        stride = seq_len if stride is None else stride
        if len(tokens) < 2:
            raise ValueError(f"cannot evaluate on {len(tokens)} tokens: two at least are needed")
        if not 1 <= stride <= seq_len:
            raise ValueError(f"the stride is {stride}, expected 1 to seq_len, {seq_len}")
        self.tokens, self.seq_len = tokens, seq_len
        self.overlap = seq_len - stride
        self.batch_size = batch_size or max(1, TOKENS_PER_BATCH // seq_len)
        self.starts = range(0, max(1, len(tokens) - 1 - self.overlap), stride)

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def batch(self, i: int) -> Batch:
        """Return the tokens and targets of batch i, (B, T) each."""
        starts = self.starts[i * self.batch_size : (i + 1) * self.batch_size]
        x = np.zeros((len(starts), self.seq_len), np.int64)
        y = np.full_like(x, IGNORE_INDEX)
        for row, start in enumerate(starts):
            window = self.tokens[start : start + self.seq_len + 1]
            x[row, : len(window) - 1] = window[:-1]
            y[row, : len(window) - 1] = window[1:]
            if start > 0:
                y[row, : self.overlap] = IGNORE_INDEX  # a target in the window before
        return x, y


def measure(
    gpt2: Any,
    params: Params,
    tokens: Integer[ndarray, " N"],
    lengths: Integer[ndarray, " V"],
    seq_len: int,
    stride: int | None = None,
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Return how well a model predicts tokens (N,) after the first, with a progress bar.

    All ranks of a group call this, share the work, and have the same result.

    `gpt2` is the module of that name, which this package does not import. `lengths` are the bytes
    of text that each token of the vocabulary stands for, 0 for end-of-text, which must be predicted
    as any other token. See `Windows` for seq_len and stride, and for what raises ValueError, as do
    ids that the model does not have.
    """

    def losses(batch: Batch) -> Float[ndarray, "B T"]:
        return gpt2.token_losses(params, *batch)

    windows = Windows(tokens, seq_len, stride)
    check_ids(params, tokens)
    nats, squares = sum_losses(losses, windows, group)
    return Evaluation(nats, len(tokens) - 1, int(lengths[tokens[1:]].sum()), squares)


def sum_losses(
    losses: Losses, windows: Windows, group: ProcessGroup | None = None
) -> tuple[float, float]:
    """Return the sum of losses(batch) over all batches, in nats, and that of their squares.

    The ranks of a group share the batches. The sums are the same however many share them.
    """
    group = group or ProcessGroup()

    def sums(i: int) -> tuple[tuple[float, float], int]:
        batch = windows.batch(i)
        return sum_and_squares(losses(batch)), int(np.count_nonzero(batch[1] != IGNORE_INDEX))

    numbers = range(group.rank, len(windows), group.size)
    here = parallel_map(sums, numbers, len(windows.tokens) - 1, "tok", group.size)
    nats, squares = zip(*itertools.chain(*group.all_gather(here)), strict=True)
    return math.fsum(nats), math.fsum(squares)  # exact, so in any order


def sum_and_squares(nats: Float[ndarray, "*N"]) -> tuple[float, float]:
    """Return the sum of losses and that of their squares, added up in float64."""
    return float(nats.sum(dtype=np.float64)), float(np.square(nats, dtype=np.float64).sum())


def token_losses(losses: Losses, windows: Windows) -> Float[ndarray, " N"]:
    """Return losses(batch) of all batches: those of the tokens after the first, in their order."""

    def of_batch(i: int) -> tuple[ndarray, int]:
        batch = windows.batch(i)
        x = losses(batch)[batch[1] != IGNORE_INDEX]
        return x, len(x)

    return np.concatenate(
        parallel_map(of_batch, range(len(windows)), len(windows.tokens) - 1, "tok")
    )


def parallel_map(
    work: Callable[[int], tuple[T, int]], numbers: range, total: int, unit: str, n_ranks: int = 1
) -> list[T]:
    """Return the results of work(i) for all numbers i; each comes with what it adds to the bar.

    The progress bar goes to `total`, with which all ranks are done. Threads share the batches, one
    a core, each with one BLAS thread: the work between the matrix products is shared as well.
    """
    from tqdm import tqdm

    def quietly(i: int) -> tuple[T, int]:
        with np.errstate(all="ignore"):  # callers tell of NaN
            return work(i)

    bar = tqdm(total=total, desc="evaluate", unit=unit, leave=False, delay=2, file=BarStream())
    results = []
    n_threads = max(1, min(blas.get_threads(), len(numbers)))
    with bar, blas.one_thread(), ThreadPoolExecutor(n_threads) as pool:
        try:
            for result, n_done in pool.map(quietly, numbers):
                results.append(result)
                bar.update(min(n_done * n_ranks, total - bar.n))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, too, soon
    return results


def perplexity(loss: float) -> float:
    """Return exp(loss), at most what a float can hold."""
    return math.exp(min(loss, 700))


def standard_error(n: int, total: float, squares: float) -> float:
    """Return that of the mean of n independent values, by their sum and that of their squares.

    NaN for a single value, whose spread is unknown, and for values that are not finite.
    """
    spread = squares - total * total / n
    if n < 2 or math.isnan(spread):
        return math.nan
    return math.sqrt(max(0.0, spread) / (n - 1) / n)


def check_finite(nats: Float[ndarray, " N"] | float) -> None:
    """Raise ValueError if losses are NaN or infinite."""
    if not np.isfinite(nats).all():
        raise ValueError("the logits are not finite: the model is damaged or has diverged")
