"""What the command lines share: how to call our programs, their parser and their exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt2_support import __version__, folders
from gpt2_support.interrupts import drop_unwritten
from gpt2_support.messages import info, printable

# What the programs of a checkout are called where the package is installed.
COMMANDS = {
    "gpt2.py": "gpt2",
    "train.py": "gpt2-train",
    "encoder.py": "gpt2-tokenize",
    "utils.py": "gpt2-weights",
    "evaluate.py": "gpt2-evaluate",
}
PROGRAM = re.compile(r"(python )?\b(gpt2|train|encoder|utils|evaluate)\.py\b")


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
    return join([*words, *map(as_argument, args)])


def as_argument(value: object) -> str:
    """Return a value as a word of a command: a path never looks like a flag."""
    is_like_a_flag = isinstance(value, Path) and str(value).startswith("-")
    return os.path.join(".", str(value)) if is_like_a_flag else str(value)


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

    Flags may be written with dashes for underscores, or as one of `aliases`, {alias: flag}. An
    argument that is none of ours is an error with a guess at what was meant: a flag of a similar
    name, or what `guess(args, words)` returns for words that are no flags.
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
        self,
        examples: Sequence[str] = (),
        prog: str | None = None,
        aliases: Mapping[str, str] | None = None,
        guess: Callable[[argparse.Namespace, list[str]], str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.aliases, self.guess = aliases or {}, guess
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

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the arguments; an unknown one is an error, also for a command of a program."""
        args = [*(sys.argv[1:] if args is None else args)]
        n_flags = args.index("--") if "--" in args else len(args)
        args[:n_flags] = map(self.spell, args[:n_flags])
        unknown = [arg for arg in args[:n_flags] if re.match("-h.", arg)]  # no flag but -h has a -
        parsed = namespace or argparse.Namespace()
        if not unknown:
            parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.hint(parsed, unknown)}")
        return parsed, []

    def given(self, args: Sequence[str] | None) -> set[str]:
        """Return the names of the flags that are among the arguments, whatever the defaults are."""
        names = [action.dest for action in self._actions]
        values = vars(self.parse_args(args, argparse.Namespace(**dict.fromkeys(names))))
        return {name for name in names if values[name] is not None}

    def spell(self, arg: str) -> str:
        """Return an argument with its flag as it is spelled here: --n_tokens for --n-tokens."""
        match = re.fullmatch(r"(--\w[\w-]*)(=.*)?", arg, re.DOTALL)
        if not match:
            return arg
        flag = "--" + match[1][2:].replace("-", "_")
        return self.aliases.get(flag, flag) + (match[2] or "")

    def hint(self, args: argparse.Namespace, unknown: list[str]) -> str:
        """Return what was probably meant by unknown arguments, "; did you mean ...?", or ""."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for arg in unknown:
            flag = "--" + arg.partition("=")[0].lstrip("-")
            if arg in flags:
                return "; flags come before --"
            if arg.startswith("-") and (close := difflib.get_close_matches(flag, flags, 1, 0.7)):
                return f"; did you mean {close[0]}?"
        if self.guess and not any(arg.startswith("--") for arg in unknown):
            return f"; {self.guess(args, unknown)}"
        return ""

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("argument ").removesuffix(": expected one argument")
        kind = getattr(self._option_string_actions.get(flag), "type", None)
        if kind in (text, name, path, folder):
            message += f"; one that begins with a dash is given as {flag}=-..."
        info(f"{self.prog}: error: {one_line(message)} (see --help)")
        sys.exit(2)


def one_line(text: str) -> str:
    """Return a text with spaces for its line ends."""
    return " ".join(text.split())


# What stands for a flag's value in --help, by its type.
METAVARS = {"int": "N", "vocabulary_size": "N", "float": "X", "str": "NAME"}
METAVARS |= {"path": "PATH", "folder": "PATH"}
VERSION_HELP = "show the version of the program and exit"


EXIT_STATUS = """exit status:
  0 all went well; 1 an error, told in a line on standard error; 2 a bad
  argument; 130 Ctrl-C"""


def checked(
    parse: Callable[[str], Any], is_good: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """Return a `type=` for argparse: it parses a text, and says what it expected of a bad one."""

    def value(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if is_good(parse(text)):
                return parse(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    value.__name__ = parse.__name__
    return value


positive_int = checked(int, lambda n: n >= 1, "a whole number of 1 or more")
int_from_2 = checked(int, lambda n: n >= 2, "a whole number of 2 or more")
natural = checked(int, lambda n: n >= 0, "a whole number of 0 or more")
number = checked(float, lambda x: 0 <= x < math.inf, "a number of 0 or more")
positive_number = checked(float, lambda x: 0 < x < math.inf, "a number over 0")
up_to_a_million = checked(float, lambda x: 0 < x <= 1e6, "a number over 0 and at most 1,000,000")
below_1 = checked(float, lambda x: 0 <= x < 1, "a number of 0 or more and below 1")
fraction = checked(float, lambda x: 0 < x <= 1, "a number over 0 and at most 1")
name = checked(str, bool, "a name or a path")


def path(text: str) -> Path:
    """Return an argument as a path, for argparse's `type=`; the empty one would be a folder, `.`"""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path")
    return Path(text)


def folder(text: str) -> Path:
    """Return the path of a folder, or of one that can be made, for argparse's `type=`."""
    folder = Path(text)
    if not text or (os.path.lexists(folder) and not folder.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return folder


def text(argument: str) -> str:
    """Return an argument as the UTF-8 text that was typed, whatever locale Python read it in.

    Python keeps a byte that is no character of the locale as a surrogate (PEP 383).
    """
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate of another kind, from Windows
        return argument


class BadArgument(ValueError):
    """A bad argument that only shows after parsing, when a model has been read for example."""


def run(main: Callable[[], object]) -> None:
    """Call a program's `main` and exit: 0, or 1 with the error on one line, 130 after Ctrl-C.

    After BadArgument it is 2, as after an error of the parser.

    The entry points of the installed commands call it, as does `python gpt2.py`.
    """
    prepare_streams()
    status = status_of(main)
    unwritten = status_of(sys.stdout.flush)
    if unwritten:  # the interpreter would try again at its end, and show a traceback
        drop_unwritten(sys.stdout)
    if status or unwritten:
        sys.exit(status or unwritten)


def prepare_streams() -> None:
    """Let a standard stream that is closed, or lacks a character, not stand in anybody's way."""
    if sys.stdin:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore  # see `text`
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: what is printed vanishes
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # prints "?"


def status_of(function: Callable[[], object]) -> int | str | None:
    """Call a function; return the exit status, or the message, of the error that it ended with."""
    program = Path(sys.argv[0]).name.removesuffix(".exe")
    try:
        function()
    except SystemExit as exit:
        return exit.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        return 1
    except (ValueError, OSError, ImportError, MemoryError, OverflowError) as error:
        nameless = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        message = f"{program}: error: {one_line(str(error)) or nameless}"
        if isinstance(error, BadArgument):
            info(message)
            return 2
        return printable(message, sys.stderr)
    except RuntimeError as error:
        if "start new thread" not in str(error):  # the limit of threads is reached
            raise
        return printable(f"{program}: error: {error}: the system allows no more", sys.stderr)
    return None
