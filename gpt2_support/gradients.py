"""Gradients: how a layer adds to those of its parameters, in one thread or in several by turns."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import blas

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Iterator

    from jaxtyping import Float, Integer
    from numpy import ndarray

WORTH_GEMM = 1 << 17  # values: for fewer NumPy's own call is as fast
ACCUMULATED_ROWS = 4096  # that a thread adds in a turn


def accumulate(out: Float[ndarray, "*N"], values: Float[ndarray, "*N"]) -> None:
    """out += values."""
    with turn(out) as is_first:
        if is_first:
            out[...] = values
        else:
            out += values


def accumulate_rows(
    out: Float[ndarray, "M C"], numbers: Integer[ndarray, " N"], rows: Float[ndarray, "N C"]
) -> None:
    """out[numbers] += rows, where a number may occur more than once; `out` is contiguous."""
    with turn(out) as is_first:
        if is_first:
            out[...] = 0
        at = numbers.astype(np.intp)[:, None] * out.shape[1] + np.arange(out.shape[1])
        np.add.at(out.reshape(-1), at.ravel(), rows.ravel())  # on one axis it is fast


def accumulate_matmul(
    out: Float[ndarray, "M O"], a: Float[ndarray, "M N"], b: Float[ndarray, "N O"]
) -> None:
    """out += a @ b, a block of rows at a time; BLAS itself adds to a large `out`."""
    for start in range(0, len(out), ACCUMULATED_ROWS):
        rows = slice(start, start + ACCUMULATED_ROWS)
        with turn(out[rows]) as is_first:
            if is_first:
                np.matmul(a[rows], b, out=out[rows])
            elif out.size < WORTH_GEMM or not blas.gemm(out[rows], a[rows], b):
                out[rows] += a[rows] @ b


class Turns:
    """Threads that add to one gradient by turns, always in the same order.

    To each array thread 0 adds first, then thread 1, up to the last, then thread 0 again: sums of
    floats depend on their order. What is added first takes the place of what the array holds, so
    that nothing need be zeroed. All threads make the same additions.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads, self.has_failed = n_threads, False
        self.n_additions: dict[int, int] = defaultdict(int)  # by the address of the array
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken_by(self, thread: int) -> Iterator[None]:
        """Within, the calling thread is one of them. If it fails, none waits for it any more."""
        _local.turns, _local.thread = self, thread
        try:
            yield
        except BaseException:
            with self.changed:
                self.has_failed = True
                self.changed.notify_all()
            raise
        finally:
            _local.turns = None

    def is_next(self, thread: int, address: int) -> bool:
        """Whether it is a thread's turn to add to the array at an address."""
        return self.n_additions[address] % self.n_threads == thread or self.has_failed


_local = threading.local()


class turn:  # a context manager, called as a function
    """Wait for the calling thread's turn to add to an array; tell whether it is the first to.

    A thread that takes no turns need not wait, and is never the first.
    """

    def __init__(self, out: ndarray) -> None:
        self.turns: Turns | None = getattr(_local, "turns", None)
        self.address = out.ctypes.data if self.turns else 0

    def __enter__(self) -> bool:
        turns, address = self.turns, self.address
        if not turns:
            return False
        if not turns.is_next(_local.thread, address):
            with turns.changed:
                turns.changed.wait_for(lambda: turns.is_next(_local.thread, address))
        return turns.n_additions[address] == 0

    def __exit__(self, *error: object) -> None:
        if self.turns:
            with self.turns.changed:
                self.turns.n_additions[self.address] += 1
                self.turns.changed.notify_all()
