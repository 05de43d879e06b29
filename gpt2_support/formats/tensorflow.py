"""OpenAI's checkpoints: TensorFlow V2 bundles, read without TensorFlow."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING

from gpt2_support.files import DamagedFile, read_json
from gpt2_support.formats.crc32c import masked_crc32c
from gpt2_support.formats.stored_tensor import check_tensors, read_tensor
from gpt2_support.messages import preview
from gpt2_support.params import Config, tensors

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# TensorFlow checkpoints (V2 bundles): an index, which is a LevelDB table of protobuf messages
# (https://github.com/google/leveldb/blob/main/doc/table_format.md, TensorFlow's
# tensor_bundle.proto), and a data file with the bytes of the tensors

TABLE_MAGIC = bytes.fromhex("57fb808b247547db")


FOOTER_BYTES = 48


LONGEST_KEY = 256  # keeps the keys of a hostile file, each built from the last, in proportion


def read_varint(data, at):
    """Return the varint at data[at] (seven bits a byte, low ones first) and the position after."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError(f"the number at byte {at} does not end")


def read_varints(data, n):
    """Return the first n varints of data."""
    values, at = [], 0
    for _ in range(n):
        value, at = read_varint(data, at)
        values.append(value)
    return values


def read_block(data, offset, size):
    """Return the contents of a block of a LevelDB table, its CRC verified."""
    end = offset + size
    if end + 5 > len(data) - FOOTER_BYTES:
        raise ValueError(f"a block of {size} bytes at {offset} does not fit in {len(data)} bytes")
    kind, crc = data[end], int.from_bytes(data[end + 1 : end + 5], "little")
    if masked_crc32c(data[offset : end + 1]) != crc:
        raise ValueError(f"wrong CRC of the block at byte {offset}")
    if kind != 0:
        name = "snappy" if kind == 1 else f"method {kind}"
        raise ValueError(f"the block at byte {offset} is compressed ({name}), cannot be read here")
    return data[offset:end]


def block_entries(block):
    """Yield (key, value) of a block; a key is stored as what differs from the one before."""
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
        if n_shared > len(key) or n_shared + n_new > LONGEST_KEY or stop > end:
            raise ValueError("an entry of a block does not fit")
        key, value, at = key[:n_shared] + block[at:middle], block[middle:stop], stop
        yield key, value


def read_table(data):
    """Return {key: value} of a LevelDB table; raises ValueError if anything in it is wrong."""
    if len(data) < FOOTER_BYTES or data[-8:] != TABLE_MAGIC:
        raise ValueError(f"{len(data)} bytes that do not end as an index of TensorFlow's does")
    meta_offset, meta_size, *index = read_varints(data[-FOOTER_BYTES:], 4)
    read_block(data, meta_offset, meta_size)  # empty, but its CRC should be right
    entries, end, last = {}, 0, None
    for _, handle in block_entries(read_block(data, *index)):
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


def protobuf_fields(data):
    """Yield (field number, value) of a protobuf message: an int, or the bytes of anything else."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        kind, size = tag & 7, 0
        if kind == 0:
            value, at = read_varint(data, at)
        elif kind == 2:
            size, at = read_varint(data, at)
            value = data[at : at + size]
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = int.from_bytes(data[at : at + size], "little")
        else:
            raise ValueError(f"protobuf field of unknown kind {kind}")
        at += size
        if at > len(data):
            raise ValueError("a protobuf field does not fit its message")
        yield tag >> 3, value


def protobuf_message(data, defaults):
    """Return a copy of `defaults` {field number: value} with the values that the message holds."""
    message = dict(defaults)
    for number, value in protobuf_fields(data):
        if number in message:
            if type(value) is not type(defaults[number]):
                raise ValueError(f"protobuf field {number} is of the wrong kind")
            message[number] = value
    return message


def bundle_entry(data_path, message):
    """Return the entry (dtype, shape, offset, size, crc) of a BundleEntryProto."""
    fields = protobuf_message(message, {1: 0, 2: b"", 3: 0, 4: 0, 5: 0, 6: 0})
    dims = [dim for number, dim in protobuf_fields(fields[2]) if number == 2]
    if fields[3] or len(dims) > 8 or not all(isinstance(dim, bytes) for dim in dims):
        raise ValueError(f"an entry of {len(dims)} dimensions in shard {fields[3]}")
    return SimpleNamespace(
        path=data_path,
        dtype="F32" if fields[1] == 1 else f"{fields[1]} (TensorFlow's numbering; F32 is 1)",
        shape=tuple(protobuf_message(dim, {1: 0})[1] for dim in dims),
        offset=fields[4],
        size=fields[5],
        crc=fields[6],
    )


def read_bundle(index_path):
    """Return {name: entry} of a TensorFlow V2 bundle, whose data file has the size they need.

    Raises FileNotFoundError, or DamagedFile for the index or the data file.
    """
    data_path = index_path.with_name(f"{index_path.name[: -len('.index')]}.data-00000-of-00001")
    try:
        table = read_table(index_path.read_bytes())
        header = protobuf_message(table.pop(b"", b""), {1: 0, 2: 0})
        if header != {1: 1, 2: 0}:
            raise ValueError(
                f"a bundle of {header[1]} shards, endianness {header[2]}; can read only 1 and 0"
            )
        entries = {
            name.decode("utf-8"): bundle_entry(data_path, message)
            for name, message in table.items()
        }
    except ValueError as error:
        raise DamagedFile(index_path, error) from None
    check_bundle_size(index_path, data_path, entries)
    return entries


def check_bundle_size(index_path, data_path, entries):
    """Raise DamagedFile unless the tensors lie one after another and fill the data file."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < end:
            raise DamagedFile(index_path, f"tensor {preview(name)} overlaps the one before")
        if entry.dtype == "F32" and entry.size != 4 * math.prod(entry.shape):
            found = f"{entry.size} bytes for {entry.shape}"
            raise DamagedFile(index_path, f"tensor {preview(name)}: {found}")
        end = entry.offset + entry.size
    found = data_path.stat().st_size
    if found != end:
        raise DamagedFile(data_path, f"{found} bytes, but the index describes {end}")


def open_openai(folder):
    """Return (config, get) of a folder in OpenAI's layout: `hparams.json` and a bundle.

    A weight is (1, in, out) there. Raises FileNotFoundError, or ValueError that names the file
    and the tensor; `get` verifies the tensor's CRC.
    """
    config = read_hparams(folder / "hparams.json")
    index_path = find_index(folder)
    entries = read_bundle(index_path)
    is_linear = re.compile(r"model/h\d+/.*/w").fullmatch
    stored = ((n, (1, *shape[::-1]) if is_linear(n) else shape) for n, shape in tensors(config))
    check_tensors(index_path, stored, entries)

    def get(name):
        entry = entries[name]
        array = read_tensor(entry)
        if masked_crc32c(array) != entry.crc:
            raise DamagedFile(entry.path, f"wrong CRC of tensor {name}")
        return array[0].T if is_linear(name) else array

    return config, get


def read_hparams(path):
    """Return the Config in OpenAI's `hparams.json`; raises DamagedFile if it does not hold one."""
    hparams = read_json(path)
    names = [field.name for field in fields(Config)]
    missing = [name for name in names if name not in hparams]
    if missing:
        raise DamagedFile(path, f"{missing[0]} is missing")
    try:
        return Config(**{name: hparams[name] for name in names})
    except ValueError as error:
        raise DamagedFile(path, error) from None


def find_index(folder):
    """Return the path of `model.ckpt.index`, or of the only other index in the folder."""
    path = folder / "model.ckpt.index"
    others = sorted(folder.glob("*.index"))
    return others[0] if len(others) == 1 and not path.exists() else path
