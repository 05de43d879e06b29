"""Messages to the user, on standard error, and values made safe to print in them."""

from __future__ import annotations

import sys


def preview(value: object, longest: int = 80) -> str:
    """Return a value that a file or a server holds as text for a message: short, on one line."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except RecursionError:  # JSON can be nested deeper than repr goes
        text = f"a nested {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def info(message: str) -> None:
    """Print a message on standard error."""
    print(message, file=sys.stderr, flush=True)
