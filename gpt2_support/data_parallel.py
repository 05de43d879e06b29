"""Data parallelism: processes that share a batch and add up their gradients."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_support import blas
from gpt2_support.checks import IGNORE_INDEX
from gpt2_support.distributed import ProcessGroup
from gpt2_support.gradients import Turns
from gpt2_support.masks import Dropout
from gpt2_support.messages import info
from gpt2_support.params import Config, Params
from gpt2_support.worker_pool import SharedArray, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from gpt2_support.shapes import Batch

    LossAndGrads = Callable[..., tuple[float, Params]]  # gpt2.loss_and_grads
    Work = Callable[[int, int], object]  # work(i, n) does share i of n


def serial(work: Work) -> list:
    """Return [work(0, 1)]: all of the work in this thread, as `DataParallel.parallel` shares it."""
    return [work(0, 1)]


class Share(NamedTuple):
    """What a process does of a step: its rows of each batch."""

    batches: list[Batch]
    n_counted: float  # targets of all processes that count
    dropout: float
    seed: tuple[int, ...]  # of what is dropped


def add_gradients(
    loss_and_grads: LossAndGrads, params: Params, grads: Params, share: Share
) -> list[float]:
    """Add the gradient of a share to grads; return the losses of its batches."""
    losses = []
    with np.errstate(all="ignore"):  # train_step tells of NaN
        for number, (tokens, targets) in enumerate(share.batches):
            drop = Dropout(share.dropout, (*share.seed, number)) if share.dropout else None
            loss, _ = loss_and_grads(params, tokens, targets, grads, share.n_counted, drop)
            losses.append(loss)
    return losses


def adder(
    loss_and_grads: LossAndGrads, config: Config, params: SharedArray, grads: SharedArray
) -> Callable[[Share], list[float]]:
    """Return `add_gradients` of a model whose arrays are shared."""
    p, d = Params(config, params.array()), Params(config, grads.array())
    return partial(add_gradients, loss_and_grads, p, d)


class DataParallel:
    """Processes of this machine, and those of a group, that share each batch.

    Each of n_procs runs the whole model on its rows of the batch, with one BLAS thread, so that the
    elementwise work is shared as well as the matrix products. They add to one gradient by turns. A
    process alone leaves large products to all BLAS threads. Several read `params`, a copy in memory
    that they share: train that, so that nothing need be copied at each step. They import the
    program, so it has to be a file that begins its work under `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        loss_and_grads: LossAndGrads,
        params: Params,
        n_procs: int = 1,
        group: ProcessGroup | None = None,
        dropout: float = 0.0,
    ) -> None:
        self._loss_and_grads, self.dropout = loss_and_grads, dropout
        self.n_procs, self.group = n_procs, group or ProcessGroup()
        self._pool: WorkerPool | None = None
        if n_procs > 1:
            config, flat = params.config, params.flat
            self._shared = [SharedArray(flat.size, flat.dtype) for _ in range(2)]
            self.params, self.grads = (Params(config, shared.array()) for shared in self._shared)
            self.params.flat[...] = flat
        else:
            self.params, self.grads = params, params.zeros_like()
        self._n_cores = blas.get_threads()

    def loss_and_grads(
        self, params: Params, batches: Iterable[Batch], *seed: int
    ) -> tuple[float, Params]:
        """Return the loss and the gradient, means over the targets that count, of all ranks.

        `batches` are this rank's. The gradient is overwritten by the next call. What is dropped
        depends on `seed`, rank, process and batch. Raises ValueError if every target is -1, and
        ChildProcessError if a process has ended.
        """
        batches = list(batches)
        n_counted = float(self._count_targets(batches))
        n_rows = math.gcd(*(len(tokens) for tokens, _ in batches))
        n = largest_divisor(n_rows, self.n_procs)  # so that all have equal rows
        shares = [
            Share(
                [(tokens[i::n], targets[i::n]) for tokens, targets in batches],
                n_counted,
                self.dropout,
                (*seed, self.group.rank, i),
            )
            for i in range(n)
        ]
        with blas_threads(params.config, n):
            losses = self._add_gradients(params, shares)
        self.group.all_reduce(self.grads.flat)
        return math.fsum(self.group.all_gather(float(np.sum(losses)))), self.grads

    def _add_gradients(self, params: Params, shares: list[Share]) -> list:
        if len(shares) == 1:
            with Turns().taken():
                return [add_gradients(self._loss_and_grads, params, self.grads, shares[0])]
        if params.flat is not self.params.flat:
            self.params.flat[...] = params.flat
        return self._start(len(shares)).run(shares)

    def _start(self, n_procs: int) -> WorkerPool:
        """Return the pool of n_procs processes, which are started unless they are there."""
        if self._pool is None or not self._pool.is_running or self._pool.n != n_procs:
            self.stop()
            args = self._loss_and_grads, self.params.config, *self._shared
            self._pool = WorkerPool(n_procs, adder, *args)
        return self._pool

    def stop(self) -> None:
        """End the processes; the next batch starts others."""
        if self._pool:
            self._pool.stop()
        self._pool = None

    def _count_targets(self, batches: list[Batch]) -> int:
        """Return how many targets count, on all ranks."""
        here = sum(int(np.count_nonzero(targets != IGNORE_INDEX)) for _, targets in batches)
        total = sum(self.group.all_gather(here))
        if total == 0:
            raise ValueError("every target is -1: there is no loss to take the mean of")
        return total

    def parallel(self, work: Work) -> list:
        """Return [work(0, n), work(1, n), ...]: elementwise work, shared among n threads."""
        is_large = self.grads.flat.size > 1 << 20  # so that waking a thread costs less than it does
        n = max(self.n_procs, self._n_cores) if is_large else self.n_procs
        return serial(work) if n == 1 else list(blas.thread_pool().map(work, range(n), [n] * n))

    def time_batch(self, params: Params, batch: Batch) -> float:
        """Return the seconds that loss and gradient of a batch take on the slowest rank."""

        def seconds() -> float:
            start = time.perf_counter()
            self.loss_and_grads(params, [batch])
            return max(self.group.all_gather(time.perf_counter() - start))

        if self.n_procs > 1:
            self._start(self.n_procs)
        first = seconds()  # this also fetches memory and wakes threads
        if first > 2:
            return first
        return statistics.median(seconds() for _ in range(3 if first < 0.2 else 1))


def fastest(
    loss_and_grads: LossAndGrads,
    params: Params,
    batch: Batch,
    counts: Sequence[int],
    group: ProcessGroup | None = None,
    dropout: float = 0.0,
) -> tuple[DataParallel, float]:
    """Return the processes that are fastest on a batch, and the seconds that they take.

    Counts are tried as they come, up to the first that is slower than the one before, or whose
    processes cannot start.
    """
    n_most, group = max(counts), group or ProcessGroup()
    try:
        workers = DataParallel(loss_and_grads, params, n_most, group, dropout)
    except OSError as error:  # no memory that can be shared
        if counts[0] > 1 or group.size > 1:  # all ranks try the same
            raise
        info(f"1 process is used, as {n_most} cannot share memory: {error}")
        workers, counts = DataParallel(loss_and_grads, params, 1, group, dropout), [1]
    best, least = counts[0], math.inf
    for n in counts:
        workers.n_procs = n
        try:
            seconds = workers.time_batch(workers.params, batch)
        except (OSError, MemoryError) as error:
            if n == counts[0] or group.size > 1:
                raise
            info(f"processes: {best} instead of {n}: {error}")
            break
        if seconds > least:
            break
        best, least = n, seconds
        blas.trim_memory()  # several processes need less each
    if best != workers.n_procs:
        workers.stop()
    workers.n_procs = best
    return workers, least


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest number up to a limit that divides n."""
    return max(i for i in range(1, limit + 1) if n % i == 0)


WORTH_PROCS = 1 << 15  # values of an activation of a batch


def blas_threads(config: Config, n_procs: int = 1) -> AbstractContextManager:
    """Give a matrix product one thread within a block, if n_procs of ours share the work.

    So too for a small model, whose products are done before a second thread has woken up. Does
    nothing where NumPy has another BLAS than OpenBLAS.
    """
    if n_procs > 1 or config.n_embd < 256:
        return blas.one_thread()
    return contextlib.nullcontext()


def proc_counts(n_rows: int, seq_len: int, n_embd: int, n_cores: int) -> list[int]:
    """Return how many processes may share a batch equally: those that divide its rows.

    On very few tokens they would mostly wait for each other: there it is one.
    """
    if n_rows * seq_len * n_embd < WORTH_PROCS:
        return [1]
    return [n for n in range(1, n_cores + 1) if n_rows % n == 0]
