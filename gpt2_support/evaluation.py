"""How well a model predicts a text: the windows that it is read in, and the figures."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import blas
from gpt2_support.checks import IGNORE_INDEX
from gpt2_support.distributed import ProcessGroup
from gpt2_support.messages import BarStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Integer
    from numpy import ndarray

    Batch = tuple[Integer[ndarray, "B T"], Integer[ndarray, "B T"]]  # tokens and targets

TOKENS_PER_BATCH = 2048


@dataclass
class Evaluation:
    """How well a model predicts `n_tokens` tokens, which are `n_bytes` bytes of text."""

    nats: float  # in total
    n_tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as nats a token are not."""
        return self.nats / math.log(2) / max(1, self.n_bytes)

    def __str__(self) -> str:
        perplexity = math.exp(min(self.loss, 700))  # what a float can hold
        return (
            f"{self.loss:.4f} nats a token, perplexity {perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits a byte"
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


def sum_losses(
    losses: Callable[[Batch], Float[ndarray, "B T"]],
    windows: Windows,
    group: ProcessGroup | None = None,
) -> float:
    """Return the sum of losses(batch) over all batches, in nats, with a progress bar.

    The ranks of a group share the batches. So do the threads of a rank, one a core, each with one
    BLAS thread: the work between the matrix products is shared as well. The sum is the same
    however many share it.
    """
    from tqdm import tqdm

    def nats(i: int) -> tuple[float, int]:
        batch = windows.batch(i)
        total = float(losses(batch).sum(dtype=np.float64))
        return total, int(np.count_nonzero(batch[1] != IGNORE_INDEX))

    group = group or ProcessGroup()
    numbers = range(group.rank, len(windows), group.size)
    n_threads = max(1, min(blas.get_threads(), len(numbers)))
    bar = tqdm(
        total=len(windows.tokens) - 1,
        desc="evaluate",
        unit="tok",
        leave=False,
        delay=2,
        file=BarStream(),
    )
    sums = []
    with bar, blas.one_thread(), ThreadPoolExecutor(n_threads) as pool:
        try:
            for total, n_tokens in pool.map(nats, numbers):
                sums.append(total)
                bar.update(min(n_tokens * group.size, bar.total - bar.n))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, too, soon
    return math.fsum(itertools.chain(*group.all_gather(sums)))  # exact, so in any order
