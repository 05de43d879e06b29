"""Files of small models as other programs write them, and how a model is compared with them."""

import json

import numpy as np
import openai_files
import pytest
from helpers import TINY

from gpt2_support import weights
from gpt2_support.formats import llmc


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_equal(params, arrays):
    """Every parameter equals the array of OpenAI's checkpoint, bit for bit."""
    assert params.named.keys() == arrays.keys()
    for name, array in arrays.items():
        array = array[0].T if array.ndim == 3 else array
        assert np.array_equal(params.named[name].view("u4"), array.view("u4")), name


def refusal(source, target):
    """Convert, which must fail; return the error. Nothing may be left in the target."""
    with pytest.raises(ValueError) as caught:
        weights.convert(source, target)
    assert not target.exists() or contents(target) == {}
    return str(caught.value)


def write_bin(path, version, config, values, padded=None, magic=llmc.MODEL_MAGIC):
    c = config
    sizes = [c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd]
    with open(path, "wb") as file:
        llmc.write_header(
            file, magic, version, *sizes, c.n_vocab_padded if padded is None else padded
        )
        file.write(values.tobytes())


HF_CONFIG = {"vocab_size": 260, "n_positions": 8, "n_embd": 8, "n_head": 2, "n_layer": 2}


def hf_arrays(prefix="transformer."):
    """Return {name: array} as transformers saves TINY: weights (in, out)."""
    arrays = {}
    for name, array in openai_files.random_arrays(TINY).items():
        name = name.replace("model/h", "h.").replace("model/", "").replace("/", ".")
        for leaf, full in ((".w", ".weight"), (".g", ".weight"), (".b", ".bias")):
            name = name[: -len(leaf)] + full if name.endswith(leaf) else name
        name += ".weight" if name in ("wte", "wpe") else ""
        arrays[prefix + name] = array[0] if array.ndim == 3 else array
    return arrays


def write_safetensors(path, arrays, **changes):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        dtype = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8"}[
            str(array.dtype)
        ]
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, len(data)]}
        header[name] |= changes.get(name, {})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_hf(folder, arrays=None, config=(), **changes):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(HF_CONFIG | dict(config))
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_safetensors(folder / "model.safetensors", arrays or hf_arrays(), **changes)
