"""Tests of train.py: learning, the loop and its command line."""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TEXT, TINY, take_steps

import encoder
import gpt2
import train
from gpt2_support import data_parallel, datasets, runlog
from gpt2_support.data_parallel import DataParallel
from gpt2_support.distributed import ProcessGroup
from gpt2_support.formats import llmc
from gpt2_support.params import Config, Params


def make_config(**kwargs):
    small = {"steps": 6, "batch_size": 2, "seq_len": 4, "warmup": 2, "eval_every": 2}
    return train.TrainConfig(**small | {"save_every": 2, "sample_every": 1000} | kwargs)


def make_state(model=TINY, dtype=np.float32, seed=0, **kwargs):
    """A new run of a new model."""
    start = train.init_params(model, seed)
    return train.TrainState(Params(model, start.flat.astype(dtype)), make_config(**kwargs))


def make_workers(params, n_threads=1):
    return DataParallel(gpt2.loss_and_grads, params, n_threads)


def uint16_tokens(n, n_vocab=TINY.n_vocab, seed=0):
    return np.random.default_rng(seed).integers(0, n_vocab, n).astype(np.uint16)


def to_float64(params):
    return Params(params.config, params.flat.astype(np.float64))


# --- the start ----------------------------------------------------------------------------------


def test_init_params_std_is_gpt2s():
    config = Config(n_vocab=500, n_ctx=64, n_embd=64, n_head=2, n_layer=8)
    named = train.init_params(config).named
    for name, array in named.items():
        if name.endswith("/b"):
            assert (array == 0).all()
        elif name.endswith("/g"):
            assert (array == 1).all()
        else:
            std = 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 x 8) = 4
            assert array.std() == pytest.approx(std, rel=0.05), name
            assert abs(array.mean()) < 5 * std / math.sqrt(array.size), name


def test_init_params_depends_on_seed_only():
    first, again, other = (train.init_params(TINY, seed).flat for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert first.dtype == np.float32


def test_init_params_leaves_padding_zero():
    params = train.init_params(TINY)
    assert (params.flat[260 * 8 : 384 * 8] == 0).all()


def test_initial_loss_is_that_of_uniform_guesses():
    config = Config(n_vocab=1024, n_ctx=32, n_embd=64, n_head=4, n_layer=4)
    tokens = uint16_tokens(33, 1024)
    loss, _ = gpt2.loss_and_grads(train.init_params(config), tokens[:-1], tokens[1:])
    assert abs(loss - math.log(1024)) < 0.1


# --- data ---------------------------------------------------------------------------------------


def test_data_loader_targets_are_next_tokens():
    tokens = np.arange(1000, dtype=np.uint16)
    for order in ("random", "sequential"):
        data = train.DataLoader(tokens, make_config(batch_size=3, seq_len=7, order=order))
        x, y = data.batch(5)
        assert x.shape == y.shape == (3, 7)
        assert (y == x + 1).all()
        assert (np.diff(x) == 1).all()


def test_data_loader_pass_takes_each_window_once():
    tokens = np.arange(1000, dtype=np.uint16)
    data = train.DataLoader(tokens, make_config(batch_size=1, seq_len=10))
    passes = []
    for n_pass in range(2):
        numbers = range(n_pass * data.n_windows, (n_pass + 1) * data.n_windows)
        firsts = [int(data.batch(number)[0][0, 0]) for number in numbers]
        assert firsts != sorted(firsts)
        assert (np.diff(sorted(firsts)) == 10).all()  # neither gaps nor repetitions
        passes.append(firsts)
    assert sorted(passes[0]) != sorted(passes[1])  # cut at another offset


def test_data_loader_offset_reaches_both_ends():
    tokens = np.arange(26, dtype=np.uint16)  # the only offsets for two windows of 10 are 0 to 5
    data = train.DataLoader(tokens, make_config(batch_size=1, seq_len=10))
    assert data.n_windows == 1
    starts = {int(data.batch(number)[0][0, 0]) for number in range(400)}
    assert starts == set(range(16))


def test_data_loader_batch_depends_on_number_only():
    tokens = uint16_tokens(500)
    one, two = (train.DataLoader(tokens, make_config()) for _ in range(2))
    for number in (0, 40, 3, 200):
        for _ in range(number % 7):
            two.batch(_)  # what was read before does not matter
        assert (one.batch(number)[0] == two.batch(number)[0]).all()
    other = train.DataLoader(tokens, make_config(seed=1))
    assert (one.batch(0)[0] != other.batch(0)[0]).any()


def test_data_loader_sequential_goes_through_the_data():
    tokens = np.arange(101, dtype=np.uint16)
    data = train.DataLoader(tokens, make_config(batch_size=2, seq_len=5, order="sequential"))
    assert data.batch(0)[0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert data.batch(1)[0][0, 0] == 10
    assert data.batch(9)[1][1].tolist() == [96, 97, 98, 99, 100]
    assert data.batch(10)[0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]  # the second pass


def llmc_windows(n_tokens, B, T, n_batches):
    """Return the starts of the windows that llm.c's dataloader_next_batch gives, (B,) a batch."""
    n_batches_of_data = (2 * n_tokens - 2) // (2 * B * T)
    starts, current = [], 0
    for _ in range(n_batches):
        if current >= n_batches_of_data:
            current = 0
        starts.append([(current * B + row) * T for row in range(B)])
        current += 1
    return starts


@pytest.mark.parametrize("n_tokens", [2 * 5 + 1, 99, 100, 101, 105, 106, 20 * 5 + 1])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_data_loader_sequential_is_that_of_llmc(n_tokens, batch_size):
    config = make_config(batch_size=batch_size, seq_len=5, order="sequential")
    data = train.DataLoader(np.arange(n_tokens, dtype=np.uint16), config)
    assert data.n_windows == (n_tokens - 1) // 5
    if data.n_windows % batch_size:  # llm.c leaves out the windows that fill no batch
        return
    for number, starts in enumerate(llmc_windows(n_tokens, batch_size, 5, 45)):
        x, y = data.batch(number)
        assert x[:, 0].tolist() == starts
        assert (y == x + 1).all()


@pytest.mark.parametrize("n_tokens", [2 * 5 + 1, 24, 57, 101])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_data_loader_sequential_takes_every_window_once_a_pass(n_tokens, batch_size):
    config = make_config(batch_size=batch_size, seq_len=5, order="sequential")
    data = train.DataLoader(np.arange(n_tokens, dtype=np.uint16), config)
    n = (n_tokens - 1) // 5
    firsts = [int(first) for number in range(3 * n) for first in data.batch(number)[0][:, 0]]
    expected = list(range(0, 5 * n, 5))
    assert firsts == expected * (3 * batch_size)


@pytest.mark.parametrize("n_tokens", [2 * 5 + 1, 24, 57, 101])
def test_data_loader_random_is_that_of_older_checkpoints(n_tokens):
    """The windows of a step never change, so that any run goes on as it began."""
    data = train.DataLoader(np.arange(n_tokens, dtype=np.uint16), make_config(seq_len=5, seed=3))
    n, expected = max(1, (n_tokens - 1) // 5 - 1), []
    for n_pass in range(6):
        rng, starts = np.random.default_rng([3, n_pass]), np.arange(n) * 5
        starts += rng.integers(n_tokens - 5 * n)
        rng.shuffle(starts)
        expected += starts.tolist()
    actual = [int(first) for number in range(3 * n) for first in data.batch(number)[0][:, 0]]
    assert actual == expected


def test_data_loader_refuse_data_shorter_than_a_batch():
    train.DataLoader(uint16_tokens(2 * 4 + 1), make_config())
    with pytest.raises(ValueError, match="data of 8 tokens is shorter than one batch of 2 windows"):
        train.DataLoader(uint16_tokens(2 * 4), make_config())


# --- learning -----------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_decays_to_its_floor():
    s = make_config(steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(step, s) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.55)  # half of the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    assert train.learning_rate(1000, s) == pytest.approx(0.1)
    assert train.learning_rate(100, replace(s, decay_steps=190)) == pytest.approx(0.55)


def test_l2_norm_is_euclidean():
    values = np.random.default_rng(0).standard_normal(200_000)
    for parallel in (data_parallel.serial, make_workers(train.init_params(TINY), 3).parallel):
        assert train.l2_norm(values, parallel) == pytest.approx(np.linalg.norm(values), rel=1e-12)


@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("n_batches", [1, 2])
def test_train_step_is_that_of_the_whole_batch_however_it_is_shared(
    workers_in_threads, n_threads, n_batches
):
    tokens = uint16_tokens(8 * 8).reshape(8, 8)
    ends = []
    for n, threads in ((1, 1), (n_batches, n_threads)):
        state = make_state(dtype=np.float64)
        batches = [(part[:, :-1], part[:, 1:]) for part in np.split(tokens, n)]
        workers = make_workers(state.params, threads)
        for _ in range(2):  # what the workers did before must not matter
            figures = train.train_step(state, batches, workers)
        ends.append((*figures, state.params.flat))
    assert ends[0][:3] == pytest.approx(ends[1][:3], rel=1e-12)
    np.testing.assert_allclose(ends[0][3], ends[1][3], rtol=1e-9, atol=1e-12)


def test_train_step_clips_the_gradient_to_its_limit():
    tokens = uint16_tokens(9)[None]
    norms = []

    class Spy(train.AdamW):
        def step(self, params, grads, lr, t, config, scale=1.0, parallel=data_parallel.serial):
            norms.append(scale * np.linalg.norm(grads.flat))

    for clip in (1e-3, 1e3, 0):  # 0: no limit
        state = make_state(grad_clip=clip)
        state.optimizer = Spy(state.params)
        batch = tokens[:, :-1], tokens[:, 1:]
        _, before, _ = train.train_step(state, [batch], make_workers(state.params))
        assert norms.pop() == pytest.approx(min(clip or before, before), rel=1e-3)
        assert 1e-3 < before < 1e3


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_train_step_stops_before_a_non_finite_update(poison):
    state = make_state()
    state.params.h[0].mlp.c_fc.b[2] = poison
    before, tokens = state.params.flat.copy(), uint16_tokens(9)[None]
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="diverged: at step 1 the loss"):
        train.train_step(state, [(tokens[:, :-1], tokens[:, 1:])], make_workers(state.params))
    np.testing.assert_array_equal(state.params.flat, before)
    assert state.step == 0 and not state.optimizer.m.any()


def test_train_step_refuses_read_only_parameters_before_it_changes_anything(tmp_path):
    llmc.save_params(tmp_path / "model.bin", train.init_params(TINY))
    params = gpt2.load(tmp_path)
    state, tokens = train.TrainState(params, make_config()), uint16_tokens(9)[None]
    with pytest.raises(ValueError, match=r"read-only, .* train a copy of them, params\.copy"):
        train.train_step(state, [(tokens[:, :-1], tokens[:, 1:])], make_workers(params))
    assert state.step == 0 and not state.optimizer.m.any() and not state.optimizer.v.any()
    state = train.TrainState(params.copy(), make_config())
    train.train_step(state, [(tokens[:, :-1], tokens[:, 1:])], make_workers(state.params))
    assert state.step == 1


@pytest.mark.no_cover
def test_training_overfits_one_batch():
    rates = {"lr": 1e-2, "min_lr": 1e-3, "warmup": 10, "weight_decay": 0.0}
    state = make_state(
        replace(TINY, n_embd=32), steps=300, batch_size=4, seq_len=8, order="sequential", **rates
    )
    loader = train.DataLoader(uint16_tokens(4 * 8 + 1), state.config)
    losses = take_steps(state, loader)
    assert losses[0] > 5
    assert losses[-1] < 0.01


# --- checkpoints of a run -----------------------------------------------------------------------


def same_state(one, two):
    return (
        one.step == two.step
        and one.best_loss == two.best_loss
        and one.config == two.config
        and (one.params.flat == two.params.flat).all()
        and (one.optimizer.m == two.optimizer.m).all()
        and (one.optimizer.v == two.optimizer.v).all()
    )


def test_checkpoint_folder_may_be_a_str(tmp_path):
    state = make_state()
    train.save_checkpoint(str(tmp_path / "run"), state)
    assert same_state(train.load_checkpoint(str(tmp_path / "run")), state)


def test_training_resumes_bit_for_bit(tmp_path):
    whole, half = (make_state(steps=8, grad_accum=2) for _ in range(2))
    loader = train.DataLoader(uint16_tokens(300), whole.config)
    take_steps(whole, loader)
    take_steps(half, loader, until=3)
    train.save_checkpoint(tmp_path, half)
    resumed = train.load_checkpoint(tmp_path)
    assert same_state(resumed, half) and resumed.step == 3
    take_steps(resumed, loader)
    assert same_state(resumed, whole) and resumed.step == 8


@pytest.mark.parametrize("n_threads", [1, 2])
def test_training_with_dropout_resumes_bit_for_bit(workers_in_threads, tmp_path, n_threads):
    def workers(state):
        return DataParallel(gpt2.loss_and_grads, state.params, n_threads, dropout=0.3)

    def advance(state, until):
        team = workers(state)
        return [
            train.train_step(state, loader.batches(step), team)[0]
            for step in range(state.step, until)
        ]

    whole, half = (make_state(steps=8, grad_accum=2, dropout=0.3) for _ in range(2))
    loader = train.DataLoader(uint16_tokens(300), whole.config)
    advance(whole, 6)
    advance(half, 3)
    train.save_checkpoint(tmp_path, half)
    resumed = train.load_checkpoint(tmp_path)
    advance(resumed, 6)
    assert same_state(resumed, whole) and resumed.config.dropout == 0.3


def test_dropout_differs_by_step_batch_process_and_rank(workers_in_threads):
    drawn = []

    def spy(params, tokens, targets, grads, n_counted, drop):
        drawn.append(tuple(drop.mask(20, dtype=np.float32)))
        return 0.0, grads

    params, tokens = train.init_params(TINY), uint16_tokens(16).reshape(4, 4)
    group = ProcessGroup()
    for group.rank in (0, 1):
        workers = DataParallel(spy, params, 2, group, dropout=0.5)
        for step in (0, 1):
            workers.loss_and_grads(params, [(tokens, tokens)] * 2, 7, step)
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 2 * 2
    DataParallel(lambda *args: drawn.append(args[5]) or (0.0, None), params).loss_and_grads(
        params, [(tokens, tokens)], 7, 0
    )
    assert drawn[-1] is None  # off by default


def test_command_trains_with_dropout_and_resumes_it(no_picture, call, fish, text, out):
    whole, dropout = text.parent / "whole", ("--dropout", 0.2)
    assert call(train, *fish(*dropout, "--steps", 4, "--out", whole)).returncode == 0
    assert call(train, *fish("--steps", 4, "--out", text.parent / "without")).returncode == 0
    assert call(train, *fish(*dropout, "--steps", 2, "--decay_steps", 4)).returncode == 0
    assert call(train, "--out", out, "--resume", "--steps", 4).returncode == 0
    assert losses(out) == losses(whole) != losses(text.parent / "without")
    assert (out / "model.bin").read_bytes() == (whole / "model.bin").read_bytes()


def test_batches_of_the_steps_are_all_batches_in_their_order(monkeypatch):
    numbers, batch = [], train.DataLoader.batch

    def counting(self, number):
        numbers.append(number)
        return batch(self, number)

    monkeypatch.setattr(train.DataLoader, "batch", counting)
    loader = train.DataLoader(uint16_tokens(300), make_config(grad_accum=2))
    assert [len(loader.batches(step)) for step in range(3)] == [2, 2, 2]
    assert numbers == [0, 1, 2, 3, 4, 5]


def test_checkpoint_model_is_that_of_the_state(tmp_path):
    state = make_state()
    train.save_checkpoint(tmp_path, state)
    assert (llmc.load_params(tmp_path / "model.bin").flat == state.params.flat).all()


# --- the command line ---------------------------------------------------------------------------


def last_line(text):
    return text.strip().splitlines()[-1]


def losses(out):
    rows = [*runlog.iterate_log(out / "log.csv")]
    return [(row["step"], row["loss"], row["val_loss"]) for row in rows]


def saved(out):
    return [(out / name).read_bytes() for name in ("model.bin", "state.npz")]


def test_command_trains_from_text_and_its_last_line_samples(call, fish, out):
    done = call(train, *fish())
    assert done.returncode == 0, done.stderr
    assert {"model.bin", "tokenizer.bin", "state.npz", "log.csv", "best"} <= set(os.listdir(out))
    assert set(os.listdir(out / "best")) == {"model.bin", "tokenizer.bin", "val_loss.json"}
    rows = [*runlog.iterate_log(out / "log.csv")]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row["val_loss"]) for row in rows] == [False, True] * 3
    best = min(float(row["val_loss"]) for row in rows if row["val_loss"])
    assert train.load_checkpoint(out).best_loss == pytest.approx(best, rel=1e-5)
    count = 260 * 8 + 8 * 8 + 12 * 8 * 8 + 13 * 8 + 2 * 8
    assert f"{count:,} parameters: 1 layer, 2 heads, 8 channels" in done.stderr
    assert done.stderr.count("a sample at temperature 0.8") == 2 and done.stdout.strip()
    command = shlex.split(last_line(done.stderr).split("To sample: ")[1])
    assert command[:2] == ["python", "gpt2.py"]
    sampled = call(gpt2, *command[2:])
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.strip()


def test_command_reads_tokens_files(no_picture, call, fish, text, out):
    tokenizer, data = text.parent / "tokenizer.bin", text.parent / "tokens.bin"
    assert call(encoder, "train", text, "--n_vocab", 260, "--out", tokenizer).returncode == 0
    arguments = ("--tokenizer", tokenizer, "--out", data)
    assert call(encoder, "encode", text, *arguments).returncode == 0
    from_text = call(train, *fish("--tokenizer", tokenizer))
    first = losses(out)
    from_bin = call(train, *fish("--data", data, "--val_data", data, "--overwrite"))
    assert (from_text.returncode, from_bin.returncode) == (0, 0), from_bin.stderr
    second = losses(out)
    assert second[0] != first[0]  # all of the tokens to train on, not 9 in 10
    assert len(second) == len(first)


def test_command_encodes_a_text_once_until_it_changes(trained, call, fish, text):
    short = ("--steps", 2, "--overwrite")
    assert "encoding" not in call(train, *fish(*short)).stderr
    assert "encoding" in call(train, *fish(*short, "--docs", "lines")).stderr
    later = time.time() + 10
    text.write_text(TEXT * 2, encoding="utf-8")
    os.utime(text, (later, later))
    changed = call(train, *fish(*short))
    assert "learning a vocabulary" in changed.stderr and "encoding" in changed.stderr


@pytest.mark.thorough
def test_command_resumes_a_killed_run_bit_for_bit(fish, text, out, run, uncounted):
    whole = text.parent / "whole"
    arguments = ("--steps", 400, "--save_every", 25, "--eval_every", 50, "--sample_every", 25)
    assert run("train.py", *fish(*arguments, "--out", whole)).returncode == 0
    command = [sys.executable, str(ROOT / "train.py"), *fish(*arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out / "state.npz").exists() or train.load_checkpoint(out).step < 50:
        assert process.poll() is None, "the run was over before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    resumed = run("train.py", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(out) == losses(whole)
    assert same_state(train.load_checkpoint(out), train.load_checkpoint(whole))
    for name in ("model.bin", "best/model.bin"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_command_resumes_to_more_steps_bit_for_bit(no_picture, call, fish, text, out):
    whole = text.parent / "whole"
    assert call(train, *fish("--steps", 8, "--out", whole)).returncode == 0
    assert call(train, *fish("--steps", 4, "--decay_steps", 8)).returncode == 0
    assert call(train, "--out", out, "--resume", "--steps", 8).returncode == 0
    assert losses(out) == losses(whole)
    assert (out / "model.bin").read_bytes() == (whole / "model.bin").read_bytes()


def test_command_resumes_a_run_that_has_ended_and_mends_its_model(trained, call):
    """A kill may have come after state.npz and before model.bin."""
    whole = (trained / "model.bin").read_bytes()
    (trained / "model.bin").write_bytes(b"of the step before")
    assert call(train, "--out", trained, "--resume").returncode == 0
    assert (trained / "model.bin").read_bytes() == whole
    assert len(losses(trained)) == 6


def scripted_losses(monkeypatch, losses):
    """Let the validations of a run give these losses, by step."""
    evaluate = train.evaluate

    def scripted(*args, **others):
        evaluation = evaluate(*args, **others)
        return replace(evaluation, nats=next(losses) * evaluation.n_tokens)

    monkeypatch.setattr(train, "evaluate", scripted)


def test_last_line_leads_to_a_folder_that_begins_with_a_dash(no_picture, call, fish, tmp_path):
    done = call(train, *fish("--steps", 1, "--out=-dash"), cwd=tmp_path)
    command = shlex.split(last_line(done.stderr).split("To sample: ")[1])
    assert call(gpt2, *command[2:], "--n_tokens", 1, cwd=tmp_path).returncode == 0
    done = call(train, "--resume", "--out", "-dash", cwd=tmp_path)
    assert done.returncode == 2 and "is given as --out=-..." in last_line(done.stderr)


def test_last_line_samples_from_a_prompt_that_begins_with_a_dash(no_picture, call, fish):
    done = call(train, *fish("--prompt=--the", "--steps", 1))
    command = shlex.split(last_line(done.stderr).split("To sample: ")[1])
    assert command[-2:] == ["--", "--the"]
    assert call(gpt2, *command[2:]).returncode == 0


def test_command_stops_early_when_validation_is_no_better(no_picture, call, fish, out, monkeypatch):
    scripted_losses(monkeypatch, iter([5.0, 4.0, 4.1, 4.2, 4.3]))
    arguments = ("--steps", 40, "--eval_every", 2, "--patience", 2, "--save_every", 1)
    done = call(train, *fish(*arguments))
    assert done.returncode == 0, done.stderr
    state = train.load_checkpoint(out)
    assert (state.step, state.best_step, state.best_loss) == (8, 4, pytest.approx(4))
    assert "no lower validation loss since step 4, so the run ends at step 8 of 40" in done.stderr
    command = shlex.split(last_line(done.stderr).split("To sample: ")[1])
    assert command[command.index("--model") + 1] == str(out / "best")
    again = call(train, "--resume", "--out", out)
    assert again.returncode == 0 and train.load_checkpoint(out).step == 8
    more = call(train, "--resume", "--out", out, "--patience", 3)
    assert more.returncode == 0 and train.load_checkpoint(out).step == 10


def test_patience_counts_on_after_a_resume(no_picture, call, fish, out, monkeypatch):
    scripted_losses(monkeypatch, iter([5.0, 4.0, 4.1, 4.2, 4.3]))
    arguments = ("--eval_every", 2, "--patience", 2)
    assert call(train, *fish(*arguments, "--steps", 6, "--decay_steps", 40)).returncode == 0
    assert call(train, "--resume", "--out", out, "--steps", 40).returncode == 0
    assert train.load_checkpoint(out).step == 8


def test_patience_after_a_kill_counts_from_the_checkpoint(no_picture, call, fish, out, monkeypatch):
    """The best model that the killed run has left may be of a later step."""
    scripted_losses(monkeypatch, iter([5.0, 5.1, 4.8, 4.9, 4.7, 5.0, 5.0]))
    arguments = ("--eval_every", 2, "--patience", 2, "--save_every", 100)
    assert call(train, *fish(*arguments, "--steps", 4, "--decay_steps", 40)).returncode == 0
    state = train.load_checkpoint(out)
    train.checkpoint.save_best(out, state.params, 4.75, state.data)  # that of step 10, as it were
    assert call(train, "--resume", "--out", out, "--steps", 40).returncode == 0
    state = train.load_checkpoint(out)
    assert (state.step, state.best_step) == (14, 10)
    assert train.checkpoint.best_loss(out, state.data) == pytest.approx(4.7)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_command_saves_and_exits_after_a_signal(no_picture, call, fish, out, monkeypatch, name):
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")
    step = train.train_step

    def step_with_signal(state, *args):
        if state.step == 2:
            signal.raise_signal(getattr(signal, name))
        return step(state, *args)

    monkeypatch.setattr(train, "train_step", step_with_signal)
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # nohup has SIGHUP ignored
    done = call(train, *fish("--steps", 100, "--save_every", 100))
    signal.signal(getattr(signal, name), before)
    assert done.returncode == 130
    assert train.load_checkpoint(out).step == len(losses(out)) == 3
    resume = shlex.split(last_line(done.stderr).split("saved at step 3; go on with: ")[1])
    assert resume == ["python", "train.py", "--resume", "--out", str(out)]


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process alone")
def test_command_saves_and_exits_on_ctrl_c(run, fish, out):
    arguments = ("--steps", 100_000, "--save_every", 100_000)
    command = [sys.executable, str(ROOT / "train.py"), *fish(*arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(losses(out)) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in message
    step = train.load_checkpoint(out).step
    assert f"saved at step {step}; go on with: python " in last_line(message)
    assert step == len(losses(out)) >= 3
    resume = shlex.split(last_line(message).split("go on with: ")[1])
    assert Path(resume[1]).resolve() == ROOT / "train.py"
    resumed = run("train.py", *resume[2:], "--steps", step + 2)
    assert resumed.returncode == 0, resumed.stderr
    assert train.load_checkpoint(out).step == step + 2


def test_command_stops_when_it_diverges_and_keeps_the_checkpoint(trained, call):
    state = train.load_checkpoint(trained)
    state.params.flat[:100] = np.inf
    train.save_checkpoint(trained, state)
    before = saved(trained)
    done = call(train, "--resume", "--out", trained, "--steps", 12)
    assert done.returncode == 1
    assert "training has diverged: at step 7 the loss is nan" in last_line(done.stderr)
    assert saved(trained) == before


def test_command_fine_tunes_a_model(trained, call, text):
    tuned = text.parent / "tuned"
    arguments = ("--data", text, "--init", trained, "--out", tuned, "--steps", 2)
    done = call(train, *arguments, "--batch_size", 2)
    assert done.returncode == 0, done.stderr
    first, _ = runlog.iterate_log(tuned / "log.csv")
    assert float(first["lr"]) == pytest.approx(5e-5)  # fine-tuning has a default of its own
    start, end = llmc.load_params(trained), llmc.load_params(tuned)
    assert 0 < abs(end.flat - start.flat).max() < 1e-4
    assert (trained / "tokenizer.bin").read_bytes() == (tuned / "tokenizer.bin").read_bytes()


def save_model(folder, n_vocab):
    """Save a model of n_vocab ids with a tokenizer of 260."""
    llmc.save_params(folder / "model.bin", train.init_params(replace(TINY, n_vocab=n_vocab)))
    encoder.train(TEXT, 260).save(folder / "tokenizer.bin")


def test_command_resumes_a_model_with_more_ids_than_its_tokenizer(
    no_picture, call, fish, out, tmp_path
):
    save_model(tmp_path / "wide", 300)
    assert call(train, *fish("--init", tmp_path / "wide", "--steps", 2)).returncode == 0
    resumed = call(train, "--resume", "--out", out, "--steps", 4)
    assert resumed.returncode == 0, resumed.stderr
    assert train.load_checkpoint(out).params.config.n_vocab == 300


def test_command_refuses_a_tokenizer_of_another_model(call, text, out, tmp_path):
    save_model(tmp_path / "small", 259)
    for more in (("--out", out), ("--eval_only",)):
        done = call(train, "--data", text, "--init", tmp_path / "small", *more)
        assert done.returncode == 1
        assert "260 tokens, the model only 259: they do not belong together" in done.stderr


def test_command_eval_only_prints_how_well_a_model_predicts(trained, call, text):
    enc, params = encoder.load(trained), gpt2.load(trained)
    before = saved(trained)
    done = call(train, "--eval_only", "--init", trained, "--data", text, "--stride", 3)
    assert done.returncode == 0, done.stderr
    tokens = np.array([enc.eot, *enc.encode(TEXT)])
    result = train.evaluate(params, tokens, datasets.token_lengths(enc), 8, 3)
    assert str(result) in done.stdout
    assert f"{len(tokens) - 1} tokens ({len(TEXT)} bytes), in windows of 8, stride 3" in done.stdout
    assert re.search(r"[\d.]+ nats per token, perplexity [\d.]+, [\d.]+ bits per byte", done.stdout)
    assert saved(trained) == before


def test_command_refuses_to_replace_a_model_unasked(trained, call, fish):
    before = saved(trained)
    refused = call(train, *fish("--seed", 1))
    assert refused.returncode == 1
    assert "there is a model already: --resume goes on with it" in last_line(refused.stderr)
    assert saved(trained) == before
    assert call(train, *fish("--seed", 1, "--overwrite")).returncode == 0
    assert saved(trained)[0] != before[0]


ERRORS = {
    "no data": ([], 2, "--data is needed"),
    "no file": (["--data", "nowhere.txt"], 1, "nowhere.txt: no such file"),
    "short": (["--batch_size", "5000"], 1, "is shorter than one batch of 5000 windows of 8"),
    "heads": (["--n_head", "3"], 2, "--n_head 3 does not divide --n_embd 8"),
    "threads": (["--threads", "3"], 2, "--threads 3 does not divide --batch_size 2"),
    "window": (["--seq_len", "9"], 2, "--seq_len 9 exceeds n_ctx = 8"),
    "epochs": (["--epochs", "1e308"], 2, "argument --epochs: '1e308' is not a number over 0 and"),
    "one token": (["--eval_tokens", "1"], 2, "argument --eval_tokens: '1' is not a whole number"),
    "heads of a plan": (
        *(["--minutes", "1", "--n_head", "3"], 2),
        "--n_head 3 does not divide --n_embd 8",
    ),
    "few tokens": (["--n_vocab", "100"], 2, "argument --n_vocab: 100 is below 257"),
    "steps": (["--steps", "0"], 2, "argument --steps: '0' is not a whole number of 1 or more"),
    "lr": (["--lr", "nan"], 2, "argument --lr"),
    "seed": (["--seed", "-1"], 2, "argument --seed"),
    "dropout": (["--dropout", "1"], 2, "'1' is not a number of 0 or more and below 1"),
    "order": (["--order", "backward"], 2, "argument --order: invalid choice: 'backward'"),
    "init": (["--init", "no/such/model"], 1, "no model no/such/model"),
    "resume": (["--resume"], 1, "there is no run to resume"),
    "eval": (["--eval_only"], 2, "--eval_only needs --init"),
    "other data": (["--other_data"], 2, "--other_data: it would do nothing"),
    "vocabulary": (["--n_vocab", "100000"], 1, "too few to learn 100000 tokens"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_errors_are_one_clear_line(call, fish, out, case):
    arguments, status, message = ERRORS[case]
    done = call(train, *([] if case == "no data" else fish(*arguments)))
    assert done.returncode == status
    assert message in last_line(done.stderr)
    assert "Traceback" not in done.stderr
    assert not (out / "model.bin").exists()


def test_command_errors_about_a_model_are_one_clear_line(trained, call, text):
    before = saved(trained)
    evaluate = ("--eval_only", "--init", trained, "--data", text)
    cases = [
        (("--resume",), 2, "--resume needs --out, the folder of the run"),
        (("--resume", "--overwrite", "--out", trained), 2, "--overwrite: it would do nothing"),
        (("--resume", "--out", trained, "--n_layer", 3), 2, "that cannot be changed"),
        (("--resume", "--out", trained, "--steps", 1), 2, "--steps 1: the run in"),
        (("--resume", "--out", trained, "--epochs", 1e-9), 2, "--epochs 1e-09: the run in"),
        ((*evaluate, "--stride", 9), 2, "--stride 9 exceeds n_ctx = 8"),
        ((*evaluate, "--seq_len", 9), 2, "--seq_len 9 exceeds n_ctx = 8"),
    ]
    for arguments, status, message in cases:
        done = call(train, *arguments)
        assert done.returncode == status, arguments
        assert message in last_line(done.stderr)
        assert saved(trained) == before


def test_command_refuses_foreign_tokens_files(call, fish, text):
    data = text.parent / "foreign.bin"
    encoder.train(TEXT, 260).save(text.parent / "tokenizer.bin")
    cases = [
        (lambda: llmc.save_tokens(data, [np.array([300] * 900)], 0), "has the id 300, but the"),
        (lambda: llmc.save_tokens(data, [[0] * 900], 300), "has a vocabulary of 300, but the"),
        (lambda: llmc.save_params(data, Params(TINY)), "expected a tokens file"),
        (lambda: data.write_bytes(b"text after all" * 100), "expected a tokens file"),
        (lambda: data.write_bytes(b""), "0 bytes"),
    ]
    for make, message in cases:
        make()
        done = call(train, *fish("--data", data))
        assert done.returncode == 1
        assert message in last_line(done.stderr)
        assert "foreign.bin" in last_line(done.stderr)
    (text.parent / "tokenizer.bin").unlink()
    done = call(train, *fish("--data", data))
    assert "no foreign.tokenizer.bin or tokenizer.bin beside it: give its --tokenizer" in last_line(
        done.stderr
    )
