"""A tensor where it lies in a file: what the readers of all checkpoint formats share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support.files import DamagedFile
from gpt2_support.messages import preview

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt16
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


def bf16_to_float32(values: UInt16[ndarray, " N"]) -> Float32[ndarray, " N"]:
    """Return float32 from the bits of bfloat16 (uint16), which are a float32's upper half."""
    return (values.astype(np.uint32) << 16).view(np.float32)


# Other people's checkpoints: what their readers share. A reader checks names, shapes and sizes,
# then gives a Config and a function `get(name) -> array` that reads one tensor, here (out, in),
# from the disk when it is asked for, so that a model of any size is converted in little memory.

FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def check_tensors(path, wanted, found):
    """Raise ValueError, naming the tensor, unless `found` {name: entry} is what is wanted.

    `wanted` is an iterable of (name, shape); an entry has a `shape` and a `dtype`.
    """
    names = set()
    for name, shape in wanted:
        if name not in found:
            raise ValueError(f"{path}: tensor {name} is missing")
        entry = found[name]
        if entry.shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {entry.shape}, expected {shape}")
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name} has dtype {preview(entry.dtype)}, can read only "
                f"{', '.join(FLOATS)}"
            )
        names.add(name)
    extra = sorted(set(found) - names)
    if extra:
        raise ValueError(f"{path}: not a GPT-2 of this size: unexpected tensor {preview(extra[0])}")


def read_tensor(entry):
    """Return the array of an entry as it lies in its file, F32 as it is and the rest as float32."""
    dtype = np.dtype(FLOATS[entry.dtype])
    with open(entry.path, "rb") as file:
        values = np.fromfile(file, dtype, math.prod(entry.shape), offset=entry.offset)
    if values.size != math.prod(entry.shape):
        raise DamagedFile(entry.path, f"ends within the {entry.size} bytes at {entry.offset}")
    values = bf16_to_float32(values) if entry.dtype == "BF16" else values.astype("<f4", copy=False)
    return values.reshape(entry.shape)
