"""The flags of train.py: what they mean, and that none does nothing without a word."""

import shlex
from argparse import Namespace

import numpy as np
import pytest

import train
from gpt2_support import train_cli
from gpt2_support.distributed import ProcessGroup
from gpt2_support.formats import llmc
from gpt2_support.params import Config


def refusal(call, argv):
    """The line that refuses some arguments."""
    done = call(train, *argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr.removeprefix("train.py: error: ")


@pytest.mark.parametrize(
    "flags, name, reason",
    [
        ("--init stories --n_layer 8", "n_layer", "the model of --init has its own"),
        ("--init stories --n_head 2", "n_head", "the model of --init has its own"),
        ("--init stories --n-embd=4", "n_embd", "the model of --init has its own"),
        ("--init stories --n_ctx 128", "n_ctx", "the model of --init has its own"),
        ("--init stories --n_vocab 300", "n_vocab", "the model of --init has its own"),
        ("--tokenizer t.bin --n_vocab 300", "n_vocab", "--tokenizer has its own vocabulary"),
        ("--stride 4", "stride", "it belongs to --eval_only"),
        ("--epochs 2 --steps 4", "steps", "--epochs gives the steps"),
        ("--other_data", "other_data", "it belongs to --resume"),
        ("--eval_only --init stories --eval_tokens 9", "eval_tokens", "--eval_only does not train"),
        ("--eval_only --init stories --val_data x", "val_data", "--eval_only does not train"),
        ("--eval_only --init stories --out x", "out", "--eval_only does not train"),
        ("--eval_only --init stories --shard", "shard", "--eval_only does not train"),
    ],
)
def test_flag_that_would_do_nothing_is_refused(call, text, monkeypatch, flags, name, reason):
    monkeypatch.chdir(text.parent)
    before = sorted(text.parent.iterdir())
    argv = ["--data", text, *shlex.split(flags)]
    out = [] if "--eval_only" in argv else ["--out", text.parent / "out"]
    line = refusal(call, [*argv, *out])
    assert line == f"argument --{name}: it would do nothing, since {reason} (see --help)\n"
    assert sorted(text.parent.iterdir()) == before


@pytest.mark.parametrize("ranks, threads", [(1, 3), (2, None)])
def test_resume_keeps_the_threads_of_a_run_of_as_many_ranks(tmp_path, ranks, threads):
    config = train.TrainConfig(threads=3, ranks=ranks, lr=0.25)
    state = train.TrainState(train.init_params(Config(300, 8, 8, 2, 1)), config)
    argv = ["--resume", "--out", str(tmp_path), "--data", "x.txt"]
    parser, group = train.make_parser(), ProcessGroup()
    args = train_cli.parse_args(parser, lambda folder, group: state, argv, group)
    assert (args.threads, args.lr, args.n_embd, args.state) == (threads, 0.25, 8, state)
    assert args.given == {"resume", "out", "data"}


@pytest.mark.parametrize("flag", ["--docs", "--n_vocab"])
def test_flag_for_a_text_is_refused_with_tokens(call, text, flag):
    data, value = text.parent / "data.bin", "lines" if flag == "--docs" else "300"
    llmc.save_tokens(data, [np.zeros(900, int)], 300)
    line = refusal(call, ["--data", data, flag, value])
    assert line.startswith(f"argument {flag}: it would do nothing, since a tokens file is encoded")
    done = call(train, "--data", data, "--val_data", text, flag, value)
    assert done.returncode == (1 if flag == "--docs" else 2)  # documents of --val_data
    assert "tokenizer.bin beside it" in done.stderr or flag == "--n_vocab"


@pytest.mark.parametrize("more", ["--init stories", "--tokenizer stories", "--overwrite"])
def test_resume_refuses_what_the_run_has(call, trained, more):
    line = refusal(call, ["--resume", "--out", trained, *more.split()])
    assert "--resume goes on with what the run has" in line


def test_flags_of_evaluation_are_taken(call, trained, text):
    flags = ("--seq_len", 8, "--stride", 4, "--docs", "file", "--tokenizer", trained)
    done = call(train, "--eval_only", "--init", trained, "--data", text, *flags)
    assert done.returncode == 0, done.stderr


def test_text_without_its_flag_says_how_to_give_it(call):
    line = refusal(call, ["my story.txt"])
    expected = "unrecognized arguments: my story.txt; did you mean --data 'my story.txt'?"
    assert line.startswith(expected)
    assert "did you mean --batch_size?" in refusal(call, ["--batchsize", "4"])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--lr abc", "'abc' is not a number of 0 or more"),
        ("--lr -1", "'-1' is not a number of 0 or more"),
        ("--warmup 1.5", "'1.5' is not a whole number of 0 or more"),
        ("--beta1 1", "'1' is not a number of 0 or more and below 1"),
        ("--beta2 nan", "'nan' is not a number of 0 or more and below 1"),
        ("--eps 0", "'0' is not a number over 0"),
    ],
)
def test_value_of_a_flag_is_told_what_is_wanted(call, flags, expected):
    line = refusal(call, ["--data", "x", *flags.split()])
    assert line == f"argument {flags.split()[0]}: {expected} (see --help)\n"


def test_shard_of_one_rank_is_said_to_do_nothing(call, fish):
    done = call(train, *fish("--shard", "--steps", 1))
    assert done.returncode == 0
    assert done.stderr.count("--shard: there is one rank") == 1


@pytest.mark.parametrize("epochs, steps", [(2, 2), (0.5, 1), (1.01, 2), (7, 7)])
def test_epochs_are_passes_over_the_data(epochs, steps):
    args = Namespace(epochs=epochs, n_tokens=8000, batch_size=10, grad_accum=4)
    assert train_cli.steps_of(args, seq_len=200) == steps


def test_epochs_give_the_steps_of_a_run(no_picture, call, text, out):
    tiny = "--n_vocab 260 --n_layer 1 --n_head 2 --n_embd 8 --n_ctx 8 --batch_size 10"
    done = call(train, "--data", text, "--out", out, *tiny.split(), "--epochs", 1.5)
    assert done.returncode == 0, done.stderr
    steps = train.load_checkpoint(out).step
    assert f"{steps} steps of 80 tokens, 1.5 passes over" in done.stderr
    assert call(train, "--resume", "--out", out, "--epochs", 2).returncode == 0
    assert train.load_checkpoint(out).step > steps
