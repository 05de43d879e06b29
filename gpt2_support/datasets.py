"""Data sets for training: token ids from a text file, which is encoded once, or a tokens .bin.

The tokens of a text, and the vocabulary learned from it, are kept in a cache folder. Their names
are hashes of the text's contents and of what else decides them, so another text never has them.
Files there can be removed at any time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import corpus, folders
from gpt2_support.files import file_hash
from gpt2_support.formats import llmc
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


def is_text(path: Path) -> bool:
    """Tell a text file from a tokens .bin, by its name and its first bytes."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a text file or a tokens .bin")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: is not a regular file, expected a text file or a tokens .bin")
    with open(path, "rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    return path.suffix != ".bin" and magic != llmc.TOKENS_MAGIC


# ----------------------------------------------------------------------------------------------
# What is computed from a text


def cache_dir() -> Path:
    """Return the folder of the tokens of texts, which is made if it is not there."""
    folder = folders.datasets_dir() / "encoded"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "name a folder that can be written with GPT2_DATASETS_DIR in the environment"
        raise OSError(f"{error}: {advice}") from None
    return folder


def cache_path(text: Path, digest: str, *others: bytes) -> Path:
    """Return where something is kept that a text, by its digest, and the others decide."""
    key = hashlib.sha256(b"".join([digest.encode(), *others])).hexdigest()[:16]
    return cache_dir() / f"{text.stem}.{key}.bin"


def text_digest(text: Path) -> str:
    """Return a hash of what a text holds."""
    return file_hash(text, "sha256").hexdigest()


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
    digest = text_digest(text)
    path = cache_path(text, digest, b"a tokenizer of %d" % n_vocab)
    if not path.exists():
        info(f"{path}: learning a vocabulary of {n_vocab} tokens from {text}")
        try:
            enc = train(corpus.read_texts([text]), n_vocab)
        except ValueError as error:
            raise explain(error, text, n_vocab) from None
        check_unchanged(text, digest)
        enc.save(path)
    return path


def explain(error: ValueError, text: Path, n_vocab: int) -> ValueError:
    """Return what to say if no vocabulary can be learned: advice that does not fail later."""
    n_bytes = text.stat().st_size
    if n_bytes == 0 or n_vocab < 257:
        return error
    bytes_alone = ", or --n_vocab 257, the bytes and end-of-text alone"
    return ValueError(
        f"{text}: {n_bytes} bytes of text are too few to learn {n_vocab} tokens from: give more "
        f"text{bytes_alone if n_bytes > 10_000 else ''}"
    )


def encode_text(text: Path, enc: Encoder, docs: str) -> Path:
    """Return the path of the tokens .bin of a text, which is encoded unless it has been before."""
    digest = text_digest(text)
    table = b"".join(bytes([len(token)]) + token for token in enc.tokens)
    path = cache_path(text, digest, table, f"{enc.eot} {docs}".encode())
    if not path.exists():
        info(f"{path}: encoding {text}")
        n_procs = os.cpu_count() or 1
        corpus.encode_files(
            enc, [text], path, docs, n_procs, check=lambda: check_unchanged(text, digest)
        )
    return path


# ----------------------------------------------------------------------------------------------
# Token ids


def tokenizer_beside(tokens: Path) -> Path:
    """Return the path of the tokenizer.bin beside a tokens .bin."""
    path = tokens.with_name("tokenizer.bin")
    if not path.exists():
        raise ValueError(f"{tokens}: no tokenizer.bin beside it: give its --tokenizer")
    return path


def read_tokens(path: Path, enc: Encoder, docs: str) -> Integer[ndarray, " N"]:
    """Return the ids (N,) of a tokens .bin, or of a text file.

    Raises ValueError for ids that `enc` does not have, or a file made with another vocabulary.
    """
    path = encode_text(path, enc, docs) if is_text(path) else path
    tokens, n_vocab = llmc.load_tokens(path)
    check_vocabulary(path, max_id(tokens), n_vocab, enc.n_vocab)
    return tokens


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
