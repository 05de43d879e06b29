"""Tests of train.py: learning, evaluation, checkpoints, the loop and its command line."""

import json
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

import encoder
import gpt2
import train
from gpt2_support import blas
from gpt2_support.formats import llmc
from gpt2_support.params import Config, Params, n_params

TINY = Config(n_vocab=260, n_ctx=8, n_embd=8, n_head=2, n_layer=2)
ROOT = Path(train.__file__).parent
TEXT = "one fish two fish red fish blue fish\nold fish new fish\n" * 60


def settings(**kwargs):
    small = {"steps": 6, "batch_size": 2, "seq_len": 4, "warmup": 2, "eval_every": 2}
    return train.Settings(**small | {"save_every": 2, "sample_every": 1000} | kwargs)


def random_tokens(n, n_vocab=TINY.n_vocab, seed=0):
    return np.random.default_rng(seed).integers(0, n_vocab, n).astype(np.uint16)


def to_float64(params):
    return Params(params.config, params.flat.astype(np.float64))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "fish.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def fish(text):
    """Arguments for a short run on a small text; `fish("--steps", 4)` adds to them."""
    tiny = "--n_vocab 260 --n_layer 1 --n_head 2 --n_embd 8 --n_ctx 8 --batch_size 2 --warmup 2"
    every = "--steps 6 --eval_every 2 --save_every 2 --sample_every 3"
    out = text.parent / "fish"
    arguments = ["--data", text, "--out", out, *tiny.split(), *every.split()]
    return lambda *more: [str(argument) for argument in (*arguments, *more)]


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
    tokens = random_tokens(33, 1024)
    loss, _ = gpt2.loss_and_grads(train.init_params(config), tokens[:-1], tokens[1:])
    assert abs(loss - math.log(1024)) < 0.1


# --- data ---------------------------------------------------------------------------------------


def test_windows_targets_are_next_tokens():
    tokens = np.arange(1000, dtype=np.uint16)
    for order in ("random", "sequential"):
        data = train.Windows(tokens, settings(batch_size=3, seq_len=7, order=order))
        x, y = data.batch(5)
        assert x.shape == y.shape == (3, 7)
        assert (y == x + 1).all()
        assert (np.diff(x) == 1).all()


def test_windows_pass_takes_each_window_once():
    tokens = np.arange(1000, dtype=np.uint16)
    data = train.Windows(tokens, settings(batch_size=1, seq_len=10))
    passes = []
    for n_pass in range(2):
        numbers = range(n_pass * data.n_windows, (n_pass + 1) * data.n_windows)
        firsts = [int(data.batch(number)[0][0, 0]) for number in numbers]
        assert firsts != sorted(firsts)
        assert (np.diff(sorted(firsts)) == 10).all()  # neither gaps nor repetitions
        passes.append(firsts)
    assert sorted(passes[0]) != sorted(passes[1])  # cut at another offset


def test_windows_offset_reaches_both_ends():
    tokens = np.arange(26, dtype=np.uint16)  # the only offsets for two windows of 10 are 0 to 5
    data = train.Windows(tokens, settings(batch_size=1, seq_len=10))
    assert data.n_windows == 1
    starts = {int(data.batch(number)[0][0, 0]) for number in range(400)}
    assert starts == set(range(16))


def test_windows_batch_depends_on_number_only():
    tokens = random_tokens(500)
    one, two = (train.Windows(tokens, settings()) for _ in range(2))
    for number in (0, 40, 3, 200):
        for _ in range(number % 7):
            two.batch(_)  # what was read before does not matter
        assert (one.batch(number)[0] == two.batch(number)[0]).all()
    other = train.Windows(tokens, settings(seed=1))
    assert (one.batch(0)[0] != other.batch(0)[0]).any()


def test_windows_sequential_goes_through_the_data():
    tokens = np.arange(100, dtype=np.uint16)
    data = train.Windows(tokens, settings(batch_size=2, seq_len=5, order="sequential"))
    assert data.batch(0)[0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert data.batch(1)[0][0, 0] == 10
    assert data.batch(9)[0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]  # the second pass


def test_windows_refuse_data_shorter_than_a_batch():
    train.Windows(random_tokens(2 * 4 + 1), settings())
    with pytest.raises(ValueError, match="data of 8 tokens is shorter than one batch of 2 windows"):
        train.Windows(random_tokens(2 * 4), settings())


# --- learning -----------------------------------------------------------------------------------


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
    monkeypatch.setattr(train.AdamW, "BLOCK", block)
    params = to_float64(train.init_params(TINY))
    start = Params(TINY, params.flat.copy())
    rng = np.random.default_rng(3)
    gradients = [rng.standard_normal(params.flat.size) for _ in range(3)]
    optimizer, share = train.AdamW(params), train.Team(params, n_threads).share
    for step, gradient in enumerate(gradients, 1):
        grads = Params(TINY, gradient * 4)
        optimizer.step(params, grads, 0.01, step, settings(weight_decay=0.3), 0.25, share)
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
    train.AdamW(params).step(params, grads, np.float64(0.1), 1, settings(), scale=np.float64(1))
    assert params.flat.dtype == np.float32
    assert (params.flat[260 * 8 : 384 * 8] == 0).all()


def test_adamw_ten_steps_equal_pytorch(shared):
    golden = np.load(shared("golden/adamw.npz"))
    config = Config(**json.loads(str(golden["config"])))

    def fill(prefix):
        params = Params(config, np.zeros(n_params(config)))
        for name, array in params.named.items():
            value = golden[f"{prefix}:{name}"]
            array[...] = value.T if name.endswith("/w") else value
        return params

    names = ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_clip")
    given = {name: float(golden[name]) for name in names}
    s = train.Settings(**given, min_lr=given["lr"], warmup=0, steps=10)
    run, end = train.Run(fill("start"), s), fill("end")
    team = train.Team(run.params)
    for loss, grad_norm in zip(golden["losses"], golden["grad_norms"], strict=True):
        got = train.train_step(run, team, [(golden["tokens"], golden["targets"])])
        assert got[:2] == pytest.approx((loss, grad_norm), rel=1e-9)
    for name, array in run.params.named.items():
        np.testing.assert_allclose(array, end.named[name], rtol=0, atol=1e-9, err_msg=name)


def test_learning_rate_warms_up_and_decays_to_its_floor():
    s = settings(steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(step, s) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.55)  # half of the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    assert train.learning_rate(1000, s) == pytest.approx(0.1)
    assert train.learning_rate(100, replace(s, decay_steps=190)) == pytest.approx(0.55)


def test_norm_is_euclidean():
    values = np.random.default_rng(0).standard_normal(200_000)
    for share in (train.alone, train.Team(train.init_params(TINY), 3).share):
        assert train.norm(values, share) == pytest.approx(np.linalg.norm(values), rel=1e-12)


@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("n_batches", [1, 2])
def test_train_step_is_that_of_the_whole_batch_however_it_is_shared(n_threads, n_batches):
    tokens = random_tokens(8 * 8).reshape(8, 8)
    ends = []
    for n, threads in ((1, 1), (n_batches, n_threads)):
        run = train.Run(to_float64(train.init_params(TINY)), settings())
        parts = np.split(tokens, n)
        batches = [(part[:, :-1], part[:, 1:]) for part in parts]
        team = train.Team(run.params, threads)
        for _ in range(2):  # what a team did before must not matter
            figures = train.train_step(run, team, batches)
        ends.append((*figures, run.params.flat))
    assert ends[0][:3] == pytest.approx(ends[1][:3], rel=1e-12)
    np.testing.assert_allclose(ends[0][3], ends[1][3], rtol=1e-9, atol=1e-12)


def test_team_leaves_the_number_of_blas_threads():
    before, seen = blas.get_threads(), []
    wide = replace(TINY, n_embd=256)
    blas.set_threads(2)
    for config, n in ((TINY, 1), (wide, 1), (wide, 2)):
        with train.blas_threads(config, n):
            seen.append(blas.get_threads())
        assert blas.get_threads() == (2 if blas.openblas("get_num_threads") else 1)
    blas.set_threads(before)
    assert seen == [1, 2, 1] or not blas.openblas("get_num_threads")


def test_team_of_one_shares_the_elementwise_work_on_large_buffers(monkeypatch):
    monkeypatch.setattr(blas, "get_threads", lambda: 3)
    large = Config(n_vocab=1 << 16, n_ctx=4, n_embd=16, n_head=2, n_layer=1)
    for config, n_parts in ((TINY, 1), (large, 3)):
        team = train.Team(train.init_params(config))
        assert team.share(lambda i, n: (i, n)) == [(i, n_parts) for i in range(n_parts)]


def test_train_step_clips_the_gradient_to_its_limit():
    tokens = random_tokens(9)[None]
    seen = []

    class Spy(train.AdamW):
        def step(self, params, grads, lr, step, settings, scale=1.0, share=train.alone):
            seen.append(scale * np.linalg.norm(grads.flat))

    for clip in (1e-3, 1e3):
        run = train.Run(train.init_params(TINY), settings(grad_clip=clip))
        run.optimizer = Spy(run.params)
        batch = tokens[:, :-1], tokens[:, 1:]
        _, before, _ = train.train_step(run, train.Team(run.params), [batch])
        assert seen.pop() == pytest.approx(min(clip, before), rel=1e-3)
        assert 1e-3 < before < 1e3


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_train_step_stops_before_a_non_finite_update(poison):
    run = train.Run(train.init_params(TINY), settings())
    run.params.h[0].mlp.c_fc.b[2] = poison
    before, tokens = run.params.flat.copy(), random_tokens(9)[None]
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="diverged: at step 1 the loss"):
        train.train_step(run, train.Team(run.params), [(tokens[:, :-1], tokens[:, 1:])])
    np.testing.assert_array_equal(run.params.flat, before)
    assert run.step == 0 and not run.optimizer.m.any()


def test_train_overfits_one_batch():
    tokens = random_tokens(4 * 8 + 1)
    s = settings(
        steps=300, batch_size=4, seq_len=8, order="sequential", lr=1e-2, min_lr=1e-3, warmup=10
    )
    config = replace(TINY, n_embd=32)
    losses = []
    run = train.Run(train.init_params(config), replace(s, weight_decay=0))
    data = train.Windows(tokens, s)
    data.n_windows = 4  # every window of this batch, in the same places each pass
    train.train(run, data, lambda loss, norm, lr: losses.append(loss))
    assert losses[0] > 5
    assert losses[-1] < 0.01


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 8, 9, 10, 17, 40])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluate_counts_each_token_once_in_its_first_window(n, stride, batch_size):
    params = to_float64(train.init_params(TINY))
    params.flat *= 20
    tokens = random_tokens(n)
    losses = np.concatenate(list(train.evaluate(params, tokens, 8, stride, batch_size)))
    expected = []
    for target in range(1, n):
        start = 0
        while target > start + 8:  # the first window that reaches it
            start += stride or 8
        logits = gpt2.forward(params, tokens[start:target])[-1]
        expected.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max())
        expected[-1] -= logits[tokens[target]]
    assert losses == pytest.approx(expected, rel=1e-9)


def test_evaluate_refuses_too_few_tokens():
    with pytest.raises(ValueError, match="evaluate on 1 tokens"):
        list(train.evaluate(train.init_params(TINY), random_tokens(1), 8))


def test_score_is_in_nats_a_token_and_bits_a_byte():
    enc = encoder.train(TEXT, 260)
    params = Params(TINY)  # all zeros: every token is as likely
    tokens = np.array([enc.eot, *enc.encode("one fish"), enc.eot, *enc.encode("two")], np.uint16)
    found = train.score(params, enc, tokens, 4)
    assert found.n_tokens == len(tokens) - 1
    assert found.n_bytes == len(b"one fishtwo")  # end-of-text is no bytes
    assert found.loss == pytest.approx(math.log(260), rel=1e-6)
    bits = found.n_tokens * math.log2(260) / found.n_bytes
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert f"perplexity 260.00, {bits:.4f} bits a byte" in str(found)


def test_score_without_end_of_text_counts_all_bytes():
    enc = encoder.Encoder(encoder.train(TEXT, 260).tokens[:-1])
    tokens = np.array(enc.encode("one fish two"), np.uint16)
    params = Params(replace(TINY, n_vocab=259))
    found = train.score(params, enc, tokens, 4)
    assert found.n_bytes == len("one fish two") - len(enc.tokens[tokens[0]])


# --- checkpoints --------------------------------------------------------------------------------


def same_run(one, two):
    return (
        one.step == two.step
        and one.best_loss == two.best_loss
        and one.settings == two.settings
        and (one.params.flat == two.params.flat).all()
        and (one.optimizer.m == two.optimizer.m).all()
        and (one.optimizer.v == two.optimizer.v).all()
    )


def test_train_resumes_bit_for_bit(tmp_path):
    tokens, s = random_tokens(300), settings(steps=8, grad_accum=2)
    whole = train.Run(train.init_params(TINY), s)
    train.train(whole, train.Windows(tokens, s))
    half = train.Run(train.init_params(TINY), s)
    train.train(half, train.Windows(tokens, s), stop=lambda: half.step == 3)
    train.save_checkpoint(tmp_path, half)
    resumed = train.load_checkpoint(tmp_path)
    assert same_run(resumed, half) and resumed.step == 3
    train.train(resumed, train.Windows(tokens, s))
    assert same_run(resumed, whole) and resumed.step == 8


def test_train_accumulates_over_batches_in_their_order():
    seen = []

    class Spy(train.Windows):
        def batch(self, number):
            seen.append(number)
            return super().batch(number)

    s = settings(steps=3, grad_accum=2)
    run = train.Run(train.init_params(TINY), s)
    train.train(run, Spy(random_tokens(300), s))
    assert seen == [0, 1, 2, 3, 4, 5]


def test_checkpoint_model_is_the_runs(tmp_path):
    run = train.Run(train.init_params(TINY), settings(), step=5)
    train.save_checkpoint(tmp_path, run)
    assert (llmc.load_params(tmp_path / "model.bin").flat == run.params.flat).all()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_load_checkpoint_refuses_damage(tmp_path, damage):
    run = train.Run(train.init_params(TINY), settings())
    train.save_checkpoint(tmp_path, run)
    path = tmp_path / "state.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    pieces = {"cut": data[: len(data) // 2], "flip": data, "empty": b"", "text": b"hello there"}
    path.write_bytes(pieces[damage])
    with pytest.raises(ValueError, match=r"state\.npz: not a whole checkpoint"):
        train.load_checkpoint(tmp_path)


def test_load_checkpoint_without_one_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        train.load_checkpoint(tmp_path)


def test_save_checkpoint_failing_keeps_the_old_one(tmp_path, monkeypatch):
    run = train.Run(train.init_params(TINY), settings(), step=2)
    train.save_checkpoint(tmp_path, run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(file, *arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "write_npz", full_disk)
    run.step = 3
    with pytest.raises(OSError, match="No space left"):
        train.save_checkpoint(tmp_path, run)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_log_drops_the_rows_after_the_step_it_resumes_from(tmp_path):
    path = tmp_path / "log.csv"
    log = train.Log(path, 0)
    for step in range(1, 6):
        log.add(step, 2.5, 1e-3, 1.0, 100.0, 2.25 if step == 2 else None, None)
    with open(path, "a", encoding="utf-8") as file:
        file.write("6,2.")  # killed in the middle of a row
    log = train.Log(path, 3)
    log.add(4, 1.5, 1e-3, 1.0, 100.0, None, None)
    rows = train.read_log(path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == ["2.5", "2.5", "2.5", "1.5"]
    assert rows == log.rows
    assert rows[1]["val_loss"] == "2.25" and rows[2]["val_loss"] == ""
    assert train.read_log(tmp_path / "none.csv") == []


def test_plot_log_draws_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    log = train.Log(tmp_path / "log.csv", 0)
    for step in range(1, 4):
        log.add(step, 2.5 / step, 1e-3, 1.0, 100.0, 2.25 if step == 2 else None, None)
    train.plot_log(log.rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# --- the command line ---------------------------------------------------------------------------


def last_line(text):
    return text.strip().splitlines()[-1]


def test_command_trains_from_text_and_its_last_line_samples(run, fish, text):
    done = run("train.py", *fish())
    assert done.returncode == 0, done.stderr
    out = text.parent / "fish"
    assert {"model.bin", "tokenizer.bin", "state.npz", "log.csv", "best"} <= set(os.listdir(out))
    assert set(os.listdir(out / "best")) == {"model.bin", "tokenizer.bin"}
    rows = train.read_log(out / "log.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row["val_loss"]) for row in rows] == [False, True] * 3
    best = min(float(row["val_loss"]) for row in rows if row["val_loss"])
    assert train.load_checkpoint(out).best_loss == pytest.approx(best, rel=1e-5)
    count = 260 * 8 + 8 * 8 + 12 * 8 * 8 + 13 * 8 + 2 * 8
    assert f"{count:,} parameters: 1 layers, 2 heads, 8 channels" in done.stderr
    command = shlex.split(last_line(done.stderr).split("To sample: ")[1])
    sampled = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, timeout=60
    )
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.strip()


def test_command_reads_tokens_files(run, fish, text):
    tokenizer, data = text.parent / "tokenizer.bin", text.parent / "tokens.bin"
    assert run("encoder.py", "train", text, "--n_vocab", 260, "--out", tokenizer).returncode == 0
    arguments = ("--tokenizer", tokenizer, "--out", data)
    assert run("encoder.py", "encode", text, *arguments).returncode == 0
    from_text = run("train.py", *fish("--tokenizer", tokenizer))
    rows = train.read_log(text.parent / "fish" / "log.csv")
    from_bin = run("train.py", *fish("--data", data, "--val_data", data, "--overwrite"))
    assert (from_text.returncode, from_bin.returncode) == (0, 0), from_bin.stderr
    again = train.read_log(text.parent / "fish" / "log.csv")
    assert again[0]["loss"] != rows[0]["loss"]  # all of the tokens to train on, not 9 in 10
    assert len(again) == len(rows)


def test_command_encodes_a_text_once_until_it_changes(run, fish, text):
    assert "encoding" in run("train.py", *fish()).stderr
    assert "encoding" not in run("train.py", *fish("--overwrite")).stderr
    assert "encoding" in run("train.py", *fish("--overwrite", "--docs", "lines")).stderr
    later = time.time() + 10
    text.write_text(TEXT * 2, encoding="utf-8")
    os.utime(text, (later, later))
    changed = run("train.py", *fish("--overwrite"))
    assert "learning a vocabulary" in changed.stderr and "encoding" in changed.stderr


def losses(out):
    return [(row["step"], row["loss"], row["val_loss"]) for row in train.read_log(out / "log.csv")]


def test_command_resumes_a_killed_run_bit_for_bit(fish, text, run):
    out, whole = text.parent / "fish", text.parent / "whole"
    arguments = ("--steps", 400, "--save_every", 25, "--eval_every", 50)
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
    one, two = train.load_checkpoint(out), train.load_checkpoint(whole)
    assert same_run(one, two)
    for name in ("model.bin", "best/model.bin"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_command_resumes_to_more_steps_bit_for_bit(run, fish, text):
    out, whole = text.parent / "fish", text.parent / "whole"
    assert run("train.py", *fish("--steps", 8, "--out", whole)).returncode == 0
    assert run("train.py", *fish("--steps", 4, "--decay_steps", 8)).returncode == 0
    assert run("train.py", "--out", out, "--resume", "--steps", 8).returncode == 0
    assert losses(out) == losses(whole)
    assert (out / "model.bin").read_bytes() == (whole / "model.bin").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process alone")
def test_command_saves_and_exits_on_ctrl_c(run, fish, text):
    out = text.parent / "fish"
    arguments = ("--steps", 100_000, "--save_every", 100_000)
    command = [sys.executable, str(ROOT / "train.py"), *fish(*arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(train.read_log(out / "log.csv")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in message
    step = train.load_checkpoint(out).step
    assert f"saved at step {step}; go on with: python " in last_line(message)
    assert step == len(train.read_log(out / "log.csv")) >= 3
    resume = shlex.split(last_line(message).split("go on with: ")[1])
    assert Path(resume[1]).resolve() == ROOT / "train.py"
    resumed = run("train.py", *resume[2:], "--steps", step + 2)
    assert resumed.returncode == 0, resumed.stderr
    assert train.load_checkpoint(out).step == step + 2


def test_command_stops_when_it_diverges_and_keeps_the_checkpoint(run, fish, text):
    out = text.parent / "fish"
    assert run("train.py", *fish()).returncode == 0
    run_ = train.load_checkpoint(out)
    run_.params.flat[:100] = np.inf
    train.save_checkpoint(out, run_)
    before = (out / "state.npz").read_bytes(), (out / "model.bin").read_bytes()
    done = run("train.py", "--resume", "--out", out, "--steps", 12)
    assert done.returncode == 1
    assert "training has diverged: at step 7 the loss is nan" in last_line(done.stderr)
    assert before == ((out / "state.npz").read_bytes(), (out / "model.bin").read_bytes())


def test_command_fine_tunes_a_model(run, fish, text):
    out, tuned = text.parent / "fish", text.parent / "tuned"
    assert run("train.py", *fish()).returncode == 0
    arguments = ("--data", text, "--init", out, "--out", tuned, "--steps", 2, "--batch_size", 2)
    done = run("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    first, _ = train.read_log(tuned / "log.csv")
    assert float(first["lr"]) == pytest.approx(5e-5 / 20)  # fine-tuning has a default of its own
    start, end = llmc.load_params(out), llmc.load_params(tuned)
    assert 0 < abs(end.flat - start.flat).max() < 1e-4
    assert (out / "tokenizer.bin").read_bytes() == (tuned / "tokenizer.bin").read_bytes()


def test_command_tunes_and_resumes_a_model_with_more_ids_than_its_tokenizer(run, fish, text):
    wide, out = text.parent / "wide", text.parent / "fish"
    llmc.save_params(wide / "model.bin", train.init_params(replace(TINY, n_vocab=300)))
    encoder.train(TEXT, 260).save(wide / "tokenizer.bin")
    assert run("train.py", *fish("--init", wide, "--steps", 2)).returncode == 0
    resumed = run("train.py", "--resume", "--out", out, "--steps", 4)
    assert resumed.returncode == 0, resumed.stderr
    assert train.load_checkpoint(out).params.config.n_vocab == 300


def test_command_refuses_a_tokenizer_of_another_model(run, fish, text):
    small = text.parent / "small"
    llmc.save_params(small / "model.bin", train.init_params(replace(TINY, n_vocab=259)))
    encoder.train(TEXT, 260).save(small / "tokenizer.bin")
    for more in ((), ("--eval_only",)):
        done = run("train.py", *fish("--init", small, *more))
        assert done.returncode == 1
        assert "260 tokens, the model only 259: they do not belong together" in done.stderr


def test_command_eval_only_prints_scores(run, fish, text):
    out = text.parent / "fish"
    assert run("train.py", *fish()).returncode == 0
    enc, params = encoder.load(out), gpt2.load(out)
    before = (out / "model.bin").read_bytes()
    done = run("train.py", "--eval_only", "--init", out, "--data", text, "--stride", 3)
    assert done.returncode == 0, done.stderr
    tokens = np.array([enc.eot, *enc.encode(TEXT)])
    found = train.score(params, enc, tokens, 8, 3)
    assert str(found) in done.stdout
    assert f"{len(tokens) - 1} tokens ({len(TEXT)} bytes), in windows of 8, stride 3" in done.stdout
    assert re.search(r"[\d.]+ nats a token, perplexity [\d.]+, [\d.]+ bits a byte", done.stdout)
    assert (out / "model.bin").read_bytes() == before


def test_command_refuses_to_replace_a_model_unasked(run, fish, text):
    out = text.parent / "fish"
    assert run("train.py", *fish()).returncode == 0
    before = (out / "model.bin").read_bytes()
    refused = run("train.py", *fish("--seed", 1))
    assert refused.returncode == 1
    assert "there is a model already: --resume goes on with it" in last_line(refused.stderr)
    assert (out / "model.bin").read_bytes() == before
    assert run("train.py", *fish("--seed", 1, "--overwrite")).returncode == 0
    assert (out / "model.bin").read_bytes() != before


ERRORS = {
    "no data": ([], 2, "--data is needed"),
    "no file": (["--data", "nowhere.txt"], 1, "nowhere.txt: no such file"),
    "short": (["--batch_size", "5000"], 1, "is shorter than one batch of 5000 windows of 8"),
    "heads": (["--n_head", "3"], 1, "n_embd = 8 is not a multiple of n_head = 3"),
    "threads": (["--threads", "3"], 1, "--threads 3 does not divide --batch_size 2"),
    "window": (["--seq_len", "9"], 1, "--seq_len 9 exceeds n_ctx = 8"),
    "steps": (["--steps", "0"], 2, "argument --steps: '0' is not a whole number of 1 or more"),
    "lr": (["--lr", "nan"], 2, "argument --lr"),
    "seed": (["--seed", "-1"], 2, "argument --seed"),
    "order": (["--order", "backward"], 2, "argument --order: invalid choice: 'backward'"),
    "init": (["--init", "no/model"], 1, "no model no/model"),
    "resume": (["--resume"], 1, "there is no run to resume"),
    "eval": (["--eval_only"], 2, "--eval_only needs --init"),
    "vocabulary": (["--n_vocab", "100000"], 1, "nothing is left to merge"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_errors_are_one_clear_line(run, fish, text, case):
    arguments, status, message = ERRORS[case]
    done = run("train.py", *([] if case == "no data" else fish(*arguments)))
    assert done.returncode == status
    assert message in last_line(done.stderr)
    assert "Traceback" not in done.stderr
    assert not (text.parent / "fish" / "model.bin").exists()


def test_command_errors_about_a_model_are_one_clear_line(run, fish, text):
    out = text.parent / "fish"
    assert run("train.py", *fish()).returncode == 0
    before = (out / "state.npz").read_bytes()
    evaluate = ("--eval_only", "--init", out, "--data", text)
    cases = [
        (("--resume",), 2, "--resume needs --out, the folder of the run"),
        (("--resume", "--out", out, "--n_layer", 3), 1, "that cannot be changed"),
        ((*evaluate, "--stride", 9), 1, "expected --stride 9 <= --seq_len 8 <= n_ctx 8"),
        ((*evaluate, "--seq_len", 9), 1, "expected --stride 9 <= --seq_len 9 <= n_ctx 8"),
    ]
    for arguments, status, message in cases:
        done = run("train.py", *arguments)
        assert done.returncode == status, arguments
        assert message in last_line(done.stderr)
        assert "Traceback" not in done.stderr
        assert (out / "state.npz").read_bytes() == before


def test_one_token_is_too_few_to_validate_with():
    with pytest.raises(ValueError, match="1 tokens to validate with: give more text"):
        train.check_validation(np.zeros(1))


def test_a_second_ctrl_c_does_not_wait_for_the_step(monkeypatch, capsys):
    now = [5.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    with train.interrupts() as asked:
        assert not asked()
        for _ in range(2):  # the second is only the first one's echo
            signal.raise_signal(signal.SIGINT)
            assert asked()
        now[0] = 6.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err.count("stopping after this step") == 1


def test_command_refuses_foreign_tokens_files(run, fish, text):
    data = text.parent / "foreign.bin"
    enc = encoder.train(TEXT, 260)
    enc.save(text.parent / "tokenizer.bin")
    cases = [
        (lambda: llmc.save_tokens(data, [np.array([300] * 900)], 0), "has the id 300, but the"),
        (lambda: llmc.save_tokens(data, [np.zeros(900)], 300), "has a vocabulary of 300, but the"),
        (lambda: llmc.save_params(data, Params(TINY)), "expected a tokens file"),
        (lambda: data.write_bytes(b"text after all" * 100), "expected a tokens file"),
        (lambda: data.write_bytes(b""), "0 bytes"),
    ]
    for make, message in cases:
        make()
        done = run("train.py", *fish("--data", data))
        assert done.returncode == 1
        assert message in last_line(done.stderr)
        assert "foreign.bin" in last_line(done.stderr)
    (text.parent / "tokenizer.bin").unlink()
    done = run("train.py", *fish("--data", data))
    assert "no tokenizer.bin beside it: give its --tokenizer" in last_line(done.stderr)
