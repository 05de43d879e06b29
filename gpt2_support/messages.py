"""What the user is told: notes on standard error, and values made safe to print."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


def preview(value, longest=80):
    """Return what a file or server sent as text for a message: short, and safe to print."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except RecursionError:  # JSON can be nested deeper than repr goes
        text = f"a nested {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


# Converting one format into another


def info(message):
    """Tell the user something, on standard error."""
    print(message, file=sys.stderr, flush=True)
