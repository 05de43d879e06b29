"""What the command lines share: how to call our programs, their parser and their exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt2_support import __version__, folders

# What the programs of a checkout are called where the package is installed.
COMMANDS = {
    "gpt2.py": "gpt2",
    "train.py": "gpt2-train",
    "encoder.py": "gpt2-tokenize",
    "utils.py": "gpt2-weights",
}
PROGRAM = re.compile(r"(python )?\b(gpt2|train|encoder|utils)\.py\b")


def is_command() -> bool:
    """Tell whether users call `gpt2` here; in a checkout they call `python gpt2.py`."""
    name = Path(sys.argv[0]).name.removesuffix(".exe")
    return folders.INSTALLED or name in COMMANDS.values()


def command_name(program: str) -> str:
    """Return what a program, "gpt2.py" say, is called here: its command or the file itself."""
    return COMMANDS[program] if is_command() else program


def command(program: str, *args: object) -> str:
    """Return what to type here to run a program, with these arguments."""
    words = [COMMANDS[program]] if is_command() else ["python", script_path(program)]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*words, *map(str, args)])


def script_path(program: str) -> str:
    """Return the path of a program of the checkout, from the current folder if there is a way."""
    path = folders.PACKAGE.parent / program
    try:
        return os.path.relpath(path)
    except (ValueError, OSError):  # another drive of Windows, a folder that has been removed
        return str(path)


def as_typed(text: str) -> str:
    """Return a help text with `python gpt2.py` and `gpt2.py` as one has to write them here."""

    def spell(match: re.Match[str]) -> str:
        program = f"{match[2]}.py"
        return command(program) if match[1] else command_name(program)

    return PROGRAM.sub(spell, text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with errors on one line (exit status 2) and a `--help` like a manual page.

    `examples` are command lines. Every text calls our programs as in a checkout, `python gpt2.py`,
    and is shown with the names that they have here. Paragraphs are wrapped and indented lines left
    as they are. Defaults are shown unless they are nothing (None, False, "", []).
    """

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def __init__(self, prog: str) -> None:
            width = min(80, shutil.get_terminal_size().columns)
            super().__init__(prog, max_help_position=26, width=width)

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            wrapper = textwrap.TextWrapper(width, indent, indent, break_on_hyphens=False)
            lines = as_typed(text).splitlines()
            return "\n".join(x if x[:1] in ("", " ") else wrapper.fill(x) for x in lines)

        def _get_help_string(self, action: argparse.Action) -> str:
            nothing = action.default is None or action.default is False
            nothing = nothing or action.default in ("", [])
            return as_typed((action.help if nothing else super()._get_help_string(action)) or "")

        def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
            return METAVARS.get(getattr(action.type, "__name__", ""), "TEXT")

    def __init__(
        self, examples: Sequence[str] = (), prog: str | None = None, **kwargs: Any
    ) -> None:
        parts = ["\n  ".join(["examples:", *examples]), EXIT_STATUS]
        kwargs["epilog"] = "\n\n".join(parts[not examples :])
        prog = as_typed(prog or Path(sys.argv[0]).name)
        super().__init__(prog=prog, formatter_class=self.Formatter, **kwargs)
        if " " not in prog:  # one of the programs, not a command of it
            version = f"%(prog)s {__version__}"
            self.add_argument("--version", action="version", version=version, help=VERSION_HELP)

    def add_argument_group(
        self, title: str | None = None, *args: Any, **kwargs: Any
    ) -> argparse._ArgumentGroup:
        return super().add_argument_group(title and as_typed(title), *args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


# What stands for a flag's value in --help, by its type.
METAVARS = {
    **dict.fromkeys(("int", "positive_int", "natural", "vocabulary_size"), "N"),
    **dict.fromkeys(("float", "number"), "X"),
    "str": "NAME",
    "Path": "PATH",
}
VERSION_HELP = "show the version of the program and exit"


EXIT_STATUS = """exit status:
  0 all went well; 1 an error, told in a line on standard error; 2 a bad
  argument; 130 Ctrl-C"""


def positive_int(text: str) -> int:
    """Return the whole number of 1 or more that a flag was given, for argparse's `type=`."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")


def run(main: Callable[[], object]) -> None:
    """Call a program's `main` and exit: 0, or 1 with the error on one line, 130 after Ctrl-C.

    The entry points of the installed commands call it, as does `python gpt2.py`.
    """
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
        name = Path(sys.argv[0]).name.removesuffix(".exe")
        sys.exit(f"{name}: error: {' '.join(str(error).split())}")
