"""The flags of encoder.py: its commands `train` and `encode`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support import cli, corpus, folders
from gpt2_support.formats.token_table import EOT_TEXT, FILE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def vocabulary_size(text: str) -> int:
    """Return the n_vocab that a flag was given, for argparse's `type=`."""
    n_vocab = cli.positive_int(text)
    if n_vocab < 257:
        raise argparse.ArgumentTypeError(f"{n_vocab} is below 257, all bytes and {EOT_TEXT}")
    return n_vocab


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `python encoder.py`."""
    parser = cli.ArgumentParser(
        prog="encoder.py",
        description="Learn a tokenizer from text, and encode text to token ids for training. Each "
        "command has a --help of its own.",
        examples=[
            "python encoder.py train stories.txt --out tokenizer.bin",
            "python encoder.py encode stories.txt --tokenizer 124M --out stories.bin",
            "python encoder.py encode --help",
        ],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (add_train_command(commands), add_encode_command(commands)):
        command.add_argument(
            "texts", metavar="TEXT", nargs="+", type=Path, help="a text file (UTF-8)"
        )
    args = parser.parse_args(argv)
    check_out(parser, args)
    return args


def check_out(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error about the arguments if --out is a file that is read, or not a file."""
    if not args.out.exists():
        return
    if not args.out.is_file():
        parser.error(f"--out {args.out} is not a file that can be replaced")
    for path in inputs(args):
        if path.exists() and path.samefile(args.out):
            parser.error(f"--out {args.out} is {path}, which is read: give another --out")


def inputs(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the paths that a command may read."""
    yield from args.texts
    if args.command == "encode":
        for path in (Path(args.tokenizer), *folders.candidates(args.tokenizer)):
            yield path
            yield from (path / name for names in FILE_NAMES for name in names)


def add_train_command(commands: argparse._SubParsersAction) -> cli.ArgumentParser:
    """Return the parser of `python encoder.py train`."""
    parser = commands.add_parser(
        "train",
        help="learn a tokenizer from text",
        description="Learn a byte-level BPE tokenizer, with GPT-2's way of splitting text. Its "
        "tokens are the 256 bytes, the most frequent merges, and <|endoftext|>, which in the text "
        "separates documents. All the text's different words are held in memory.",
        examples=[
            "python encoder.py train stories.txt --out tokenizer.bin",
            "python encoder.py train part1.txt part2.txt --n_vocab 8192 --out 8192.bin",
        ],
    )
    parser.add_argument("--n_vocab", type=vocabulary_size, default=1024, help="how many tokens")
    parser.add_argument("--out", type=Path, default="tokenizer.bin", help="the file to write")
    return parser


def add_encode_command(commands: argparse._SubParsersAction) -> cli.ArgumentParser:
    """Return the parser of `python encoder.py encode`."""
    parser = commands.add_parser(
        "encode",
        help="encode text to token ids",
        description="Encode text files, of any size, to one file of token ids, each document after "
        "the id of <|endoftext|>. It is llm.c's format, which train.py reads.",
        examples=[
            "python encoder.py encode stories.txt --out stories.bin",
            "python encoder.py encode names.txt --tokenizer names/tokenizer.bin \\",
            "    --docs lines --out names.bin",
        ],
    )
    add, n_procs = parser.add_argument, os.cpu_count() or 1
    tables = "a tokenizer.bin, tokenizer.json or encoder.json, a folder with one, or the name of a "
    add("--tokenizer", type=str, default="124M", help=f"{tables}model in models/")
    add("--out", type=Path, required=True, help="the file to write (required)")
    docs = "what a document is: a whole file, a line (without its line end), or what lies between "
    add("--docs", choices=corpus.SEPARATORS, default="eot", help=f"{docs}lines of only {EOT_TEXT}")
    add("--n_procs", type=cli.positive_int, default=n_procs, help="processes to use")
    return parser
