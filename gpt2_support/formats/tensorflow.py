"""OpenAI's checkpoints, which are TensorFlow V2 bundles, read without TensorFlow.

A checkpoint is a folder with `hparams.json`, an index and a data file. The data file holds the
bytes of all tensors. The index is a LevelDB table: its keys are the names of the tensors, its
values are protobuf messages that say where each tensor is stored. The functions below are in order
from the outside in: the checkpoint, the bundle, the table and its blocks, protobuf messages, and
the whole numbers in them (varints). Sources: TensorFlow's tensor_bundle.proto, and
https://github.com/google/leveldb/blob/main/doc/table_format.md
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from gpt2_support.files import DamagedFile, open_file, read_json
from gpt2_support.formats.crc32c import masked_crc32c
from gpt2_support.formats.stored_tensor import GetTensor, StoredTensor, check_tensors, read_tensor
from gpt2_support.messages import preview
from gpt2_support.params import Config, named_shapes

TABLE_MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_BYTES = 48
MAX_KEY_BYTES = 256  # a hostile block could build ever longer keys, each from the one before
IS_LINEAR = re.compile(r"model/h\d+/.*/w")  # the name of a linear layer's weight

Value = TypeVar("Value", int, bytes)


# The checkpoint


@contextlib.contextmanager
def open_model(folder: Path) -> Iterator[tuple[Config, GetTensor]]:
    """Give (config, get) of a folder in OpenAI's layout; `get` verifies the CRC of a tensor.

    A weight is (1, in, out) there. Raises FileNotFoundError, or ValueError naming file and tensor.
    """
    config = read_hparams(folder / "hparams.json")
    index_path = find_index(folder)
    expected = (
        (name, (1, *shape[::-1]) if IS_LINEAR.fullmatch(name) else shape)
        for name, shape in named_shapes(config)
    )
    with open_bundle(index_path) as stored:
        check_tensors(index_path, expected, stored)

        def get(name: str) -> np.ndarray:
            array = read_tensor(stored[name])
            if masked_crc32c(array) != stored[name].crc:
                raise DamagedFile(stored[name].file.name, f"wrong CRC of tensor {name}")
            return array[0].T if IS_LINEAR.fullmatch(name) else array

        yield config, get


def read_hparams(path: Path) -> Config:
    """Return the Config in OpenAI's `hparams.json`; raise DamagedFile if it does not hold one."""
    hparams = read_json(path)
    names = [field.name for field in fields(Config)]
    missing = [name for name in names if name not in hparams]
    if missing:
        raise DamagedFile(path, f"{missing[0]} is missing")
    try:
        return Config(**{name: hparams[name] for name in names})
    except ValueError as error:
        raise DamagedFile(path, error) from None


def find_index(folder: Path) -> Path:
    """Return the path of `model.ckpt.index`, or of the only other index in the folder."""
    path = folder / "model.ckpt.index"
    others = sorted(folder.glob("*.index"))
    return others[0] if len(others) == 1 and not path.exists() else path


# The bundle


@contextlib.contextmanager
def open_bundle(index_path: Path) -> Iterator[dict[str, StoredTensor]]:
    """Give {name: tensor} of a bundle, whose data file has the size that they need.

    Raises FileNotFoundError, or DamagedFile for the index or the data file.
    """
    data_path = index_path.with_name(f"{index_path.name[: -len('.index')]}.data-00000-of-00001")
    with open_file(index_path) as index, open_file(data_path) as data:
        try:
            table = read_table(index.read())
            header = protobuf_message(table.pop(b"", b""), {1: 0, 2: 0})
            if header != {1: 1, 2: 0}:
                raise ValueError(
                    f"a bundle of {header[1]} shards, endianness {header[2]}; can read only 1 and 0"
                )
            stored = {
                name.decode("utf-8"): parse_tensor(data, message) for name, message in table.items()
            }
        except ValueError as error:
            raise DamagedFile(index_path, error) from None
        check_data_file(index_path, data, stored)
        yield stored


def parse_tensor(data_file: BinaryIO, message: bytes) -> StoredTensor:
    """Return the tensor that a BundleEntryProto describes."""
    numbers = protobuf_message(message, dict.fromkeys((1, 3, 4, 5, 6), 0))
    dtype, shard, offset, size, crc = numbers.values()
    shape = protobuf_message(message, {2: b""})[2]
    dims = [dim for number, dim in protobuf_fields(shape) if number == 2]
    if shard or len(dims) > 8 or not all(isinstance(dim, bytes) for dim in dims):
        raise ValueError(f"an entry of {len(dims)} dimensions in shard {shard}")
    return StoredTensor(
        data_file,
        "F32" if dtype == 1 else f"{dtype} (TensorFlow's numbering; F32 is 1)",
        tuple(protobuf_message(dim, {1: 0})[1] for dim in dims),
        offset,
        size,
        crc,
    )


def check_data_file(index_path: Path, data: BinaryIO, stored: dict[str, StoredTensor]) -> None:
    """Raise DamagedFile unless the tensors fill the data file without overlaps."""
    end = 0
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset < end:
            raise DamagedFile(index_path, f"tensor {preview(name)} overlaps the one before")
        if tensor.dtype == "F32" and tensor.size != 4 * math.prod(tensor.shape):
            actual = f"{tensor.size} bytes for {tensor.shape}"
            raise DamagedFile(index_path, f"tensor {preview(name)}: {actual}")
        end = tensor.offset + tensor.size
    size = os.fstat(data.fileno()).st_size
    if size != end:
        raise DamagedFile(data.name, f"{size} bytes, but the index describes {end}")


# The table


def read_table(data: bytes) -> dict[bytes, bytes]:
    """Return {key: value} of a LevelDB table; raise ValueError if anything in it is wrong."""
    if len(data) < FOOTER_BYTES or data[-8:] != TABLE_MAGIC:
        raise ValueError(f"{len(data)} bytes that do not end as an index of TensorFlow's does")
    meta_offset, meta_size, offset, size = read_varints(data[-FOOTER_BYTES:], 4)
    read_block(data, meta_offset, meta_size)  # it is empty; this verifies its CRC
    entries: dict[bytes, bytes] = {}
    end, last = 0, None
    for _, handle in block_entries(read_block(data, offset, size)):
        offset, size = read_varints(handle, 2)
        if offset < end:
            raise ValueError(f"the block at byte {offset} overlaps the one before")
        end = offset + size
        for key, value in block_entries(read_block(data, offset, size)):
            if last is not None and key <= last:
                raise ValueError(f"key {key!r} follows {last!r}, expected rising keys")
            entries[key] = value
            last = key
    return entries


def read_block(data: bytes, offset: int, size: int) -> bytes:
    """Return the contents of a block of a LevelDB table, its CRC verified."""
    end = offset + size
    if end + 5 > len(data) - FOOTER_BYTES:
        raise ValueError(f"a block of {size} bytes at {offset} does not fit in {len(data)} bytes")
    compression, crc = data[end], int.from_bytes(data[end + 1 : end + 5], "little")
    if masked_crc32c(data[offset : end + 1]) != crc:
        raise ValueError(f"wrong CRC of the block at byte {offset}")
    if compression != 0:
        name = "snappy" if compression == 1 else f"method {compression}"
        raise ValueError(f"the block at byte {offset} is compressed ({name}), cannot be read here")
    return data[offset:end]


def block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) pairs of a block; a key is stored as its difference from the last."""
    n_restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * n_restarts
    if end < 0:
        raise ValueError(f"a block of {len(block)} bytes cannot hold {n_restarts} restarts")
    key, at = b"", 0
    while at < end:
        n_shared, at = read_varint(block, at)
        n_new, at = read_varint(block, at)
        n_value, at = read_varint(block, at)
        middle, stop = at + n_new, at + n_new + n_value
        if n_shared > len(key) or n_shared + n_new > MAX_KEY_BYTES or stop > end:
            raise ValueError("an entry of a block does not fit")
        key, value, at = key[:n_shared] + block[at:middle], block[middle:stop], stop
        yield key, value


# Protobuf messages and varints


def protobuf_message(data: bytes, defaults: dict[int, Value]) -> dict[int, Value]:
    """Return the values {field number: value} in a message, or their defaults."""
    message = dict(defaults)
    for number, value in protobuf_fields(data):
        if number in message:
            if type(value) is not type(defaults[number]):
                raise ValueError(f"protobuf field {number} is of the wrong kind")
            message[number] = value
    return message


def protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a message: an int, or the bytes of anything else."""
    at = 0
    value: Any
    while at < len(data):
        tag, at = read_varint(data, at)
        wire_type, size = tag & 7, 0
        if wire_type == 0:
            value, at = read_varint(data, at)
        elif wire_type == 2:
            size, at = read_varint(data, at)
            value = data[at : at + size]
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
            value = int.from_bytes(data[at : at + size], "little")
        else:
            raise ValueError(f"protobuf field of unknown kind {wire_type}")
        at += size
        if at > len(data):
            raise ValueError("a protobuf field does not fit its message")
        yield tag >> 3, value


def read_varints(data: bytes, n: int) -> list[int]:
    """Return the first n varints of data."""
    values, at = [], 0
    for _ in range(n):
        value, at = read_varint(data, at)
        values.append(value)
    return values


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at data[at] (seven bits a byte, low ones first) and the position after."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError(f"the number at byte {at} does not end")
