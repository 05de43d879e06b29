"""Tests of gpt2_support/planning.py: what --minutes chooses, and that it keeps what is given."""

import math
import os
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from helpers import TEXT, TINY

import gpt2
import train
from gpt2_support import planning
from gpt2_support.distributed import ProcessGroup
from gpt2_support.params import Config, n_params


def make_args(given=(), **values):
    """The flags of a run of 10 minutes that begins now."""
    defaults = vars(train.make_parser().parse_args(["--data", "x", "--minutes", "10"]))
    args = Namespace(**defaults | {"given": {"minutes", *given}, "group": ProcessGroup()})
    args.started = planning.time.perf_counter()
    return Namespace(**vars(args) | values)


@pytest.fixture
def still(monkeypatch):
    """A clock that stands still at 0."""
    monkeypatch.setattr(planning.time, "perf_counter", lambda: 0.0)


def models(*widths):
    return [replace(TINY, n_embd=n) for n in widths]


# --- the rules ----------------------------------------------------------------------------------


def test_worth_of_passes_falls_from_that_of_new_text_to_none():
    assert planning.worth(50.0, 100) == 50
    assert planning.worth(100.0, 100) == 100
    assert planning.worth(101.0, 100) == pytest.approx(101, abs=1e-3)
    assert planning.worth(1600.0, 100) == pytest.approx(100 + 1500 * (1 - 1 / math.e))
    assert planning.worth(1e6, 100) == pytest.approx(1600)


@pytest.mark.parametrize(
    "share, n_chosen, n_tried",  # what they read of what is enough, to a model each
    [
        ((0.1, 1.0, 1.0, 0.99, 5.0), 3, 4),  # the fifth is not tried
        ((0.1, 0.5, 2.0), 1, 2),  # the smallest, whatever it reads
        ((0.1, 2.0), 2, 2),
        ((0.1,), 1, 1),
    ],
)
def test_choose_model_takes_the_largest_that_reads_enough(share, n_chosen, n_tried):
    some, tried = models(*range(8, 8 * len(share) + 1, 8)), []

    def n_read(model):
        tried.append(model)
        n = planning.TOKENS_PER_PARAMETER * 12 * model.n_layer * model.n_embd**2
        return n * share[some.index(model)]

    chosen = planning.choose_model(some, n_read, 10**9)
    assert chosen == some[n_chosen - 1]
    assert tried == some[1:n_tried]  # there is no other choice than the first


def test_choose_model_takes_a_smaller_one_for_a_short_text():
    some, n_read = models(8, 16, 32, 64, 128), lambda model: 1e9
    chosen = [planning.choose_model(some, n_read, n).n_embd for n in (10, 10**4, 10**9)]
    assert chosen == sorted(set(chosen))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"n_layer": 5},
        {"n_embd": 100},
        {"n_embd": 7},
        {"n_head": 5},
        {"n_ctx": 33},
        {"n_layer": 1, "n_head": 2, "n_embd": 6, "n_ctx": 9},
    ],
)
def test_candidates_keep_what_is_given(given):
    found = planning.candidates(given, 300)
    assert all(vars(model) == vars(model) | given | {"n_vocab": 300} for model in found)
    assert len(found) == len(set(found))
    assert len(found) == 1 or len(given) < 4
    sizes = [model.n_layer * model.n_embd**2 for model in found]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("n_embd", "n_head", "n_ctx"), [(64, 4, 128), (100, 4, 128), (260, 4, 256), (1024, 8, 512)]
)
def test_a_given_width_decides_heads_and_context(n_embd, n_head, n_ctx):
    found = planning.candidates({"n_layer": 3, "n_embd": n_embd}, 300)
    assert found == [Config(300, n_ctx, n_embd, n_head, 3)]


def test_candidates_refuse_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="n_embd = 10 is not a multiple of n_head = 3"):
        planning.candidates({"n_head": 3, "n_embd": 10}, 300)


def test_memory_is_that_of_four_buffers_and_activations_however_many_threads():
    model = Config(n_vocab=5000, n_ctx=2, n_embd=64, n_head=1, n_layer=2)
    n, config = n_params(model), train.TrainConfig(batch_size=2, seq_len=2)
    bytes_needed = planning.memory(model, config, 256)
    assert 16 * n < bytes_needed < 17.5 * n
    assert planning.memory(model, replace(config, threads=2), 256) == bytes_needed
    assert planning.memory(model, config, 256, 2) == bytes_needed - 4 * n


def test_memory_limit_is_a_part_of_the_machine_and_infinite_where_it_is_not_told(monkeypatch):
    alone, one_of_four = planning.memory_limit(ProcessGroup()), ProcessGroup()
    one_of_four.size, one_of_four.n_ranks_here = 4, 2
    assert 1e8 < alone < 1e15
    assert planning.memory_limit(one_of_four) == alone / 2
    monkeypatch.delattr(os, "sysconf")
    assert planning.memory_limit(ProcessGroup()) == math.inf


def test_a_run_trains_the_parameters_that_its_processes_share(workers_in_threads):
    state = make_state(batch_size=4)
    before, batch = state.params, (np.zeros((4, 4), int),) * 2
    args = Namespace(threads=2, group=ProcessGroup())
    workers, _ = planning.fastest_step(gpt2.loss_and_grads, state, batch, args)
    assert state.params is workers.params is not before
    np.testing.assert_array_equal(state.params.flat, before.flat)
    assert state.config.threads == workers.n_procs == 2


# --- the plan of a run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_tokens, n_steps, ranks, expected",
    [
        (10**6, 10.0, 1, 8),
        (10**6, 4001.0, 1, 16),
        (10**6, 16_000.0, 1, 32),
        (10**6, 16_001.0, 1, 64),
        (10**6, 10.0, 3, 6),
        (10**6, 10.0, 16, 16),  # a window each
        (129 + 128, 10.0, 1, 2),  # what fits
        (50, 10.0, 1, 1),
    ],
)
def test_batch_is_of_so_many_tokens_and_ranks(n_tokens, n_steps, ranks, expected):
    args = make_args()
    args.group.size = ranks
    planning.choose_batch(args, replace(TINY, n_ctx=128), n_tokens, n_steps)
    assert args.batch_size == expected
    planning.choose_batch(args, replace(TINY, n_ctx=128, n_vocab=4096), 10**6)
    assert args.batch_size == 16 // ranks * ranks  # twice as many for a large vocabulary
    args = make_args(given=["batch_size"], batch_size=5)
    planning.choose_batch(args, TINY, n_tokens, n_steps)
    assert args.batch_size == 5


@pytest.mark.parametrize("threads, expected", [(None, 8), (3, 6), (16, 16)])
def test_batch_can_be_shared_by_the_threads_that_are_given(threads, expected):
    args = make_args(given=["threads"], threads=threads)
    planning.choose_batch(args, replace(TINY, n_ctx=128), 10**6)
    assert args.batch_size == expected


def test_time_that_is_left_is_that_of_rank_zero(still):
    args = make_args(started=-100.0)
    assert planning.seconds_left(args) == 500
    args.group.all_gather = lambda seconds: [7.0, seconds]
    assert planning.seconds_left(args) == 7


def time_by_size(model):
    """Seconds of a step of 1024 tokens, as if the blocks were all."""
    return 1e-7 * 12 * model.n_layer * model.n_embd**2


def test_plan_model_is_larger_with_more_time_and_more_text(still, capsys):
    chosen = {}
    for minutes, n_tokens in ((1, 10**9), (100, 10**9), (100, 10**4), (1, 500_000)):
        args = make_args(minutes=minutes, started=0.0)
        planning.plan_model(args, 300, n_tokens, time_by_size)
        chosen[minutes, n_tokens] = 12 * args.n_layer * args.n_embd**2, args.dropout
        assert f"{args.n_layer} layers of {args.n_embd} channels" in capsys.readouterr().err
    (small, _), (large, none), (short, some), (medium, also_none) = chosen.values()
    assert small < large > short
    assert none == 0 < some  # a text that is read many times
    assert (medium, also_none) == (147_456, 0)  # read 8 times, by a model that cannot remember it


@pytest.mark.parametrize(
    "flags, minutes, reason",
    [
        ({}, 10, "of those tried the largest that reads 10 tokens for each parameter"),
        ({}, 0.005, "the smallest, though it reads fewer than 10 tokens for each parameter"),
        ({"n_layer": 2, "n_embd": 32, "n_head": 2, "n_ctx": 64}, 10, "as the flags say; dropout"),
    ],
)
def test_plan_model_says_why(still, capsys, flags, minutes, reason):
    args = make_args(given=flags, started=0.0, minutes=minutes, **flags)
    planning.plan_model(args, 300, 10**9, time_by_size)
    assert f"channels, {reason}" in capsys.readouterr().err


def test_plan_model_keeps_what_is_given(still):
    flags = {"n_layer": 3, "batch_size": 7, "dropout": 0.3}
    args = make_args(given=flags, started=0.0, **flags)
    planning.plan_model(args, 300, 10**4, time_by_size)
    assert vars(args) == vars(args) | flags


@pytest.mark.parametrize("flags, n_ctx", [({"seq_len": 300}, 300), ({"n_ctx": 400}, 400)])
def test_plan_model_has_room_for_the_windows(still, flags, n_ctx):
    args = make_args(given=flags, started=0.0, **flags)
    planning.plan_model(args, 300, 10**9, time_by_size)
    assert args.n_ctx == n_ctx


def test_plan_model_leaves_out_what_does_not_fit(still):
    args = make_args(started=0.0)
    planning.plan_model(args, 300, 10**9, lambda model: 1e-3 if model.n_embd < 96 else math.inf)
    assert args.n_embd == 64


def make_state(**kwargs):
    return train.TrainState(train.init_params(TINY), train.TrainConfig(**kwargs))


def test_plan_steps_take_the_time_with_their_reports(still):
    args, state = make_args(started=0.0), make_state(batch_size=8, seq_len=8)
    planning.plan_steps(args, state, 0.5, 10**9)
    c = state.config
    assert c.steps == 1133  # a step each 0.5 s of 95% of 600 s, less 10 reports of 0.3 s
    assert c.eval_every == c.save_every == c.sample_every == 114
    validations = 10 * c.eval_tokens * 0.5 / 3 / 64
    assert validations == pytest.approx(0.05 * 600, rel=0.01)
    assert c.warmup == 100
    args = make_args(started=0.0, minutes=1)
    planning.plan_steps(args, state, 0.5, 10**9)
    assert c.warmup == c.steps // 10 == 10


def test_plan_steps_keep_what_is_given(still):
    args = make_args(["eval_every", "eval_tokens", "warmup"], started=0.0, minutes=1)
    state = make_state(eval_every=3, eval_tokens=9, warmup=77)
    planning.plan_steps(args, state, 1.0, 10**9)
    c = state.config
    assert (c.eval_every, c.eval_tokens, c.warmup) == (3, 9, 77)
    assert 40 < c.steps < 60 and c.save_every < c.steps


def test_plan_steps_of_a_resumed_run_are_more(still):
    args, state = make_args(started=0.0, resume=True), make_state(warmup=50)
    state.step = 5000
    planning.plan_steps(args, state, 1.0, 10**9)
    assert 5500 < state.config.steps < 5600
    assert replace(state.config, steps=2000) == train.TrainConfig(warmup=50)


def test_plan_steps_bound_the_passes(still, capsys):
    args, state = make_args(started=0.0), make_state(batch_size=8, seq_len=8)
    planning.plan_steps(args, state, 0.001, 640)
    assert state.config.steps == 10 * planning.MAX_PASSES
    assert f"the run ends before, with {planning.MAX_PASSES} passes" in capsys.readouterr().err


def test_plan_steps_refuse_a_time_without_a_step(still):
    for started, seconds in ((0.0, 601.0), (-601.0, 0.1)):
        with pytest.raises(ValueError, match=r"--minutes 10: .* s are left, and a step takes"):
            planning.plan_steps(make_args(started=started), make_state(), seconds, 10**9)


# --- the command line ---------------------------------------------------------------------------


def test_command_trains_by_the_time(no_picture, call, text, out, monkeypatch):
    monkeypatch.setattr(planning, "MODELS", planning.MODELS[:1])
    monkeypatch.setattr(planning, "MAX_PASSES", 2)
    monkeypatch.setattr(planning, "MAX_STEPS", 10**9)  # a fast machine doubles the batch
    done = call(train, "--data", text, "--out", out, "--minutes", 1, "--n_ctx", 16)
    assert done.returncode == 0, done.stderr
    state = train.load_checkpoint(out)
    assert state.params.config == Config(257, 16, 32, 2, 2)
    assert state.config.batch_size == 64
    assert done.stderr.count("--minutes 1: 2 layers of 32 channels") == 1
    assert state.step == state.config.steps == math.ceil(2 * 0.9 * (len(TEXT) + 1) / 1024)
    resumed = call(train, "--resume", "--out", out, "--minutes", 1)
    assert resumed.returncode == 0, resumed.stderr
    assert train.load_checkpoint(out).step == 2 * state.step
    assert "layers of 32 channels" not in resumed.stderr


def test_command_tries_no_model_that_does_not_fit(no_picture, call, text, out, monkeypatch):
    fastest, tried = planning.fastest, []

    def spy(gradients, params, *more):
        tried.append(params.config.n_embd)
        return fastest(gradients, params, *more)

    monkeypatch.setattr(planning, "fastest", spy)
    monkeypatch.setattr(planning, "memory_limit", lambda group: 0)
    monkeypatch.setattr(planning, "MAX_PASSES", 1)
    done = call(train, "--data", text, "--out", out, "--minutes", 1, "--n_ctx", 16)
    assert done.returncode == 0, done.stderr
    assert tried == [32]  # the run itself: there is no smaller model


def test_command_tunes_a_model_by_the_time(no_picture, trained, call, text, monkeypatch):
    monkeypatch.setattr(planning, "MAX_PASSES", 1)
    tuned, flags = text.parent / "tuned", ("--minutes", 1, "--batch_size", 8)
    done = call(train, "--data", text, "--init", trained, "--out", tuned, *flags)
    assert done.returncode == 0, done.stderr
    state, before = train.load_checkpoint(tuned), train.load_checkpoint(trained)
    assert state.params.config == before.params.config
    assert f"{state.step} steps of 64 tokens, 1.0 passes" in done.stderr
    assert "for each parameter" not in done.stderr


@pytest.mark.parametrize("flag", ["steps", "epochs"])
def test_command_refuses_minutes_and_steps(call, text, flag):
    done = call(train, "--data", text, f"--{flag}", 2, "--minutes", 1)
    assert done.returncode == 2
    assert "it would do nothing, since --minutes gives the steps" in done.stderr


def test_command_without_time_says_so(call, text, out):
    model = ("--n_layer", 1, "--n_head", 1, "--n_embd", 8, "--n_ctx", 8)
    done = call(train, "--data", text, "--out", out, *model, "--minutes", 1e-9)
    assert done.returncode == 1
    assert "--minutes 1e-09: 0 s are left, and a step takes" in done.stderr
    assert not (out / "model.bin").exists()
