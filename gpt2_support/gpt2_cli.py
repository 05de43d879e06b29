"""The flags of gpt2.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2_support import checks, cli, hub
from gpt2_support.messages import info

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

PICOGPT_FLAGS = {"--n_tokens_to_generate": "--n_tokens", "--model_size": "--model"}


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
        aliases=PICOGPT_FLAGS,
        guess=guess_prompt,
    )
    positive = cli.positive_int
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", type=cli.text, default="", help="text to continue; "
        "- reads it from standard input, without its last line end; without one the model starts a "
        "text")  # fmt: skip
    add = parser.add_argument_group("model").add_argument
    add("--model", type=cli.name, help="OpenAI's 124M, 355M, 774M or 1558M, a GPT-2 on the Hugging "
        "Face hub (distilgpt2, owner/name[@revision]), a model in --models_dir, or a path, also in "
        "Hugging Face's or OpenAI's format; a missing model is downloaded (default: 124M, or "
        "stories where that cannot be downloaded)")  # fmt: skip
    add("--models_dir", type=cli.folder, default=hub.MODELS_DIR, help="folder of the models")
    add = parser.add_argument_group("text").add_argument
    add("--n_tokens", type=positive, default=40, help="tokens to generate at most")
    add("--stop", action="append", type=cli.text, default=[], help="end before this text; may be "
        "repeated (default: end at the end-of-text token only)")  # fmt: skip
    add("--n_samples", type=positive, default=1, help="continuations to write")
    add("--interactive", action="store_true", help="read one prompt per line until end of input; "
        "Ctrl-C ends an answer")  # fmt: skip
    add("--conversation", action="store_true", help="with --interactive: each prompt continues the "
        "lines and answers before it")  # fmt: skip
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=cli.number, help="the logits are divided by it: below 1 makes the "
        "probable more probable; 0 takes the most probable token each time (default: 0, or 1 with "
        "--top_k, --top_p, --seed or several --n_samples)")  # fmt: skip
    add("--top_k", type=positive, help="sample from the k most probable tokens (default: from all)")
    add("--top_p", type=cli.fraction, help="sample from the fewest tokens of this total "
        "probability (default: from all)")  # fmt: skip
    penalty = cli.checked(float, checks.is_penalty, checks.PENALTIES)
    add("--repetition_penalty", type=penalty, default=1.0, help="over 1 discourages tokens seen")
    add("--seed", type=cli.natural, help="makes samples repeatable; sample i draws from seed + i "
        "(default: different each time)")  # fmt: skip
    add = parser.add_argument_group("reports, on standard error").add_argument
    add("--explain", action="store_true", help="for each token, its probability and the most "
        "probable ones (at temperature 0: those at temperature 1)")  # fmt: skip
    add("--stats", action="store_true", help="the speed of prefill and decoding")
    return parser


def guess_prompt(args: argparse.Namespace, words: list[str]) -> str:
    """Return how to give a prompt that the shell has cut into words, or that looks like a flag."""
    prompt = " ".join([args.prompt, *words] if getattr(args, "prompt", "") else words)
    dashes = ["--"] * prompt.startswith("-")
    return f"to continue that text: {cli.command('gpt2.py', *dashes, prompt)}"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and one line for a bad argument."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if "" in args.stop:
        parser.error("argument --stop: the empty text would stop at once")
    if args.interactive and args.prompt == "-":
        parser.error("argument --interactive: the prompt - takes all of standard input")
    if args.conversation and not args.interactive:
        parser.error("argument --conversation: it needs --interactive")
    if args.conversation and args.n_samples > 1:
        parser.error("argument --conversation: only one of --n_samples could go on")
    choose_temperature(args)
    args.error = parser.error
    return args


def choose_temperature(args: argparse.Namespace) -> None:
    """Set a --temperature that was not given: 1 with a flag of sampling, otherwise 0."""
    flags = ["--n_samples"] * (args.n_samples > 1)
    flags += [f"--{name}" for name in ("top_k", "top_p", "seed") if vars(args)[name] is not None]
    if args.temperature is None:
        args.temperature = 1.0 if flags else 0.0
    elif args.temperature == 0 and flags:
        info(f"no effect at temperature 0: {', '.join(flags)}")
