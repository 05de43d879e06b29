"""Data parallelism: threads, and processes, that share a batch and add up their gradients."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import blas
from gpt2_support.checks import IGNORE_INDEX
from gpt2_support.distributed import ProcessGroup
from gpt2_support.gradients import Turns
from gpt2_support.masks import Dropout
from gpt2_support.params import Config, Params

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from numpy import ndarray

    Batch = tuple[ndarray, ndarray]  # tokens and targets, (B, T) each
    LossAndGrads = Callable[..., tuple[float, Params]]  # gpt2.loss_and_grads
    Work = Callable[[int, int], object]  # work(i, n) does share i of n


def serial(work: Work) -> list:
    """Return [work(0, 1)]: all of the work in this thread, as `DataParallel.parallel` shares it."""
    return [work(0, 1)]


class DataParallel:
    """Threads, and the processes of a group, that share each batch.

    Every thread runs the whole model on its rows of the batch, with one BLAS thread, so that the
    elementwise work is shared as well as the matrix products. They add to one gradient by turns. A
    single thread leaves the products to all BLAS threads. Given `grads`, they overwrite that.
    """

    def __init__(
        self,
        loss_and_grads: LossAndGrads,
        params: Params,
        n_threads: int = 1,
        group: ProcessGroup | None = None,
        dropout: float = 0.0,
        grads: Params | None = None,
    ) -> None:
        self._loss_and_grads, self.dropout = loss_and_grads, dropout
        self.n_threads, self.group = n_threads, group or ProcessGroup()
        self.grads = params.zeros_like() if grads is None else grads
        is_large = params.flat.size > 1 << 20  # so that waking a thread costs less than it does
        self.n_elementwise = max(n_threads, blas.get_threads()) if is_large else n_threads
        self.pool = ThreadPoolExecutor(self.n_elementwise)

    def loss_and_grads(
        self, params: Params, batches: Iterable[Batch], *seed: int
    ) -> tuple[float, Params]:
        """Return the loss and the gradient, means over the targets that count, of all ranks.

        `batches` are this rank's. The gradient is overwritten by the next call. What is dropped
        depends on `seed`, rank, thread and batch. Raises ValueError if every target is -1.
        """
        batches = list(batches)
        n_counted = float(self._count_targets(batches))
        n_rows = math.gcd(*(len(tokens) for tokens, _ in batches))
        n_threads = largest_divisor(n_rows, self.n_threads)  # so that all have equal rows
        turns = Turns(n_threads)

        def add_gradients(i: int, n: int) -> list[float]:  # of the rows i, i + n, ... of each batch
            losses = []
            with turns.taken_by(i), np.errstate(all="ignore"):  # train_step tells of NaN
                for number, (tokens, targets) in enumerate(batches):
                    drop = self._drop(*seed, self.group.rank, i, number)
                    rows = tokens[i::n], targets[i::n]
                    loss, _ = self._loss_and_grads(params, *rows, self.grads, n_counted, drop)
                    losses.append(loss)
            return losses

        with blas_threads(params.config, n_threads):
            losses = self._parallel_map(add_gradients, n_threads)
        self.group.all_reduce(self.grads.flat)
        return math.fsum(self.group.all_gather(float(np.sum(losses)))), self.grads

    def _drop(self, *seed: int) -> Dropout | None:
        return Dropout(self.dropout, seed) if self.dropout else None

    def _count_targets(self, batches: list[Batch]) -> int:
        """Return how many targets count, on all ranks."""
        here = sum(int(np.count_nonzero(targets != IGNORE_INDEX)) for _, targets in batches)
        total = sum(self.group.all_gather(here))
        if total == 0:
            raise ValueError("every target is -1: there is no loss to take the mean of")
        return total

    def parallel(self, work: Work) -> list:
        """Return [work(0, n), work(1, n), ...]: elementwise work, shared among n threads."""
        return self._parallel_map(work, self.n_elementwise)

    def _parallel_map(self, work: Work, n: int) -> list:
        if n == 1:
            return serial(work)
        return list(self.pool.map(work, range(n), [n] * n))

    def time_batch(self, params: Params, batch: Batch) -> float:
        """Return the seconds that loss and gradient of a batch take on the slowest rank."""

        def seconds() -> float:
            start = time.perf_counter()
            self.loss_and_grads(params, [batch])
            return max(self.group.all_gather(time.perf_counter() - start))

        first = seconds()  # this also fetches memory and wakes threads
        if first > 2:
            return first
        return statistics.median(seconds() for _ in range(3 if first < 0.2 else 1))


def fastest(
    loss_and_grads: LossAndGrads,
    params: Params,
    batch: Batch,
    thread_counts: Iterable[int],
    group: ProcessGroup | None = None,
    dropout: float = 0.0,
) -> tuple[DataParallel, float]:
    """Return the threads that are fastest on a batch, and the seconds that they take.

    Counts are tried as they come, up to the first that is slower than the one before.
    """
    best: tuple[DataParallel, float] | None = None
    for n_threads in thread_counts:
        grads = best[0].grads if best else None  # a large model has memory for one
        workers = DataParallel(loss_and_grads, params, n_threads, group, dropout, grads)
        seconds = workers.time_batch(params, batch)
        if best and seconds > best[1]:
            break
        best = workers, seconds
    assert best, "thread_counts is empty"
    return best


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest number up to a limit that divides n."""
    return max(i for i in range(1, limit + 1) if n % i == 0)


WORTH_THREADS = 1 << 15  # values of an activation of a batch


def blas_threads(config: Config, n_threads: int = 1) -> AbstractContextManager:
    """Give a matrix product one thread within a block, if n_threads of ours share the work.

    So too for a small model, whose products are done before a second thread has woken up. Does
    nothing where NumPy has another BLAS than OpenBLAS.
    """
    if n_threads > 1 or config.n_embd < 256:
        return blas.one_thread()
    return contextlib.nullcontext()


def thread_counts(n_rows: int, seq_len: int, n_embd: int, n_cores: int) -> list[int]:
    """Return how many threads may share a batch equally: those that divide its rows.

    On very few tokens they would only wait for Python's lock: there it is one.
    """
    if n_rows * seq_len * n_embd < WORTH_THREADS:
        return [1]
    return [n for n in range(1, n_cores + 1) if n_rows % n == 0]
