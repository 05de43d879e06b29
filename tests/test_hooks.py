"""Tests of gpt2_support/hooks.py: what `edit` changes in the model, what is recorded, gradients."""

import dataclasses
import inspect

import numpy as np
import pytest
from helpers import CONFIG, normal, random_params, random_tokens

import gpt2
from gpt2_support import gradients, hooks, tiles

EVERY = [name for name in hooks.activation_names(CONFIG) if name != "logits"]


def record_of(params, tokens, **options):
    record = {}
    gpt2.forward(params, tokens, record=record, **options)
    return record


@pytest.mark.parametrize("shape", [(9,), (2, 9)])
def test_edit_with_what_is_recorded_changes_nothing(shape, monkeypatch):
    monkeypatch.setattr(tiles, "QUERIES", 4)
    params, tokens = random_params(), random_tokens(*shape)
    record = record_of(params, tokens)
    assert list(record) == list(hooks.activation_names(CONFIG))
    for name, array in record.items():
        logits = gpt2.forward(params, tokens, edit={name: array})
        np.testing.assert_allclose(logits, record["logits"], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", [*EVERY, "logits"])
def test_edit_is_seen_by_all_that_comes_after_and_by_nothing_before(name):
    params, tokens = random_params(), random_tokens(2, 5)
    plain = record_of(params, tokens)
    edited = record_of(params, tokens, edit={name: lambda x: 2 * x + 1})
    np.testing.assert_allclose(edited[name], 2 * plain[name] + 1)
    at = list(plain).index(name)
    for before in list(plain)[:at]:
        np.testing.assert_array_equal(edited[before], plain[before], err_msg=before)
    assert not np.allclose(edited["logits"], plain["logits"])


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_edit_of_a_head_is_that_of_its_part_of_the_heads(shape):
    params, tokens = random_params(), random_tokens(*shape)
    D = CONFIG.n_embd // CONFIG.n_head
    expected = record_of(params, tokens)["h0.attn.heads"]
    expected[..., D : 2 * D] = 0
    actual = record_of(params, tokens, edit={"h0.attn.heads.1": 0})
    np.testing.assert_array_equal(actual["h0.attn.heads"], expected)
    values = record_of(params, tokens, edit={"h0.attn.v.1": 0})  # nothing for it to mix
    np.testing.assert_allclose(values["logits"], actual["logits"], rtol=1e-12, atol=1e-12)


def test_edit_by_a_pattern_is_that_of_each_name():
    params, tokens = random_params(), random_tokens(2, 5)
    one = gpt2.forward(params, tokens, edit={"h*.attn.heads.*": 0})
    each = gpt2.forward(
        params, tokens, edit={f"h{i}.attn.out": params.h[i].attn.c_proj.b for i in range(2)}
    )
    np.testing.assert_allclose(one, each, rtol=1e-12, atol=1e-12)
    assert set(hooks.find_edits({"h*": 0}, CONFIG)) == {"h0", "h1"}  # no dot is passed


@pytest.mark.parametrize(
    "name", ["h0.attn.k", "h1.attn.v.2", "h0.attn.att", "h0", "h1.mlp.gelu", "logits"]
)
def test_edit_through_a_cache_is_that_without(name):
    params, tokens, edit = random_params(), random_tokens(2, 9), {name: lambda x: 0.5 * x}
    whole, kv = gpt2.forward(params, tokens, edit=edit), gpt2.KVCache(CONFIG, 2, np.float64)
    parts = [gpt2.forward(params, part, kv, edit=edit) for part in np.split(tokens, [4, 5], axis=1)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-10, atol=1e-12)


def test_edit_in_generate_is_that_of_forward():
    params, text, edit = random_params(), [5, 9, 2], {"h0": hooks.Add(np.arange(12) / 3)}
    actual = list(gpt2.generate(params, text, 8, eot=None, edit=edit))
    for _ in range(8):
        text = [*text, int(gpt2.forward(params, text, edit=edit)[-1].argmax())]
    assert actual == text[3:]
    assert actual != list(gpt2.generate(params, [5, 9, 2], 8, eot=None))
    assert set(gpt2.generate(params, [5], 4, eot=None, edit={"logits": np.eye(61)[7]})) == {7}


def test_edit_may_change_its_argument_but_not_the_cache():
    params, kv, tokens = random_params(), gpt2.KVCache(CONFIG, dtype=np.float64), random_tokens(4)

    def clear(x):
        x[...] = 0
        return x

    gpt2.forward(params, tokens, kv, edit={"h1.attn.k": clear})
    plain = gpt2.KVCache(CONFIG, dtype=np.float64)
    gpt2.forward(params, tokens, plain)
    np.testing.assert_array_equal(kv.buffer[1, 0], plain.buffer[1, 0])


@pytest.mark.parametrize(
    "edit, problem",
    [
        ({"h0.attn.ouT": 0}, "no activation is called 'h0.attn.ouT': did you mean h0.attn.out"),
        ({"h2": 0}, "no activation is called 'h2': did you mean"),
        ({"h0.attn.q.3": 0}, "no activation is called 'h0.attn.q.3'"),
        ({"zebra": 0}, "a record lists the names"),
        ("h0", r"edit must be a dict \{name: array or function\}, found 'h0'"),
        (
            {"h0": np.zeros((5, 11))},
            r"edit of h0: float64 \(5, 11\) does not fit float64 \(2, 5, 12\)",
        ),
        ({"h0": np.zeros((3, 2, 5, 12))}, "does not fit"),
        ({"h0": lambda x: None}, "edit of h0: None does not fit"),
        ({"h0": 1j}, "edit of h0: complex128 \\(\\) does not fit"),
    ],
)
def test_edit_that_fits_nothing_is_a_clear_error(edit, problem):
    unchecked = inspect.unwrap(gpt2.forward)  # a thorough run checks types before
    with pytest.raises(ValueError, match=problem):
        unchecked(random_params(), random_tokens(2, 5), edit=edit)


def test_edit_of_the_logits_is_refused_where_there_are_none():
    params, tokens = random_params(), random_tokens(2, 5)
    with pytest.raises(ValueError, match="no activation is called 'logits'"):
        gpt2.loss_and_grads(params, tokens, tokens, edit={"logits": 0})


# --- gradients ----------------------------------------------------------------------------------


def numeric(function, x, direction, h=1e-5):
    return (function(x + h * direction) - function(x - h * direction)) / (2 * h)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_gradients_of_activations_are_numeric(name, shape):
    params, tokens, targets = random_params(), random_tokens(*shape), random_tokens(*shape)
    record, record_grads, rng = {}, {}, np.random.default_rng(3)
    plain = gpt2.loss_and_grads(params, tokens, targets)
    loss, grads = gpt2.loss_and_grads(
        params, tokens, targets, record=record, record_grads=record_grads
    )
    assert loss == plain[0]
    np.testing.assert_allclose(grads.flat, plain[1].flat, rtol=0, atol=1e-13)
    assert set(record) == set(record_grads) == set(EVERY)
    np.testing.assert_array_equal(record[name], record_of(params, tokens)[name])
    assert record[name].shape == record_grads[name].shape

    def loss_of(x):
        return gpt2.loss_and_grads(params, tokens, targets, edit={name: x})[0]

    direction = rng.standard_normal(record[name].shape)
    expected = numeric(loss_of, record[name], direction)
    assert np.vdot(record_grads[name], direction) == pytest.approx(expected, rel=1e-6, abs=1e-10)


class Flip:
    """An edit that does not commute with Scale."""

    def __call__(self, x):
        return x[..., ::-1]

    backward = __call__


@pytest.mark.parametrize(
    "edit",
    [
        {"h0": hooks.Add(np.ones(12))},
        {"h0.mlp.out": hooks.Scale(0.3), "h1.attn.out": 0.5},  # the stream goes past them
        {"h0.mlp.gelu": Flip(), "h*.mlp.gelu": hooks.Scale(np.arange(48) / 9)},
        {"h*.attn.heads.1": hooks.Scale(0.3), "h*.attn.heads.*": hooks.Scale(2.0)},
        {"h0.attn.att.2": hooks.Scale(0.5), "h1.mlp.gelu": hooks.Scale(np.arange(48) / 9)},
        {"h0.attn.k": 0.25, "h1.ln_2": lambda x: x[..., ::-1]},  # constants
    ],
)
def test_gradient_through_edits_is_numeric(edit):
    params, tokens = random_params(), random_tokens(2, 5)
    frozen, record = dict(edit), record_of(params, tokens, edit=edit)
    for name, value in edit.items():  # a function without a backward counts as a constant
        if callable(value) and not hasattr(value, "backward"):
            frozen[name] = record[name]

    def loss_of(flat):
        return gpt2.loss_and_grads(type(params)(CONFIG, flat), tokens, tokens, edit=frozen)[0]

    direction = np.random.default_rng(1).standard_normal(params.flat.shape)
    direction.reshape(-1)[CONFIG.n_vocab * 12 : CONFIG.n_vocab_padded * 12] = 0
    _, grads = gpt2.loss_and_grads(params, tokens, tokens, edit=edit)
    expected = numeric(loss_of, params.flat, direction, 1e-6)
    assert np.vdot(grads.flat, direction) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradient_takes_logits_gradients_of_any_strides(monkeypatch, dtype):
    monkeypatch.setattr(gradients, "WORTH_GEMM", 1)
    params, tokens = random_params(dtype=dtype), random_tokens(6)
    rows = normal(12, 2 * CONFIG.n_vocab).astype(dtype)
    for dlogits in (
        np.broadcast_to(rows[0, : CONFIG.n_vocab], (6, CONFIG.n_vocab)),
        rows[5::-1, : CONFIG.n_vocab],
        rows[::2, : CONFIG.n_vocab],
        rows[:6, ::2],
        rows[:6, CONFIG.n_vocab - 1 :: -1],
    ):
        expected = gpt2.gradient(params, tokens, dlogits.copy())
        actual = gpt2.gradient(params, tokens, dlogits)
        tolerance = 1e-5 if dtype == np.float32 else 1e-13
        np.testing.assert_allclose(actual.flat, expected.flat, rtol=tolerance, atol=tolerance)


def test_grads_of_another_model_are_refused():
    params, tokens = random_params(), random_tokens(5)
    other = type(params)(dataclasses.replace(CONFIG, n_layer=1))
    loss_and_grads, gradient = map(inspect.unwrap, (gpt2.loss_and_grads, gpt2.gradient))
    for grads in (other, np.zeros(5), 1):
        with pytest.raises(ValueError, match=r"params.zeros_like\(\) makes some"):
            loss_and_grads(params, tokens, tokens, grads)
        with pytest.raises(ValueError, match=r"params.zeros_like\(\) makes some"):
            gradient(params, tokens, normal(5, CONFIG.n_vocab), grads)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_gradient_of_a_scalar_of_the_logits_is_numeric(shape):
    params, tokens, record_grads = random_params(), random_tokens(*shape), {}
    dlogits = np.random.default_rng(0).standard_normal((*shape, CONFIG.n_vocab))
    grads = gpt2.gradient(params, tokens, dlogits, record_grads=record_grads)
    direction = np.random.default_rng(1).standard_normal(params.flat.shape)

    def scalar(flat):
        return np.vdot(dlogits, gpt2.forward(type(params)(CONFIG, flat), tokens))

    direction[CONFIG.n_vocab * 12 : CONFIG.n_vocab_padded * 12] = 0
    expected = numeric(scalar, params.flat, direction)
    assert np.vdot(grads.flat, direction) == pytest.approx(expected, rel=1e-6)
    assert set(record_grads) == set(EVERY)
    unchecked = inspect.unwrap(gpt2.gradient)  # a thorough run checks types before
    for wrong, actual in [
        (dlogits[..., :-1], r"found shape \(.*60\), dtype float64"),
        (dlogits > 0, r"found shape \(.*61\), dtype bool"),
        ([[1], [2, 3]], "found rows of different lengths"),
    ]:
        message = r"dlogits must be numbers of the logits' shape \(.*61\), " + actual
        with pytest.raises(ValueError, match=message):
            unchecked(params, tokens, wrong)
    with pytest.raises(ValueError, match="no activation is called 'logits'"):
        gpt2.gradient(params, tokens, dlogits, edit={"logits": 0})
