"""Hugging Face's model folders: `config.json`, safetensors files, and tokenizer files.

A safetensors file is the length of a header (8 bytes), the header (JSON), and the bytes of the
tensors (https://huggingface.co/docs/safetensors). A large model is split into several, with an
index that says which file holds which tensor. A linear layer's weight is (in, out) there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2_support.files import DamagedFile, open_file, parse_json, read_json
from gpt2_support.formats.llmc import write_array
from gpt2_support.formats.stored_tensor import (
    FLOATS,
    GetTensor,
    Shape,
    StoredTensor,
    check_tensors,
    modified,
    read_tensor,
)
from gpt2_support.formats.token_table import bytes_to_unicode, recover_merges
from gpt2_support.messages import preview
from gpt2_support.params import Config, named_shapes

SETTINGS = {  # the values in `config.json` that mean GPT-2; the first also stands for a missing key
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
TOKENIZER_FILES = (  # what transformers reads in a folder, beside config and tensors
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
SHARD_NAME = re.compile(r"[\w-][\w.-]{,99}\.safetensors", re.ASCII)  # a file name, never a path
MASK_NAME = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which is no parameter


# Reading a model


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[tuple[Config, GetTensor]]:
    """Give (config, get) of a GPT-2 in a folder, or of a safetensors file and the config beside it.

    `get` reads F16 and BF16 as float32. Raises FileNotFoundError, or ValueError if the config is
    not a GPT-2's or if the tensors are not those of such a model.
    """
    is_file = path.is_file()
    config = read_config((path.parent if is_file else path) / "config.json")
    expected = (
        (name_in_checkpoint(name), shape_in_checkpoint(name, shape))
        for name, shape in named_shapes(config)
    )
    with open_tensors([path] if is_file else find_safetensors(path)) as stored:
        lm_head = stored.pop("lm_head.weight", None)
        check_tensors(path, expected, stored)
        if lm_head is not None:
            check_tied(path, lm_head, stored["wte.weight"])

        def get(name: str) -> np.ndarray:
            array = read_tensor(stored[name_in_checkpoint(name)])
            return array.T if name.endswith("/w") else array

        yield config, get


def name_in_checkpoint(name: str) -> str:
    """Return Hugging Face's name: model/h3/ln_1/g is h.3.ln_1.weight, model/wte is wte.weight."""
    path = re.sub(r"^model/h(\d+)/", r"model/h/\1/", name).split("/")[1:]
    leaf = {"w": "weight", "g": "weight", "b": "bias"}
    last = [leaf[path[-1]]] if path[-1] in leaf else [path[-1], "weight"]
    return ".".join(path[:-1] + last)


def shape_in_checkpoint(name: str, shape: Shape) -> Shape:
    """Return Hugging Face's shape: (in, out) for the weight of a linear layer."""
    return shape[::-1] if name.endswith("/w") else shape


def check_tied(folder: Path, lm_head: StoredTensor, wte: StoredTensor) -> None:
    """Raise ValueError unless lm_head.weight equals wte.weight."""
    check_tensors(folder, [("lm_head.weight", wte.shape)], {"lm_head.weight": lm_head})
    if not np.array_equal(read_tensor(lm_head).view("<u4"), read_tensor(wte).view("<u4")):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight: an untied head")


def read_config(path: Path) -> Config:
    """Return the Config in a `config.json`; a missing key has the default of GPT2Config.

    Raises DamagedFile, or ValueError naming the first setting that makes it another model.
    `reorder_and_upcast_attn` is allowed: it only computes attention more precisely.
    """
    data = read_json(path)
    keys = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    sizes = {
        field.name: data.get(keys.get(field.name, field.name), field.default)
        for field in fields(Config)
    }
    try:
        config = Config(**sizes)
    except ValueError as error:
        raise DamagedFile(path, error) from None
    for name, values in {**SETTINGS, "n_inner": (None, 4 * config.n_embd)}.items():
        value = data.get(name, values[0])
        if value not in values:
            expected = " or ".join(map(repr, values))
            actual = preview(repr(value) if isinstance(value, str) else value)
            raise ValueError(f"{path}: {name} = {actual}, GPT-2 as written here has {expected}")
    return config


@contextlib.contextmanager
def open_tensors(paths: Sequence[Path]) -> Iterator[dict[str, StoredTensor]]:
    """Give {name without `transformer.`: tensor} of the safetensors files of a model."""
    stored: dict[str, StoredTensor] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            file = stack.enter_context(open_file(path))
            for name, tensor in read_safetensors(file).items():
                short = name.removeprefix("transformer.")
                if short in stored:
                    raise ValueError(f"{path}: tensor {preview(name)} is there twice")
                if not MASK_NAME.fullmatch(short):
                    stored[short] = tensor
        yield stored


def find_safetensors(folder: Path) -> list[Path]:
    """Return the paths of model.safetensors, or of the files that its index names."""
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        return [path]
    return [folder / name for name in read_index(index)]


def read_index(path: Path) -> list[str]:
    """Return the names of the files in an index; raise DamagedFile for what is no name of one."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and SHARD_NAME.fullmatch(shard) for shard in shards.values()
    ):
        raise DamagedFile(path, "no weight_map that names safetensors files beside it")
    return sorted(set(shards.values()))


# Safetensors files


def read_safetensors(file: BinaryIO) -> dict[str, StoredTensor]:
    """Return {name: tensor} of a safetensors file.

    Raises DamagedFile unless the tensors fill the file without overlaps.
    """
    path, n_bytes = file.name, os.fstat(file.fileno()).st_size
    n_header = int.from_bytes(file.read(8), "little")
    if n_bytes < 8:
        raise DamagedFile(path, f"{n_bytes} bytes are too few for a header")
    if n_header > n_bytes - 8:
        raise DamagedFile(path, f"a header of {n_header} bytes in a file of {n_bytes}")
    header = parse_json(path, file.read(n_header))
    header.pop("__metadata__", None)
    end = 8 + n_header
    stored = {name: parse_tensor(file, name, entry, end) for name, entry in header.items()}
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != end:
            actual = f"begins at byte {tensor.offset}, expected {end}"
            raise DamagedFile(path, f"tensor {preview(name)} {actual}")
        end += tensor.size
    if end != n_bytes:
        raise DamagedFile(path, f"{n_bytes} bytes, but its header describes {end}")
    return stored


def parse_tensor(file: BinaryIO, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Return the tensor that an entry of a safetensors header describes."""
    path = file.name
    tensor = f"tensor {preview(name)}"
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        dtype, shape, start, end = None, (), 0, 0
    numbers = (*shape, start, end)
    if not isinstance(dtype, str) or len(shape) > 8 or not all(type(n) is int for n in numbers):
        raise DamagedFile(path, f"{tensor} has no proper dtype, shape and data_offsets")
    if not all(0 <= n < 2**63 for n in numbers) or end < start:
        raise DamagedFile(path, f"{tensor}: " + preview(f"shape {shape}, bytes {start} to {end}"))
    size = end - start
    if dtype in FLOATS and size != math.prod(shape) * np.dtype(FLOATS[dtype]).itemsize:
        raise DamagedFile(path, f"{tensor}: {size} bytes for {shape} in {dtype}")
    offset = data_start + start
    return StoredTensor(file, dtype, shape, offset, size, mtime_ns=modified(file))


def write_safetensors(file: BinaryIO, config: Config, get: GetTensor) -> None:
    """Write a model as transformers saves a GPT2LMHeadModel, in float32, a tensor at a time."""
    names = {f"transformer.{name_in_checkpoint(name)}": name for name, _ in named_shapes(config)}
    shapes = {name: shape_in_checkpoint(name, shape) for name, shape in named_shapes(config)}
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, name in sorted(names.items()):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[key] = {"dtype": "F32", "shape": shapes[name], "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, name in sorted(names.items()):
        array = get(name)
        write_array(file, array.T if name.endswith("/w") else array, shapes[name])


# The other files of a folder


def config_json(config: Config, eot: int | None) -> dict[str, Any]:
    """Return the content of `config.json`: the settings from which transformers makes a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.n_vocab,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }


def tokenizer_files(config: Config, tokens: list[bytes], eot: int | None) -> dict[str, Any]:
    """Return {name: content} of the files from which transformers makes a GPT-2 tokenizer."""
    alphabet = bytes_to_unicode()
    texts = ["".join(alphabet[byte] for byte in token) for token in tokens]
    merges = [
        " ".join("".join(alphabet[byte] for byte in part) for part in pair)
        for pair in recover_merges(tokens, eot)
    ]
    special = None if eot is None else texts[eot]
    return {
        "vocab.json": {text: id for id, text in enumerate(texts)},
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "model_max_length": config.n_ctx,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), special),
        },
    }
