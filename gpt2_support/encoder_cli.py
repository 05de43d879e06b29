"""The flags of encoder.py: its commands `train`, `encode`, `show` and `decode`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support import cli, corpus, datasets, folders
from gpt2_support.distributed import usable_cores
from gpt2_support.formats.token_table import EOT_TEXT, FILE_NAMES
from gpt2_support.messages import info, preview, write
from gpt2_support.prompts import standard_input, without_line_end

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Protocol, TypeAlias, runtime_checkable

    @runtime_checkable
    class Encoder(Protocol):
        """What is needed of an encoder.Encoder."""

        tokens: list[bytes]

        def encode(self, text: str) -> list[int]: ...

        def decode(self, ids: list[int]) -> str: ...

    Counts: TypeAlias = tuple[int, int, int]  # of tokens, documents and bytes

TOKENIZER_HELP = (
    "a tokenizer.bin, tokenizer.json or encoder.json, a folder with one, or the name of a model, "
    "whose tokenizer is downloaded if it is missing"
)


def vocabulary_size(text: str) -> int:
    """Return the n_vocab that a flag was given, for argparse's `type=`."""
    n_vocab = cli.positive_int(text)
    if n_vocab < 257:
        raise argparse.ArgumentTypeError(f"{n_vocab} is below 257, 256 bytes and {EOT_TEXT}")
    return n_vocab


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `python encoder.py`."""
    parser = cli.ArgumentParser(
        prog="encoder.py",
        description="Learn a tokenizer from text, encode text to token ids for training, show "
        "tokens, decode ids. Each command has a --help of its own.",
        examples=[
            "python encoder.py train stories.txt --out tokenizer.bin",
            "python encoder.py encode stories.txt --tokenizer 124M --out stories.bin",
            'python encoder.py show "Once upon a time" --tokenizer stories',
            "python encoder.py encode --help",
        ],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    names = ", ".join(datasets.DATA_SETS)
    for command in (add_train_command(commands), add_encode_command(commands)):
        help = f"a text file (UTF-8), or the name of a data set to fetch: {names}"
        command.add_argument("texts", metavar="TEXT", nargs="+", type=cli.path, help=help)
    add_show_command(commands)
    add_decode_command(commands)
    args = parser.parse_args(argv)
    args.error = parser.error
    if args.command == "encode" and args.docs is None:
        args.docs, *others = {datasets.default_docs(text) for text in args.texts}
        if others:
            parser.error("--docs is needed: the documents of these texts are separated in two ways")
    return args


def find_texts(args: argparse.Namespace) -> list[Path]:
    """Return the paths of the texts, fetched if they are data sets, once --out is none of them.

    Ends with an error about the arguments if it is, or if it is not a file.
    """
    texts = [datasets.find(text) for text in args.texts]
    if args.out.exists() and not args.out.is_file():
        args.error(f"--out {args.out} is not a file that can be replaced")
    for path in (*texts, *tables(args)) if args.out.exists() else ():
        if path.exists() and path.samefile(args.out):
            args.error(f"--out {args.out} is {path}, which is read: give another --out")
    return texts


def tables(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the paths at which a command may find its token table."""
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
    parser.add_argument("--out", type=cli.path, default="tokenizer.bin", help="the file to write")
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
    add, n_procs = parser.add_argument, len(usable_cores())
    add("--tokenizer", type=cli.name, default="124M", help=TOKENIZER_HELP)
    add("--out", type=cli.path, required=True, help="the file to write (required); the tokenizer "
        "goes beside it, for train.py: stories.tokenizer.bin for stories.bin")  # fmt: skip
    docs = "what a document is: a whole file, a line (without its line end), or what lies between "
    docs += f"lines of only {EOT_TEXT} (default: eot, or lines for the data set called names)"
    add("--docs", choices=corpus.SEPARATORS, help=docs)
    add("--n_procs", type=cli.positive_int, default=n_procs, help="processes to use")
    return parser


def encode(enc: datasets.Encoder, texts: list[Path], args: argparse.Namespace) -> Counts:
    """Write the tokens of texts and, beside them, their tokenizer; see `corpus.encode_files`.

    Another tokenizer there is removed before the tokens are replaced. So if the process is killed
    in between, the tokens have no tokenizer, which train.py reports, instead of a wrong one.
    """
    tokenizer = corpus.tokenizer_path(args.out)

    def remove_other() -> None:
        if datasets.is_other(tokenizer, enc):
            tokenizer.unlink()

    counts = corpus.encode_files(
        enc, texts, args.out, args.docs, args.n_procs, before_rename=remove_other
    )
    enc.save(tokenizer)
    return counts


def add_show_command(commands: argparse._SubParsersAction) -> None:
    """Add the command `python encoder.py show`."""
    parser = commands.add_parser(
        "show",
        help="show the tokens of a text",
        description="Show the tokens of a text, one a line: its id, and the text or bytes that it "
        "stands for.",
        examples=['python encoder.py show "Hello, world!"'],
    )
    text_help = 'the text; "-": standard input, without its last line end'
    parser.add_argument("text", metavar="TEXT", nargs="+", help=text_help)
    parser.add_argument("--tokenizer", type=cli.name, default="124M", help=TOKENIZER_HELP)


def add_decode_command(commands: argparse._SubParsersAction) -> None:
    """Add the command `python encoder.py decode`."""
    parser = commands.add_parser(
        "decode",
        help="turn token ids into text",
        description="Print the text of token ids.",
        examples=["python encoder.py decode 15496 11 995 0"],
    )
    add, ids = parser.add_argument, 'token ids, separated by spaces or commas; "-": standard input'
    add("ids", metavar="ID", nargs="+", help=ids)
    add("--tokenizer", type=cli.name, default="124M", help=TOKENIZER_HELP)


def token_ids(args: argparse.Namespace) -> list[int]:
    """Return the ids in the arguments: numbers, or lists of them as Python prints these."""
    text = standard_input().read() if args.ids == ["-"] else " ".join(args.ids)
    if not re.fullmatch(r"[\d\s,\[\]]*", text):
        args.error(f"{preview(text)} is not a list of token ids")
    ids = re.findall(r"\d+", text)
    if max(map(len, ids), default=0) > 9:
        args.error(f"{preview(max(ids, key=len))} is no token id")
    return list(map(int, ids))


def table(enc: Encoder, text: str) -> str:
    """Return the tokens of a text, a line each, as `show` prints them."""
    lines = []
    for id in enc.encode(text):
        token = enc.tokens[id]
        try:
            lines.append(f"{id:6}  {token.decode()!r}")
        except UnicodeDecodeError:  # a part of a character
            lines.append(f"{id:6}  {token!r}")
    return "\n".join(lines)


def show_or_decode(enc: Encoder, args: argparse.Namespace) -> None:
    """Do what the commands `show` and `decode` say."""
    if args.command == "show":
        is_input = args.text == ["-"]
        text = without_line_end(standard_input().read()) if is_input else " ".join(args.text)
        write(table(enc, cli.text(text)))
    else:
        write(enc.decode(token_ids(args)))


def summarize(out: Path, n_tokens: int, n_docs: int, n_bytes: int) -> None:
    """Say what `encode` has written."""
    info(
        f"{n_tokens:,} tokens in {n_docs:,} documents, {n_bytes / n_tokens:.2f} bytes a token: "
        f"{out}, and their tokenizer {corpus.tokenizer_path(out)}"
    )
