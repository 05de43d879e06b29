"""The prompts of gpt2.py: read, refused if they cannot fit, kept as a conversation, continued."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gpt2_support import checks, cli, streaming
from gpt2_support.messages import info

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator
    from typing import Protocol, TextIO, TypeAlias, runtime_checkable

    from numpy import ndarray

    from gpt2_support.params import Params

    @runtime_checkable
    class Encoder(streaming.Encoder, Protocol):
        """What is needed of an encoder.Encoder."""

        def encode(self, text: str) -> list[int]: ...

    Decode: TypeAlias = Callable[..., Iterable[tuple[list[int], list[ndarray]]]]
    Probs: TypeAlias = Callable[..., tuple[ndarray, ndarray]]


def answer_prompts(
    args: argparse.Namespace, enc: Encoder, params: Params, decode: Decode, probs: Probs
) -> None:
    """Write a continuation of each prompt; decode and probs are gpt2.decode, next_token_probs.

    A prompt that exceeds n_ctx is an error or, where another may follow, a message.
    """
    n_ctx = params.config.n_ctx
    longest = n_ctx * max(map(len, enc.tokens))  # more characters cannot be n_ctx tokens
    text = ""
    for prompt in read_prompts(args, longest):
        too_long = f"over {longest} characters" * (len(prompt) > longest)
        if not too_long and (n_tokens := len(enc.encode(prompt))) > n_ctx:
            too_long = f"{n_tokens} tokens"
        if too_long:
            refuse = info if args.interactive else args.error
            refuse(f"the prompt of {too_long} exceeds the {n_ctx} tokens that the model reads")
            continue
        text = (text + prompt)[-longest:] if args.conversation else prompt
        text += answer(args, enc, params, decode, probs, enc.encode(text)[-n_ctx:]) + "\n"


def answer(
    args: argparse.Namespace,
    enc: Encoder,
    params: Params,
    decode: Decode,
    probs: Probs,
    ids: list[int],
) -> str:
    """Continue a prompt, write the text as `streaming.write_samples` does, and return it."""
    prompts, _ = checks.check_prompts(params, [ids] * args.n_samples, enc.eot)
    sampling = checks.Sampling(*(vars(args)[name] for name in checks.Sampling._fields))
    steps = decode(params, prompts, args.n_tokens, sampling, enc.eot, len(enc.tokens))
    # At temperature 0 the most probable ids are those at temperature 1: else one would be left.
    limits = sampling[:3] if args.temperature else ()
    explain = (lambda logits: probs(logits, *limits)) if args.explain else None
    return streaming.write_samples(steps, enc, args, explain, len(prompts[0]))


def read_prompts(args: argparse.Namespace, longest: int) -> Iterator[str]:
    """Yield the prompts: the argument, or standard input, whole or (--interactive) line by line.

    One line end at the end is left out. Of a prompt of more characters than `longest`, whatever
    else there is, `longest` + 1 and a line end of two are read.
    """
    if args.prompt == "-":
        yield without_line_end(cli.text(standard_input().read(longest + 3)))
    elif args.prompt or not args.interactive:
        yield args.prompt
    while args.interactive and (line := read_line(standard_input(), longest + 3)):
        yield without_line_end(cli.text(line))


def without_line_end(text: str) -> str:
    """Return a text without one line end at its end, of Unix or of Windows."""
    return text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")


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
