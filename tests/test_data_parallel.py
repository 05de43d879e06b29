"""Tests of gpt2_support/data_parallel.py; what a step computes is in test_train.py."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, TINY, random_params

import gpt2
from gpt2_support import blas, data_parallel
from gpt2_support.distributed import ProcessGroup
from gpt2_support.params import Config, Params


def test_blas_threads_are_as_many_afterwards_as_before():
    before, during = blas.get_threads(), []
    wide = replace(TINY, n_embd=256)
    blas.set_threads(2)
    for config, n in ((TINY, 1), (wide, 1), (wide, 2)):
        with data_parallel.blas_threads(config, n):
            during.append(blas.get_threads())
        assert blas.get_threads() == (2 if blas.openblas("openblas_get_num_threads") else 1)
    blas.set_threads(before)
    assert during == [1, 2, 1] or not blas.openblas("openblas_get_num_threads")


def test_parallel_shares_the_elementwise_work_on_large_buffers(monkeypatch):
    monkeypatch.setattr(blas, "get_threads", lambda: 3)
    large = Config(n_vocab=1 << 16, n_ctx=4, n_embd=16, n_head=2, n_layer=1)
    for config, n in ((TINY, 1), (large, 3)):
        workers = data_parallel.DataParallel(gpt2.loss_and_grads, Params(config))
        monkeypatch.setattr(blas, "get_threads", lambda: 1)  # as within an optimizer's step
        assert workers.parallel(lambda i, n: (i, n)) == [(i, n) for i in range(n)]
        monkeypatch.setattr(blas, "get_threads", lambda: 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_parallel_works_in_a_forked_process_too():
    code = """if True:
    import os, sys, threading
    sys.path.insert(0, "tests")
    os.cpu_count = lambda: 2
    from helpers import TINY, random_params
    import gpt2
    from gpt2_support.data_parallel import DataParallel
    workers = DataParallel(gpt2.loss_and_grads, random_params(TINY))
    workers.n_procs = 2  # as many threads share elementwise work
    both = threading.Barrier(2)

    def work(i, n):
        both.wait()
        return i

    assert workers.parallel(work) == [0, 1]
    if child := os.fork():
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(workers.parallel(work) != [0, 1])
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


@pytest.mark.parametrize(
    "n_rows, seq_len, n_embd, n_cores, counts",
    [
        (16, 256, 216, 2, [1, 2]),
        (16, 256, 216, 1, [1]),
        (3, 256, 216, 2, [1]),
        (12, 64, 128, 2, [1, 2]),
        (12, 1024, 768, 8, [1, 2, 3, 4, 6]),
        (32, 16, 16, 2, [1]),
    ],
)
def test_numbers_of_processes_divide_the_rows(n_rows, seq_len, n_embd, n_cores, counts):
    assert data_parallel.proc_counts(n_rows, seq_len, n_embd, n_cores) == counts


@pytest.mark.parametrize(
    "seconds, best, tried",
    [
        ({1: 3.0, 2: 2.0, 3: 1.0}, 3, 3),
        ({1: 3.0, 2: 2.0, 3: 2.5, 6: 1.0}, 2, 3),  # 6 is not tried: 3 was slower than 2
        ({1: 1.0, 2: 2.0}, 1, 2),
        ({4: 1.0}, 4, 1),
    ],
)
def test_fastest_is_the_last_before_a_slower_one(monkeypatch, seconds, best, tried):
    timed, used = [], []

    def time_batch(workers, params, batch):
        timed.append(workers.n_procs)
        used.append((params, workers.params, workers.grads))
        return seconds[workers.n_procs]

    monkeypatch.setattr(data_parallel.DataParallel, "time_batch", time_batch)
    batch = np.zeros((1, 4), int), np.zeros((1, 4), int)
    workers, time = data_parallel.fastest(gpt2.loss_and_grads, Params(TINY), batch, list(seconds))
    assert (workers.n_procs, time) == (best, seconds[best])
    for arrays in used:  # one model and one gradient for all that are tried
        assert [id(array) for array in arrays] == [
            *map(id, (workers.params,) * 2),
            id(workers.grads),
        ]
    assert len(timed) == tried


def test_fastest_does_without_processes_that_cannot_start(monkeypatch, capsys):
    class NoPool:
        def __init__(self, n, *_):
            raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(data_parallel, "WorkerPool", NoPool)
    tokens = np.zeros((4, 4), int)
    batch, params, group = (tokens, tokens), Params(TINY), ProcessGroup()
    workers, seconds = data_parallel.fastest(gpt2.loss_and_grads, params, batch, [1, 2, 4])
    assert (workers.n_procs, seconds < 60) == (1, True)
    message = "processes: 1 instead of 2: [Errno 11] Resource temporarily unavailable"
    assert capsys.readouterr().err.strip() == message
    with pytest.raises(BlockingIOError):  # as --threads 2 asks
        data_parallel.fastest(gpt2.loss_and_grads, params, batch, [2])
    group.size = 2
    with pytest.raises(BlockingIOError):  # the other rank tries, too
        data_parallel.fastest(gpt2.loss_and_grads, params, batch, [1, 2], group)


def test_fastest_does_without_memory_that_cannot_be_shared(monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_parallel, "SharedArray", fail)
    tokens = np.zeros((4, 4), int)
    batch, params = (tokens, tokens), Params(TINY)
    workers, _ = data_parallel.fastest(gpt2.loss_and_grads, params, batch, [1, 2])
    assert (workers.n_procs, workers.params) == (1, params)
    assert "1 process is used, as 2 cannot share memory" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space"):
        data_parallel.fastest(gpt2.loss_and_grads, params, batch, [2])
    group = ProcessGroup()
    group.size = 2
    with pytest.raises(OSError, match="No space"):  # the other rank tries both
        data_parallel.fastest(gpt2.loss_and_grads, params, batch, [1, 2], group)


def test_time_batch_is_the_median_after_the_first_call(monkeypatch):
    times = [0, 0.1, 1, 2, 3, 6, 7, 9]  # 0.1 s, then 1, 3, 2 s
    clock = iter(map(float, times))
    monkeypatch.setattr(data_parallel.time, "perf_counter", lambda: next(clock))
    params = Params(TINY)
    workers = data_parallel.DataParallel(gpt2.loss_and_grads, params)
    tokens = np.zeros((1, 4), int)
    assert workers.time_batch(params, (tokens, tokens)) == 2


IGNORED = {  # rows of targets, and which of them do not count
    "none": [],
    "some": [(0, slice(2, 8)), (3, slice(0, 5)), (6, slice(7, 8))],
    "a row": [(2, slice(0, 8)), (5, slice(1, 3))],
    "all but one": [(slice(0, 8), slice(0, 8))],
}


def ignore_targets(case, dtype=np.int64):
    """Return tokens and targets (8, 8) of a random text, some of the targets -1."""
    tokens, targets = np.random.default_rng(0).integers(TINY.n_vocab, size=(2, 8, 8)).astype(dtype)
    for rows, columns in IGNORED[case]:
        targets[rows, columns] = -1
    if case == "all but one":
        targets[6, 3] = 5
    return tokens, targets


def share(params, batches, n_procs, **options):
    """Return loss and gradient (a copy) of batches that n_procs processes share."""
    workers = data_parallel.DataParallel(gpt2.loss_and_grads, params, n_procs, **options)
    loss, grads = workers.loss_and_grads(params, batches)
    return loss, grads.flat.copy()


def assert_same(actual, expected):
    """Equal to the rounding of float64."""
    assert actual[0] == pytest.approx(expected[0], rel=1e-13)
    largest = np.abs(expected[1]).max()
    np.testing.assert_allclose(actual[1], expected[1], rtol=0, atol=1e-13 * largest)


@pytest.mark.parametrize("case", IGNORED)
@pytest.mark.parametrize("n_procs", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("n_batches", [1, 2, 4])
def test_loss_and_gradient_do_not_depend_on_who_shares_the_targets(
    workers_in_threads, case, n_procs, n_batches
):
    """Processes that cannot have equal rows have none; one, or a batch, may have no target."""
    params = random_params(TINY)
    tokens, targets = ignore_targets(case)
    loss, grads = gpt2.loss_and_grads(params, tokens, targets)
    parts = (np.split(array, n_batches) for array in (tokens, targets))
    actual = share(params, list(zip(*parts, strict=True)), n_procs)
    assert_same(actual, (loss, grads.flat))


def test_batches_of_other_sizes_add_up(workers_in_threads, monkeypatch):
    """With blocks of one row, a process of more rows than another would wait for it for ever."""
    monkeypatch.setattr(gpt2, "LM_HEAD_ROWS", 1)
    params, (tokens, targets) = random_params(TINY), ignore_targets("none")
    loss, grads = gpt2.loss_and_grads(params, tokens, targets)
    parts = [(tokens[:4], targets[:4]), (tokens[4:7], targets[4:7]), (tokens[7:], targets[7:])]
    assert_same(share(params, parts, 2), (loss, grads.flat))


@pytest.mark.parametrize("case", IGNORED)
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_loss_and_gradient_do_not_depend_on_the_ranks(workers_in_threads, case, n_ranks):
    params = random_params(TINY)
    tokens, targets = ignore_targets(case)
    loss, grads = gpt2.loss_and_grads(params, tokens, targets)
    n_targets = int(np.count_nonzero(targets != -1))
    losses, total = [], np.zeros_like(params.flat)
    for rank in range(n_ranks):
        group = ProcessGroup()
        group.size = n_ranks

        def gather(value):
            if type(value) is int:  # the number of targets of this rank
                return [n_targets] + [0] * (n_ranks - 1)
            losses.append(value)
            return [value]

        group.all_gather = gather
        batch = tokens[rank::n_ranks], targets[rank::n_ranks]
        total += share(params, [batch], 2, group=group)[1]
    assert_same((np.sum(losses), total), (loss, grads.flat))


def test_loss_and_gradient_of_equal_parts_have_the_bits_of_their_means():
    """But for wte, to which each part adds twice: after the other, so in another order."""
    params = random_params(TINY, np.float32)
    tokens, targets = ignore_targets("none")
    workers = data_parallel.DataParallel(gpt2.loss_and_grads, params, 2)
    loss, grads = workers.loss_and_grads(params, [(tokens, targets)])
    parts = [gpt2.loss_and_grads(params, tokens[i::2], targets[i::2]) for i in range(2)]
    assert loss == np.mean([part for part, _ in parts])
    for name, array in grads.named.items():
        tolerance = 1e-7 if name == "model/wte" else 0
        mean = (parts[0][1].named[name] + parts[1][1].named[name]) * 0.5
        np.testing.assert_allclose(array, mean, rtol=0, atol=tolerance, err_msg=name)


def test_batches_without_any_target_are_refused():
    params, (tokens, targets) = random_params(TINY), ignore_targets("none")
    targets[...] = -1
    for n_procs in (1, 2):
        with pytest.raises(ValueError, match="every target is -1"):
            share(params, [(tokens, targets)] * 2, n_procs)
