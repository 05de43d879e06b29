"""Tests of gpt2_support/worker_pool.py, with processes; who adds when is in test_gradients.py."""

import gc
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY, random_params

import gpt2
import train
from gpt2_support import blas, data_parallel, gradients, worker_pool
from gpt2_support.worker_pool import SharedArray, WorkerPool

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks /proc which processes there are"
)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it took longer than 20 s")


def has_no_workers():
    gc.collect()
    return not active_children()


def adder(shared):
    """Return a function of a job (what to do, a number): it adds the number, in halves."""
    out = shared.array()

    def work(job):
        action, value = job
        if action == "fail":
            raise ValueError(f"cannot add {value}")
        if action == "exit":
            os._exit(9)
        if action == "unpicklable":
            return lambda: value
        if action == "sleep":
            time.sleep(100)
        for _ in range(2):
            gradients.accumulate(out, np.full(out.size, value / 2))
        return os.getpid(), blas.get_threads(), len(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    return work


def make_pool(n):
    shared = SharedArray(5, np.dtype("float64"))
    return WorkerPool(n, adder, shared), shared.array()


def pids(pool):
    return [process.pid for process in pool.processes]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_process_does_its_job_on_shared_memory(n):
    pool, out = make_pool(n)
    for _ in range(2):  # the second gradient overwrites the first
        with blas.one_thread():
            results = pool.run([("add", 10.0**i) for i in range(n)])
        assert [each[:2] for each in results] == [(pid, 1) for pid in [os.getpid(), *pids(pool)]]
        np.testing.assert_array_equal(out, np.full(5, sum(10.0**i for i in range(n))))
    pool.stop()
    assert not any(map(is_alive, pids(pool)))


FAILURES = {
    "this one": (["fail", "add", "add"], ValueError, "cannot add 0"),
    "a worker": (["add", "fail", "add"], ValueError, "cannot add 1"),
    "the last": (["add", "add", "fail"], ValueError, "cannot add 2"),
    "two": (["add", "exit", "fail"], ValueError, "cannot add 2"),
    "ended": (["add", "exit", "add"], ChildProcessError, "has ended, killed perhaps .*--threads 1"),
    "the last ended": (["add", "add", "exit"], ChildProcessError, "has ended"),
    "this one, a worker is busy": (["fail", "sleep", "add"], ValueError, "cannot add 0"),
    "result": (["add", "unpicklable", "add"], RuntimeError, "cannot be sent"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_job_that_fails_ends_the_pool_with_its_error(case):
    actions, error, message = FAILURES[case]
    pool, _ = make_pool(3)
    start = time.monotonic()
    with pytest.raises(error, match=message):
        pool.run([(action, i) for i, action in enumerate(actions)])
    assert time.monotonic() < start + 60
    assert not pool.is_running
    assert not any(map(is_alive, pids(pool)))


def in_parent_only(pid):
    if os.getpid() != pid:
        raise RuntimeError("not in this process")
    return print


def test_a_worker_that_cannot_begin_is_an_error():
    with pytest.raises(RuntimeError, match="not in this process"):
        WorkerPool(2, in_parent_only, os.getpid())


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no pickle of it")


def fails_to_begin(pid, kind):
    if os.getpid() != pid:
        if kind == "exit":
            os._exit(9)
        raise Unpicklable("why it fails")
    return print


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("exit", ChildProcessError, "did not start: the program has to be a file"),
        ("raise", RuntimeError, "why it fails.*cannot be sent: no pickle of it"),
    ],
)
def test_why_a_worker_did_not_start(kind, error, message):
    with pytest.raises(error, match=message):
        WorkerPool(3, fails_to_begin, os.getpid(), kind)


@pytest.mark.parametrize("n, killed", [(2, 0), (3, 0), (3, 1), (4, 1)])
def test_a_worker_that_is_killed_between_two_jobs_is_an_error(n, killed):
    pool, _ = make_pool(n)
    pool.run([("add", 1.0)] * n)
    pool.processes[killed].kill()
    pool.processes[killed].join()
    with pytest.raises(ChildProcessError, match="has ended"):
        pool.run([("add", 1.0)] * n)
    assert not any(map(is_alive, pids(pool)))


def test_a_daemonic_process_starts_no_workers(monkeypatch):
    monkeypatch.setattr(worker_pool, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(ChildProcessError, match="daemonic"):
        make_pool(2)
    assert make_pool(1)[0].run([("add", 1.0)])


def test_memory_that_is_shared_need_not_fit_into_dev_shm(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: pytest.fail("asks for room"))
    pool, out = make_pool(2)
    pool.run([("add", 1.0)] * 2)
    np.testing.assert_array_equal(out, np.full(5, 2))
    pool.stop()


def test_a_pool_leaves_no_open_file():
    make_pool(2)  # which starts what the next needs, too
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        make_pool(2)
    gc.collect()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    make_pool(2)[0].stop()
    assert dict(os.environ) == before


def test_workers_end_when_nobody_holds_the_pool():
    pool, _ = make_pool(2)
    workers = pids(pool)
    assert all(map(is_alive, workers))
    del pool
    wait_until(has_no_workers)
    assert not any(map(is_alive, workers))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_workers_leave_signals_to_their_parent(name):
    """A terminal sends Ctrl-C to all of them, a scheduler SIGTERM; the parent ends after a step."""
    pool, out = make_pool(2)
    for pid in pids(pool):
        os.kill(pid, getattr(signal, name))
    pool.run([("add", 1.0), ("add", 2.0)])
    assert out[0] == 3
    pool.stop()


PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
import time
import test_worker_pool

if __name__ == "__main__":
    pool, _ = test_worker_pool.make_pool(3)
    print(*test_worker_pool.pids(pool), flush=True)
    print(*[result[2] for result in pool.run([("add", 1.0)] * 3)[1:]], flush=True)
    time.sleep(60 if sys.argv[3] == "wait" else 0)
"""


@pytest.mark.parametrize("end", ["killed", "returns"])
def test_workers_end_with_their_parent(tmp_path, end):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    tests = Path(__file__).parent
    command = [sys.executable, program, tests, tests.parent, "wait" if end == "killed" else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        workers = [*map(int, process.stdout.readline().split())]
        assert len(workers) == 2
        assert process.stdout.readline() == "3 3\n"  # signals are blocked since they began
        if end == "killed":
            process.kill()
        assert process.wait(30) == (-signal.SIGKILL if end == "killed" else 0)
    wait_until(lambda: not any(map(is_alive, workers)))


def test_processes_and_threads_give_the_same_bits(workers_in_threads, monkeypatch):
    params, rng = random_params(TINY, np.float32), np.random.default_rng(0)
    tokens, targets = rng.integers(TINY.n_vocab, size=(2, 6, 8))
    results = []
    for spawn in (worker_pool.SPAWN, worker_pool.get_context("spawn")):
        monkeypatch.setattr(worker_pool, "SPAWN", spawn)
        workers = data_parallel.DataParallel(gpt2.loss_and_grads, params, 3, dropout=0.3)
        loss, grads = workers.loss_and_grads(params, [(tokens, targets)] * 2, 1, 2)
        results.append((loss, grads.flat.copy()))
        workers.stop()
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert results[0][1].any()


def test_parameters_that_are_not_shared_are_copied_at_each_step():
    params, rng = random_params(TINY), np.random.default_rng(0)
    batch = tuple(rng.integers(TINY.n_vocab, size=(2, 4, 8)))
    workers = data_parallel.DataParallel(gpt2.loss_and_grads, params, 2)
    np.testing.assert_array_equal(workers.params.flat, params.flat)
    for _ in range(2):
        expected = gpt2.loss_and_grads(params, *batch)[0]
        assert workers.loss_and_grads(params, [batch])[0] == pytest.approx(expected, rel=1e-13)
        params.flat *= 1.1


def test_a_batch_that_is_refused_leaves_workers_for_the_next():
    params = random_params(TINY)
    workers = data_parallel.DataParallel(gpt2.loss_and_grads, params, 2)
    good, bad = (np.full((4, 8), value) for value in (1, TINY.n_vocab))
    loss, _ = workers.loss_and_grads(workers.params, [(good, good)])
    for batch in ((bad, good), (np.vstack([good[:1], bad[:1]] * 2), good)):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            workers.loss_and_grads(workers.params, [batch])
        assert workers.loss_and_grads(workers.params, [(good, good)])[0] == loss


def test_command_resumes_in_processes_bit_for_bit(no_picture, call, fish, text):
    """With dropout and accumulated batches."""
    flags = ("--threads", 2, "--dropout", 0.2, "--grad_accum", 2, "--steps", 4)
    one, two = text.parent / "one", text.parent / "two"
    assert call(train, *fish(*flags, "--out", one)).returncode == 0
    half = fish(*flags, "--out", two, "--steps", 2, "--decay_steps", 4, "--threads", 2)
    assert call(train, *half).returncode == 0
    assert call(train, "--resume", "--out", two, "--steps", 4).returncode == 0
    assert (one / "model.bin").read_bytes() == (two / "model.bin").read_bytes()
    assert train.load_checkpoint(two).config.threads == 2
    wait_until(has_no_workers)


def test_command_saves_when_a_worker_is_killed(no_picture, call, fish, out, monkeypatch):
    take_step = train.train_step

    def step(state, *args):
        if state.step == 3:
            for process in active_children():
                process.kill()
        return take_step(state, *args)

    monkeypatch.setattr(train, "train_step", step)
    done = call(train, *fish("--threads", 2, "--save_every", 100))
    assert done.returncode == 1
    assert done.stderr.count("one of the processes that share a batch has ended") == 1
    assert train.load_checkpoint(out).step == 3
    monkeypatch.undo()
    assert call(train, "--resume", "--out", out).returncode == 0
    assert train.load_checkpoint(out).step == 6
