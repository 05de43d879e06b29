"""The settings and threads of OpenBLAS."""

import os
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from conftest import ROOT

from gpt2_support import blas

ZEN_5 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
flags\t\t: fpu avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16

processor\t: 1
"""
CPU = ZEN_5.partition("processor\t: 1")[0]


@pytest.mark.parametrize(
    "change, setting, chosen",
    [
        (("", ""), None, "SKYLAKEX"),
        (("", ""), "Haswell", "Haswell"),  # the user's own choice stays
        (("", ""), "", ""),
        (("family\t: 26", "family\t: 25"), None, None),  # Zen 4, which OpenBLAS knows
        (("AuthenticAMD", "GenuineIntel"), None, None),
        (("avx512vl", ""), None, None),
        ((ZEN_5, "no such lines"), None, None),
        ((ZEN_5, ""), None, None),
        ((ZEN_5, CPU + CPU.replace("26", "6") + "flags\t\t: fpu av"), None, "SKYLAKEX"),
        ((ZEN_5, CPU * 90), None, "SKYLAKEX"),
        (("cpu family\t: 26\n", ""), None, None),
        (("cpu family\t: 26", "cpu family\t:"), None, None),
        (("vendor_id\t: AuthenticAMD\n", ""), None, None),
        ((CPU, CPU.partition("flags")[0]), None, None),
        (("flags\t\t: ", "flags"), None, None),
    ],
)
def test_blas_kernels_are_chosen_for_a_cpu_that_openblas_does_not_know(
    tmp_path, monkeypatch, change, setting, chosen
):
    (tmp_path / "cpuinfo").write_text(ZEN_5.replace(*change))
    monkeypatch.setenv("OPENBLAS_CORETYPE", "")  # so that it is put back after the test
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "26")
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    if setting is not None:
        monkeypatch.setenv("OPENBLAS_CORETYPE", setting)
    blas.configure_openblas(tmp_path / "cpuinfo")
    assert os.environ.get("OPENBLAS_CORETYPE") == setting  # NumPy is loaded: too late
    monkeypatch.delitem(sys.modules, "numpy")
    blas.configure_openblas(tmp_path / "none")
    assert os.environ.get("OPENBLAS_CORETYPE") == setting
    blas.configure_openblas(tmp_path / "cpuinfo")
    assert os.environ.get("OPENBLAS_CORETYPE") == chosen
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "26"
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    blas.configure_openblas(tmp_path / "cpuinfo")
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "20"


@pytest.mark.parametrize(
    "module",
    ["gpt2", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("utils", "encoder", "train"))],
)
def test_module_configures_openblas_before_it_loads_numpy(module):
    code = f"""
import sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            print("configure_openblas" in vars(sys.modules.get("gpt2_support.blas", sys)))
sys.meta_path.insert(0, Finder)
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


IDLE = """
import time
from functools import partial
import numpy as np
x = np.ones((512, 512), np.float32)
x @ x
import gpt2
from gpt2_support import blas
used = 0
for _ in range(10):
    assert (x @ x == 512).all()
    start = time.process_time()
    time.sleep(0.02)
    used += time.process_time() - start
print(used)
blas.set_threads(1)
blas.restart_threads()
assert blas.get_threads() == 1
"""


def test_idle_threads_do_not_spin_though_numpy_came_first():
    if not blas.openblas("openblas_read_env", True):
        pytest.skip("NumPy's BLAS is no OpenBLAS that reads its settings again")
    env = {name: value for name, value in os.environ.items() if "OPENBLAS" not in name}
    argv = [sys.executable, "-c", IDLE]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1  # seconds of the CPU in 0.2 on the clock


def test_threads_serve_a_forked_process_too():
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    code = """
import os, threading
from gpt2_support import blas
blas.get_threads, blas.set_threads = lambda: 3, lambda n: None
def parts():
    found, all_here = [], threading.Barrier(3, timeout=20)
    def function(part):
        all_here.wait()
        found.append((part.start, part.stop))
    blas.parallel_for(function, 7, work=1 << 40)
    return sorted(found)
assert parts() == [(0, 2), (2, 4), (4, 7)]
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(parts() != [(0, 2), (2, 4), (4, 7)])
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(blas, "get_threads", lambda: 3)
    monkeypatch.setattr(blas, "set_threads", lambda n: None)

    def function(part):
        if part.stop == 7:
            raise KeyError(part.start)

    with pytest.raises(KeyError, match="4"):
        blas.parallel_for(function, 7, work=1 << 40)


def test_threads_treat_floating_point_errors_as_the_caller_does(monkeypatch):
    monkeypatch.setattr(blas, "get_threads", lambda: 3)
    monkeypatch.setattr(blas, "set_threads", lambda n: None)
    seen = []
    with np.errstate(over="ignore", divide="raise"):
        expected = np.geterr()
        blas.parallel_for(lambda part: seen.append(np.geterr()), 3, work=1 << 40)
    assert seen == 3 * [expected]


def test_threads_call_what_the_caller_has_set_for_floating_point_errors(monkeypatch):
    monkeypatch.setattr(blas, "get_threads", lambda: 3)
    monkeypatch.setattr(blas, "set_threads", lambda n: None)
    seen, huge = [], np.full(2, 1e300)
    with np.errstate(over="call", call=lambda error, flag: seen.append(error)):
        blas.parallel_for(lambda part: np.square(huge), 3, work=1 << 40)
    assert seen == 3 * ["overflow"]


def test_one_blas_thread_is_for_the_block_only():
    before = blas.get_threads()
    with pytest.raises(KeyError), blas.one_thread():
        assert blas.get_threads() == 1
        raise KeyError
    assert blas.get_threads() == before


@pytest.fixture
def blas_threads(monkeypatch):
    """The numbers of threads that a BLAS of 4 has had, the last one now."""
    threads = [4]
    monkeypatch.setattr(blas, "get_threads", lambda: threads[-1])
    monkeypatch.setattr(blas, "set_threads", threads.append)
    return threads


def test_one_blas_thread_ends_with_the_last_of_two_blocks(blas_threads):
    first, second = blas.one_thread(), blas.one_thread()
    with second:
        first.__enter__()
        with blas.one_thread():
            first.__exit__(None, None, None)
        assert blas_threads[-1] == 1
    assert blas_threads == [4, 1, 4]
    with first:
        assert blas_threads[-1] == 1
    assert blas_threads[-1] == 4


def test_one_blas_thread_begins_after_another_block_has_ended(monkeypatch, blas_threads):
    """A thread enters at the moment at which another leaves: 1 is not the number of before."""
    leaving = threading.Event()

    def set_slowly(n):
        if n == 4:
            leaving.set()
            time.sleep(0.05)
        blas_threads.append(n)

    def enter():
        leaving.wait(10)
        with blas.one_thread():
            pass

    monkeypatch.setattr(blas, "set_threads", set_slowly)
    other = threading.Thread(target=enter)
    other.start()
    with blas.one_thread():
        pass
    other.join()
    assert blas_threads == [4, 1, 4, 1, 4]


def test_another_blas_has_one_thread_and_unknown_kernels(monkeypatch):
    monkeypatch.setattr(blas, "openblas", lambda function: None)
    assert blas.get_threads() == 1
    with blas.one_thread():
        assert blas.get_threads() == 1
    assert blas.kernels() == "unknown"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", ["plain", "strided", "no OpenBLAS"])
def test_axpby_adds_in_place(monkeypatch, dtype, case):
    if case == "no OpenBLAS":
        monkeypatch.setattr(blas, "openblas", lambda function: None)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 1000)).astype(dtype)
    x, y = (x[::2], y[::2]) if case == "strided" else (x, y)
    expected = 0.3 * x.astype(float) - 0.9 * y.astype(float)
    assert blas.axpby(0.3, x, -0.9, y) is y
    np.testing.assert_allclose(y, expected, rtol=0, atol=4 * np.finfo(dtype).eps)


def test_axpby_refuses_what_does_not_fit():
    x, y = np.ones(4), np.ones(3)
    with pytest.raises((ValueError, TypeError)):  # or the check of types says so
        blas.axpby(1.0, x, 1.0, y)
    y = np.ones(4)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        blas.axpby(1.0, x, 1.0, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 16), (1, 1), (0, 3)])
def test_reductions_are_numpys_own(dtype, shape):
    x, y = np.random.default_rng(0).standard_normal((2, *shape)).astype(dtype)
    rows, others = x.reshape(-1, shape[-1]), y.reshape(-1, shape[-1])
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    if x.size:
        np.testing.assert_array_equal(blas.max_last(x), x.max(-1, keepdims=True))
    close(blas.sum_last(x, y), (x * y).sum(-1, keepdims=True))
    close(blas.mean_last(x), x.mean(-1, keepdims=True))
    close(blas.sum_rows(rows), rows.sum(0))
    close(blas.sum_rows(rows, others), (rows * others).sum(0))
    results = blas.max_last(x), blas.sum_last(x), blas.sum_rows(rows), blas.sum_rows(rows, rows)
    assert {out.dtype for out in results} == {np.dtype(dtype)}


def test_max_last_finds_infinity_nan_and_views():
    x = np.array([[1, -np.inf, 2], [-np.inf, -np.inf, -np.inf], [3, np.nan, 5], [np.inf, 0, 1]])
    for n in (1, 10, 11, 20):  # rows of up to 60 values
        wide = blas.max_last(np.repeat(x, n, axis=1))
        np.testing.assert_array_equal(wide[:, 0], [2, -np.inf, np.nan, np.inf])
    np.testing.assert_array_equal(blas.max_last(x.T)[:, 0], x.T.max(-1))
