"""What must not end a run in the midst of a step: signals, which wait, and output that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from gpt2_support.messages import info


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C, SIGTERM or SIGHUP has come since the block began.

    A second Ctrl-C raises KeyboardInterrupt at once, unless it comes within a second of the first:
    then it is mpiexec that passes on a signal which every process has already received. What a
    shell has told us to ignore, SIGHUP by `nohup` or SIGINT by `&` in a script, stays ignored.
    """
    timestamps: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not timestamps:
            info("\nstopping after this step (again: at once, unsaved) ...")
        elif time.monotonic() > timestamps[0] + 1:
            raise KeyboardInterrupt
        timestamps.append(time.monotonic())

    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    signals = [n for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN]
    handlers = [signal.signal(number, handle) for number in signals]
    try:
        yield lambda: bool(timestamps)
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)  # None: not from Python


@contextlib.contextmanager
def never_fatal(action: str) -> Iterator[None]:
    """Turn an error in the block, which does `action`, into a message."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        info(f"could not {action}: {reason}")


@contextlib.contextmanager
def signals_blocked(*names: str) -> Iterator[None]:
    """Let signals, "SIGINT" for example, wait until the end of the block.

    For a process that begins there they wait for ever. Does nothing on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # the first process would start it, and it unblocks signals
    numbers = [getattr(signal, name) for name in names]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ForgivingStream:
    """A text stream that drops what it cannot write: closed, a pipe without a reader, a full disk.

    `error` is why, None if all was written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable, *args: str) -> None:
        try:
            function(*args)
        except (OSError, ValueError) as error:
            self.error = error
        except RuntimeError:  # a signal handler prints while its program prints
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Let no print, note or progress bar in the block fail; say at the end what was lost."""
    streams = {"standard output": sys.stdout, "standard error": sys.stderr}
    out, err = map(ForgivingStream, streams.values())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore
            yield
            for name, stream in zip(streams, (out, err), strict=True):
                stream.flush()
                if stream.error:
                    info(f"{name} could not be written: {stream.error}")
    finally:
        for stream in (out, err):
            drop_unwritten(stream.stream)


def drop_unwritten(stream: TextIO) -> None:
    """Let a stream that cannot be written write into nothing: Python flushes it when it exits."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
