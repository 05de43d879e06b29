"""Tests of gpt2_support/data_parallel.py; what a step computes is in test_train.py."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import TINY

import gpt2
import train
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
        assert blas.get_threads() == (2 if blas.openblas("get_num_threads") else 1)
    blas.set_threads(before)
    assert during == [1, 2, 1] or not blas.openblas("get_num_threads")


def test_parallel_shares_the_elementwise_work_on_large_buffers(monkeypatch):
    monkeypatch.setattr(blas, "get_threads", lambda: 3)
    large = Config(n_vocab=1 << 16, n_ctx=4, n_embd=16, n_head=2, n_layer=1)
    for config, n in ((TINY, 1), (large, 3)):
        workers = data_parallel.DataParallel(gpt2.loss_and_grads, Params(config))
        assert workers.parallel(lambda i, n: (i, n)) == [(i, n) for i in range(n)]


@pytest.mark.parametrize(
    "n_rows, seq_len, n_embd, n_cores, n_threads",
    [
        (16, 256, 216, 2, 2),
        (16, 256, 216, 1, 1),
        (3, 256, 216, 2, 1),
        (4, 64, 768, 2, 1),
        (8, 16, 64, 2, 1),
        (12, 1024, 768, 8, 6),
    ],
)
def test_choose_threads_gives_each_enough_work(n_rows, seq_len, n_embd, n_cores, n_threads):
    assert data_parallel.choose_threads(n_rows, seq_len, n_embd, n_cores) == n_threads


@pytest.mark.parametrize("n", [2, 3, 7, 1000])
@pytest.mark.parametrize("block", [5, 32768])
def test_adamw_in_shards_is_the_whole_bit_for_bit(monkeypatch, n, block):
    monkeypatch.setattr(data_parallel, "BLOCK", block)
    model = replace(TINY, n_vocab=10, n_embd=2, n_layer=1)
    start = train.init_params(model)
    whole, sharded = (Params(model, start.flat.copy()) for _ in range(2))
    group, config = ProcessGroup(), train.TrainConfig()
    group.size, optimizers = n, []
    for group.rank in range(n):
        optimizers.append(train.AdamW(sharded, group.shard(sharded.flat.size)))
    one = train.AdamW(whole)
    assert not one.is_sharded and all(optimizer.is_sharded for optimizer in optimizers)
    rng = np.random.default_rng(1)
    for t in (1, 2):
        grads = Params(model, rng.standard_normal(start.flat.size, np.float32))
        one.step(whole, grads, 0.01, t, config, 0.5)
        for optimizer in optimizers:
            optimizer.step(sharded, grads, 0.01, t, config, 0.5)
    assert (whole.flat == sharded.flat).all() and (whole.flat != start.flat).any()
    for name in ("m", "v"):
        joined = np.concatenate([getattr(optimizer, name) for optimizer in optimizers])
        assert (joined == getattr(one, name)).all()
