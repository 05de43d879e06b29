"""Data sets for training: token ids from a text file, kept beside it, or from a tokens .bin."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import corpus
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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    return path.suffix != ".bin" and magic != llmc.TOKENS_MAGIC


def is_newer(path: Path, source: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns >= source.stat().st_mtime_ns


def learn_tokenizer(
    text: Path, n_vocab: int, train: Callable[[Iterable[str], int], Encoder]
) -> Path:
    """Return the path of the tokenizer of n_vocab tokens learned from a text, and kept beside it.

    `train` learns it from the text in chunks, unless the file is there and newer than the text.
    """
    path = text.with_name(f"{text.name}.{n_vocab}.tokenizer.bin")
    if not is_newer(path, text):
        info(f"{path}: learning a vocabulary of {n_vocab} tokens from {text}")
        train(corpus.read_texts([text]), n_vocab).save(path)
    return path


def tokenizer_beside(tokens: Path) -> Path:
    """Return the path of the tokenizer.bin beside a tokens .bin."""
    path = tokens.with_name("tokenizer.bin")
    if not path.exists():
        raise ValueError(f"{tokens}: no tokenizer.bin beside it: give its --tokenizer")
    return path


def read_tokens(path: Path, enc: Encoder, docs: str) -> Integer[ndarray, " N"]:
    """Return the ids (N,) of a tokens .bin, or of a text file, which is encoded once, beside it.

    Raises ValueError for ids that `enc` does not have, or a file made with another vocabulary.
    """
    if is_text(path):
        table = b"".join(bytes([len(token)]) + token for token in enc.tokens)
        digest = hashlib.sha256(table + docs.encode()).hexdigest()[:8]
        text, path = path, path.with_name(f"{path.name}.{digest}.bin")
        if not is_newer(path, text):
            info(f"{path}: encoding {text}")
            corpus.encode_files(enc, [text], path, docs, os.cpu_count() or 1)
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
