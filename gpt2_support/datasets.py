"""Data sets for training: token ids from a text file, which is encoded once, or a tokens .bin.

A text may be the name of a data set, which is fetched at first use. The tokens of a text, and the
vocabulary learned from it, are kept in a cache folder. Their names are hashes of the text's
contents and of what else decides them, so another text never has them. Files there can be removed
at any time.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_support import cli, corpus, folders, huggingface_hub
from gpt2_support.distributed import usable_cores
from gpt2_support.files import file_hash, hold_lock
from gpt2_support.formats import llmc, nanogpt
from gpt2_support.http import Effort, fetch, public
from gpt2_support.messages import info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol, runtime_checkable

    from jaxtyping import Integer
    from numpy import ndarray

    @runtime_checkable
    class Encoder(corpus.Encoder, Protocol):
        """What is needed of an encoder.Encoder."""

        tokens: list[bytes]

        def save(self, path: Path) -> None: ...


class DataSet(NamedTuple):
    """A text that is fetched by its name."""

    url: str
    size: int | None = None  # in bytes, if it is known
    sha256: str | None = None
    docs: str = "eot"  # what separates its documents, as --docs says it


TINY_STORIES = "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"  # on the hub
KARPATHY = "https://raw.githubusercontent.com/karpathy/"
DATA_SETS = {
    "tinystories": DataSet(f"{TINY_STORIES}train.txt"),
    "tinystories_val": DataSet(f"{TINY_STORIES}valid.txt"),
    "tinyshakespeare": DataSet(
        f"{KARPATHY}char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "names": DataSet(
        f"{KARPATHY}makemore/master/names.txt",
        228_145,
        "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
        docs="lines",
    ),
}
TASKS = {  # JSON lines, for evaluate.py: see tasks.py
    "lambada": DataSet(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        1_819_752,
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "hellaswag": DataSet(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        sha256="0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
}
MAX_BYTES = 10**10  # of a data set whose size is not known


# ----------------------------------------------------------------------------------------------
# Finding a text or a file of tokens


def find(name: Path) -> Path:
    """Return the path of a text or a tokens .bin: `name` itself, or the data set of that name.

    A data set is fetched at first use. Raises FileNotFoundError that says how to make a file.
    """
    if name.exists() and not (name.is_dir() and str(name) in DATA_SETS):
        return name
    if str(name) in DATA_SETS:
        return download(str(name))
    fetched = folders.datasets_dir() / name
    if str(name) in map("{}.txt".format, DATA_SETS) and fetched.is_file():
        return fetched
    raise FileNotFoundError(f"{name}: no such file{advice(name)}")


def default_docs(text: str | Path) -> str:
    """Return what separates the documents of a text, as --docs says it, if that is not given."""
    is_data_set = str(text) in DATA_SETS and not Path(text).is_file()
    return DATA_SETS[str(text)].docs if is_data_set else "eot"


def advice(name: Path) -> str:
    """Return how to make a file that is not there, by its name."""
    commands, stem = [], name.stem
    if stem in DATA_SETS:
        commands.append(cli.command("utils.py", "download", stem))
    if name.suffix == ".bin":
        text = f"{stem}.txt" if stem in DATA_SETS else name.with_suffix(".txt")
        commands.append(cli.command("encoder.py", "encode", text, "--out", name))
    if commands:
        return f"; make it with: {' and then: '.join(commands)}"
    return f", nor a data set of that name ({', '.join(DATA_SETS)})"


def download(name: str, effort: Effort = Effort()) -> Path:  # noqa: B008 (it cannot be changed)
    """Fetch a data set, unless it is there, and return its path; raises as `http.fetch` does."""
    url, size, sha256, _ = (DATA_SETS | TASKS)[name]
    url = huggingface_hub.endpoint() + url if url.startswith("/") else url
    path = folders.datasets_dir() / f"{name}{'.jsonl' if name in TASKS else '.txt'}"
    if path.is_file():
        return path
    info(f"{path}: fetching {f'{size:,} bytes' if size else 'the text'} from {public(url)}")
    make_folder(path.parent)
    try:
        with hold_lock(path.with_name(f".{name}.lock")):
            if not path.is_file():  # another process may have fetched it
                fetch(url, path, size or MAX_BYTES, sha256, effort=effort)
    except ConnectionError as error:
        others = f"Run this again to go on from here, or put the text at {path}"
        raise ConnectionError(f"{error}. {others}") from None
    return path


def is_text(path: Path, raw: bool = False) -> bool:
    """Tell a text file, or the name of a data set, from a tokens .bin: by name and first bytes.

    Nothing is a text if `raw`.
    """
    if raw:
        return False
    if str(path) in DATA_SETS and not path.is_file():
        return True
    path = find(path)
    if not path.is_file():
        actual = "a folder" if path.is_dir() else "not a regular file"
        raise ValueError(f"{path}: is {actual}, expected a text file or a tokens .bin")
    return path.suffix != ".bin" and magic_number(path) != llmc.TOKENS_MAGIC


def magic_number(path: Path) -> int:
    """Return the number with which a file begins, by which a tokens .bin is known."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little")


# ----------------------------------------------------------------------------------------------
# What is computed from a text


def cache_dir() -> Path:
    """Return the folder of the tokens of texts."""
    return folders.datasets_dir() / "encoded"


def make_folder(folder: Path) -> None:
    """Make a folder of data sets, if it is not there; raise OSError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder}: cannot be written")
    except OSError as error:
        others = "name another folder with GPT2_DATASETS_DIR in the environment"
        raise OSError(f"{error}: {others}") from None


def cache_path(text: Path, digest: str, *others: bytes) -> Path:
    """Return the cache path of what depends on a text, by its digest, and on the others."""
    key = hashlib.sha256(b"".join([digest.encode(), *others])).hexdigest()[:16]
    return cache_dir() / f"{text.stem[:40]}.{key}.bin"


def text_digest(text: Path) -> str:
    """Return a hash of what a text holds, as `corpus.read_chunks` reads it."""
    return file_hash(text, "sha256", corpus.text_start(text)).hexdigest()


def check_unchanged(text: Path, digest: str) -> None:
    """Raise ValueError if a text has another digest now."""
    if text_digest(text) != digest:
        raise ValueError(f"{text}: the text changed while it was read: run this again")


def learn_tokenizer(
    text: Path, n_vocab: int, train: Callable[[Iterable[str], int], Encoder]
) -> Path:
    """Return the path of the tokenizer of n_vocab tokens learned from a text, which is kept.

    `train` learns it from the text in chunks, unless it has been learned before.
    """
    text = find(text)
    digest = text_digest(text)
    path = cache_path(text, digest, b"a tokenizer of %d" % n_vocab)
    if not path.exists():
        make_folder(path.parent)
        info(f"{path}: learning a vocabulary of {n_vocab} tokens from {text}")
        try:
            enc = train(corpus.read_texts([text]), n_vocab)
        except ValueError as error:
            raise explain(error, text, n_vocab) from None
        check_unchanged(text, digest)
        enc.save(path)
    return path


def explain(error: ValueError, text: Path, n_vocab: int) -> ValueError:
    """Return what to say if no vocabulary can be learned, with advice that works next time."""
    n_bytes = text.stat().st_size
    if n_bytes == 0 or n_vocab < 257:
        return error
    bytes_alone = ", or --n_vocab 257, the bytes and end-of-text alone"
    return ValueError(
        f"{text}: {n_bytes} bytes of text are too few to learn {n_vocab} tokens from: give more "
        f"text{bytes_alone if n_bytes > 10_000 else ''}"
    )


def table_of(enc: Encoder) -> bytes:
    """Return the tokens of an encoder as a tokenizer .bin has them after its header."""
    return b"".join(bytes([len(token)]) + token for token in enc.tokens)


def encode_text(text: Path, enc: Encoder, docs: str) -> Path:
    """Return the path of the tokens .bin of a text, which is encoded unless it has been before."""
    digest = text_digest(text)
    path = cache_path(text, digest, table_of(enc), f"{enc.eot} {docs}".encode())
    if not path.exists():
        make_folder(path.parent)
        info(f"{path}: encoding {text}")
        n_procs = len(usable_cores())
        check = functools.partial(check_unchanged, text, digest)
        corpus.encode_files(enc, [text], path, docs, n_procs, before_rename=check)
    return path


# ----------------------------------------------------------------------------------------------
# Token ids


def tokenizer_beside(tokens: Path) -> Path:
    """Return the path of the tokenizer beside a tokens .bin: its own, or else tokenizer.bin."""
    names = (corpus.tokenizer_path(tokens), tokens.with_name("tokenizer.bin"))
    for path in names:
        if path.exists():
            return path
    expected = " or ".join(path.name for path in names)
    raise ValueError(f"{tokens}: no {expected} beside it: give its --tokenizer")


def read_tokens(path: Path, enc: Encoder, docs: str, raw: bool = False) -> Integer[ndarray, " N"]:
    """Return the ids (N,) of a tokens .bin, or of a text file.

    If `raw`, a file without a header is read as nanoGPT's, whatever its name. Raises ValueError for
    ids that `enc` does not have, or a file made with another vocabulary.
    """
    path = find(path)
    if is_text(path, raw):
        path = encode_text(path, enc, docs)
    check_tokenizer(path, enc)
    if raw and magic_number(path) != llmc.TOKENS_MAGIC:
        refuse_text(path)
        tokens, n_vocab = nanogpt.load_tokens(path), 0
    else:
        tokens, n_vocab = load_tokens(path)
    check_vocabulary(path, max_id(tokens), n_vocab, enc.n_vocab)
    return tokens


def check_tokenizer(tokens: Path, enc: Encoder) -> None:
    """Raise ValueError if the tokenizer that `encode` left beside a tokens .bin is another one."""
    own = corpus.tokenizer_path(tokens)
    if is_other(own, enc):
        raise ValueError(
            f"{tokens}: was encoded with another tokenizer, {own}: give that as --tokenizer, or "
            "encode the text again with this one; if that file does not belong there, remove it"
        )


def is_other(tokenizer: Path, enc: Encoder) -> bool:
    """Return whether a tokenizer .bin is there that has other tokens than `enc`."""
    return tokenizer.is_file() and tokenizer.read_bytes()[llmc.HEADER_BYTES :] != table_of(enc)


def load_tokens(path: Path) -> tuple[Integer[ndarray, " N"], int]:
    """Return what llmc.load_tokens does; its error for another file may name the flag --raw."""
    try:
        return llmc.load_tokens(path)
    except ValueError as error:
        if magic_number(path) in llmc.NAMES:
            raise
        hint = "with --raw it is read as one of nanoGPT's, uint16 without a header"
        raise ValueError(f"{error}; {hint}") from None


def refuse_text(path: Path) -> None:
    """Raise ValueError for a file of ids that begins with text in UTF-8, as ids hardly ever do.

    Read as uint16, most texts would pass for ids of GPT-2's vocabulary.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(start)
    if len(start) >= 64 and not re.search("[\0-\x08\x0e-\x1f\ufffd]", text):
        raise ValueError(f"{path}: begins with text, --raw expects ids in uint16: leave out --raw")


def check_validation(tokens: Integer[ndarray, " N"]) -> None:
    """Raise ValueError if there is nothing to predict."""
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens to validate with: give more text, or --val_data")


def max_id(tokens: Integer[ndarray, " N"]) -> int:
    """Return the largest id of a memory-mapped file of any size, 0 if there is none."""
    parts = np.array_split(tokens, 1 + len(tokens) // 2**24)
    return max((int(part.max()) for part in parts if part.size), default=0)


def check_vocabulary(path: Path, max_id: int, n_vocab: int, expected: int) -> None:
    """Raise ValueError if the ids of a file are not of a vocabulary of `expected` tokens."""
    if max_id >= expected or n_vocab not in (0, expected):
        actual = f"a vocabulary of {n_vocab}" if n_vocab else f"the id {max_id}"
        raise ValueError(
            f"{path}: has {actual}, but the tokenizer has {expected} tokens: they do not belong "
            "together; give the --tokenizer it was encoded with"
        )


def token_lengths(enc: Encoder) -> Integer[ndarray, " V"]:
    """Return the bytes of text that each token stands for, (V,): none for end-of-text."""
    lengths = np.array([len(token) for token in enc.tokens])
    if enc.eot is not None:
        lengths[enc.eot] = 0
    return lengths
