"""Tests of gpt2_support/gradients.py; that they are right is in test_gpt2.py."""

import threading

import numpy as np
import pytest
from helpers import TINY, random_params

import gpt2
from gpt2_support import blas, data_parallel, gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (600, 40, 300), (5000, 7, 64)])
@pytest.mark.parametrize("has_gemm", [True, False])
def test_accumulate_matmul_adds_the_product(monkeypatch, dtype, shape, has_gemm):
    n_rows, n, n_columns = shape
    if not has_gemm:
        monkeypatch.setattr(blas, "gemm", lambda *arrays: False)
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, n_rows)).astype(dtype)
    b = rng.standard_normal((n, n_columns)).astype(dtype)
    before = rng.standard_normal((n_rows, n_columns)).astype(dtype)
    out = np.zeros_like(before)
    gradients.accumulate_matmul(out, a.T, b)
    np.testing.assert_array_equal(out, a.T @ b)  # on zeros bit for bit
    total = before.copy()
    gradients.accumulate_matmul(total, a.T, b)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(total, before + a.T @ b, rtol=0, atol=40 * eps)


@pytest.mark.parametrize("case", ["dtype", "order of a", "order of b", "order of out", "half"])
def test_accumulate_matmul_takes_arrays_that_gemm_does_not(case):
    a, b, out = np.ones((9, 700)).T, np.ones((9, 300)), np.zeros((700, 300))
    a = a.copy("C") if case == "order of a" else a
    b = np.asfortranarray(b) if case == "order of b" else b
    out = np.asfortranarray(out) if case == "order of out" else out
    b = b.astype(np.float32) if case == "dtype" else b
    if case == "half":
        a, b, out = a.astype(np.float16), b.astype(np.float16), out.astype(np.float16)
    assert not blas.gemm(out, a, b)
    gradients.accumulate_matmul(out, a, b)
    np.testing.assert_array_equal(out, np.full((700, 300), 9))


def test_accumulate_matmul_refuses_read_only_memory():
    out = np.zeros((700, 300))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        gradients.accumulate_matmul(out, np.ones((9, 700)).T, np.ones((9, 300)))
    assert not out.any()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_rows_that_occur_again_are_added_again(n):
    rng = np.random.default_rng(0)
    out, numbers = rng.standard_normal((4, 3)), rng.integers(4, size=n * 7)
    rows = rng.standard_normal((n * 7, 3))
    expected = out.copy()
    np.add.at(expected, numbers, rows)
    gradients.accumulate_rows(out, numbers, rows)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-14)


def run(*functions):
    """Run functions in threads of their own, each started after the one before has gone on."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
        thread.join(0.05)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_threads_add_in_their_order_and_the_first_overwrites(order):
    """2^24, 1, 1 in float32: another order would give 2^24 + 2."""
    turns, out = gradients.Turns(3), np.full(1, np.nan, np.float32)
    values = np.array([[1 << 24], [1], [1]], np.float32)

    def adder(thread):
        def add():
            with turns.taken_by(thread):
                gradients.accumulate(out, values[thread])
                gradients.accumulate(out, -values[thread])

        return add

    run(*[adder(thread) for thread in order])
    assert out == -2  # 2^24 + 1 + 1 - 2^24 - 1 - 1, each rounded
    gradients.accumulate(out, values[1])  # out of turn
    assert out == -1


@pytest.mark.parametrize("kind", ["values", "matmul", "large matmul", "rows"])
def test_the_first_to_add_overwrites_all(kind):
    rng = np.random.default_rng(0)
    n = 5000 if kind == "large matmul" else 4
    out, a, b = np.full((n, 64), np.nan), rng.standard_normal((7, n)), rng.standard_normal((7, 64))
    add = {
        "values": lambda: gradients.accumulate(out, a.T @ b),
        "rows": lambda: gradients.accumulate_rows(out, np.array([1]), b[:1]),
    }.get(kind, lambda: gradients.accumulate_matmul(out, a.T, b))
    turns = gradients.Turns(1)
    with turns.taken_by(0):
        add()
    expected = a.T @ b if kind != "rows" else np.arange(n)[:, None] == 1
    if kind == "rows":
        expected = expected * b[:1]
    np.testing.assert_array_equal(out, expected)
    with turns.taken_by(0):
        add()
    np.testing.assert_allclose(out, 2 * expected, rtol=0, atol=1e-12)


def test_a_thread_that_fails_keeps_none_waiting():
    turns, out, added = gradients.Turns(2), np.zeros(1), []

    def fail():
        with pytest.raises(MemoryError), turns.taken_by(0):
            raise MemoryError

    def wait():
        with turns.taken_by(1):
            gradients.accumulate(out, np.ones(1))
            added.append(1)

    run(wait, fail)
    assert added == [1]


def test_a_step_is_the_same_whatever_the_gradient_held():
    """Nothing of the last step is left, also where this one has fewer positions and tokens."""
    params, rng = random_params(TINY), np.random.default_rng(0)
    workers = data_parallel.DataParallel(gpt2.loss_and_grads, params, 2)
    for length in (8, 3):
        tokens = rng.integers(TINY.n_vocab, size=(2, 4, length))
        grads = workers.loss_and_grads(params, [tuple(tokens)])[1].flat.copy()
        for array in workers.grads.named.values():  # the padding of wte stays zero
            array[...] = np.nan
        _, again = workers.loss_and_grads(params, [tuple(tokens)])
        np.testing.assert_array_equal(again.flat, grads)
