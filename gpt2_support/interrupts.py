"""Ctrl-C that waits: a loop asks whether it came, so that no step is left half done."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C, or SIGTERM, has come since the block began.

    A second Ctrl-C raises KeyboardInterrupt at once, unless it comes within a second of the first:
    then it is mpiexec that passes on a signal which every process has already received.
    """
    timestamps: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not timestamps:
            print("\nstopping after this step ...", file=sys.stderr)
        elif time.monotonic() > timestamps[0] + 1:
            raise KeyboardInterrupt
        timestamps.append(time.monotonic())

    signals = [signal.SIGINT, signal.SIGTERM]
    handlers = [signal.signal(number, handle) for number in signals]
    try:
        yield lambda: bool(timestamps)
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
