"""The flags of gpt2.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support import cli, hub
from gpt2_support.checks import check_sampling

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def make_parser() -> cli.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(
        prog="gpt2.py",
        usage="%(prog)s [PROMPT] [flags]",
        description="Continue a text with GPT-2, on NumPy. Only the generated text goes to "
        "standard output: notes, speeds and explanations go to standard error.",
        examples=[
            'python gpt2.py "The meaning of life is"',
            'python gpt2.py "Once upon a time" --n_tokens 200 --temperature 0.8 --seed 1',
            'python gpt2.py "Q: What is 2 + 2? A:" --stop "Q:" --explain',
            "python gpt2.py - --model models/mine --n_samples 3 --top_p 0.9 < prompt.txt",
        ],
    )
    positive = cli.positive_int
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="text to continue; "
        "- reads it from standard input; without one the model starts a text")  # fmt: skip
    add = parser.add_argument_group("model").add_argument
    add("--model", type=str, help="124M, 355M, 774M or 1558M, another in --models_dir, or a path; "
        "one of these four is downloaded if it is not there (default: 124M, or stories where that "
        "is not there and there is no network)")  # fmt: skip
    add("--models_dir", type=Path, default=hub.MODELS_DIR, help="folder of the models")
    add = parser.add_argument_group("text").add_argument
    add("--n_tokens", type=positive, default=40, help="tokens to generate at most")
    add("--stop", action="append", default=[], help="end before this text; may be repeated "
        "(default: end at the end-of-text token only)")  # fmt: skip
    add("--n_samples", type=positive, default=1, help="continuations to write")
    add("--interactive", action="store_true", help="read a prompt a line until end of input")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.0, help="the logits are divided by it: below 1 "
        "makes the probable more probable; 0 takes the most probable token each time")  # fmt: skip
    add("--top_k", type=int, help="sample from the k most probable tokens (default: from all)")
    add("--top_p", type=float, help="sample from the fewest tokens of this total probability "
        "(default: from all)")  # fmt: skip
    add("--repetition_penalty", type=float, default=1.0, help="over 1 discourages tokens seen")
    add("--seed", type=int, help="makes samples repeatable; sample i draws from seed + i "
        "(default: different each time)")  # fmt: skip
    add = parser.add_argument_group("reports, on standard error").add_argument
    add("--explain", action="store_true", help="a line for each token: its probability, and the "
        "most probable ones, as it was drawn from; at temperature 0, those of 1")  # fmt: skip
    add("--stats", action="store_true", help="the speed of reading and of writing")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and one line for a bad argument."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    except ValueError as error:
        parser.error(f"argument --{error}")
    if args.seed is not None and args.seed < 0:
        parser.error(f"argument --seed: {args.seed} is negative")
    if "" in args.stop:
        parser.error("argument --stop: the empty text would stop at once")
    args.error = parser.error
    return args
