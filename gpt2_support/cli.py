"""What the command lines share: the argument parser, and errors into an exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# Commands: what the four programs share


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with errors on one line (exit status 2) and a `--help` like a manual page.

    `examples` are command lines. Paragraphs of the texts are wrapped, indented lines left as they
    are; defaults are preview, but for nothing (None, False, "", []).
    """

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def __init__(self, prog):
            width = min(80, shutil.get_terminal_size().columns)
            super().__init__(prog, max_help_position=26, width=width)

        def _fill_text(self, text, width, indent):
            wrapper = textwrap.TextWrapper(width, indent, indent, break_on_hyphens=False)
            lines = text.splitlines()
            return "\n".join(x if x[:1] in ("", " ") else wrapper.fill(x) for x in lines)

        def _get_help_string(self, action):
            nothing = action.default is None or action.default is False
            nothing = nothing or action.default in ("", [])
            return action.help if nothing else super()._get_help_string(action)

        def _get_default_metavar_for_optional(self, action):
            return METAVARS.get(getattr(action.type, "__name__", None), "TEXT")

    def __init__(self, examples=(), **kwargs):
        parts = ["\n  ".join(["examples:", *examples]), EXIT_STATUS]
        kwargs["epilog"] = "\n\n".join(parts[not examples :])
        super().__init__(formatter_class=self.Formatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


# What stands for a flag's value in --help, by its type.
METAVARS = {"int": "N", "positive_int": "N", "natural": "N", "vocabulary_size": "N"}


METAVARS |= {"float": "X", "number": "X", "str": "NAME", "Path": "PATH"}


EXIT_STATUS = """exit status:
  0 all went well; 1 an error, told in a line on standard error; 2 a bad
  argument; 130 Ctrl-C"""


def positive_int(text):
    """Return the whole number of 1 or more that a flag was given, for argparse's `type=`."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")


def run(main):
    """Call a program's `main` and exit: 0, or 1 with the error on one line, 130 after Ctrl-C."""
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):  # None if closed
        stream.reconfigure(errors="replace")  # a console that lacks a character prints a "?"
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")
