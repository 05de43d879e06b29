"""Edited activations, and gradients with respect to activations, equal PyTorch's.

The model beside ours is Hugging Face's, with hooks. Needs the extra `interop` (torch,
transformers); without it these tests are skipped.
"""

import contextlib
import itertools
from unittest import mock

import numpy as np
import pytest
from helpers import normal

import gpt2

pytest.importorskip("torch", reason="the extra `interop` is not installed")
pytest.importorskip("transformers", reason="the extra `interop` is not installed")

import torch
from test_interop import SMALL, make_model, relative_error, trained_size_params

B, T, C, H, D = 2, 11, SMALL.n_embd, SMALL.n_head, SMALL.n_embd // SMALL.n_head
SHAPES = {
    "embed": (B, T, C), "h0": (B, T, C), "h1": (B, T, C), "ln_f": (B, T, C),
    "h0.ln_1": (B, T, C), "h1.attn.out": (B, T, C), "h0.mlp.out": (B, T, C), "h1.ln_2": (B, T, C),
    "h0.mlp.fc": (B, T, 4 * C), "h1.mlp.gelu": (B, T, 4 * C), "h1.attn.heads": (B, T, C),
    "h0.attn.heads.1": (B, T, D), "h1.attn.heads.2": (B, T, D), "h0.attn.q": (B, H, T, D),
    "h1.attn.k.0": (B, T, D), "h0.attn.v": (B, H, T, D), "h0.attn.v.2": (B, T, D),
    "h0.attn.att": (B, H, T, T), "h1.attn.att.1": (B, T, T),
}  # fmt: skip


def hook_point(model, name):
    """Return the module of Hugging Face's model that has an activation, and whether as input."""
    if not name.startswith("h"):
        return {"embed": model.transformer.drop, "ln_f": model.transformer.ln_f}[name], False
    layer, _, inner = name.partition(".")
    block = model.transformer.h[int(layer[1:])]
    inner = ".".join(inner.split(".")[:2])
    modules = {
        "": block, "ln_1": block.ln_1, "ln_2": block.ln_2, "attn.q": block.attn.c_attn,
        "attn.k": block.attn.c_attn, "attn.v": block.attn.c_attn, "attn.heads": block.attn.c_proj,
        "attn.out": block.attn.resid_dropout,
        "mlp.fc": block.mlp.c_fc, "mlp.gelu": block.mlp.act, "mlp.out": block.mlp.dropout,
    }  # fmt: skip
    return modules[inner], inner == "attn.heads"


def part(x, name):
    """Return the view of a tensor at a hook point that has a name of ours."""
    *_, inner, head = ["", "", *name.split(".")]
    inner, head = (inner, int(head)) if head.isdigit() else (head, None)
    if inner in ("q", "k", "v"):
        start = C * "qkv".index(inner)
        x = x[..., start : start + C].unflatten(-1, (H, D)).transpose(1, 2)
    elif inner == "heads" and head is not None:
        x = x.unflatten(-1, (H, D)).transpose(1, 2)
    return x if head is None else x[:, head]


@contextlib.contextmanager
def hooked(model, edit, seen):
    """Within the block the model runs with an activation replaced, and `seen` keeps what it has."""

    def change(name, x):
        x = x.clone()
        if name in edit:
            part(x, name)[...] = torch.from_numpy(edit[name])
        x.retain_grad()
        seen[name] = x
        return x

    def hook(name, out):
        return (change(name, out[0]), *out[1:]) if isinstance(out, tuple) else change(name, out)

    with contextlib.ExitStack() as stack:
        for name in {**edit, **seen}:
            if ".att" in name.replace(".attn", ""):
                stack.enter_context(weights_changed(name, change))
                continue
            module, is_input = hook_point(model, name)
            if is_input:
                handle = module.register_forward_pre_hook(lambda _, x, n=name: hook(n, x))
            else:
                handle = module.register_forward_hook(lambda _, x, out, n=name: hook(n, out))
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def weights_changed(name, change):
    """Within the block the attention weights of a layer are changed where dropout receives them."""
    layers = itertools.count()

    def dropout(x, *args, **kwargs):
        is_here = x.ndim == 4 and name.startswith(f"h{next(layers)}.")
        return change(name, x) if is_here else x

    with mock.patch.object(torch.nn.functional, "dropout", dropout):
        yield


def errors_of(name, dtype, edited=True):
    """Return the errors of logits and gradients when `name` is edited, or only looked at."""
    params, tokens = trained_size_params(SMALL, 1, dtype), np.random.default_rng(2)
    tokens = tokens.integers(SMALL.n_vocab, size=(B, T))
    edit = {name: abs(normal(*SHAPES[name])).astype(dtype)} if edited else {}
    dlogits, seen = normal(B, T, SMALL.n_vocab).astype(dtype), {name: None}
    model = make_model(params)
    with hooked(model, edit, seen):
        logits = model(torch.from_numpy(tokens)).logits
    (logits * torch.from_numpy(dlogits)).sum().backward()
    record, grads = {}, {}
    actual = gpt2.forward(params, tokens, edit=edit, record=record)
    gradient = gpt2.gradient(params, tokens, dlogits, edit=edit, record_grads=grads)
    dwpe = model.transformer.wpe.weight.grad
    path = ".".join(name.split(".")[:3])
    expected = part(seen[name].grad, path).numpy()
    return {
        "logits": relative_error(actual, logits.detach().numpy()),
        "activation": relative_error(record[path], part(seen[name].detach(), path).numpy()),
        "gradient": relative_error(grads[path], expected),
        "before": relative_error(gradient.wpe, 0 if dwpe is None else dwpe.numpy()),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_edited_forward_equals_transformers_with_hooks(name):
    errors = errors_of(name, np.float32)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradient_of_an_activation_equals_pytorch(name, edited):
    errors = errors_of(name, np.float64, edited)
    assert max(errors.values()) < 1e-10, errors
