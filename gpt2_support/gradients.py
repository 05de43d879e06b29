"""Gradients: how a layer adds to those of its parameters, in one process or in several by turns."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import blas

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from jaxtyping import Float, Integer
    from numpy import ndarray

WORTH_GEMM = 1 << 17  # values: for fewer NumPy's own call is as fast
ACCUMULATED_ROWS = 4096  # that a process adds in a turn


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
    with turn(*row_blocks(out)) as is_first:
        if is_first:
            out[...] = 0
        at = numbers.astype(np.intp)[:, None] * out.shape[1] + np.arange(out.shape[1])
        np.add.at(out.reshape(-1), at.ravel(), rows.ravel())  # on one axis it is fast


def accumulate_matmul(
    out: Float[ndarray, "M O"], a: Float[ndarray, "M N"], b: Float[ndarray, "N O"]
) -> None:
    """out += a @ b, a block of rows at a time; BLAS itself adds to a large `out`."""
    for part, rows in zip(row_blocks(out), row_blocks(a), strict=True):
        with turn(part) as is_first:
            if is_first:
                np.matmul(rows, b, out=part)
            elif out.size < WORTH_GEMM or not blas.gemm(part, rows, b):
                part += rows @ b


def row_blocks(array: Float[ndarray, "M _"]) -> list[Float[ndarray, "m _"]]:
    """Return the rows of an array, ACCUMULATED_ROWS at a time."""
    starts = range(0, len(array), ACCUMULATED_ROWS)
    return [array[start : start + ACCUMULATED_ROWS] for start in starts]


class ProcessEnded(Exception):
    """A process that this one waits for has ended."""


@contextlib.contextmanager
def other_end() -> Iterator[None]:
    """Raise ProcessEnded if the other end of a pipe that is used in the block is closed."""
    try:
        yield
    except (EOFError, OSError):
        raise ProcessEnded from None


class Turns:
    """The turns in which a process adds to the gradient that it shares, always in the same order.

    To each array process 0 adds first, then process 1, up to the last, then process 0 again: sums
    of floats depend on their order. What is added first takes the place of what the array holds, so
    that nothing need be zeroed. All processes make the same additions. Each hears of those that
    the one `before` it has made, and tells the one `after` it; the last tells process 0.
    """

    def __init__(
        self, process: int = 0, before: Connection | None = None, after: Connection | None = None
    ) -> None:
        self.process, self.before, self.after = process, before, after
        self.n_added = self.n_heard = 0
        self.n_added_to: dict[int, int] = {}  # the last addition to an array, by its address

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Within the block, the calling thread adds in its turn. Begins a new gradient."""
        self.n_added = self.n_heard = 0
        self.n_added_to.clear()
        _local.turns = self
        try:
            yield
            self._hear(self.n_added)  # process 0 ends when all have added
        finally:
            _local.turns = None

    def begin(self, addresses: list[int]) -> bool:
        """Wait for the turn to add to the arrays at some addresses; tell whether it is the first.

        Raises ProcessEnded if that cannot come.
        """
        last = max(self.n_added_to.get(address, 0) for address in addresses)
        self._hear(self.n_added + 1 if self.process else last)
        return self.process == 0 and last == 0

    def end(self, addresses: list[int]) -> None:
        """Tell the next process that the addition has been made."""
        self.n_added += 1
        self.n_added_to.update(dict.fromkeys(addresses, self.n_added))
        if self.after:
            with other_end():
                self.after.send_bytes(b"+")

    def close(self) -> None:
        """Close both pipes: whoever waits at their other ends ends, too."""
        for pipe in (self.before, self.after):
            if pipe:
                pipe.close()

    def _hear(self, n: int) -> None:
        """Wait until the process before has made n additions."""
        while self.before and self.n_heard < n:
            with other_end():
                self.before.recv_bytes()
            self.n_heard += 1


_local = threading.local()


class turn:  # a context manager, called as a function
    """Wait for the turn to add to arrays, if turns are taken; tell whether it is the first."""

    def __init__(self, *outs: ndarray) -> None:
        self.turns: Turns | None = getattr(_local, "turns", None)
        self.addresses = [out.ctypes.data for out in outs] if self.turns else []

    def __enter__(self) -> bool:
        return self.turns.begin(self.addresses) if self.turns else False

    def __exit__(self, error: object, *_: object) -> None:
        if self.turns and error is None:
            self.turns.end(self.addresses)
