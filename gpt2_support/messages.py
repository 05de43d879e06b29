"""Messages to the user, on standard error, and values made safe to print in them."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, TextIO

# What a terminal obeys: all but the tab and the line end, and what reverses the order of letters.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def preview(value: object, longest: int = 80) -> str:
    """Return a value that a file or a server holds as text for a message: short, on one line."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except RecursionError:  # JSON can be nested deeper than repr goes
        text = f"a nested {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def printable(text: str, stream: TextIO | None) -> str:
    """Return a text as a stream is to have it: on a terminal, control characters are escaped.

    A model, a path or a server may hold some, and the terminal would obey them.
    """
    if stream is None or not stream.isatty():
        return text
    return CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def info(message: str, end: str = "\n") -> None:
    """Print a message on standard error. If that fails, the program goes on without it."""
    if sys.stderr:  # None if it is closed; `print` would take standard output for that
        with contextlib.suppress(OSError, ValueError):
            print(printable(message, sys.stderr), end=end, file=sys.stderr, flush=True)


class BarStream:
    """Standard error as the file of a progress bar. If it fails, the program goes on without it."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None if it is closed
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def write(text: str, end: str = "\n") -> None:
    """Print text, generated say, on standard output at once. Raises OSError if that fails."""
    try:
        print(printable(text, sys.stdout), end=end, flush=True)
    except OSError as error:
        error.filename = error.filename or "standard output"
        raise
