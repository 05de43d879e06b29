"""gpt2.py: layers and their gradients, the model, the KV cache, sampling, generation.

Gradients are compared with central finite differences in float64, the model with a naive one
written from the paper, and both with PyTorch's and OpenAI's numbers where those are at hand.
"""

import collections
import dataclasses
import functools
import inspect
import json
import math
import re
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from helpers import CONFIG, random_params, random_tokens, unchecked
from hypothesis import given
from hypothesis import strategies as st
from scripted import script_model

import encoder
import gpt2
from gpt2_support import blas, hub, tiles
from gpt2_support.formats import llmc
from gpt2_support.params import Config, LayerNorm, Params, n_params

pytestmark = pytest.mark.filterwarnings("error")  # an overflow or an invalid value is a failure

MINI = Config(n_vocab=7, n_ctx=5, n_embd=4, n_head=2, n_layer=2)  # for numeric gradients

EPS = {np.float32: 1e-5, np.float64: 1e-12}  # how far two orders of the same sums may differ


def only_thorough(value):
    """A value of a parameter that quick runs leave out."""
    return pytest.param(value, marks=pytest.mark.thorough)


def normal(*shape, seed=2):
    return np.random.default_rng(seed).standard_normal(shape)


# ----------------------------------------------------------------------------------------------
# Gradients against finite differences


def numeric_gradient(function, x, step=5e-4):
    """d function() / dx, with x changed in place, by the central difference over five points.

    Its error is of order step^4 (Abramowitz and Stegun 1964, 25.3.6).
    """
    gradient = np.empty(x.shape)
    with unchecked():
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


@pytest.fixture(scope="module", autouse=True)
def several_blocks():
    """Let the short sequences of these tests, too, have several tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "QUERIES", 2)
        yield


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


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("n_out", [1, 5, 64, 301])
def test_a_product_of_few_rows_is_the_product(monkeypatch, n_threads, n_rows, n_out):
    monkeypatch.setattr(blas, "STACK", 40 * n_rows * 6)  # 6 rows of w
    monkeypatch.setattr(blas, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(blas, "has_small_kernels", lambda: True)
    monkeypatch.setattr(blas, "get_threads", lambda: n_threads)
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


def test_attention_gradient_is_numeric():
    params = random_params(MINI)
    p, positions = params.h[0].attn, np.arange(3)[None]
    check_backward(
        lambda x: gpt2.attention(x, p, 2, positions),
        lambda dout, cache, d: gpt2.attention_backward(dout, cache, p, d.h[0].attn, 2),
        (normal(2, 3, 4),),
        params,
        "model/h0/attn/",
    )


def test_mlp_gradient_is_numeric():
    params = random_params(MINI)
    p = params.h[1].mlp
    check_backward(
        lambda x: gpt2.mlp(x, p),
        lambda dout, cache, d: gpt2.mlp_backward(dout, cache, p, d.h[1].mlp),
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
    monkeypatch.setattr(blas, "ACCUMULATED_ROWS", head_rows)
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


def keep_in(caches):
    """A hook for gpt2.transformer that keeps what the backward needs."""

    def hook(name, x, cache):
        caches[name] = cache
        return x

    return hook


def test_hook_replaces_what_the_layers_above_see():
    params, tokens = random_params(), random_tokens(2, 5)

    def hook(name, x, cache):
        return np.zeros_like(x) if name == "h0" else x

    x = gpt2.transformer(params, tokens, hook=hook)
    assert not np.allclose(x, gpt2.transformer(params, tokens))
    np.testing.assert_array_equal(x[0], x[1])  # nothing of the tokens is left


def test_transformer_gradient_is_numeric():  # of one layer; the loss, below, is that of two
    config = dataclasses.replace(MINI, n_layer=1)
    params, tokens = random_params(config), np.array([[3, 3, 0, 6, 1], [6, 3, 0, 3, 3]])

    def forward():
        caches = {}
        return gpt2.transformer(params, tokens, hook=keep_in(caches)), caches

    check_backward(
        forward,
        lambda dout, caches, d: gpt2.transformer_backward(dout, caches, params, d),
        (),
        params,
        "model/",
    )


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
    caches = {}
    gpt2.transformer(params, tokens, hook=keep_in(caches))
    floats = [array for array in arrays_in(tuple(caches.values())) if array.dtype.kind == "f"]
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
        ([0] * 17, "position 17 exceeds n_ctx = 16"),
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
    with pytest.raises(ValueError, match=r"position 17 exceeds n_ctx = 16"):
        gpt2.forward(params, random_tokens(2, 7), kv)
    assert kv.length.tolist() == [5, 10]
    gpt2.forward(params, random_tokens(2, 6), kv)
    assert kv.length.tolist() == [11, 16]


def test_forward_refuses_a_cache_of_another_batch_size():
    with pytest.raises(ValueError, match=r"2 rows of tokens, but the KV cache has 3"):
        gpt2.forward(random_params(), random_tokens(2, 4), gpt2.KVCache(CONFIG, 3))


@pytest.mark.parametrize("function", [gpt2.loss_and_grads, gpt2.token_losses])
@pytest.mark.parametrize(
    "targets, message",
    [
        ([1, 2], r"targets of shape \(2,\) for tokens of shape \(3,\)"),
        ([[1, 2, 3]], r"targets of shape \(1, 3\) for tokens of shape \(3,\)"),
        ([1.0, 2.0, 3.0], r"targets"),
        ([1, 2, 61], r"target 61 is outside the vocabulary of 61"),
        ([1, -1, 61], r"target 61 is outside the vocabulary of 61"),
        ([1, 2, -2], r"target -2 is outside the vocabulary of 61"),
        ([-1, -1, -1], r"every target is -1"),
    ],
)
def test_loss_refuses_targets(function, targets, message):
    with pytest.raises(ValueError, match=message):
        function(random_params(), [4, 5, 6], targets)


BAD_SAMPLING = [
    ({"temperature": -0.1}, r"temperature = -0.1 is not a finite number of 0 or more"),
    ({"temperature": math.inf}, r"temperature = inf"),
    ({"temperature": math.nan}, r"temperature = nan"),
    ({"top_k": 0}, r"top_k = 0 is not 1 or more"),
    ({"top_k": -3}, r"top_k = -3"),
    ({"top_p": 0.0}, r"top_p = 0.0 is not over 0 and at most 1"),
    ({"top_p": 1.01}, r"top_p = 1.01"),
    ({"top_p": math.nan}, r"top_p = nan"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty = 0.0 is not a finite number over 0"),
    ({"repetition_penalty": -1.0}, r"repetition_penalty = -1.0"),
    ({"repetition_penalty": math.inf}, r"repetition_penalty = inf"),
    ({"repetition_penalty": math.nan}, r"repetition_penalty = nan"),
    ({"temperature": None}, r"temperature = None is not a finite number"),
    ({"temperature": "hot"}, r"temperature = hot is not a finite number"),
    ({"temperature": Decimal("sNaN")}, r"temperature = sNaN is not a finite number"),
    ({"temperature": Fraction(10**400)}, r"temperature = 1000\d* is not a finite number"),
    ({"temperature": Fraction(-1, 2)}, r"temperature = -1/2"),
    ({"top_k": 5.0}, r"top_k = 5.0 is not a whole number"),
    ({"top_k": True}, r"top_k = True is not a whole number"),
    ({"top_p": "most"}, r"top_p = most is not over 0"),
    ({"top_p": Decimal("1.5")}, r"top_p = 1.5 is not over 0"),
    ({"repetition_penalty": 1j}, r"repetition_penalty = 1j is not a finite number"),
]


@pytest.mark.parametrize("sampling, message", BAD_SAMPLING)
def test_generate_refuses_sampling_parameters_when_called(sampling, message):
    with pytest.raises(ValueError, match=message):
        gpt2.generate(random_params(), [1], 1, **sampling)
    if "repetition_penalty" not in sampling:
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(gpt2.next_token_probs)(normal(5), **{"temperature": 1.0} | sampling)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_tokens": 3.0}, "n_tokens = 3.0 is not a whole number"),
        ({"n_tokens": None}, "n_tokens = None is not a whole number"),
        ({"seed": -1}, "seed = -1 is negative"),
        ({"seed": 1.5}, "seed = 1.5 is not a whole number"),
        ({"n_vocab": 0}, "n_vocab = 0 is not 1 or more"),
        ({"n_vocab": -5}, "n_vocab = -5 is not 1 or more"),
        ({"n_vocab": 30.0}, "n_vocab = 30.0 is not a whole number"),
        ({"n_vocab": 62}, "n_vocab = 62 exceeds the model's, 61"),
        ({"eot": 61}, "eot = 61 is not an id of the vocabulary of 61"),
        ({"eot": 40, "n_vocab": 40}, "eot = 40 is not an id of the vocabulary of 40"),
        ({"eot": "first"}, "eot = 'first' is not an id"),
        ({"eot": 1.0}, "eot = 1.0 is not an id"),
    ],
)
def test_generate_refuses_other_numbers_when_called(options, message):
    with pytest.raises(ValueError, match=message):
        gpt2.generate(random_params(), [1], **{"n_tokens": 1} | options)


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
    for got, same in zip(
        gpt2.next_token_probs(normal(9), half, top_p=half),
        gpt2.next_token_probs(normal(9), 0.5, top_p=0.5),
        strict=True,
    ):
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_generate_tells_that_the_logits_are_not_finite(sampling, bad):
    params = random_params()
    params.wte[7] = bad
    ids = gpt2.generate(params, [1, 2], 3, **sampling)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="logits are not finite"):
        next(ids)


def test_next_token_probs_takes_logits_of_which_some_are_minus_infinity():
    logits = np.array([-math.inf, 1.0, 1.0, -math.inf])
    assert gpt2.next_token_probs(logits, 0.0)[0].tolist() == [1]
    assert gpt2.next_token_probs(logits, 1.0)[1].tolist() == [0, 0.5, 0.5, 0]
    with pytest.raises(ValueError, match="not finite"):
        gpt2.next_token_probs(np.full(3, -math.inf), 1.0)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([0] * 17, r"prompt of 17 tokens exceeds n_ctx = 16"),
        ([[1], [0] * 40], r"prompt of 40 tokens exceeds n_ctx = 16"),
        ([1, 61], r"token id 61 is outside the vocabulary of 61"),
        ([[1, 2], [-1]], r"token id -1 is outside the vocabulary of 61"),
        ([1.5], r"whole numbers"),
        (5, r"whole numbers.*found shape \(\)"),
        (None, r"whole numbers"),
        (b"Once", r"tokens must be ids, found b'Once'"),
        (bytearray(b"Once"), r"tokens must be ids"),
        ("Once", r"tokens must be ids, found 'Once'.*encode"),
        (["Once", "Twice"], r"tokens must be ids, found 'Once'"),
        (iter([b"Once"]), r"tokens must be ids"),
        ([[1], [[2]]], r"neither one list of ids nor a list of such lists"),
        ([[[1], [2]]], r"neither one list of ids nor a list of such lists"),
        (np.zeros((2, 1, 3), int), r"neither one list of ids nor a list of such lists"),
        (map(float, [1, 2]), r"whole numbers"),
        ([2**70], r"whole numbers"),
    ],
)
def test_generate_refuses_prompts_when_called(tokens, message):
    with pytest.raises(ValueError, match=message):
        gpt2.generate(random_params(), tokens, 1)


def test_generate_refuses_an_empty_prompt_without_end_of_text():
    with pytest.raises(ValueError, match="no end-of-text token to start from"):
        gpt2.generate(random_params(), [], 1, eot=None)


# ----------------------------------------------------------------------------------------------
# Sampling


class FakeRng(np.random.Generator):
    """Gives the numbers it is told to, over and over."""

    def __init__(self, *numbers):
        super().__init__(np.random.PCG64())
        self.numbers, self.calls = numbers, 0

    def random(self):
        self.calls += 1
        return self.numbers[(self.calls - 1) % len(self.numbers)]


ALMOST_ONE = 1 - 2.0**-53  # the largest that Generator.random() can give


@pytest.fixture
def n_draws(thorough):
    """How often a test of frequencies draws."""
    return 4000 if thorough else 400


def frequencies(logits, n_draws, **sampling):
    """How often each id is drawn, over numbers spread evenly: within 1 / n_draws of its chance."""
    rng = FakeRng(*((i + 0.5) / n_draws for i in range(n_draws)))
    with unchecked():
        drawn = [gpt2.sample(logits, rng, **sampling) for _ in range(n_draws)]
    return np.bincount(drawn, minlength=len(logits)) / n_draws


def reference_probs(logits, temperature, top_k=None, top_p=None):
    """The probabilities that `sample` should draw from, one id at a time."""
    order = sorted(range(len(logits)), key=lambda id: (-logits[id], id))[:top_k]
    top = max(logits)
    weights = {id: math.exp((float(logits[id]) - top) / temperature) for id in order}
    total = sum(weights.values())
    if top_p is not None:
        kept, mass = {}, 0.0
        for id in order:
            if mass >= top_p * total * (1 - 1e-15):
                break
            kept[id] = weights[id]
            mass += weights[id]
        weights, total = kept, mass
    return np.array([weights.get(id, 0) / total for id in range(len(logits))])


def test_sample_at_temperature_0_is_argmax_and_draws_nothing():
    rng = FakeRng(0.5)
    logits = normal(61).astype(np.float32)
    actual = gpt2.sample(logits, rng, 0.0, top_k=5, top_p=0.5)
    assert actual == logits.argmax()
    assert type(actual) is int
    assert rng.calls == 0
    assert gpt2.sample(np.array([1.0, 7.0, 7.0]), rng) == 1  # of equal ones the first


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 2.0, "top_p": 0.05},
    {"temperature": 0.7, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_next_token_probs_gives_the_ids_kept_and_their_probabilities(sampling):
    logits = 2 * normal(12)
    expected = reference_probs(logits, **sampling)
    ids, probs = gpt2.next_token_probs(logits, **sampling)
    assert sorted(ids) == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(probs, expected[ids], rtol=1e-12, atol=0)
    assert abs(probs.sum() - 1) < 1e-12
    if "top_k" in sampling or "top_p" in sampling:
        assert (np.diff(probs) <= 0).all()
    np.testing.assert_array_equal(logits, 2 * normal(12))


def test_next_token_probs_at_temperature_0_is_argmax_alone():
    for sampling in ({}, {"top_k": 3}, {"top_p": 0.9}):
        ids, probs = gpt2.next_token_probs(np.array([1.0, 7.0, 7.0], np.float32), 0.0, **sampling)
        assert (ids.tolist(), probs.tolist()) == ([1], [1.0])


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, only_thorough(np.float64)])
def test_sample_frequencies_are_the_probabilities(sampling, dtype, n_draws):
    logits = (2 * normal(12)).astype(dtype)
    expected = reference_probs(logits, **sampling)
    actual = frequencies(logits, n_draws, **sampling)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1.01 / n_draws)
    assert not actual[expected == 0].any()


@pytest.mark.thorough
def test_sample_from_a_generator_fits_the_probabilities():
    logits, rng, n_draws = normal(10), np.random.default_rng(0), 20000
    expected = n_draws * reference_probs(logits, 0.8)
    with unchecked():
        drawn = [gpt2.sample(logits, rng, 0.8) for _ in range(n_draws)]
    chi_square = ((np.bincount(drawn, minlength=10) - expected) ** 2 / expected).sum()
    assert chi_square < 27.9  # 9 degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize("number", [0.0, 0.3, ALMOST_ONE])
def test_sample_with_top_k_1_is_argmax_even_of_equal_logits(number):
    logits = np.array([1.0, 3.0, 3.0, 2.0, 3.0], np.float32)
    assert gpt2.sample(logits, FakeRng(number), 1.0, top_k=1) == 1
    assert gpt2.sample(logits, FakeRng(number), 1.0, top_k=2) in (1, 2)
    assert gpt2.sample(logits, FakeRng(number), 1.0, top_p=1e-9) == 1


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (0.01, [3]),
        (0.5, [3]),
        (0.5001, [1, 3]),
        (0.75, [1, 3]),
        (0.76, [0, 1, 3]),
        (0.875, [0, 1, 3]),
        (0.99, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_sample_top_p_keeps_the_fewest_that_reach_it(top_p, kept, n_draws):
    logits = np.log([0.125, 0.25, 0.125, 0.5, 1e-300])  # 0 and 2 are equal: the first goes first
    actual = frequencies(logits, n_draws, temperature=1.0, top_p=top_p)
    assert np.flatnonzero(actual).tolist() == kept


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 1.0}, {"top_k": 4, "top_p": 0.9}])
@pytest.mark.parametrize("number", [0.0, 5e-324, 0.5, ALMOST_ONE])
def test_sample_never_gives_an_id_of_probability_zero(sampling, number):
    for logits in (
        [-1e4, 0.0, -1e4, 1.0, -1e4],  # zeros at both ends
        [0.0, -1e4, -1e4, -1e4, 0.0],
        [-2000.0, -1000.0, 0.0, -1000.0, -2000.0],
    ):
        id = gpt2.sample(np.array(logits, np.float32), FakeRng(number), 1.0, **sampling)
        assert logits[id] > -500


@pytest.mark.parametrize("number", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300, 5e-324])
def test_sample_at_a_tiny_temperature_is_argmax(temperature, number):
    logits = normal(61).astype(np.float32)
    assert gpt2.sample(logits, FakeRng(number), temperature) == logits.argmax()
    assert gpt2.sample(logits, FakeRng(number), temperature, 7, 0.9) == logits.argmax()


def test_sample_top_p_counts_the_last_probability_too(n_draws):
    actual = frequencies(np.zeros(4), n_draws, temperature=1.0, top_p=0.76)
    assert actual.tolist() == [0.25] * 4
    actual = frequencies(np.zeros(4), n_draws, temperature=1.0, top_k=2, top_p=0.51)
    assert actual.tolist() == [0.5, 0.5, 0, 0]
    assert gpt2.sample(np.arange(3.0), FakeRng(ALMOST_ONE), 1.0, top_k=1, top_p=0.5) == 2


def test_sample_at_a_huge_temperature_is_uniform(n_draws):
    actual = frequencies(1e4 * normal(8).astype(np.float32), n_draws, temperature=1e30)
    np.testing.assert_allclose(actual, 1 / 8, atol=1.01 / n_draws)


def test_sample_numbers_at_the_ends_give_the_first_and_the_last():
    logits = np.zeros(5, np.float32)
    assert gpt2.sample(logits, FakeRng(0.0), 1.0) == 0
    assert gpt2.sample(logits, FakeRng(ALMOST_ONE), 1.0) == 4
    assert gpt2.sample(logits, FakeRng(1.0), 1.0) == 4  # if rounding should ever make it 1
    big = np.zeros(50257, np.float32)
    assert gpt2.sample(big, FakeRng(ALMOST_ONE), 1.0) == 50256


def test_sample_leaves_the_logits_as_they_were():
    logits = normal(61)
    gpt2.sample(logits, FakeRng(0.5), 0.7, top_k=9, top_p=0.9)
    np.testing.assert_array_equal(logits, normal(61))


def test_repetition_penalty_makes_each_seen_id_less_probable_once():
    logits = np.array([2.0, -2.0, 0.0, 4.0], np.float32)
    actual = gpt2.apply_repetition_penalty(logits, [0, 1, 2, 0, 0], 2.0)
    np.testing.assert_array_equal(actual, np.array([1, -4, 0, 4], np.float32))
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(logits, [2, -2, 0, 4])


# ----------------------------------------------------------------------------------------------
# Generation


def reference_generate(params, prompt, n_tokens, choose=np.argmax, eot=None):
    """What `generate` should give, without a cache: every step reads the whole window anew."""
    n_ctx = params.config.n_ctx
    window, history, out = list(prompt), list(prompt), []
    while len(out) < n_tokens:
        id = int(choose(gpt2.forward(params, window)[-1]))
        if id == eot:
            break
        out.append(id)
        history.append(id)
        window.append(id)
        if len(window) > n_ctx:
            window = window[-max(n_ctx // 2, 1) :]
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_generate_greedy_equals_argmax_of_repeated_forwards(dtype):
    params, prompt = random_params(dtype=dtype), [5, 9, 2]
    expected = reference_generate(params, prompt, 10)
    actual = list(gpt2.generate(params, prompt, 10, eot=None))
    assert actual == expected
    assert len(set(actual)) > 3  # not a model that always says the same
    assert {type(id) for id in actual} == {int}


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5])
def test_generate_gives_n_tokens(n_tokens):
    params = random_params()
    assert len(list(gpt2.generate(params, [1], n_tokens, eot=None))) == n_tokens
    actual = list(gpt2.generate(params, [[1], [2, 3]], n_tokens, eot=None))
    assert len(actual) == n_tokens
    assert all(len(ids) == 2 for ids in actual)


def test_generate_is_lazy_and_reads_no_token_in_vain(monkeypatch):
    counts = []
    transformer = gpt2.transformer

    def counting(params, tokens, *args):
        counts.append(tokens.size)
        return transformer(params, tokens, *args)

    monkeypatch.setattr(gpt2, "transformer", counting)
    ids = gpt2.generate(random_params(), [5, 9, 2], 4, eot=None)
    assert counts == []
    next(ids)
    assert counts == [3]
    list(ids)
    assert counts == [3, 1, 1, 1]


def test_generate_ends_before_end_of_text():
    params, prompt = random_params(), [5, 9, 2]
    free = reference_generate(params, prompt, 12)
    eot = free[6]
    first = free.index(eot)
    assert list(gpt2.generate(params, prompt, 12, eot=eot)) == free[:first]
    assert list(gpt2.generate(params, prompt, 12, eot=free[0])) == []


def test_generate_takes_the_last_id_for_end_of_text():
    params = random_params()
    params.wte[60] = 0
    params.ln_f.g[:] = 0
    params.ln_f.b[:] = 1
    params.wte[60] = 10  # now every next token is 60
    assert list(gpt2.generate(params, [1, 2], 5)) == []
    assert list(gpt2.generate(params, [1, 2], 5, eot=3)) == [60] * 5
    assert list(gpt2.generate(params, [60, 60], 2, eot=None)) == [60] * 2


def test_generate_goes_on_after_a_prompt_that_ends_with_end_of_text():
    params = random_params()
    expected = reference_generate(params, [4, 60], 5)
    assert 60 not in expected
    assert list(gpt2.generate(params, [4, 60], 5)) == expected


@pytest.mark.parametrize("eot", ["last", 7])
def test_generate_from_an_empty_prompt_starts_from_end_of_text(eot):
    params, start = random_params(), 60 if eot == "last" else eot
    expected = reference_generate(params, [start], 6, eot=start)
    assert list(gpt2.generate(params, [], 6, eot=eot)) == expected
    assert list(gpt2.generate(params, np.array([], int), 6, eot=eot)) == expected
    assert [ids for [ids] in gpt2.generate(params, [[]], 6, eot=eot)] == expected


PROMPTS = [[5, 9, 2], [1], [7] * 14, [], [], [5, 9, 2], list(range(16)), []]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampled", "all options"],
)
def test_generate_of_a_batch_gives_what_each_prompt_gives_alone(sampling, thorough):
    params, n_tokens = random_params(), 40 if thorough else 20  # past n_ctx, each at its own time
    steps = list(gpt2.generate(params, PROMPTS, n_tokens, eot=60, **sampling))
    for b, prompt in enumerate(PROMPTS):
        own = dict(sampling)
        if "seed" in sampling:
            own["seed"] += b
        alone = list(gpt2.generate(params, prompt, n_tokens, eot=60, **own))
        row = [ids[b] for ids in steps]
        assert row[: len(alone)] == alone
        assert row[len(alone) :] == [60] * (len(row) - len(alone))


def test_generate_of_a_batch_ends_when_all_rows_have_ended():
    params = random_params()
    free = [reference_generate(params, prompt, 12) for prompt in ([5, 9, 2], [1])]
    eot = next(id for id in free[0] if id in free[1]) if set(free[0]) & set(free[1]) else free[0][2]
    alone = [list(gpt2.generate(params, prompt, 12, eot=eot)) for prompt in ([5, 9, 2], [1])]
    steps = list(gpt2.generate(params, [[5, 9, 2], [1]], 12, eot=eot))
    assert len(steps) == max(map(len, alone))


def test_generate_of_a_batch_repeats_end_of_text_for_a_row_that_began_with_it():
    params = random_params()
    free = [reference_generate(params, [token], 6) for token in range(9)]
    first = next(token for token in range(9) if free[token][0] != free[token][1])
    eot = free[first][0]  # alone the row would go on with another id after it
    second = next(token for token in range(9) if eot not in free[token])
    steps = list(gpt2.generate(params, [[first], [second]], 6, eot=eot))
    assert steps == [[eot, id] for id in free[second]]


def test_generate_reads_equal_prompts_once(monkeypatch):
    counts = []
    transformer = gpt2.transformer

    def counting(params, tokens, *args):
        counts.append(tokens.shape)
        return transformer(params, tokens, *args)

    monkeypatch.setattr(gpt2, "transformer", counting)
    prompts = [[5, 9, 2], [1, 1], [5, 9, 2], [5, 9, 2]]
    list(gpt2.generate(random_params(), prompts, 2, eot=None))
    assert counts == [(1, 3), (1, 2), (4, 1)]


def test_generate_repeats_itself_for_a_seed_and_only_for_it():
    params = random_params()

    def ids(seed):
        return list(gpt2.generate(params, [5, 9], 12, temperature=1.0, seed=seed, eot=None))

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert ids(None) != ids(None)  # equal once in more than 1e10 runs


def test_generate_samples_of_a_batch_differ():
    steps = list(gpt2.generate(random_params(), [[5]] * 4, 12, temperature=1.0, seed=0, eot=None))
    assert len(set(zip(*steps, strict=True))) == 4


def test_generate_draws_as_sample_does_from_forwards():
    params, prompt, n_tokens = random_params(), [5, 9, 2], 30
    rng = np.random.default_rng(11)
    expected = reference_generate(
        params, prompt, n_tokens, lambda logits: gpt2.sample(logits, rng, 1.2, 30, 0.9)
    )
    actual = gpt2.generate(
        params, prompt, n_tokens, temperature=1.2, top_k=30, top_p=0.9, seed=11, eot=None
    )
    assert list(actual) == expected


def test_generate_penalises_the_whole_history():
    params, prompt = random_params(), [5, 9, 2]
    history, expected = list(prompt), []
    for _ in range(12):
        logits = gpt2.forward(params, history)[-1]
        for id in set(history):
            logits[id] = logits[id] / 2 if logits[id] > 0 else logits[id] * 2
        expected.append(int(logits.argmax()))
        history.append(expected[-1])
    actual = list(gpt2.generate(params, prompt, 12, repetition_penalty=2.0, eot=None))
    assert actual == expected
    assert actual != reference_generate(params, prompt, 12)


@pytest.mark.parametrize("n_ctx", [1, 2, only_thorough(3), only_thorough(4), 5, 16])
@pytest.mark.parametrize("n_prompt", [1, only_thorough(2), 15, 16])
def test_generate_past_n_ctx_goes_on_from_the_last_half_of_the_window(n_ctx, n_prompt):
    params = random_params(Config(61, n_ctx, 12, 3, 2))
    prompt = random_tokens(min(n_prompt, n_ctx)).tolist()
    expected = reference_generate(params, prompt, 45)
    assert list(gpt2.generate(params, prompt, 45, eot=None)) == expected


def test_generate_takes_sampling_parameters_at_their_limits():
    params, prompt = random_params(), [5, 9, 2]
    greedy = reference_generate(params, prompt, 8)
    for limits in ({"top_k": 1}, {"top_p": 5e-324}, {"top_k": 1, "top_p": 1.0}):
        actual = gpt2.generate(params, prompt, 8, temperature=1.0, seed=0, eot=None, **limits)
        assert list(actual) == greedy
    assert list(gpt2.generate(params, prompt, 8, temperature=5e-324, eot=None)) == greedy


def test_decode_yields_ids_and_the_logits_that_they_are_drawn_from():
    params, prompts = random_params(), [[1, 2, 3], [7]]
    options = {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.4, "n_vocab": 50}
    steps = list(gpt2.decode(params, prompts, 9, **options))
    assert [ids for ids, _ in steps] == list(gpt2.generate(params, prompts, 9, **options))
    texts = [list(prompt) for prompt in prompts]
    for ids, logits in steps:
        for text, id, row in zip(texts, ids, logits, strict=True):
            expected = gpt2.forward(params, text)[-1]
            expected = gpt2.apply_repetition_penalty(expected, text, 1.4)[:50]
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-10)
            text.append(id)


def test_decode_yields_the_end_of_text_and_ends():
    params = random_params()
    greedy = reference_generate(params, [1, 2], 6)
    eot = greedy[3]
    ids = [ids for ids, _ in gpt2.decode(params, [[1, 2]], 6, eot=eot)]
    assert ids == [[id] for id in greedy[: greedy.index(eot) + 1]]


def test_generate_leaves_the_prompts_as_they_were():
    params, one, several = random_params(), [5, 9, 2], [[5], [9, 2]]
    list(gpt2.generate(params, one, 5, eot=None))
    list(gpt2.generate(params, several, 5, eot=None))
    assert one == [5, 9, 2]
    assert several == [[5], [9, 2]]


def test_generate_takes_arrays_and_numpy_scalars():
    params = random_params(dtype=np.float32)
    expected = list(gpt2.generate(params, [5, 9], 5, 0.5, 20, 0.9, 3, 1.5, eot=None))
    numbers = (np.int64(5), np.float64(0.5), np.int64(20), np.float32(0.9), np.int64(3))
    for tokens in (np.array([5, 9]), np.array([5, 9], np.uint16), (5, 9), [np.int32(5), 9]):
        actual = gpt2.generate(params, tokens, *numbers, np.float64(1.5), eot=np.int64(-1))
        assert list(actual) == expected
    actual = gpt2.generate(params, np.array([[5, 9], [5, 9]]), *numbers, np.float64(1.5), eot=None)
    assert [ids[0] for ids in actual] == expected


class JaxLike:
    """An array of another library: it can be made one of NumPy's, and its items have no hash."""

    __hash__ = None

    def __init__(self, values):
        self.values = np.array(values)

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return JaxLike(self.values[i])


@pytest.mark.parametrize(
    "kind",
    [
        iter,
        lambda ids: map(int, ids),
        lambda ids: (id for id in ids),
        collections.deque,
        JaxLike,
        lambda ids: [JaxLike(id) for id in ids],
        lambda ids: np.array(ids, np.uint64),
        lambda ids: [np.uint64(id) for id in ids],
        lambda ids: [np.uint64(ids[0]), *ids[1:]],
    ],
)
def test_generate_takes_ids_of_any_kind(kind):
    """Past n_ctx, and with a penalty, which both look at what was written before."""
    params, prompts = random_params(), [[5, 9, 2], [5, 9, 2], [7]]
    options = {"n_tokens": 18, "repetition_penalty": 1.3, "eot": None}
    alone = list(gpt2.generate(params, prompts[0], **options))
    assert list(gpt2.generate(params, kind(prompts[0]), **options)) == alone
    expected = list(gpt2.generate(params, prompts, **options))
    assert list(gpt2.generate(params, map(kind, prompts), **options)) == expected


def test_generate_computes_in_the_dtype_of_the_parameters(monkeypatch):
    dtypes = set()
    sample = gpt2.sample

    def noting(logits, *args):
        dtypes.add(logits.dtype)
        return sample(logits, *args)

    monkeypatch.setattr(gpt2, "sample", noting)
    for dtype in (np.float32, np.float64):
        dtypes.clear()
        list(gpt2.generate(random_params(dtype=dtype), [5], 3, repetition_penalty=1.1, eot=None))
        assert dtypes == {np.dtype(dtype)}


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


def test_generate_refuses_a_mixture_and_a_negative_count():
    params = random_params(Config(20, 8, 4, 2, 1), np.float32)
    with pytest.raises(ValueError, match="neither one list of ids nor a list of such lists"):
        gpt2.generate(params, [[1], 2], 3)
    with pytest.raises(ValueError, match="n_tokens = -1 is negative"):
        gpt2.generate(params, [1], -1)


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


def test_generate_leaves_out_the_ids_that_the_tokenizer_has_not():
    params = random_params()
    options = {"temperature": 5.0, "seed": 0, "eot": None, "repetition_penalty": 1.5}
    with unchecked():
        assert max(gpt2.generate(params, [5], 80, **options)) > 30
        assert max(gpt2.generate(params, [5], 80, n_vocab=30, **options)) == 29
        assert max(gpt2.generate(params, [5, 60], 80, n_vocab=30, **options)) == 29


def test_generate_takes_the_last_id_that_n_vocab_leaves_for_end_of_text():
    params = random_params()
    greedy = reference_generate(params, [5, 9, 2], 12, lambda logits: logits[:50].argmax())
    n_vocab = max(greedy) + 1
    expected = greedy[: greedy.index(n_vocab - 1)]
    assert list(gpt2.generate(params, [5, 9, 2], 12, n_vocab=n_vocab)) == expected
    started = gpt2.generate(params, [], 5, n_vocab=n_vocab)
    assert list(started) == list(gpt2.generate(params, [n_vocab - 1], 5, n_vocab=n_vocab))
