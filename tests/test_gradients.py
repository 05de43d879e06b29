"""Tests of gpt2_support/gradients.py; that they are right is in test_gpt2.py."""

import threading
import time
from multiprocessing import Pipe

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


def make_turns(n):
    """Return the Turns of n processes, each with pipes from the one before and to the next."""
    ring = [Pipe(duplex=False) for _ in range(n)]
    return [gradients.Turns(i, ring[i][0], ring[(i + 1) % n][1]) for i in range(n)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_processes_add_in_their_order_and_the_first_overwrites(order):
    """2^24, 1, 1 in float32: another order would give 2^24 + 2."""
    turns, out, seen = make_turns(3), np.full(1, np.nan, np.float32), []
    values = np.array([[1 << 24], [1], [1]], np.float32)

    def adder(process):
        def add():
            with turns[process].taken():
                gradients.accumulate(out, values[process])
                gradients.accumulate(out, -values[process])
            if process == 0:
                seen.append(float(out[0]))  # 2^24 + 1 + 1 - 2^24 - 1 - 1, each rounded: all added

        return add

    for _ in range(2):  # the next gradient begins anew
        run(*[adder(process) for process in order])
        assert seen.pop() == out == -2
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
    expected = a.T @ b if kind != "rows" else np.arange(n)[:, None] == 1
    if kind == "rows":
        expected = expected * b[:1]
    with gradients.Turns().taken():
        add()
        np.testing.assert_array_equal(out, expected)
        add()
    np.testing.assert_allclose(out, 2 * expected, rtol=0, atol=1e-12)


def test_who_waits_for_a_process_that_has_ended_is_told():
    turns, out, told = make_turns(2), np.zeros(1), []

    def wait():
        with pytest.raises(gradients.ProcessEnded), turns[1].taken():
            gradients.accumulate(out, np.ones(1))
        told.append(1)

    run(wait, turns[0].close)
    assert told == [1]
    assert out == 0


def test_rows_wait_for_all_blocks_of_a_product(monkeypatch):
    """Process 1 still adds to the last block of `out` when process 0 wants to add to its rows."""
    monkeypatch.setattr(gradients, "ACCUMULATED_ROWS", 2)
    turns, out, ones = make_turns(2), np.zeros((6, 1)), np.ones((6, 1))
    has_added, waited = threading.Event(), []

    def process_0():
        with turns[0].taken():
            gradients.accumulate_matmul(out, ones, np.ones((1, 1)))
            gradients.accumulate_rows(out, np.array([5]), ones[:1])
            waited.append(has_added.is_set())

    def process_1():
        with turns[1].taken():
            for block in gradients.row_blocks(out)[:2]:
                gradients.accumulate(block, ones[:2])
            time.sleep(0.3)
            has_added.set()
            gradients.accumulate(out[4:], ones[:2])
            gradients.accumulate_rows(out, np.array([5]), ones[:1])

    run(process_0, process_1)
    assert waited == [True]
    np.testing.assert_array_equal(out.ravel(), [2, 2, 2, 2, 2, 4])


def test_an_addition_that_fails_is_not_told():
    turns, out = make_turns(2), np.zeros(2)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"), turns[0].taken():
        gradients.accumulate(out, np.ones(2))
    assert not turns[1].before.poll()


def test_a_step_is_the_same_whatever_the_gradient_held(workers_in_threads):
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
