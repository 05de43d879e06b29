"""Logits and gradients equal those of Hugging Face's GPT-2 on PyTorch, for any shape and seed.

Needs the extra `interop` (torch, transformers); without it these tests are skipped.
"""

import math
import re

import numpy as np
import pytest
from helpers import random_params
from hypothesis import given
from hypothesis import strategies as st

import gpt2
from gpt2_support import weights
from gpt2_support.formats import llmc
from gpt2_support.params import Config

torch = pytest.importorskip("torch", reason="the extra `interop` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `interop` is not installed")

SMALL = Config(n_vocab=300, n_ctx=16, n_embd=24, n_head=3, n_layer=2)
SIZES = {
    "124M": Config(),
    "355M": Config(n_embd=1024, n_head=16, n_layer=24),
}


def trained_size_params(config, seed, dtype):
    """Params as large as trained ones, biases and gains random, too."""
    params = random_params(config, dtype, seed, scale=1)
    for name, array in params.named.items():
        if name.endswith("/g"):
            array[...] = 1 + 0.1 * (array - 1)
        else:
            array *= {"w": 0.7 / math.sqrt(array.shape[-1]), "e": 0.05}.get(name[-1], 0.1)
    return params


def make_model(params):
    """Return Hugging Face's model with our parameters."""
    c = params.config
    config = transformers.GPT2Config(
        vocab_size=c.n_vocab,
        n_positions=c.n_ctx,
        n_embd=c.n_embd,
        n_head=c.n_head,
        n_layer=c.n_layer,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config).eval().to(torch_dtype(params))
    with torch.no_grad():
        for name, tensor in torch_tensors(model).items():
            tensor.copy_(torch.from_numpy(params.named[name]))
    return model


def torch_dtype(params):
    return {np.dtype("f4"): torch.float32, np.dtype("f8"): torch.float64}[params.flat.dtype]


def torch_tensors(model, of=lambda parameter: parameter):
    """Return {our name: tensor} of a model: h.3.attn.c_attn.weight is model/h3/attn/c_attn/w."""
    tensors = {}
    for key, parameter in model.transformer.named_parameters():
        *path, leaf = ["model", *re.sub(r"^h\.", "h", key).split(".")]
        tensor = of(parameter)
        if path[-1] in ("wte", "wpe"):
            tensors["/".join(path)] = tensor
        elif leaf == "weight" and tensor.ndim == 2:  # of a Conv1D, (in, out)
            tensors["/".join([*path, "w"])] = tensor.T
        else:
            tensors["/".join([*path, {"weight": "g", "bias": "b"}[leaf]])] = tensor
    return tensors


def relative_error(actual, expected):
    """The norm of the difference by the norm of the expected array, or the absolute one at zero."""
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-6)


def compare(config, seed, dtype, shape):
    """Return the errors of the logits, the loss, and the worst gradient of any tensor."""
    params, rng = trained_size_params(config, seed, dtype), np.random.default_rng(seed)
    x, y = rng.integers(config.n_vocab, size=(2, *shape))
    y[0, 0] = -1 if y.size > 1 else y[0, 0]
    model = make_model(params)
    logits = model(torch.from_numpy(x)).logits
    targets = torch.from_numpy(y).flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1)
    logits = logits.detach().numpy()
    logits_error = relative_error(gpt2.forward(params, x), logits)
    del logits
    loss.backward()
    actual_loss, grads = gpt2.loss_and_grads(params, x, y)
    expected = torch_tensors(model, of=lambda parameter: parameter.grad)
    assert expected.keys() == grads.named.keys()
    errors = {name: relative_error(grads.named[name], g) for name, g in expected.items()}
    return logits_error, abs(actual_loss - loss.item()), max(errors.values())


@st.composite
def cases(draw):
    n_head = draw(st.integers(1, 4))
    config = Config(
        n_vocab=draw(st.integers(2, 400)),
        n_ctx=draw(st.integers(2, 40)),
        n_embd=n_head * draw(st.integers(2, 12)),
        n_head=n_head,
        n_layer=draw(st.integers(1, 4)),
    )
    return config, draw(st.integers(0, 999)), (draw(st.integers(1, 3)), config.n_ctx)


@given(cases())
def test_any_shape_and_seed_equals_transformers_in_float64(case):
    config, seed, shape = case
    logits_error, loss_error, grads_error = compare(config, seed, np.float64, shape)
    assert logits_error < 1e-12 and loss_error < 1e-11 and grads_error < 1e-8


@given(cases())
def test_any_shape_and_seed_equals_transformers_in_float32(case):
    config, seed, shape = case
    logits_error, loss_error, grads_error = compare(config, seed, np.float32, shape)
    assert logits_error < 1e-5 and loss_error < 1e-5 and grads_error < 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("name", SIZES)
def test_released_shape_equals_transformers_in_float32(name, capsys):
    logits_error, loss_error, grads_error = compare(SIZES[name], 1, np.float32, (2, 64))
    with capsys.disabled():
        print(f"\n{name}: logits {logits_error:.1e}, loss {loss_error:.1e}, worst gradient "
              f"{grads_error:.1e}")  # fmt: skip
    assert logits_error < 1e-5 and loss_error < 1e-5 and grads_error < 1e-4


def test_folder_through_transformers_and_back_is_exact(tmp_path):
    """Ours -> Hugging Face's, loaded and saved by transformers -> ours, bit for bit."""
    params = trained_size_params(SMALL, 0, np.float32)
    llmc.save_params(tmp_path / "ours" / "model.bin", params)
    weights.convert(tmp_path / "ours", tmp_path / "hf", "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    for name, tensor in torch_tensors(model).items():
        assert tensor.detach().numpy().tobytes() == params.named[name].tobytes(), name
    model.save_pretrained(tmp_path / "saved")
    weights.convert(tmp_path / "saved", tmp_path / "back")
    ours, back = (tmp_path / name / "model.bin" for name in ("ours", "back"))
    assert back.read_bytes() == ours.read_bytes()
