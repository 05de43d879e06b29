"""Hugging Face's folders: right ones are read exactly, others refused by name."""

import contextlib
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import openai_files
import pytest
from helpers import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import (
    HF_CONFIG,
    assert_equal,
    contents,
    hf_arrays,
    refusal,
    write_hf,
    write_safetensors,
)

from gpt2_support import weights
from gpt2_support.formats import huggingface, llmc
from gpt2_support.params import Config


def test_hf_folder_of_transformers_and_back_is_exact(shared, tmp_path):
    folder = shared("hf_tiny")
    weights.convert(folder, tmp_path / "ours")
    weights.convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    weights.convert(tmp_path / "hf", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "ours")
    exported = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert exported == (folder / "model.safetensors").read_bytes()


def test_hf_export_with_tokenizer_and_back_is_exact(tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    weights.convert(tmp_path / "in", tmp_path / "ours")
    weights.convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    weights.convert(tmp_path / "hf", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "ours")
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == 259
    merges = (tmp_path / "hf" / "merges.txt").read_text(encoding="utf-8")
    assert merges == "#version: 0.2\nĠ t\nh e\nĠt he\n"


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_hf_names_and_buffers_are_understood(tmp_path, prefix):
    arrays = hf_arrays(prefix)
    arrays[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
    arrays[f"{prefix}h.1.attn.masked_bias"] = np.zeros((), np.float32)
    arrays["lm_head.weight"] = arrays[f"{prefix}wte.weight"].copy()
    write_hf(tmp_path / "in", arrays)
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert_equal(llmc.load_params(tmp_path / "out"), openai_files.random_arrays(TINY))


def test_hf_f16_and_bf16_become_float32(tmp_path):
    arrays = hf_arrays()
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    write_hf(tmp_path / "f16", half)
    brain = {name: (array.view("u4") >> 16).astype("<u2") for name, array in arrays.items()}
    write_hf(tmp_path / "bf16", brain)
    name, ours = "transformer.h.1.mlp.c_fc.weight", "model/h1/mlp/c_fc/w"
    for dtype, expected in [
        ("f16", half[name].astype("f4")),
        ("bf16", (arrays[name].view("u4") >> 16 << 16).view("f4")),
    ]:
        weights.convert(tmp_path / dtype, tmp_path / f"{dtype}_out")
        actual = llmc.load_params(tmp_path / f"{dtype}_out").named[ours]
        assert np.array_equal(actual, expected.T)


def test_hf_shards_are_read(tmp_path):
    arrays = hf_arrays()
    write_hf(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    shards = {name: names[i % 2] for i, name in enumerate(arrays)}
    for shard in names:
        part = {name: array for name, array in arrays.items() if shards[name] == shard}
        write_safetensors(tmp_path / "in" / shard, part)
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert_equal(llmc.load_params(tmp_path / "out"), openai_files.random_arrays(TINY))
    write_hf(tmp_path / "in")  # now there is a whole file, too, and the index is of no account
    index.write_text("{}", encoding="utf-8")
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert_equal(llmc.load_params(tmp_path / "out"), openai_files.random_arrays(TINY))
    (tmp_path / "in" / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"x": "../" + names[0]}}), encoding="utf-8")
    assert "weight_map" in refusal(tmp_path / "in", tmp_path / "out2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 48),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("activation_function", ["gelu_new"]),
    ],
)
def test_hf_config_of_another_model_is_refused_by_name(tmp_path, name, value):
    write_hf(tmp_path / "in", config={name: value})
    assert f"{name} = {value!r}" in refusal(tmp_path / "in", tmp_path / "out")


def test_hf_config_that_means_the_same_is_accepted(tmp_path):
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 32}
    write_hf(tmp_path / "in", config={**same, "reorder_and_upcast_attn": True})
    weights.convert(tmp_path / "in", tmp_path / "out")


def test_hf_config_defaults_are_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert huggingface.read_config(tmp_path / "config.json") == Config(50257, 1024, 768, 12, 12)


def changed(name, array):
    arrays = hf_arrays()
    arrays[name] = array
    return arrays


FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        (changed("lm_head.weight", np.ones((260, 8), "f4")), {}, "an untied head"),
        (changed("lm_head.weight", np.ones((260, 9), "f4")), {}, "lm_head.weight has shape"),
        (changed("score.weight", np.ones(1, "f4")), {}, "unexpected tensor score.weight"),
        (changed("wte.weight", np.ones((260, 8), "f4")), {}, "tensor wte.weight is there twice"),
        (
            changed(FC, np.ones((32, 8), "f4")),
            {},
            "c_fc.weight has shape (32, 8), expected (8, 32)",
        ),
        (changed(FC, np.ones((8, 32), "u1")), {}, "c_fc.weight has dtype U8"),
        (None, {FC: {"data_offsets": [0, 1024]}}, "begins at byte"),
        (None, {FC: {"data_offsets": [0, 4]}}, "4 bytes for (8, 32)"),
        (None, {FC: {"data_offsets": [-4, 1020]}}, "bytes -4 to 1020"),
        (None, {FC: {"data_offsets": [8]}}, "no proper"),
        (None, {FC: {"data_offsets": [1.5, 2.5]}}, "no proper"),
        (None, {FC: {"shape": [8, "x"]}}, "no proper"),
        (None, {FC: {"shape": [1] * 500}}, "no proper"),
        (None, {FC: {"dtype": None}}, "no proper"),
    ],
)
def test_hf_tensors_with_a_fault_are_refused_by_name(tmp_path, arrays, changes, message):
    write_hf(tmp_path / "in", arrays, **changes)
    assert message in refusal(tmp_path / "in", tmp_path / "out")


def test_hf_missing_tensor_is_refused(tmp_path):
    arrays = hf_arrays()
    del arrays["transformer.h.0.ln_2.bias"]
    write_hf(tmp_path / "in", arrays)
    assert "tensor h.0.ln_2.bias is missing" in refusal(tmp_path / "in", tmp_path / "out")


def test_safetensors_cut_or_extended_anywhere_is_refused(tmp_path):
    write_hf(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    good = path.read_bytes()
    for data in [good[:n] for n in range(0, len(good), 499)] + [good + b"x", b"\xff" * 100]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors: "), open(path, "rb") as file:
            huggingface.read_safetensors(file)


@settings(max_examples=2 * settings().max_examples)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner
            )
        ),
    )
)
def test_safetensors_of_any_header_give_an_object_or_value_error(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    for value in (
        header,
        {"x": header},
        {"x": {"dtype": "F32", "shape": [], "data_offsets": header}},
    ):
        text = json.dumps(value).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with contextlib.suppress(ValueError), open(path, "rb") as file:
            assert isinstance(huggingface.read_safetensors(file), dict)


class Tensor(np.ndarray):
    """An array with what the program below needs of a tensor of PyTorch."""

    def float(self):
        return self.astype(np.float32)

    def contiguous(self):
        return np.ascontiguousarray(self)


@pytest.mark.parametrize("has_biases", [True, False])
def test_program_of_the_docs_makes_a_model_of_nanogpts_checkpoint(
    tmp_path, monkeypatch, has_biases
):
    """Run without PyTorch, which the tests do not need, on a checkpoint as nanoGPT's train.py
    saves it."""
    checkpoint, expected = {}, openai_files.random_arrays(TINY)
    for name, array in hf_arrays("_orig_mod.transformer.").items():
        if has_biases or not name.endswith(".bias"):
            array = array.T if ".h." in name and array.ndim == 2 else array
            checkpoint[name] = array.view(Tensor)
    checkpoint["_orig_mod.transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8)).view(Tensor)
    checkpoint["_orig_mod.lm_head.weight"] = checkpoint["_orig_mod.transformer.wte.weight"]
    sizes = {"block_size": 8, "bias": has_biases, "dropout": 0.0}
    torch = types.ModuleType("torch")
    torch.load = lambda path, map_location: {"model": checkpoint, "model_args": HF_CONFIG | sizes}
    torch.zeros = lambda n: np.zeros(n, np.float32)
    safetensors = types.ModuleType("safetensors.torch")
    safetensors.save_file = lambda tensors, path: write_safetensors(Path(path), tensors)
    for module in (torch, safetensors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(import json, os, torch\n.*?)```", page, re.S)[1], {})
    if not has_biases:
        expected |= {n: np.zeros_like(x) for n, x in expected.items() if n.endswith("/b")}
    assert_equal(weights.load_params(tmp_path / "from_nanogpt"), expected)
