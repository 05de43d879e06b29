"""The prompts of gpt2.py: read, refused if they cannot fit, kept as a conversation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gpt2_support import cli
from gpt2_support.messages import info

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from typing import Protocol, TextIO, runtime_checkable

    @runtime_checkable
    class Encoder(Protocol):
        """What is needed of an encoder.Encoder."""

        tokens: list[bytes]

        def encode(self, text: str) -> list[int]: ...


def answer_prompts(
    args: argparse.Namespace, enc: Encoder, n_ctx: int, answer: Callable[[list[int]], str]
) -> None:
    """Call `answer(ids)`, which writes a continuation and returns it, for each prompt.

    A prompt that exceeds n_ctx is an error or, where another may follow, a message.
    """
    longest = n_ctx * max(map(len, enc.tokens))  # more characters cannot be n_ctx tokens
    text = ""
    for prompt in read_prompts(args, longest):
        too_long = f"over {longest} characters" * (len(prompt) > longest)
        if not too_long and (n_tokens := len(enc.encode(prompt))) > n_ctx:
            too_long = f"{n_tokens} tokens"
        if too_long:
            refuse = info if args.interactive else args.error
            refuse(f"prompt of {too_long} exceeds n_ctx = {n_ctx}")
            continue
        text = (text + prompt)[-longest:] if args.conversation else prompt
        text += answer(enc.encode(text)[-n_ctx:]) + "\n"


def read_prompts(args: argparse.Namespace, longest: int) -> Iterator[str]:
    """Yield the prompts: the argument, or standard input, whole or (--interactive) line by line.

    One line end at the end is left out. Of a prompt of more characters than `longest`, whatever
    else there is, `longest` + 1 are read and yielded.
    """
    if args.prompt == "-":
        yield cli.text(standard_input().read(longest + 2)).removesuffix("\n")
    elif args.prompt or not args.interactive:
        yield args.prompt
    while args.interactive and (line := read_line(standard_input(), longest + 2)):
        yield cli.text(line).removesuffix("\n")


def standard_input() -> TextIO:
    """Return standard input; raises ValueError if it is closed."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: there is nothing to read")
    return sys.stdin


def read_line(stream: TextIO, longest: int) -> str:
    """Return the next line, "" at the end; of a longer line, its first `longest` characters.

    Ctrl-C on a terminal begins the line anew: it may have come a moment after an answer's end.
    """
    while True:
        if stream.isatty():
            info("> ", end="")
        try:
            line = part = stream.readline(longest)
            while len(part) == longest and not part.endswith("\n"):
                part = stream.readline(longest)  # the rest of it is dropped
            return line
        except KeyboardInterrupt:
            if not stream.isatty():
                raise
            info("\nto end the program, end the input: Ctrl-D, or Ctrl-Z and Enter on Windows")
