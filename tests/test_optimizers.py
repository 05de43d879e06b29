"""Tests of gpt2_support/optimizers.py: AdamW and Muon follow their formulas, however shared."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import TINY, take_steps

import gpt2
import train
from gpt2_support import optimizers, planning
from gpt2_support.data_parallel import DataParallel
from gpt2_support.distributed import ProcessGroup
from gpt2_support.params import Config, Params, n_params

make_config = train.TrainConfig


def make_workers(params, n_threads=1):
    return DataParallel(gpt2.loss_and_grads, params, n_threads)


def to_float64(params):
    return Params(params.config, params.flat.astype(np.float64))


# --- AdamW --------------------------------------------------------------------------------------


def naive_adamw(p, gradients, lr, decay, beta1=0.9, beta2=0.95, eps=1e-8):
    """The formulas of Loshchilov and Hutter on one value."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr * decay * p
        p -= lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
    return p


@pytest.mark.parametrize("block", [7, 32768])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_adamw_equals_its_formulas_in_any_blocks(monkeypatch, block, n_threads):
    monkeypatch.setattr(optimizers, "BLOCK", block)
    params = to_float64(train.init_params(TINY))
    start = Params(TINY, params.flat.copy())
    rng = np.random.default_rng(3)
    gradients = [rng.standard_normal(params.flat.size) for _ in range(3)]
    optimizer = train.AdamW(params)
    parallel, config = make_workers(params, n_threads).parallel, make_config(weight_decay=0.3)
    for step, gradient in enumerate(gradients, 1):
        grads = Params(TINY, gradient * 4)
        optimizer.step(params, grads, 0.01, step, config, 0.25, parallel)
    for name in params.named:
        decay = 0.0 if name.endswith(("/b", "/g")) else 0.3
        trees = (Params(TINY, gradient).named[name] for gradient in gradients)
        history = [float(array.flat[5]) for array in trees]
        expected = naive_adamw(float(start.named[name].flat[5]), history, 0.01, decay)
        assert params.named[name].flat[5] == pytest.approx(expected, rel=1e-12), name


def test_adamw_keeps_float32_and_padding():
    params = train.init_params(TINY)
    grads = Params(TINY)
    for array in grads.named.values():
        array[...] = 1
    train.AdamW(params).step(params, grads, np.float64(0.1), 1, make_config(), np.float64(1))
    assert params.flat.dtype == np.float32
    assert (params.flat[260 * 8 : 384 * 8] == 0).all()


def test_adamw_ten_steps_equal_pytorch(shared):
    golden = np.load(shared("golden/adamw.npz"))
    model = Config(**json.loads(str(golden["config"])))

    def fill(prefix):
        params = Params(model, np.zeros(n_params(model)))
        for name, array in params.named.items():
            value = golden[f"{prefix}:{name}"]
            array[...] = value.T if name.endswith("/w") else value
        return params

    names = ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_clip")
    given = {name: float(golden[name]) for name in names}
    config = train.TrainConfig(**given, min_lr=given["lr"], warmup=0, steps=10)
    state, end = train.TrainState(fill("start"), config), fill("end")
    workers, batch = make_workers(state.params), (golden["tokens"], golden["targets"])
    for expected in zip(golden["losses"], golden["grad_norms"], strict=True):
        loss, grad_norm, _ = train.train_step(state, [batch], workers)
        assert (loss, grad_norm) == pytest.approx(expected, rel=1e-9)
    for name, array in state.params.named.items():
        np.testing.assert_allclose(array, end.named[name], rtol=0, atol=1e-9, err_msg=name)


def check_two_steps(one, whole, shards, sharded, config):
    """Two steps of one optimizer, and of one for each shard, are the same bit for bit."""
    start, rng = whole.flat.copy(), np.random.default_rng(1)
    for t in (1, 2):
        grads = Params(whole.config, rng.standard_normal(start.size, np.float32))
        one.step(whole, grads, 0.01, t, config, 0.5)
        for optimizer in shards:
            optimizer.step(sharded, grads, 0.01, t, config, 0.5)
    assert (whole.flat == sharded.flat).all() and (whole.flat != start).any()
    for name in ("m", "v"):
        joined = np.concatenate([getattr(optimizer, name) for optimizer in shards])
        assert (joined == getattr(one, name)).all()


@pytest.mark.parametrize("n", [2, 3, 7, 1000])
@pytest.mark.parametrize("block", [5, 32768])
def test_adamw_in_shards_is_the_whole_bit_for_bit(monkeypatch, n, block):
    monkeypatch.setattr(optimizers, "BLOCK", block)
    model = replace(TINY, n_vocab=10, n_embd=2, n_layer=1)
    start = train.init_params(model)
    whole, sharded = (Params(model, start.flat.copy()) for _ in range(2))
    group, config = ProcessGroup(), train.TrainConfig()
    group.size, shards = n, []
    for group.rank in range(n):
        shards.append(train.AdamW(sharded, group.shard(sharded.flat.size)))
    one = train.AdamW(whole)
    assert not one.is_sharded and all(optimizer.is_sharded for optimizer in shards)
    check_two_steps(one, whole, shards, sharded, config)


# --- Muon ---------------------------------------------------------------------------------------


def naive_muon(p, gradients, lr, decay, momentum=0.9):
    """The formulas of Jordan on one matrix; the polynomial acts on the singular values alone."""
    m = np.zeros_like(p)
    for g in gradients:
        m = momentum * m + g
        u, s, vt = np.linalg.svd(g + momentum * m, full_matrices=False)
        s = s / math.sqrt((s * s).sum())
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        p = p - lr * decay * p - lr * math.sqrt(max(1, p.shape[0] / p.shape[1])) * (u * s @ vt)
    return p


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-11)])
def test_muon_equals_its_formulas(n_threads, dtype, tolerance):
    model = replace(TINY, n_embd=24)
    start = train.init_params(model)
    params, first = Params(model, start.flat.astype(dtype)), start.copy().named
    rng = np.random.default_rng(3)
    gradients = [rng.standard_normal(start.flat.size) for _ in range(3)]
    for gradient in gradients:
        gradient[260 * 24 : 384 * 24] = 0  # the padding of wte
    muon, adamw = optimizers.Muon(params), optimizers.AdamW(start)
    config = make_config(optimizer="muon", lr=0.01, muon_lr=0.3, weight_decay=0.3)
    parallel = make_workers(params, n_threads).parallel
    for t, gradient in enumerate(gradients, 1):
        grads = Params(model, gradient.astype(dtype) * 4)
        muon.step(params, grads, 0.005, t, config, 0.25, parallel)  # half the highest rate
        adamw.step(start, grads, 0.005, t, config, 0.25)
    for name, array in params.named.items():
        if "/h" in name and name.endswith("/w"):
            n = 3 if "c_attn" in name else 1  # queries, keys and values are matrices of their own
            history = [np.split(Params(model, g).named[name], n) for g in gradients]
            for i, p in enumerate(np.split(first[name].astype(float), n)):
                expected = naive_muon(p, [g[i] for g in history], 0.15, 0.3)
                actual = np.split(array, n)[i]
                np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_allclose(array, start.named[name], rtol=0, atol=1e-6, err_msg=name)
    assert params.flat.dtype == dtype and not params.flat[260 * 24 : 384 * 24].any()


@pytest.mark.parametrize("n_joined", [2, 5])
def test_muon_updates_joined_matrices_as_each_alone(monkeypatch, n_joined):
    model = replace(TINY, n_embd=8, n_layer=3)
    results, sizes = [], []
    for n in (1, n_joined):
        monkeypatch.setattr(optimizers, "JOINED", n * 64)
        params = train.init_params(model)
        muon = optimizers.Muon(params)
        grads = Params(model, np.random.default_rng(1).standard_normal(params.flat.size))
        muon.step(params, grads, 0.01, 1, make_config(optimizer="muon", lr=0.01))
        results.append(params.flat)
        sizes.append(max(shape[0] for _, shape in muon._matrices))
    assert sizes == [1, n_joined]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (40, 10), (10, 40), (1, 5), (3, 8, 14), (2, 40, 10)])
def test_orthogonalize_brings_singular_values_near_1(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    s = np.linalg.svd(optimizers.orthogonalize(x * 1e6), compute_uv=False)
    assert s.min() > 0.6 and s.max() < 1.3
    assert not optimizers.orthogonalize(np.zeros(shape, np.float32)).any()


def test_muon_keeps_the_second_moment_of_the_rest_only():
    params = train.init_params(TINY)
    optimizer = optimizers.Muon(params)
    grads = Params(TINY, np.ones_like(params.flat))
    optimizer.step(params, grads, 0.001, 1, make_config(optimizer="muon"))
    named = Params(TINY, optimizer.v).named
    for name, v in named.items():
        assert v.any() != ("/h" in name and name.endswith("/w")), name


@pytest.mark.parametrize("n", [2, 3, 7, 100])
def test_muon_in_shards_is_the_whole_bit_for_bit(n):
    start = train.init_params(TINY)
    whole, sharded = (Params(TINY, start.flat.copy()) for _ in range(2))
    group, config, parts = ProcessGroup(), make_config(optimizer="muon"), []
    group.size = n
    for group.rank in range(n):
        parts.append(optimizers.make_optimizer("muon", sharded, group))
    one = optimizers.make_optimizer("muon", whole)
    assert not one.is_sharded and all(part.is_sharded for part in parts)
    ends = [0, *(part.shard.stop for part in parts)]
    assert [part.shard.start for part in parts] == ends[:-1] and ends[-1] == whole.flat.size
    check_two_steps(one, whole, parts, sharded, config)


def test_muon_resumes_bit_for_bit(tmp_path):
    config = make_config(optimizer="muon", steps=8, batch_size=2, seq_len=4, warmup=2)
    whole, half = (train.TrainState(train.init_params(TINY), config) for _ in range(2))
    tokens = np.random.default_rng(0).integers(0, TINY.n_vocab, 300).astype(np.uint16)
    loader = train.DataLoader(tokens, config)
    take_steps(whole, loader)
    take_steps(half, loader, until=3)
    train.save_checkpoint(tmp_path, half)
    resumed = train.load_checkpoint(tmp_path)
    assert isinstance(resumed.optimizer, optimizers.Muon)
    take_steps(resumed, loader)
    assert (resumed.params.flat == whole.params.flat).all()
    assert (resumed.optimizer.m == whole.optimizer.m).all()


def test_command_trains_with_muon_and_resumes_it(no_picture, call, fish, text, out):
    whole = text.parent / "whole"
    muon = ("--optimizer", "muon")
    assert call(train, *fish(*muon, "--steps", 4, "--out", whole)).returncode == 0
    assert call(train, *fish(*muon, "--steps", 2, "--decay_steps", 4)).returncode == 0
    changed = call(train, "--resume", "--out", out, "--steps", 4, "--optimizer", "adamw")
    assert changed.returncode == 2
    assert "the run has --optimizer muon; that cannot be changed" in changed.stderr
    assert call(train, "--resume", "--out", out, "--steps", 4).returncode == 0
    assert (out / "model.bin").read_bytes() == (whole / "model.bin").read_bytes()
    state = train.load_checkpoint(out)
    assert isinstance(state.optimizer, optimizers.Muon)


def test_muon_lr_is_in_proportion_to_lr(no_picture, call, fish, out):
    muon = ("--optimizer", "muon", "--steps", 1, "--overwrite")
    for flags, expected in (
        (("--lr", 0.5 / 8), 0.02),
        (("--lr", 0.25 / 8), 0.01),
        (("--lr", 0), 0),
    ):
        assert call(train, *fish(*muon, *flags)).returncode == 0
        assert train.load_checkpoint(out).config.muon_lr == pytest.approx(expected)
    assert call(train, *fish(*muon, "--muon_lr", 0.5)).returncode == 0
    assert train.load_checkpoint(out).config.muon_lr == 0.5


def test_other_rates_follow_the_lr_of_a_resumed_run(no_picture, call, fish, out):
    muon = ("--optimizer", "muon", "--steps", 1, "--lr", 0.08, "--muon_lr", 0.4, "--min_lr", 0.02)
    assert call(train, *fish(*muon)).returncode == 0
    for flags, expected in (
        ((), (0.08, 0.4, 0.02)),
        (("--lr", 0.04), (0.04, 0.2, 0.01)),
        (("--lr", 0.08, "--min_lr", 0.03), (0.08, 0.4, 0.03)),
    ):
        steps = train.load_checkpoint(out).step + 1
        assert call(train, "--resume", "--out", out, "--steps", steps, *flags).returncode == 0
        config = train.load_checkpoint(out).config
        assert (config.lr, config.muon_lr, config.min_lr) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "flags", "warmup"), [(30, (), 3), (1500, (), 100), (30, (9,), 9)]
)
def test_warmup_is_a_tenth_of_a_short_run(steps, flags, warmup, text):
    argv = ["--data", str(text), "--n_vocab", "300", "--steps", str(steps)]
    argv += [text for value in flags for text in ("--warmup", str(value))]
    args = train.parse_args(argv)
    assert train.make_config(args, Config(300)).warmup == warmup


def test_command_refuses_what_does_not_fit_muon(call, fish, out):
    adamw = ("--optimizer", "adamw")
    cases = [
        ((*adamw, "--muon_lr", 0.1), 2, "--muon_lr: it would do nothing, since it belongs to"),
        ((*adamw, "--momentum", 0.9), 2, "--momentum: it would do nothing, since it belongs to"),
        (("--optimizer", "muon", "--momentum", 1), 2, "'1' is not a number of 0 or more and below"),
        (("--optimizer", "sgd"), 2, "argument --optimizer: invalid choice: 'sgd'"),
    ]
    for arguments, status, message in cases:
        done = call(train, *fish(*arguments))
        assert (done.returncode, done.stderr.count(message)) == (status, 1), done.stderr
        assert not (out / "model.bin").exists()


# --- its time -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_time_update_takes_the_faster_step_and_leaves_the_run_alone(monkeypatch, name):
    clock = iter([0.0, 5.0, 10.0, 13.0])  # 5 s with memory to fetch, then 3 s
    monkeypatch.setattr(optimizers.time, "perf_counter", lambda: next(clock))
    params = train.init_params(TINY)
    optimizer, workers = optimizers.make_optimizer(name, params), make_workers(params, 2)
    workers.grads.flat[...] = np.inf  # of a run that is about to diverge
    before = params.flat.copy()
    seconds = optimizers.time_update(optimizer, params, make_config(optimizer=name), workers)
    assert seconds == 3
    assert (params.flat == before).all()
    assert not optimizer.m.any() and not optimizer.v.any()


def test_time_update_of_an_empty_shard_is_a_moment():
    params = train.init_params(Config(257, 8, 64, 4, 1))
    empty = next(
        optimizer
        for start in range(0, params.flat.size, 1000)
        if not (optimizer := optimizers.Muon(params, slice(start, start + 10))).m.size
    )  # both ends within one matrix
    seconds = optimizers.time_update(empty, params, make_config(), make_workers(params))
    assert 0 <= seconds < 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_time_update_of_a_large_model_updates_a_part(monkeypatch, name):
    clock, updates = iter([0.0, 5.0, 10.0, 13.0]), []
    monkeypatch.setattr(optimizers.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(optimizers, "adamw_update", lambda p, *_: updates.append(p.size))
    monkeypatch.setattr(optimizers, "muon_update", lambda p, *_: updates.append(p.size))
    monkeypatch.setattr(optimizers, "BLOCK", 64)
    params = train.init_params(TINY)
    monkeypatch.setattr(optimizers, "TIMED", -(-params.flat.size // 4))
    optimizer, workers = optimizers.make_optimizer(name, params), make_workers(params)
    config = make_config(optimizer=name)
    assert optimizers.time_update(optimizer, params, config, workers) == 4 * 3
    assert 0.15 < sum(updates) / 2 / params.flat.size < 0.5  # of two steps


def test_announced_time_has_the_optimizers_share(no_picture, monkeypatch, call, fish):
    monkeypatch.setattr(planning, "fastest", lambda _, params, *__: (make_workers(params), 6.0))
    monkeypatch.setattr(planning, "time_update", lambda *_: 30.0)
    done = call(train, *fish("--steps", 2, "--grad_accum", 5))
    assert "about 2.0 minutes" in done.stderr  # 2 x (5 x 6 + 30) s
