"""Hugging Face's model folders: `config.json`, safetensors, tokenizer files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support.files import DamagedFile, parse_json, read_json
from gpt2_support.formats.llmc import write_array
from gpt2_support.formats.stored_tensor import FLOATS, check_tensors, read_tensor
from gpt2_support.formats.token_table import bytes_to_unicode, recover_merges
from gpt2_support.messages import preview
from gpt2_support.params import Config, tensors

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# Hugging Face folders: `config.json`, and tensors in safetensors files
# (https://huggingface.co/docs/safetensors): a header length, a header in JSON, then raw bytes

HF_SETTINGS = {  # in `config.json`: what GPT-2 is, the first value being that of a missing key
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


HF_SHARD = re.compile(r"[\w-][\w.-]{,99}\.safetensors", re.ASCII)  # a file name, never a path


HF_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, not a parameter


def hf_name(name):
    """Return Hugging Face's name: model/h3/ln_1/g is h.3.ln_1.weight, model/wte is wte.weight."""
    path = re.sub(r"^model/h(\d+)/", r"model/h/\1/", name).split("/")[1:]
    leaf = {"w": "weight", "g": "weight", "b": "bias"}
    last = [leaf[path[-1]]] if path[-1] in leaf else [path[-1], "weight"]
    return ".".join(path[:-1] + last)


def hf_shape(name, shape):
    """Return the shape at Hugging Face: a linear layer's weight is (in, out) there."""
    return shape[::-1] if name.endswith("/w") else shape


def read_safetensors(path):
    """Return {name: entry} of a safetensors file.

    Raises FileNotFoundError, or DamagedFile unless the tensors fill the file, none over another.
    """
    n_bytes = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > n_bytes - 8:
            raise DamagedFile(path, f"a header of {n_header} bytes in a file of {n_bytes}")
        header = parse_json(path, file.read(n_header))
    header.pop("__metadata__", None)
    end = 8 + n_header
    entries = {name: safetensors_entry(path, name, info, end) for name, info in header.items()}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            found = f"begins at byte {entry.offset}, expected {end}"
            raise DamagedFile(path, f"tensor {preview(name)} {found}")
        end += entry.size
    if end != n_bytes:
        raise DamagedFile(path, f"{n_bytes} bytes, but its header describes {end}")
    return entries


def safetensors_entry(path, name, info, data_start):
    """Return the entry (dtype, shape, offset, size) that a safetensors header describes."""
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        dtype, shape, start, end = None, (), 0, 0
    numbers, what = (*shape, start, end), f"tensor {preview(name)}"
    if not isinstance(dtype, str) or len(shape) > 8 or not all(type(n) is int for n in numbers):
        raise DamagedFile(path, f"{what} has no proper dtype, shape and data_offsets")
    if not all(0 <= n < 2**63 for n in numbers) or end < start:
        raise DamagedFile(path, f"{what}: " + preview(f"shape {shape}, bytes {start} to {end}"))
    if dtype in FLOATS and end - start != math.prod(shape) * np.dtype(FLOATS[dtype]).itemsize:
        raise DamagedFile(path, f"{what}: {end - start} bytes for {shape} in {dtype}")
    return SimpleNamespace(
        path=path, dtype=dtype, shape=shape, offset=data_start + start, size=end - start
    )


def hf_tensors(folder):
    """Return {name: entry} of all safetensors files of a model, names without `transformer.`."""
    paths = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not paths[0].exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(shard, str) and HF_SHARD.fullmatch(shard) for shard in shards.values()
        ):
            raise DamagedFile(index, "no weight_map that names safetensors files beside it")
        paths = [folder / shard for shard in sorted(set(shards.values()))]
    entries = {}
    for path in paths:
        for name, entry in read_safetensors(path).items():
            short = name.removeprefix("transformer.")
            if short in entries:
                raise ValueError(f"{path}: tensor {preview(name)} is there twice")
            if not HF_BUFFER.fullmatch(short):
                entries[short] = entry
    return entries


def open_hf(folder):
    """Return (config, get) of a Hugging Face GPT-2; F16 and BF16 are read as float32.

    Raises FileNotFoundError, or ValueError if the config is not a GPT-2's or the tensors are not
    those it asks for.
    """
    config = read_hf_config(folder / "config.json")
    entries = hf_tensors(folder)
    head = entries.pop("lm_head.weight", None)
    wanted = ((hf_name(name), hf_shape(name, shape)) for name, shape in tensors(config))
    check_tensors(folder, wanted, entries)
    if head is not None:
        check_tensors(
            folder, [("lm_head.weight", entries["wte.weight"].shape)], {"lm_head.weight": head}
        )
        same = np.array_equal(*(read_tensor(e).view("<u4") for e in (head, entries["wte.weight"])))
        if not same:
            raise ValueError(f"{folder}: lm_head.weight differs from wte.weight: an untied head")

    def get(name):
        array = read_tensor(entries[hf_name(name)])
        return array.T if name.endswith("/w") else array

    return config, get


def read_hf_config(path):
    """Return the Config in a `config.json`; a missing key has the default of GPT2Config.

    Raises DamagedFile, or ValueError naming the first setting that GPT-2 does not have.
    `reorder_and_upcast_attn` is not among them: it only computes attention more precisely.
    """
    found = read_json(path)
    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    default = {
        field.name: found.get(names.get(field.name, field.name), field.default)
        for field in fields(Config)
    }
    try:
        config = Config(**default)
    except ValueError as error:
        raise DamagedFile(path, error) from None
    for name, values in {**HF_SETTINGS, "n_inner": (None, 4 * config.n_embd)}.items():
        value = found.get(name, values[0])
        if value not in values:
            expected = " or ".join(map(repr, values))
            found = preview(repr(value) if isinstance(value, str) else value)
            raise ValueError(f"{path}: {name} = {found}, GPT-2 as written here has {expected}")
    return config


def write_safetensors(file, config, get):
    """Write the tensors as Hugging Face's GPT2LMHeadModel saves them, in float32."""
    names = {f"transformer.{hf_name(name)}": (name, shape) for name, shape in tensors(config)}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, (name, shape) in sorted(names.items()):
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": hf_shape(name, shape), "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, (name, shape) in sorted(names.items()):
        array = get(name)
        write_array(file, array.T if name.endswith("/w") else array, hf_shape(name, shape))


HF_FILES = (  # what transformers reads in a folder, beside config.json and model.safetensors
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def hf_config(config, eot):
    """Return the content of `config.json`: what transformers needs to know of a GPT-2."""
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


def hf_tokenizer(config, tokens, eot):
    """Return {name: content} of the files from which transformers makes a GPT-2 tokenizer."""
    letters = bytes_to_unicode()
    texts = ["".join(letters[byte] for byte in token) for token in tokens]
    merges = [
        " ".join("".join(letters[byte] for byte in part) for part in pair)
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
