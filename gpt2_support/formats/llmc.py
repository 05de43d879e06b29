"""llm.c's .bin files: models, tokens, and the header that all of them begin with.

A header is 256 int32: a magic number, a version, and sizes. All numbers are little-endian.
Tokenizer files have the same header; `token_table` reads them. Source:
https://github.com/karpathy/llm.c
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gpt2_support.checks import to_array
from gpt2_support.files import atomic_write, open_file, sync
from gpt2_support.formats.stored_tensor import (
    GetTensor,
    Shape,
    StoredTensor,
    bf16_to_float32,
    float32_to_bf16,
    modified,
    read_tensor,
)
from gpt2_support.params import Config, Params, n_params, named_shapes, whole_number

if TYPE_CHECKING:
    from jaxtyping import Float, Integer, UInt16
    from numpy import ndarray

HEADER_BYTES = 1024
SMALL = 64 << 20  # bytes: a smaller file is read into memory, a larger one is mapped
MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC, TOKENS_MAGIC = 20240326, 20240327, 20240328, 20240520
NAMES = {
    MODEL_MAGIC: "model",
    STATE_MAGIC: "debug state",
    TOKENIZER_MAGIC: "tokenizer",
    TOKENS_MAGIC: "tokens",
}


# The header


def read_header(file: BinaryIO, magic: int, versions: Sequence[int]) -> list[int]:
    """Return the 256 numbers of a header; raise ValueError for another magic number or version."""
    path, name = file.name, NAMES[magic]
    data = file.read(HEADER_BYTES)
    if len(data) < HEADER_BYTES:
        raise ValueError(f"{path}: {len(data)} bytes is too short for the header of a {name} file")
    header = np.frombuffer(data, "<i4").tolist()
    if header[0] != magic:
        other = NAMES.get(header[0])
        actual = f"a {other} file" if other else f"magic number {header[0]}"
        raise ValueError(f"{path}: expected a {name} file (magic number {magic}), found {actual}")
    if header[1] not in versions:
        raise ValueError(f"{path}: {name} file of version {header[1]}, can read only {versions}")
    return header


def write_header(file: BinaryIO, *values: int) -> None:
    """Write a header that begins with `values`; the rest of it is zeros."""
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    file.write(header.tobytes())


def check_size(file: BinaryIO, expected: int, contents: str) -> None:
    """Raise ValueError unless the file has exactly `expected` bytes, which `contents` take."""
    actual = os.fstat(file.fileno()).st_size
    if actual != expected:
        raise ValueError(
            f"{file.name}: {actual} bytes, but {contents} takes {expected}: the file is "
            "incomplete, damaged, or from a program that uses this version for another layout"
        )


def read_values(file: BinaryIO, dtype: str | np.dtype, header_bytes: int = HEADER_BYTES) -> ndarray:
    """Return what follows a header, (N,), read-only: in memory, or mapped if the file is large."""
    if os.fstat(file.fileno()).st_size > SMALL:
        return np.memmap(file, dtype, "r", offset=header_bytes).view(np.ndarray)
    file.seek(header_bytes)
    values = np.fromfile(file, dtype)
    values.flags.writeable = False
    return values


# Models


def load_params(path: str | Path) -> Params:
    """Return the Params, read-only, of a model .bin file, or of the `model.bin` in a folder.

    A file of version 3 (float32, padded vocabulary) of more than 64 MB is memory-mapped, that is,
    read from the disk as it is used: a program that shortens it in place meanwhile ends this one
    (SIGBUS); one that replaces it does no harm. Versions 1 (unpadded) and 5 (bf16) are copied to
    float32. Raises FileNotFoundError, or ValueError if header or file size are not those of a
    GPT-2.
    """
    path = Path(path)
    with open_file(path / "model.bin" if path.is_dir() else path) as file:
        config, n_rows, dtype = read_model_header(file)
        values = read_values(file, dtype)
    if dtype == np.uint16:
        values = bf16_to_float32(values)
    if n_rows < config.n_vocab_padded:
        end, padding = n_rows * config.n_embd, (config.n_vocab_padded - n_rows) * config.n_embd
        values = np.concatenate([values[:end], np.zeros(padding, "<f4"), values[end:]])
    values.flags.writeable = False
    return Params(config, values)


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[tuple[Config, GetTensor]]:
    """Give (config, get) of a model .bin file; raises as `load_params` does.

    `get` reads from the file and maps nothing, because mapped pages count as memory in use once
    they have been read.
    """
    with open_file(path) as file:
        mtime_ns = modified(file)
        config, n_rows, dtype = read_model_header(file)
        dtype_name = "BF16" if dtype == np.uint16 else "F32"
        stored, end = {}, HEADER_BYTES
        for name, shape in named_shapes(config):
            size = dtype.itemsize * math.prod(shape)
            stored[name] = StoredTensor(file, dtype_name, shape, end, size, mtime_ns=mtime_ns)
            end += size
            if name == "model/wte":
                end += dtype.itemsize * (n_rows - config.n_vocab) * config.n_embd
        yield config, lambda name: read_tensor(stored[name])


def read_model_header(file: BinaryIO) -> tuple[Config, int, np.dtype]:
    """Return the Config of a model .bin file, the rows of its wte, and its dtype (uint16 for bf16).

    Raises as `load_params` does.
    """
    path = file.name
    _, version, n_ctx, n_vocab, n_layer, n_head, n_embd, n_padded, *_ = read_header(
        file, MODEL_MAGIC, (1, 3, 5)
    )
    try:
        config = Config(n_vocab, n_ctx, n_embd, n_head, n_layer)
    except ValueError as error:
        raise ValueError(f"{path}: not the header of a GPT-2: {error}") from None
    n_rows = n_vocab if version == 1 else config.n_vocab_padded
    if version != 1 and n_padded != n_rows:
        raise ValueError(
            f"{path}: vocabulary padded to {n_padded}, expected {n_rows} for {n_vocab}"
        )
    dtype = np.dtype("<u2" if version == 5 else "<f4")
    n_values = n_params(config) - (config.n_vocab_padded - n_rows) * n_embd
    size = HEADER_BYTES + dtype.itemsize * n_values
    check_size(file, size, f"version {version} of {config}")
    return config, n_rows, dtype


VERSIONS = {"fp32": 3, "bf16": 5}  # that are written, by their numbers


def save_params(path: str | Path, params: Params) -> None:
    """Write a model .bin file of llm.c's version 3 (float32, padded vocabulary), atomically."""
    with atomic_write(path) as file:
        write_model(file, params.config, params.named.__getitem__)


def write_model(file: BinaryIO, config: Config, get: GetTensor, dtype: str = "fp32") -> None:
    """Write a model .bin file of version 3, or 5 for "bf16", one tensor at a time.

    `get(name)` returns a tensor; raises ValueError if its shape is not the one in `named_shapes`.
    """
    c = config
    sizes = (c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd, c.n_vocab_padded)
    write_header(file, MODEL_MAGIC, VERSIONS[dtype], *sizes)
    for name, shape in named_shapes(config):
        write_array(file, get(name), shape, dtype)
        if name == "model/wte":
            padding = np.zeros((c.n_vocab_padded - c.n_vocab, c.n_embd), "<f4")
            write_array(file, padding, padding.shape, dtype)


def write_array(
    file: BinaryIO, array: Float[ndarray, "*shape"], shape: Shape, dtype: str = "fp32"
) -> None:
    """Write an array as float32 or bf16; raise ValueError if its shape is not `shape`."""
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape}, expected {shape}")
    values = np.ascontiguousarray(array, "<f4")
    file.write((float32_to_bf16(values) if dtype == "bf16" else values).data)


# Tokens


def load_tokens(path: str | Path) -> tuple[UInt16[ndarray, " N"], int]:
    """Return the ids of a tokens .bin file, (N,) uint16, and n_vocab (0 if not recorded).

    A file of more than 64 MB is memory-mapped; see `load_params`. Raises FileNotFoundError, or
    ValueError if it is not a tokens file of the right length.
    """
    with open_file(path) as file:
        _, _, n_tokens, n_vocab, *_ = read_header(file, TOKENS_MAGIC, (1,))
        if n_tokens < 0 or not 0 <= n_vocab <= 65536:
            claim = f"{n_tokens} tokens of a vocabulary of {n_vocab}"
            raise ValueError(f"{path}: header claims {claim}")
        check_size(file, HEADER_BYTES + 2 * n_tokens, f"a tokens file of {n_tokens} tokens")
        return read_values(file, "<u2"), n_vocab


def save_tokens(
    path: str | Path,
    chunks: Iterable[Sequence[int] | ndarray],
    n_vocab: int,
    before_rename: Callable[[], object] = lambda: None,
) -> int:
    """Write arrays of ids, one after another, as a tokens .bin file; return the number of tokens.

    The file is written atomically; `before_rename` is called once it is on the disk. `n_vocab` may
    be 0, unknown. Raises ValueError if it exceeds the 65,536 ids of uint16, for ids outside the
    vocabulary, or if the header cannot hold the number of tokens.
    """
    n = whole_number(n_vocab)
    if n is None or not 0 <= n <= 65536:
        limits = "a whole number of 0 or more and, as the file holds 16-bit ids, 65536 at most"
        raise ValueError(f"n_vocab = {n_vocab!r}: expected {limits}")
    n_tokens = 0
    with atomic_write(path) as file:
        write_header(file)  # written again at the end, with the number of tokens
        for chunk in chunks:
            file.write(check_ids(chunk, n or 65536).astype("<u2").tobytes())
            n_tokens += len(chunk)
        if n_tokens > 2**31 - 1:
            raise ValueError(f"{n_tokens} tokens exceed the 2**31 - 1 that a tokens file can count")
        file.seek(0)
        write_header(file, TOKENS_MAGIC, 1, n_tokens, n)
        sync(file)
        before_rename()
    return n_tokens


def check_ids(chunk: Sequence[int] | ndarray, n_vocab: int) -> Integer[ndarray, " N"]:
    """Return ids as an array; raise ValueError for others than whole numbers of the vocabulary."""
    expected = "ids must be whole numbers of shape (N,)"
    ids = to_array(chunk, expected)
    ids = ids if ids.size else ids.astype(int)  # an empty list has no integers
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{expected}, found shape {ids.shape}, dtype {ids.dtype}")
    bad = ids[(ids < 0) | (ids >= n_vocab)]
    if bad.size:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary of {n_vocab}")
    return ids
