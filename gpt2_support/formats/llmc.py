"""llm.c's .bin files: models, tokenizers, tokens (https://github.com/karpathy/llm.c).

Each begins with a header of 256 int32. All numbers are little-endian."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support.files import atomic_write
from gpt2_support.formats.stored_tensor import bf16_to_float32, read_tensor
from gpt2_support.params import Config, Params, n_params, tensors

if TYPE_CHECKING:
    from jaxtyping import UInt16
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# The .bin files: llm.c's formats (https://github.com/karpathy/llm.c), each a header of 256 int32

HEADER_BYTES = 1024


MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC, TOKENS_MAGIC = 20240326, 20240327, 20240328, 20240520


MAGIC_MEANS = {
    MODEL_MAGIC: "model",
    STATE_MAGIC: "debug state",
    TOKENIZER_MAGIC: "tokenizer",
    TOKENS_MAGIC: "tokens",
}


def write_header(file, *values):
    """Write `values` (int32) as the header of a .bin file, the rest of it zeros."""
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    file.write(header.tobytes())


def read_header(path, magic, versions):
    """Return the header of a .bin file as a list of 256 ints.

    Raises ValueError, naming what was found, unless magic number and version are as wanted.
    """
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), "<u1")
    want = MAGIC_MEANS[magic]
    if len(header) < HEADER_BYTES:
        raise ValueError(
            f"{path}: {len(header)} bytes is too short for the header of a {want} file"
        )
    header = header.view("<i4").tolist()
    if header[0] != magic:
        found = MAGIC_MEANS.get(header[0])
        found = f"a {found} file" if found else f"magic number {header[0]}"
        raise ValueError(f"{path}: expected a {want} file (magic number {magic}), found {found}")
    if header[1] not in versions:
        raise ValueError(f"{path}: {want} file of version {header[1]}, can read only {versions}")
    return header


def check_size(path, expected, what):
    """Raise ValueError unless the file has exactly `expected` bytes."""
    found = os.path.getsize(path)
    if found != expected:
        raise ValueError(
            f"{path}: {found} bytes, but {what} takes {expected}: the file is incomplete, damaged, "
            "or from a program that uses this version number for another layout"
        )


def write_model_header(file, config):
    """Write the header of a model .bin file of version 3 (float32, padded vocabulary)."""
    c = config
    sizes = (c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd, c.n_vocab_padded)
    write_header(file, MODEL_MAGIC, 3, *sizes)


def write_model(file, config, get):
    """Write a model .bin file of version 3; `get(name)` returns a tensor when it is its turn.

    Raises ValueError for an array of another shape than `tensors` says.
    """
    write_model_header(file, config)
    for name, shape in tensors(config):
        write_array(file, get(name), shape)
        if name == "model/wte":
            file.write(bytes(4 * (config.n_vocab_padded - config.n_vocab) * config.n_embd))


def write_array(file, array, shape):
    """Write an array as float32, after checking its shape."""
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape}, expected {shape}")
    file.write(np.ascontiguousarray(array, "<f4").data)


def save_params(path: str | Path, params: Params) -> None:
    """Write a model .bin file exactly as llm.c's version 3 has it (float32), atomically."""
    with atomic_write(path) as file:
        write_model(file, params.config, params.named.__getitem__)


def load_params(path: str | Path) -> Params:
    """Return the Params of a model .bin file, or of the `model.bin` in a folder.

    A float32 file with a padded vocabulary (version 3) is memory-mapped: read-only, and loaded
    by the operating system as it is used. Version 1 (unpadded) and 5 (bf16) are copied to float32.
    Raises FileNotFoundError, or ValueError if header or file size are not those of a GPT-2.
    """
    path = Path(path)
    path = path / "model.bin" if path.is_dir() else path
    config, rows, dtype = read_model_header(path)
    values = np.memmap(path, dtype, "r", offset=HEADER_BYTES).view(np.ndarray)
    if dtype == np.uint16:
        values = bf16_to_float32(values)
    if rows == config.n_vocab_padded:
        return Params(config, values)
    params = Params(config)  # unpadded: leave a gap of zeros after the rows of wte
    params.flat[: rows * config.n_embd] = values[: rows * config.n_embd]
    params.flat[config.n_vocab_padded * config.n_embd :] = values[rows * config.n_embd :]
    return params


def read_model_header(path):
    """Return a model .bin file's Config, rows of wte, and dtype (uint16 for bf16), size checked.

    Raises as `load_params` does.
    """
    _, version, n_ctx, n_vocab, n_layer, n_head, n_embd, padded, *_ = read_header(
        path, MODEL_MAGIC, (1, 3, 5)
    )
    try:
        config = Config(n_vocab, n_ctx, n_embd, n_head, n_layer)
    except ValueError as error:
        raise ValueError(f"{path}: not the header of a GPT-2: {error}") from None
    rows = n_vocab if version == 1 else config.n_vocab_padded
    if version != 1 and padded != rows:
        raise ValueError(f"{path}: vocabulary padded to {padded}, expected {rows} for {n_vocab}")
    n_values = n_params(config) - (config.n_vocab_padded - rows) * n_embd
    dtype = np.dtype("<u2" if version == 5 else "<f4")
    what = f"version {version} of {config}"
    check_size(path, HEADER_BYTES + dtype.itemsize * n_values, what)
    return config, rows, dtype


def load_tokens(path: str | Path) -> tuple[UInt16[ndarray, " N"], int]:
    """Memory-map a tokens .bin file; return its ids (N,) uint16, and n_vocab (0 if not recorded).

    Raises FileNotFoundError, or ValueError if it is not a tokens file of the right length.
    """
    _, _, n_tokens, n_vocab, *_ = read_header(path, TOKENS_MAGIC, (1,))
    if n_tokens < 0 or not 0 <= n_vocab <= 65536:
        raise ValueError(f"{path}: header claims {n_tokens} tokens of a vocabulary of {n_vocab}")
    check_size(path, HEADER_BYTES + 2 * n_tokens, f"a tokens file of {n_tokens} tokens")
    if n_tokens == 0:
        return np.zeros(0, np.uint16), n_vocab
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES).view(np.ndarray), n_vocab


def save_tokens(path, chunks, n_vocab):
    """Write a tokens .bin file, atomically, from an iterable of id arrays; return how many tokens.

    Raises ValueError if the ids do not fit uint16 or the count does not fit the header.
    """
    if n_vocab > 65536:
        raise ValueError(f"n_vocab = {n_vocab}: a tokens file holds 16-bit ids, 65536 at most")
    n_tokens = 0
    with atomic_write(path) as file:
        write_header(file)  # the count is known at the end
        for chunk in chunks:
            file.write(np.asarray(chunk, "<u2").tobytes())
            n_tokens += len(chunk)
        if n_tokens > 2**31 - 1:
            raise ValueError(f"{n_tokens} tokens exceed the 2**31 - 1 that a tokens file can count")
        file.seek(0)
        write_header(file, TOKENS_MAGIC, 1, n_tokens, n_vocab)
    return n_tokens


def open_bin(path):
    """Return (config, get) of a model .bin file; raises as `load_params` does.

    Not by `load_params`: pages of a memory map, once read, count as memory in use.
    """
    config, rows, dtype = read_model_header(path)
    kind = "BF16" if dtype == np.uint16 else "F32"
    entries, end = {}, HEADER_BYTES
    for name, shape in tensors(config):
        size = dtype.itemsize * math.prod(shape)
        entries[name] = SimpleNamespace(path=path, dtype=kind, shape=shape, offset=end, size=size)
        end += size
        if name == "model/wte":
            end += dtype.itemsize * (rows - config.n_vocab) * config.n_embd
    return config, lambda name: read_tensor(entries[name])
