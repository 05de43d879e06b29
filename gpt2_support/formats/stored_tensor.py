"""A tensor as it is stored in a file: what the readers of all checkpoint formats share.

The reader of a format checks the names, shapes and sizes of all tensors in a model first. Then it
gives a Config and a function `get(name)`, which reads one tensor from the disk when it is called,
a weight as (out, in). So a model of any size is converted in little memory. Each file stays open
until the reader ends, so that tensors of a file that replaces it are not mixed in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from gpt2_support.files import DamagedFile
from gpt2_support.messages import preview

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt16
    from numpy import ndarray

Shape = tuple[int, ...]
GetTensor = Callable[[str], np.ndarray]
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # safetensors' names of dtypes


class StoredTensor(NamedTuple):
    """Where a tensor is stored, and how."""

    file: BinaryIO
    dtype: str  # one of FLOATS, or a name that `check_tensors` refuses
    shape: Shape
    offset: int  # of its first byte in the file
    size: int  # in bytes
    crc: int | None = None  # masked CRC32C of its bytes, in a format that has one
    mtime_ns: int | None = None  # when the file was written, in a format that has no CRC


def check_tensors(
    path: Path, expected: Iterable[tuple[str, Shape]], stored: Mapping[str, StoredTensor]
) -> None:
    """Raise ValueError unless the stored tensors {name: tensor} are those of `expected`.

    `expected` is (name, shape) of each tensor of the model; the error names `path` and the tensor.
    """
    names = set()
    for name, shape in expected:
        if name not in stored:
            raise ValueError(f"{path}: tensor {name} is missing")
        tensor = stored[name]
        if tensor.shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {tensor.shape}, expected {shape}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name} has dtype {preview(tensor.dtype)}, can read only "
                f"{', '.join(FLOATS)}"
            )
        names.add(name)
    extra = sorted(set(stored) - names)
    if extra:
        raise ValueError(f"{path}: not a GPT-2 of this size: unexpected tensor {preview(extra[0])}")


def read_tensor(tensor: StoredTensor) -> Float32[ndarray, "*shape"]:
    """Read a tensor into an array of float32.

    Raises DamagedFile if the file ends too early, or if it has been written meanwhile.
    """
    file, n_values = tensor.file, math.prod(tensor.shape)
    file.seek(tensor.offset)
    values = np.fromfile(file, FLOATS[tensor.dtype], n_values)
    if values.size != n_values:
        raise DamagedFile(file.name, f"ends within the {tensor.size} bytes at {tensor.offset}")
    if tensor.mtime_ns not in (None, modified(file)):
        raise DamagedFile(file.name, "another program has written to it meanwhile")
    values = bf16_to_float32(values) if tensor.dtype == "BF16" else values.astype("<f4", copy=False)
    return values.reshape(tensor.shape)


def modified(file: BinaryIO) -> int:
    """Return when an open file was last written, in nanoseconds."""
    return os.fstat(file.fileno()).st_mtime_ns


def bf16_to_float32(bits: UInt16[ndarray, " N"]) -> Float32[ndarray, " N"]:
    """Return the float32 of bfloat16 values, whose 16 bits are the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: Float32[ndarray, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """Return the bfloat16 nearest to each value, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype("<u2")
