"""gpt2.py: layers and their gradients, the model, the KV cache.

Gradients are compared with central finite differences in float64, the model with a naive one
written from the paper, and both with PyTorch's and OpenAI's numbers where those are at hand.
"""

import dataclasses
import functools
import inspect
import json
import math
import re
import threading
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from helpers import CONFIG, normal, only_thorough, random_params, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from scripted import script_model

import encoder
import gpt2
from gpt2_support import blas, gradients, hooks, hub, tiles
from gpt2_support.formats import llmc
from gpt2_support.masks import Dropout
from gpt2_support.params import Config, LayerNorm, Params, n_params

pytestmark = [
    pytest.mark.filterwarnings("error"),  # an overflow or an invalid value is a failure
    pytest.mark.usefixtures("several_tiles"),
]

MINI = Config(n_vocab=7, n_ctx=5, n_embd=4, n_head=2, n_layer=2)  # for numeric gradients

EPS = {np.float32: 1e-5, np.float64: 1e-12}  # how far two orders of the same sums may differ


# ----------------------------------------------------------------------------------------------
# Gradients against finite differences


def numeric_gradient(function, x, step=5e-4):
    """d function() / dx, with x changed in place, by the central difference over five points.

    Its error is of order step^4 (Abramowitz and Stegun 1964, 25.3.6).
    """
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        old, values = x[i], []
        for steps in (-2, -1, 1, 2):
            x[i] = old + steps * step
            values.append(function())
        x[i] = old
        gradient[i] = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * step)
    return gradient


def assert_gradient(actual, numeric, name=""):
    """Every element within 1e-7 of its own size, or within rounding: 1e-9 of the largest."""
    largest = np.abs(numeric).max(initial=0)
    np.testing.assert_allclose(actual, numeric, rtol=1e-7, atol=1e-9 * largest, err_msg=name)


def check_backward(forward, backward, inputs, params=None, under="nothing"):
    """Compare a backward with numeric gradients of the sum of weights * forward(*inputs).

    forward(*inputs) -> out, cache; backward(dout, cache, grads) -> the gradients of the inputs.
    Parameters whose names begin with `under` must receive their gradients on top of what is there,
    and no others may be touched.
    """
    out, cache = forward(*inputs)
    weights = normal(*out.shape, seed=9)
    grads = random_params(params.config, seed=8) if params else None
    before = grads.flat.copy() if params else None

    def loss():
        return float((weights * forward(*inputs)[0]).sum())

    actual = backward(weights.copy(), cache, grads)
    actual = actual if isinstance(actual, tuple) else (actual,)
    if inputs:
        for x, dx in zip(inputs, actual, strict=True):
            assert dx.shape == x.shape
            assert_gradient(dx, numeric_gradient(loss, x))
    if params:
        before = Params(params.config, before)
        for name, array in params.named.items():
            change = grads.named[name] - before.named[name]
            if name.startswith(under):
                assert_gradient(change, numeric_gradient(loss, array), name)
            else:
                assert not change.any(), name


def test_embed_gradient_is_numeric_with_repeated_tokens():
    params = random_params(MINI)
    tokens = np.array([[3, 3, 0], [6, 3, 0]])
    check_backward(
        lambda: gpt2.embed(tokens, np.arange(3)[None], params),
        lambda dout, cache, d: gpt2.embed_backward(dout, cache, d),
        (),
        params,
        "model/w",
    )


def test_layer_norm_gradient_is_numeric():
    params = random_params(MINI)
    check_backward(
        lambda x: gpt2.layer_norm(x, params.ln_f),
        lambda dout, cache, d: gpt2.layer_norm_backward(dout, cache, params.ln_f, d.ln_f),
        (3 * normal(2, 3, 4) + 5,),
        params,
        "model/ln_f/",
    )


def test_linear_gradient_is_numeric():
    params = random_params(MINI)
    p = params.h[1].mlp.c_fc
    check_backward(
        lambda x: gpt2.linear(x, p),
        lambda dout, cache, d: gpt2.linear_backward(dout, cache, p, d.h[1].mlp.c_fc),
        (normal(2, 3, 4),),
        params,
        "model/h1/mlp/c_fc/",
    )


def test_gelu_gradient_is_numeric():
    check_backward(
        gpt2.gelu,
        lambda dout, cache, d: gpt2.gelu_backward(dout, cache),
        (np.linspace(-5, 5, 41).reshape(1, 41) + 0.01,),
    )


def softmax(x):
    """gpt2.softmax, which works in place, as a forward of the usual form."""
    att = gpt2.softmax(x.copy())
    return att, att


def test_softmax_gradient_is_numeric():
    check_backward(
        softmax,
        lambda dout, att, d: gpt2.softmax_backward(dout, att),
        (2 * normal(2, 3, 5),),
    )


def tiled(q, k, v, positions):
    """Attention in tiles, as a forward of the usual form."""
    out, att = tiles.apply(gpt2.scaled_dot_product_attention, q, k, v, positions)
    return out, (q, k, v, att)


def tiled_backward(dout, cache):
    backward = gpt2.scaled_dot_product_attention_backward
    return tiles.apply_backward(backward, dout, *cache)


@pytest.mark.parametrize("n_rows", [only_thorough(1), 2, only_thorough(64)])
@pytest.mark.parametrize(
    "positions",
    [[[0, 1, 2]], [[2, 3, 4]], [[0, 1, 2], [2, 3, 4]], [[4, 4, 4]]],
    ids=["from the start", "after others", "ragged", "nothing hidden"],
)
def test_attend_gradient_is_numeric(monkeypatch, positions, n_rows):
    monkeypatch.setattr(tiles, "QUERIES", n_rows)
    q, k, v = normal(2, 2, 3, 4), normal(2, 2, 5, 4, seed=3), normal(2, 2, 5, 4, seed=4)
    positions = np.array(positions)
    check_backward(
        lambda q, k, v: tiled(q, k, v, positions),
        lambda dout, cache, d: tiled_backward(dout, cache),
        (q, k, v),
    )


def test_attention_weights_are_kept_only_for_a_backward_or_a_record(monkeypatch):
    params, tokens, kept = random_params(), random_tokens(2, 5), []

    def apply(*args, apply=tiles.apply):
        out, att = apply(*args)
        kept.append(len(att) > 0)
        return out, att

    monkeypatch.setattr(tiles, "apply", apply)
    for call in (
        lambda: gpt2.forward(params, tokens),
        lambda: gpt2.token_losses(params, tokens, tokens),
        lambda: gpt2.forward(params, tokens, record={}),
        lambda: gpt2.loss_and_grads(params, tokens, tokens),
    ):
        call()
    n = params.config.n_layer
    assert kept == 2 * n * [False] + 2 * n * [True]


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_attention_in_threads_gives_the_same_bits(monkeypatch, n_threads):
    q, k, v = normal(2, 3, 9, 4), normal(2, 3, 11, 4, seed=3), normal(2, 3, 11, 4, seed=4)
    positions, dout = np.arange(2, 11)[None], normal(2, 3, 9, 4, seed=5)
    out, cache = tiled(q, k, v, positions)
    expected = [out, *tiled_backward(dout, cache)]
    names, threads = set(), [n_threads]

    def softmax(scores, softmax=gpt2.softmax):
        names.add(threading.current_thread().name)
        return softmax(scores)

    monkeypatch.setattr(blas, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(gpt2, "softmax", softmax)
    monkeypatch.setattr(blas, "get_threads", lambda: threads[-1])
    monkeypatch.setattr(blas, "set_threads", threads.append)
    out, cache = tiled(q, k, v, positions)
    for actual, same in zip([out, *tiled_backward(dout, cache)], expected, strict=True):
        np.testing.assert_array_equal(actual, same)
    assert len(names) > 1
    assert threads == [n_threads, 1, n_threads, 1, n_threads]


@pytest.mark.parametrize("n_threads", [1, 2, 8])
@pytest.mark.parametrize("n_values, n_blocks", [(1, 6), (14, 3), (28, 2), (41, 2), (42, 1)])
def test_gelu_by_rows_gives_the_same_bits(monkeypatch, n_threads, n_values, n_blocks):
    x, dout, names = normal(2, 3, 7), normal(2, 3, 7, seed=5), set()
    expected, cache = gpt2.gelu(x)
    expected_dx = gpt2.gelu_backward(dout, cache)

    def gelu(x):
        names.add(threading.current_thread().name)
        return gpt2.gelu(x)

    monkeypatch.setattr(tiles, "BLOCK", n_values)
    monkeypatch.setattr(blas, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(blas, "get_threads", lambda: n_threads)
    monkeypatch.setattr(blas, "set_threads", lambda n: None)
    out, caches = tiles.apply_by_rows(gelu, x)
    np.testing.assert_array_equal(out, expected)
    assert len(caches) == n_blocks
    assert (len(names) > 1) == (n_threads > 1 and n_blocks > 1)
    dx = tiles.apply_by_rows_backward(gpt2.gelu_backward, dout, caches)
    np.testing.assert_array_equal(dx, expected_dx)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("n_out", [1, 5, 64, 301])
def test_a_product_of_few_rows_is_the_product(monkeypatch, n_threads, n_rows, n_out):
    monkeypatch.setattr(blas, "STACK", 40 * n_rows * 6)  # 6 rows of w
    monkeypatch.setattr(blas, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(blas, "has_small_kernels", lambda: True)
    monkeypatch.setattr(blas, "get_threads", lambda: n_threads)
    monkeypatch.setattr(blas, "set_threads", lambda n: None)
    x, w = normal(n_rows, 40), normal(n_out, 40, seed=3)
    actual = blas.matmul(x, w.T)
    assert actual.flags.c_contiguous
    np.testing.assert_allclose(actual, x @ w.T, rtol=0, atol=1e-13)
    actual = blas.matmul(x.astype(np.float32), w.astype(np.float32).T)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, x @ w.T, rtol=0, atol=1e-4)


def test_few_rows_are_taken_apart_only_for_kernels_that_are_made_for_it(monkeypatch):
    x, w = normal(4, 8), normal(16, 8)
    stacks = []
    monkeypatch.setattr(blas, "parallel_for", lambda function, n, work: stacks.append(n))
    for kernels, expected in (("Haswell", []), ("unknown", []), ("SkylakeX", [1])):
        monkeypatch.setattr(blas, "kernels", lambda kernels=kernels: kernels)
        blas.matmul(x, w.T)
        assert len(stacks) == len(expected)


def dropping(p):
    """A hook that drops the same values each time it is made; none for p = 0."""
    return hooks.make(MINI, False, None, None, None, Dropout(p, seed=7) if p else None)


@pytest.mark.parametrize("p_drop", [0.0, 0.4])
def test_attention_gradient_is_numeric(p_drop):
    params = random_params(MINI)
    p, positions = params.h[0].attn, np.arange(3)[None]

    def forward(x):
        hook = dropping(p_drop)
        out, cache = gpt2.attention(x, p, 2, positions, None, hook)
        return out, (cache, hook)

    check_backward(
        forward,
        lambda dout, cache, d: gpt2.attention_backward(dout, cache[0], p, d.h[0].attn, 2, cache[1]),
        (normal(2, 3, 4),),
        params,
        "model/h0/attn/",
    )


@pytest.mark.parametrize("p_drop", [0.0, 0.4])
def test_mlp_gradient_is_numeric(p_drop):
    params = random_params(MINI)
    p = params.h[1].mlp

    def forward(x):
        hook = dropping(p_drop)
        out, cache = gpt2.mlp(x, p, hook)
        return out, (cache, hook)

    check_backward(
        forward,
        lambda dout, cache, d: gpt2.mlp_backward(dout, cache[0], p, d.h[1].mlp, cache[1]),
        (normal(2, 3, 4),),
        params,
        "model/h1/mlp/",
    )


def test_block_gradient_is_numeric():
    params = random_params(MINI)
    p, positions = params.h[0], np.arange(3)[None]
    check_backward(
        lambda x: gpt2.block(x, p, 2, positions),
        lambda dout, cache, d: gpt2.block_backward(dout, cache, p, d.h[0], 2),
        (normal(2, 3, 4),),
        params,
        "model/h0/",
    )


def test_cross_entropy_gradient_is_numeric_and_zero_where_ignored():
    targets = np.array([0, 6, -1, 3, 3, -1])
    check_backward(
        lambda logits: gpt2.cross_entropy(logits.copy(), targets),
        lambda dout, cache, d: gpt2.cross_entropy_backward(dout, cache),
        (2 * normal(6, 7),),
    )


@pytest.mark.parametrize("head_rows", [1, 3, 6, 256])
@pytest.mark.parametrize("targets", [[0, 6, -1, 3, 3, -1, 2], [-1, -1, -1, -1, 5, -1, -1]], ids=str)
def test_head_gradient_is_numeric_over_blocks_of_rows(targets, head_rows, monkeypatch):
    monkeypatch.setattr(gpt2, "LM_HEAD_ROWS", head_rows)
    monkeypatch.setattr(gradients, "ACCUMULATED_ROWS", head_rows)
    params, targets = random_params(MINI), np.array(targets)
    x, grads = normal(7, 4), random_params(MINI, seed=8)
    before, n_counted = grads.flat.copy(), (targets >= 0).sum()

    def loss():
        return float(gpt2.lm_head_loss(x, params.wte, targets)[0].sum() / n_counted)

    losses, dx = gpt2.lm_head_loss(x, params.wte, targets, grads.wte)
    assert losses.shape == (7,)
    assert not losses[targets == -1].any()
    assert math.isclose(losses.sum() / n_counted, loss(), rel_tol=1e-15)
    assert_gradient(dx, numeric_gradient(loss, x))
    change = Params(MINI, grads.flat - before)
    assert_gradient(change.wte, numeric_gradient(loss, params.wte))
    assert not change.flat[128 * 4 :].any()


def test_head_without_gradients_or_targets_gives_none_or_zeros():
    losses, dx = gpt2.lm_head_loss(normal(3, 12), random_params().wte, np.array([1, -1, 60]))
    assert dx is None
    assert losses[1] == 0
    losses, dx = gpt2.lm_head_loss(
        normal(2, 12), random_params().wte, np.array([-1, -1]), random_params().wte
    )
    assert not losses.any()
    assert not dx.any()


@pytest.mark.parametrize("p_drop", [0.0, 0.4])
def test_transformer_gradient_is_numeric(p_drop):  # of one layer; the loss, below, is that of two
    config = dataclasses.replace(MINI, n_layer=1)
    params, tokens = random_params(config), np.array([[3, 3, 0, 6, 1], [6, 3, 0, 3, 3]])

    def forward():
        caches, hook = deque(), dropping(p_drop)
        x = gpt2.transformer(params, tokens, None, hook, caches)
        return x, (caches, hook)

    check_backward(
        forward,
        lambda dout, cache, d: gpt2.transformer_backward(dout, cache[0], params, d, cache[1]),
        (),
        params,
        "model/",
    )


def test_dropout_keeps_the_mean_and_drops_where_gpt2_does():
    x = np.ones((200, 300), np.float32)
    out = hooks.Hooks(CONFIG, drop=Dropout(0.1, 0))("embed", x)
    assert set(np.unique(out)) == {0, np.float32(1 / 0.9)} and out.dtype == np.float32
    assert (out == 0).mean() == pytest.approx(0.1, abs=0.01)
    assert hooks.make(CONFIG, False, None) is hooks.NO_HOOK
    params, masks = random_params(), []

    class Spy(Dropout):
        def mask(self, *shape, dtype):
            masks.append(shape)
            return super().mask(*shape, dtype=dtype)

    tokens = random_tokens(2, 5)
    dropped, _ = gpt2.loss_and_grads(params, tokens, tokens, drop=Spy(0.5, 0))
    B, T, C, H = 2, 5, 12, 3  # embeddings; in each layer attention weights and two branches
    assert masks == [(B, T, C)] + 2 * [(B, H, T, T), (B, T, C), (B, T, C)]
    assert dropped != gpt2.loss_and_grads(params, tokens, tokens)[0]


@pytest.mark.parametrize("n_threads", [2, 3])
def test_dropout_of_attention_does_not_depend_on_tiles(monkeypatch, n_threads):
    params, tokens = random_params(), random_tokens(2, 9)
    expected, grads = gpt2.loss_and_grads(params, tokens, tokens, drop=Dropout(0.5, 0))
    monkeypatch.setattr(tiles, "QUERIES", 2)
    monkeypatch.setattr(blas, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(blas, "get_threads", lambda: n_threads)
    monkeypatch.setattr(blas, "set_threads", lambda n: None)
    loss, tiled = gpt2.loss_and_grads(params, tokens, tokens, drop=Dropout(0.5, 0))
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(tiled.flat, grads.flat, rtol=0, atol=1e-12)


@pytest.mark.thorough
def test_loss_gradient_is_numeric_for_every_parameter(monkeypatch):
    monkeypatch.setattr(gpt2, "LM_HEAD_ROWS", 4)
    params = random_params(MINI)
    tokens = np.array([[3, 3, 0, 6, 1], [6, 3, 0, 3, 3]])  # some twice, 2, 4 and 5 never
    targets = np.array([[3, 0, -1, 1, 5], [-1, 0, 3, 3, 6]])
    loss, grads = gpt2.loss_and_grads(params, tokens, targets)

    def numeric_loss():
        losses = gpt2.token_losses(params, tokens, targets)
        return float(losses.sum() / 8)

    assert math.isclose(loss, numeric_loss(), rel_tol=1e-14)
    for name, array in params.named.items():
        assert_gradient(grads.named[name], numeric_gradient(numeric_loss, array), name)


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "linear", "attention", "mlp", "block"])
def test_layer_leaves_its_input_as_it_was(name):
    params = random_params()
    h, positions, x = params.h[0], np.arange(5)[None], normal(2, 5, 12)
    layers = {
        "gelu": lambda: gpt2.gelu(x),
        "layer_norm": lambda: gpt2.layer_norm(x, h.ln_1),
        "linear": lambda: gpt2.linear(x, h.mlp.c_fc),
        "attention": lambda: gpt2.attention(x, h.attn, 3, positions),
        "mlp": lambda: gpt2.mlp(x, h.mlp),
        "block": lambda: gpt2.block(x, h, 3, positions),
    }
    layers[name]()
    np.testing.assert_array_equal(x, normal(2, 5, 12))


def test_backward_leaves_parameters_and_arguments_as_they_were():
    params, tokens, targets = random_params(), random_tokens(2, 9), random_tokens(2, 9, seed=5)
    gpt2.loss_and_grads(params, tokens, targets)
    np.testing.assert_array_equal(params.flat, random_params().flat)
    np.testing.assert_array_equal(tokens, random_tokens(2, 9))
    np.testing.assert_array_equal(targets, random_tokens(2, 9, seed=5))


def test_grads_accumulate_over_batches():
    params, tokens, targets = random_params(), random_tokens(2, 9), random_tokens(2, 9, seed=5)
    total = Params(CONFIG, np.zeros_like(params.flat))
    parts = []
    for tokens_b, targets_b in zip(tokens, targets, strict=True):
        loss, actual = gpt2.loss_and_grads(params, tokens_b, targets_b, grads=total)
        assert actual is total
        parts.append((loss, gpt2.loss_and_grads(params, tokens_b, targets_b)[1].flat))
    scale = np.abs(total.flat).max()
    summed = parts[0][1] + parts[1][1]
    np.testing.assert_allclose(total.flat, summed, rtol=0, atol=1e-14 * scale)
    loss, grads = gpt2.loss_and_grads(params, tokens, targets)  # rows of equal length: the mean
    assert math.isclose(loss, (parts[0][0] + parts[1][0]) / 2, rel_tol=1e-14)
    np.testing.assert_allclose(grads.flat, total.flat / 2, rtol=0, atol=1e-14 * scale)


def test_grads_are_zero_for_the_padding_and_for_what_was_not_used():
    params, tokens = random_params(), random_tokens(2, 9)
    _, grads = gpt2.loss_and_grads(params, tokens, tokens)
    assert not grads.flat[61 * 12 : 128 * 12].any()
    assert not grads.wpe[9:].any()
    assert grads.wpe[:9].all()


def test_ignored_targets_change_neither_loss_nor_gradient_of_the_rest():
    params, tokens, targets = random_params(), random_tokens(9), random_tokens(9, seed=5)
    loss, grads = gpt2.loss_and_grads(params, tokens[:6], targets[:6])
    targets[6:] = -1
    longer_loss, longer = gpt2.loss_and_grads(params, tokens, targets)
    assert math.isclose(loss, longer_loss, rel_tol=1e-14)
    scale = np.abs(grads.flat).max()
    np.testing.assert_allclose(grads.flat, longer.flat, rtol=0, atol=1e-14 * scale)


# ----------------------------------------------------------------------------------------------
# The model against a naive one


def naive_forward(params, tokens):
    """GPT-2 one token and one head at a time: tokens (T,) -> logits (T, V)."""
    config = params.config
    D = config.n_embd // config.n_head

    def norm(x, p):
        return (x - np.mean(x)) / math.sqrt(np.var(x) + 1e-5) * p.g + p.b

    def gelu(x):
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    stream = [params.wte[token] + params.wpe[t] for t, token in enumerate(tokens)]
    for p in params.h:
        keys, values = [], []
        for t, x in enumerate(stream):
            qkv = p.attn.c_attn.w @ norm(x, p.ln_1) + p.attn.c_attn.b
            query, key, value = np.split(qkv, 3)
            keys.append(key)
            values.append(value)
            mixed = np.zeros(config.n_embd)
            for h in range(config.n_head):
                own = slice(h * D, (h + 1) * D)
                scores = [math.exp(query[own] @ k[own] / math.sqrt(D)) for k in keys]
                for score, v in zip(scores, values, strict=True):
                    mixed[own] += score / sum(scores) * v[own]
            x = x + p.attn.c_proj.w @ mixed + p.attn.c_proj.b
            hidden = p.mlp.c_fc.w @ norm(x, p.ln_2) + p.mlp.c_fc.b
            hidden = np.array([gelu(value) for value in hidden])
            stream[t] = x + p.mlp.c_proj.w @ hidden + p.mlp.c_proj.b
    return np.array([params.wte @ norm(x, params.ln_f) for x in stream])


def naive_losses(logits, targets):
    """-log softmax(logits)[target], 0 for a target of -1: (N, V), (N,) -> (N,)."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows = zip(log_probs, targets, strict=True)
    return np.array([0 if target == -1 else -row[target] for row, target in rows])


@pytest.mark.parametrize("n_tokens", [1, 7, 16])
def test_forward_equals_a_naive_transformer(n_tokens):
    params, tokens = random_params(), random_tokens(n_tokens)
    np.testing.assert_allclose(
        gpt2.forward(params, tokens), naive_forward(params, tokens), rtol=1e-12, atol=1e-12
    )


def test_forward_of_a_batch_equals_a_naive_transformer_row_by_row():
    params, tokens = random_params(), random_tokens(3, 11)
    expected = [naive_forward(params, row) for row in tokens]
    np.testing.assert_allclose(gpt2.forward(params, tokens), expected, rtol=1e-12, atol=1e-12)


def test_forward_in_float32_is_within_rounding_of_float64():
    tokens = random_tokens(2, 16)
    params = random_params(dtype=np.float32)
    exact = gpt2.forward(Params(CONFIG, params.flat.astype(np.float64)), tokens)
    assert np.abs(exact).max() > 1
    np.testing.assert_allclose(gpt2.forward(params, tokens), exact, rtol=0, atol=1e-5)


def test_forward_of_one_row_has_no_batch_axis():
    params, tokens = random_params(), random_tokens(9)
    logits = gpt2.forward(params, tokens)
    assert logits.shape == (9, 61)
    np.testing.assert_array_equal(logits[None], gpt2.forward(params, tokens[None]))
    np.testing.assert_array_equal(logits, gpt2.forward(params, tokens.tolist()))
    np.testing.assert_array_equal(logits, gpt2.forward(params, tokens.astype(np.uint16)))


RECORDED = {  # what a block leaves in a record, and its shape
    "ln_1": "BTC", "attn.q": "BHTD", "attn.k": "BHSD", "attn.v": "BHSD", "attn.att": "BHTS",
    "attn.heads": "BTC", "attn.out": "BTC", "ln_2": "BTC", "mlp.fc": "BTF", "mlp.gelu": "BTF",
    "mlp.out": "BTC",
}  # fmt: skip


def test_record_names_what_forward_computes(monkeypatch):
    monkeypatch.setattr(tiles, "QUERIES", 4)
    params, tokens, record = random_params(), random_tokens(2, 11), {}
    logits = gpt2.forward(params, tokens, record=record)
    np.testing.assert_array_equal(logits, gpt2.forward(params, tokens))
    np.testing.assert_array_equal(record["logits"], logits)
    sizes = {"B": 2, "T": 11, "S": 11, "C": 12, "H": 3, "D": 4, "F": 48}
    for i in range(2):
        for name, shape in RECORDED.items():
            assert record[f"h{i}.{name}"].shape == tuple(sizes[axis] for axis in shape), name
    assert len(record) == 1 + 2 * (len(RECORDED) + 1) + 2
    x = params.wte[tokens] + params.wpe[:11]
    np.testing.assert_array_equal(record["embed"], x)
    for i, p in enumerate(params.h):
        one = {name: record[f"h{i}.{name}"] for name in RECORDED}
        assert_same = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
        assert_same(one["ln_1"], gpt2.layer_norm(x, p.ln_1)[0])
        mixed = one["attn.att"] @ one["attn.v"]
        assert_same(one["attn.att"].sum(-1), np.ones((2, 3, 11)))
        assert not np.triu(one["attn.att"], 1).any()
        assert_same(one["attn.heads"], gpt2.merge_heads(mixed))
        x = x + one["attn.out"]
        assert_same(one["ln_2"], gpt2.layer_norm(x, p.ln_2)[0])
        assert_same(one["mlp.gelu"], gpt2.gelu(one["mlp.fc"])[0])
        x = x + one["mlp.out"]
        assert_same(record[f"h{i}"], x)
    np.testing.assert_allclose(record["ln_f"], gpt2.layer_norm(x, params.ln_f)[0], rtol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_record_shares_no_memory_with_the_logits_returned(shape):
    params, record = random_params(), {}
    logits = gpt2.forward(params, random_tokens(*shape), record=record)
    assert not any(np.shares_memory(logits, array) for array in record.values())


def test_record_through_a_cache_stays_as_it_was():
    params, tokens = random_params(), random_tokens(12)
    whole, kv, first, rest = {}, gpt2.KVCache(CONFIG, dtype=np.float64), {}, {}
    gpt2.forward(params, tokens, record=whole)
    gpt2.forward(params, tokens[:8], kv, first)
    before = {name: array.copy() for name, array in first.items()}
    gpt2.forward(params, tokens[8:], kv, rest)
    kv.buffer[...] = 0
    for name, array in whole.items():
        assert (first[name] == before[name]).all(), name
        actual = rest[name]
        if name.endswith("attn.att"):
            array = array[:, 8:]
        elif not name.endswith(("attn.k", "attn.v")):
            actual = np.concatenate([first[name], actual], axis=-2)
        np.testing.assert_allclose(actual, array, rtol=1e-10, atol=1e-12, err_msg=name)


def test_gelu_equals_its_formula():
    x = np.array([-40.0, -3.0, -1.0, -1e-8, 0.0, 1e-8, 0.5, 1.0, 3.0, 40.0])
    formula = [0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) for z in x]
    np.testing.assert_allclose(gpt2.gelu(x)[0], formula, rtol=1e-14, atol=1e-14)


def test_layer_norm_gives_mean_0_and_variance_1():
    x = 100 * normal(5, 64) + 1000
    p = LayerNorm(g=np.ones(64), b=np.zeros(64))
    out, _ = gpt2.layer_norm(x, p)
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-13)
    np.testing.assert_allclose(out.var(-1), 1, atol=1e-8)  # not exactly: eps counts
    constant, _ = gpt2.layer_norm(np.full((1, 64), 7.0), p)
    assert not constant.any()


def test_softmax_sums_to_one_and_ignores_a_shift():
    x = normal(4, 9)
    probs = gpt2.softmax(x.copy())
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-15)
    np.testing.assert_allclose(gpt2.softmax(x + 50), probs, rtol=1e-12)
    np.testing.assert_allclose(probs, np.exp(x) / np.exp(x).sum(-1, keepdims=True), rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_and_cross_entropy_are_stable_at_ten_thousand(dtype):
    logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype)
    probs = gpt2.softmax(logits.copy())
    third = np.full(3, 1 / 3)
    exact = [[1, 0, 0], [0, 1, 0], third, third]
    np.testing.assert_allclose(probs, exact, rtol=1e-7)
    targets = np.array([0, 0, 2, 1])
    losses, cache = gpt2.cross_entropy(logits.copy(), targets)
    np.testing.assert_allclose(losses, [0, 2e4, math.log(3), math.log(3)], rtol=1e-7)
    dlogits = gpt2.cross_entropy_backward(np.ones(4, dtype), cache)
    np.testing.assert_allclose(dlogits, exact - np.eye(3)[targets], rtol=1e-6)


def test_cross_entropy_equals_the_naive_formula():
    logits, targets = 3 * normal(20, 61), random_tokens(20)
    targets[::4] = -1
    losses, _ = gpt2.cross_entropy(logits.copy(), targets)
    np.testing.assert_allclose(losses, naive_losses(logits, targets), rtol=1e-13)


def test_token_losses_equal_the_naive_formula():
    params, tokens, targets = random_params(), random_tokens(2, 9), random_tokens(2, 9, seed=5)
    targets[1, 4:] = -1
    losses = gpt2.token_losses(params, tokens, targets)
    logits = gpt2.forward(params, tokens).reshape(18, 61)
    expected = naive_losses(logits, targets.ravel()).reshape(2, 9)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gpt2.token_losses(params, tokens[1], targets[1]), losses[1])
    loss, _ = gpt2.loss_and_grads(params, tokens, targets)
    assert math.isclose(loss, expected.sum() / 13, rel_tol=1e-13)


def test_loss_of_a_uniform_model_is_the_log_of_the_vocabulary():
    params = random_params()
    params.ln_f.g[:] = params.ln_f.b[:] = 0
    loss, _ = gpt2.loss_and_grads(params, random_tokens(9), random_tokens(9, seed=5))
    assert math.isclose(loss, math.log(61), rel_tol=1e-14)


# ----------------------------------------------------------------------------------------------
# Dtypes


def arrays_in(tree):
    """Yield the arrays in nested tuples and lists."""
    if isinstance(tree, np.ndarray | np.generic):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from arrays_in(part)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_the_parameters_is_that_of_every_result(dtype):
    params, tokens = random_params(dtype=dtype), random_tokens(2, 9)
    kv = gpt2.KVCache(CONFIG, 2, dtype)
    assert gpt2.forward(params, tokens).dtype == dtype
    assert gpt2.forward(params, tokens, kv).dtype == kv.buffer.dtype == dtype
    assert gpt2.forward(params, tokens[:, :1], kv).dtype == dtype
    caches = deque()
    gpt2.transformer(params, tokens, caches=caches)
    floats = [array for array in arrays_in(tuple(caches)) if array.dtype.kind == "f"]
    assert len(floats) > 20
    assert {array.dtype for array in floats} == {np.dtype(dtype)}
    loss, grads = gpt2.loss_and_grads(params, tokens, tokens)
    assert type(loss) is float
    assert grads.flat.dtype == dtype
    assert gpt2.token_losses(params, tokens, tokens).dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_every_layer_and_backward_is_that_of_its_input(dtype):
    params, grads = random_params(dtype=dtype), random_params(dtype=dtype)
    x, p, d = normal(2, 5, 12).astype(dtype), params.h[0], grads.h[0]
    positions, targets = np.arange(5)[None], random_tokens(10)
    pairs = [
        (gpt2.gelu(x), gpt2.gelu_backward),
        (gpt2.layer_norm(x, p.ln_1), lambda *a: gpt2.layer_norm_backward(*a, p.ln_1, d.ln_1)),
        (
            gpt2.linear(x, p.mlp.c_fc),
            lambda *a: gpt2.linear_backward(*a, p.mlp.c_fc, d.mlp.c_fc),
        ),
        (
            gpt2.attention(x, p.attn, 3, positions),
            lambda *a: gpt2.attention_backward(*a, p.attn, d.attn, 3),
        ),
        (gpt2.mlp(x, p.mlp), lambda *a: gpt2.mlp_backward(*a, p.mlp, d.mlp)),
        (gpt2.block(x, p, 3, positions), lambda *a: gpt2.block_backward(*a, p, d, 3)),
        (
            gpt2.cross_entropy(gpt2.as_rows(x).repeat(6, 1), targets),
            gpt2.cross_entropy_backward,
        ),
    ]
    for (out, cache), backward in pairs:
        assert out.dtype == dtype
        assert backward(np.ones_like(out), cache).dtype == dtype
    losses, dx = gpt2.lm_head_loss(gpt2.as_rows(x), params.wte, targets, grads.wte)
    assert losses.dtype == dx.dtype == dtype


# ----------------------------------------------------------------------------------------------
# The KV cache


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chunks_through_the_cache_equal_the_whole(dtype):
    params, tokens = random_params(dtype=dtype), random_tokens(2, 16)
    whole = gpt2.forward(params, tokens)

    @given(st.sets(st.integers(1, 15)), st.integers(1, 16))
    def check(cuts, n):
        kv = gpt2.KVCache(CONFIG, 2, dtype)
        ends = sorted(cut for cut in cuts if cut < n)
        chunks = np.split(tokens[:, :n], ends, axis=1)
        logits = np.concatenate([gpt2.forward(params, chunk, kv) for chunk in chunks], axis=1)
        np.testing.assert_allclose(logits, whole[:, :n], rtol=0, atol=EPS[dtype])
        assert kv.length.tolist() == [n, n]

    check()


def test_cache_of_one_row_continues_tokens_without_a_batch_axis():
    params, tokens = random_params(), random_tokens(9)
    kv = gpt2.KVCache(CONFIG, dtype=np.float64)
    first, rest = gpt2.forward(params, tokens[:4], kv), gpt2.forward(params, tokens[4:], kv)
    assert first.shape == (4, 61)
    np.testing.assert_allclose(
        np.concatenate([first, rest]), gpt2.forward(params, tokens), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_row_is_what_it_is_alone(dtype):
    params, tokens = random_params(dtype=dtype), random_tokens(4, 16)
    logits = gpt2.forward(params, tokens)
    for row, expected in zip(tokens, logits, strict=True):
        alone = gpt2.forward(params, row)
        np.testing.assert_allclose(alone, expected, rtol=0, atol=EPS[dtype])


def test_batch_row_does_not_affect_another():
    params, tokens = random_params(), random_tokens(3, 16)
    logits = gpt2.forward(params, tokens)
    tokens[1] = random_tokens(16, seed=7)
    changed = gpt2.forward(params, tokens)
    np.testing.assert_array_equal(changed[[0, 2]], logits[[0, 2]])
    assert np.abs(changed[1] - logits[1]).max() > 0.1


@pytest.mark.parametrize("t", range(16))
def test_later_tokens_do_not_affect_earlier_logits(t):
    params, tokens = random_params(dtype=np.float32), random_tokens(16)
    logits = gpt2.forward(params, tokens)
    tokens[t] = (tokens[t] + 1) % 61
    changed = gpt2.forward(params, tokens)
    np.testing.assert_array_equal(changed[:t], logits[:t])  # exactly
    assert (np.abs(changed[t:] - logits[t:]).max(-1) > 1e-4).all()  # and the later ones change


def test_ragged_rows_equal_each_alone():
    params, lengths = random_params(), [3, 9, 1]
    tokens = [random_tokens(16, seed=b) for b in range(3)]
    kv = gpt2.KVCache(CONFIG, 3, np.float64)
    for b, n in enumerate(lengths):
        gpt2.forward(params, tokens[b][:n], kv.row(b))
    assert kv.length.tolist() == lengths
    for chunk in (1, 2, 1, 3):
        new = [row[n : n + chunk] for row, n in zip(tokens, kv.length, strict=True)]
        before = kv.length.copy()
        logits = gpt2.forward(params, np.array(new), kv)
        for b, n in enumerate(before):
            alone = gpt2.forward(params, tokens[b][: n + chunk])[n:]
            np.testing.assert_allclose(logits[b], alone, rtol=0, atol=1e-12)
    assert kv.length.tolist() == [10, 16, 8]


def test_stale_keys_of_a_shortened_row_are_not_seen():
    params, tokens = random_params(), random_tokens(2, 16)
    kv = gpt2.KVCache(CONFIG, 2, np.float64)
    kv.buffer[:] = 1e3
    gpt2.forward(params, tokens[:, :12], kv)
    kv.length[0] = 2
    logits = gpt2.forward(params, tokens[:, 12:14], kv)
    expected = gpt2.forward(params, [*tokens[0, :2], *tokens[0, 12:14]])[2:]
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-12)
    expected = gpt2.forward(params, tokens[1, :14])[12:]
    np.testing.assert_allclose(logits[1], expected, rtol=0, atol=1e-12)


def test_row_of_a_cache_shares_its_memory():
    kv = gpt2.KVCache(CONFIG, 3)
    row = kv.row(1)
    assert row.buffer.shape[2] == 1
    gpt2.forward(random_params(dtype=np.float32), [1, 2, 3], row)
    assert kv.length.tolist() == [0, 3, 0]
    assert kv.buffer[:, :, 1, :, :3].all()
    assert not kv.buffer[:, :, [0, 2]].any()
    assert not kv.buffer[:, :, 1, :, 3:].any()


def test_copied_row_goes_on_as_its_source_and_independently():
    params, tokens = random_params(), random_tokens(6)
    kv = gpt2.KVCache(CONFIG, 3, np.float64)
    gpt2.forward(params, tokens, kv.row(2))
    kv.copy_row(2, 0)
    assert kv.length.tolist() == [6, 0, 6]
    gpt2.forward(params, [5, 5], kv.row(2))
    assert kv.length.tolist() == [6, 0, 8]
    logits = gpt2.forward(params, [7], kv.row(0))
    expected = gpt2.forward(params, [*tokens, 7])[-1:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)


def test_cache_takes_the_bytes_it_says():
    kv = gpt2.KVCache(CONFIG, 3)
    assert kv.buffer.nbytes == 8 * 3 * CONFIG.n_ctx * CONFIG.n_layer * CONFIG.n_embd
    assert kv.buffer.dtype == np.float32
    assert kv.length.tolist() == [0, 0, 0]


# ----------------------------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([3, 61], "token id 61 is outside the vocabulary of 61"),
        ([[3], [1000]], "token id 1000 is outside the vocabulary of 61"),
        ([0, 61], "token id 61 is outside the vocabulary of 61"),
        ([3, -1], "token id -1 is outside the vocabulary of 61"),
        ([], "tokens must be whole numbers.*found shape (0,)"),
        (np.zeros((2, 0), int), "found shape (2, 0)"),
        ([1.0, 2.0], "whole numbers.*dtype float64"),
        (["a"], "whole numbers"),
        ([True, False], "whole numbers.*dtype bool"),
        (np.array(3), "shape (T,) or (B, T), found shape ()"),
        (np.zeros((1, 1, 1), int), "found shape (1, 1, 1)"),
        ([[1, 2], [3]], "found rows of different lengths"),
        ("Once", "must be ids, found 'Once': encoder.load(name).encode(text) makes ids"),
        (b"Once", "must be ids, found b'Once'"),
        (bytearray(b"Once"), "must be ids, found bytearray(b'Once')"),
        ([0] * 17, "17 tokens exceed n_ctx = 16"),
    ],
)
def test_forward_refuses_tokens(tokens, message):
    message = re.escape(message).replace(r"\.\*", ".*")
    calls = [(gpt2.forward,), (gpt2.loss_and_grads, tokens), (gpt2.token_losses, tokens)]
    for function, *targets in calls:
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(function)(random_params(), tokens, *targets)


@pytest.mark.parametrize("params", ["stories", None, CONFIG, [1, 2]])
def test_functions_of_a_model_say_how_to_get_one(params):
    message = "params must be a model, as gpt2.load returns it, found"
    calls = [(gpt2.forward, [1]), (gpt2.loss_and_grads, [1], [2]), (gpt2.token_losses, [1], [2])]
    for function, *args in [*calls, (gpt2.generate, [1], 3)]:
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(function)(params, *args)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int32, np.uint64])
def test_ids_may_be_of_any_whole_dtype(dtype):
    params, tokens = random_params(), random_tokens(2, 9)
    typed = tokens.astype(dtype)
    np.testing.assert_array_equal(gpt2.forward(params, typed), gpt2.forward(params, tokens))
    actual, expected = (gpt2.loss_and_grads(params, x, x) for x in (typed, tokens))
    assert actual[0] == expected[0]
    np.testing.assert_array_equal(actual[1].flat, expected[1].flat)


@pytest.mark.parametrize(
    "change", [{"n_ctx": 17}, {"n_layer": 3}, {"n_layer": 1}, {"n_head": 2}, {"n_embd": 24}]
)
def test_forward_refuses_the_cache_of_another_model(change):
    kv = gpt2.KVCache(dataclasses.replace(CONFIG, **change))
    with pytest.raises(ValueError, match=r"that of another model.*\(2, 2, 1, 3, 16, 4\)"):
        gpt2.forward(random_params(), [1, 2], kv)
    assert not kv.length.any() and not kv.buffer.any()


def test_forward_refuses_a_position_beyond_the_cache_and_leaves_it_unchanged():
    params, kv = random_params(dtype=np.float32), gpt2.KVCache(CONFIG, 2)
    gpt2.forward(params, random_tokens(5), kv.row(0))
    gpt2.forward(params, random_tokens(10), kv.row(1))
    with pytest.raises(ValueError, match=r"17 tokens exceed n_ctx = 16"):
        gpt2.forward(params, random_tokens(2, 7), kv)
    assert kv.length.tolist() == [5, 10]
    gpt2.forward(params, random_tokens(2, 6), kv)
    assert kv.length.tolist() == [11, 16]


def test_forward_refuses_a_cache_of_another_batch_size():
    with pytest.raises(ValueError, match=r"2 rows of tokens, but the KV cache has 3"):
        gpt2.forward(random_params(), random_tokens(2, 4), gpt2.KVCache(CONFIG, 3))


@pytest.mark.parametrize("dtype, other", [(np.float64, np.float32), (np.float32, int)])
def test_forward_refuses_a_cache_of_another_dtype(dtype, other):
    """A default cache would make the past of a float64 model float32, one of int would cut it."""
    params, kv = random_params(dtype=dtype), gpt2.KVCache(CONFIG, 2, other)
    makes_one = r"gpt2\.KVCache\(params\.config, 2, params\.flat\.dtype\) makes one"
    message = rf"cache has dtype {np.dtype(other)}, the parameters {np.dtype(dtype)}: {makes_one}"
    with pytest.raises(ValueError, match=message):
        gpt2.forward(params, random_tokens(2, 4), kv)
    assert not kv.length.any()


@pytest.mark.parametrize("kv", [{}, True, np.zeros(3)], ids=str)
def test_forward_refuses_what_is_no_cache(kv):
    message = rf"kv must be a KV cache, found {type(kv).__name__}: gpt2\.KVCache\("
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(gpt2.forward)(random_params(), [1, 2], kv)


@pytest.mark.parametrize("function", [gpt2.loss_and_grads, gpt2.token_losses])
@pytest.mark.parametrize(
    "targets, message",
    [
        ([1, 2], r"whole numbers of the tokens' shape \(3,\), found shape \(2,\), dtype int"),
        ([[1, 2, 3]], r"of the tokens' shape \(3,\), found shape \(1, 3\)"),
        ([1.0, 2.0, 3.0], r"targets must be whole numbers .*\(3,\), dtype float64"),
        ([[1], [2, 3]], r"tokens' shape \(3,\), found rows of different lengths"),
        ([1, 2, 61], r"target 61 is outside the vocabulary of 61"),
        ([1, -1, 61], r"target 61 is outside the vocabulary of 61"),
        ([1, 2, -2], r"target -2 is outside the vocabulary of 61"),
        ([-1, -1, -1], r"every target is -1"),
    ],
)
def test_loss_refuses_targets(function, targets, message):
    with pytest.raises(ValueError, match=message):
        function(random_params(), [4, 5, 6], targets)


@pytest.mark.parametrize("number", [Fraction, Decimal, np.float32, np.array])
def test_sampling_parameters_may_be_any_numbers(number):
    params, half, penalty = random_params(), number(0.5), number(1.25)
    limits = {"temperature": half, "top_p": half, "repetition_penalty": penalty}
    plain = {"temperature": 0.5, "top_p": 0.5, "repetition_penalty": 1.25}
    actual, expected = (
        list(gpt2.generate(params, [5, 9], 12, seed=0, eot=None, **options))
        for options in (limits, plain)
    )
    assert actual == expected
    logits = gpt2.apply_repetition_penalty(normal(9).astype(np.float32), [1, 2], penalty)
    plain = gpt2.apply_repetition_penalty(normal(9).astype(np.float32), [1, 2], 1.25)
    np.testing.assert_array_equal(logits, plain)
    assert logits.dtype == np.float32
    for got, same in zip(
        gpt2.next_token_probs(normal(9), half, top_p=half),
        gpt2.next_token_probs(normal(9), 0.5, top_p=0.5),
        strict=True,
    ):
        np.testing.assert_array_equal(got, same)


def test_load_maps_the_model_read_only(tmp_path):
    cat = script_model(tmp_path / "cat", "The cat sat on the mat.")
    params = gpt2.load(cat)
    assert not params.flat.flags.writeable
    assert params.config.n_ctx == 64
    params = gpt2.load("cat", models_dir=cat.parent)
    np.testing.assert_array_equal(params.flat, gpt2.load(cat / "model.bin").flat)
    loss, grads = gpt2.loss_and_grads(params, [1, 2], [2, 3])
    assert math.isfinite(loss)
    assert grads.flat.flags.writeable


def test_load_refuses_an_unknown_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model nonesuch"):
        gpt2.load("nonesuch", tmp_path)


@pytest.mark.parametrize("name", [None, 124, b"stories", ["124M"], CONFIG])
def test_load_says_what_names_a_model(name):
    with pytest.raises(ValueError, match=r"a model is given by its name.*or its path, not by a "):
        inspect.unwrap(gpt2.load)(name)


# ----------------------------------------------------------------------------------------------
# Reference values of PyTorch, Hugging Face, llm.c and OpenAI's own code


def golden(path, dtype):
    """Return the reference file, its parameters and its gradients, in a dtype."""
    file = np.load(path)
    config = Config(**json.loads(str(file["config"])))
    both = []
    for kind in ("param", "grad"):
        both.append(Params(config, np.zeros(n_params(config), dtype)))
        for name, array in both[-1].named.items():
            value = file[f"{kind}:{name}"]
            array[...] = value.T if name.endswith("/w") else value
    return file, *both


def assert_close_tensors(grads, expected, tolerance):
    """Every tensor within `tolerance` of its norm."""
    for name, array in expected.named.items():
        error = np.linalg.norm(grads.named[name] - array.astype(np.float64))
        assert error <= tolerance * np.linalg.norm(array), name


def test_golden_logits_of_pytorch(shared):
    file, params, _ = golden(shared("golden/grads.npz"), np.float64)
    logits = gpt2.forward(params, file["tokens"])
    np.testing.assert_allclose(logits, file["logits"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_golden_loss_and_gradients_of_pytorch(shared, dtype, tolerance):
    file, params, expected = golden(shared("golden/grads.npz"), dtype)
    loss, grads = gpt2.loss_and_grads(params, file["tokens"], file["targets"])
    assert grads.flat.dtype == dtype
    assert math.isclose(loss, file["loss"], rel_tol=1e-10 if dtype == np.float64 else 1e-6)
    assert_close_tensors(grads, expected, tolerance)


def test_golden_debug_state_of_llmc(shared):
    params = llmc.load_params(shared("golden/llmc_tiny.bin"))
    path, config = shared("golden/llmc_tiny_debug_state.bin"), params.config
    with open(path, "rb") as file:
        _, _, B, T, *_ = llmc.read_header(file, llmc.STATE_MAGIC, (2,))
    ids = np.fromfile(path, "<i4", 2 * B * T, offset=1024).reshape(2, B, T)
    values = np.fromfile(path, "<f4", offset=1024 + ids.nbytes)
    logits, loss, flat = np.split(values, [B * T * config.n_vocab, B * T * config.n_vocab + 1])
    actual = gpt2.forward(params, ids[0])
    np.testing.assert_allclose(actual, logits.reshape(actual.shape), rtol=0, atol=2e-5)
    actual, grads = gpt2.loss_and_grads(params, ids[0], ids[1])
    assert math.isclose(actual, loss[0], rel_tol=1e-6)
    assert_close_tensors(grads, Params(config, flat), 1e-4)


def test_golden_logits_and_text_of_openai(shared):
    source = shared("openai_tiny")
    params = gpt2.load(source)
    expected = np.load(source / "expected.npz")
    logits = gpt2.forward(params, expected["tokens"])
    stride = int(expected["logits_stride"])
    np.testing.assert_allclose(logits[..., ::stride], expected["logits"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(logits.argmax(-1), expected["argmax"])
    prompt, greedy = expected["prompt"][0], expected["greedy"][0]
    n_tokens = len(greedy) - len(prompt)
    actual = list(gpt2.generate(params, prompt, n_tokens, eot=None))
    assert [*prompt, *actual] == greedy.tolist()


def test_golden_logits_and_text_of_hugging_face(shared):
    source = shared("hf_tiny")
    params = gpt2.load(source)
    expected = np.load(source / "expected.npz")
    logits = gpt2.forward(params, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)
    greedy = expected["greedy"][0].tolist()
    assert list(gpt2.generate(params, greedy[:8], 24, eot=None)) == greedy[8:]


STORY_FOR_THE_BUNDLED = """Once upon a time there was a little boy named Tim. Tim had a red ball. \
One day, he went to the park with his mom. He wanted to play with his ball. Tim saw a big dog. \
The dog was sad. Tim gave the ball to the dog. The dog was very happy. They played all day."""


@pytest.mark.thorough
def test_bundled_model_knows_stories_from_noise():
    params, enc = gpt2.load("stories"), encoder.load("stories")
    assert (hub.MODELS_DIR / "stories" / "model.bin").stat().st_size <= 16_000_000
    words = STORY_FOR_THE_BUNDLED.split(" ")
    bits = []
    for text in (STORY_FOR_THE_BUNDLED, " ".join(words[::-1])):
        ids = [enc.eot, *enc.encode(text)]
        nats = gpt2.token_losses(params, ids[:-1], ids[1:]).sum()
        bits.append(nats / math.log(2) / len(text))
    assert bits[0] < 0.9 < 1.5 < bits[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_is_the_tanh_form_and_cannot_overflow(dtype):
    x = np.linspace(-12, 12, 2001)
    u = gpt2.GELU_SCALE * (x + 0.044715 * x**3)
    du = gpt2.GELU_SCALE * (1 + 3 * 0.044715 * x**2)
    out, cache = gpt2.gelu(x.astype(dtype))
    dx = gpt2.gelu_backward(np.ones_like(out), cache)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(out, 0.5 * x * (1 + np.tanh(u)), rtol=0, atol=16 * eps)
    expected = 0.5 * (1 + np.tanh(u) + x * du / np.cosh(u) ** 2)
    np.testing.assert_allclose(dx, expected, rtol=0, atol=64 * eps)
    assert out.dtype == dx.dtype == dtype
    out, cache = gpt2.gelu(np.array([-1e9, -400, 400, 1e9], dtype))
    assert out.tolist() == [0, 0, 400, 1e9]
    assert gpt2.gelu_backward(np.ones_like(out), cache).tolist() == [0, 0, 1, 1]
