"""cli.py: programs called by the name that they have here, and errors as an exit status."""

import argparse
import os
import re
import sys

import pytest

import encoder
import evaluate
import gpt2
import train
from gpt2_support import cli, folders, weights_cli

QUOTE = '"' if os.name == "nt" else "'"


def test_a_system_without_threads_is_an_error_on_one_line():
    def refused():
        raise RuntimeError("can't start new thread")

    def wrong():
        raise RuntimeError("another error")

    assert "error: can't start new thread: the system allows" in str(cli.status_of(refused))
    with pytest.raises(RuntimeError, match="another"):
        cli.status_of(wrong)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(folders, "INSTALLED", True)


def test_command_in_a_checkout_is_the_way_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(folders.PACKAGE.parent)
    assert cli.command("gpt2.py", "a b", 1) == f"python gpt2.py {QUOTE}a b{QUOTE} 1"
    assert cli.command_name("gpt2.py") == "gpt2.py"
    monkeypatch.chdir(tmp_path)
    path = cli.command("train.py").removeprefix("python ")
    assert os.name == "nt" or not os.path.isabs(path)  # on Windows there are other drives
    assert os.path.samefile(path, train.__file__)


@pytest.mark.parametrize("program", cli.COMMANDS)
def test_command_of_an_installation_is_a_word(installed, program):
    name = cli.COMMANDS[program]
    assert cli.command_name(program) == name
    assert cli.command(program, "--out", "a b") == f"{name} --out {QUOTE}a b{QUOTE}"


@pytest.mark.parametrize("name", ["/venv/bin/gpt2-train", "gpt2", r"gpt2-weights.exe"])
def test_command_started_by_its_word_says_words(monkeypatch, name):
    """So it is with an editable install, which leaves the files where they are."""
    monkeypatch.setattr(sys, "argv", [name])
    assert cli.command("encoder.py", "encode") == "gpt2-tokenize encode"


def test_as_typed_spells_every_program_and_nothing_else(installed):
    text = "python gpt2.py -; mpiexec python train.py, see encoder.py encode; utils.py; my_utils.py"
    spelled = "gpt2 -; mpiexec gpt2-train, see gpt2-tokenize encode; gpt2-weights; my_utils.py"
    assert cli.as_typed(text) == spelled


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (gpt2.main, ["--help"]),
        (train.main, ["--help"]),
        (weights_cli.main, ["--help"]),
        (weights_cli.main, ["download", "--help"]),
    ],
    ids=["gpt2", "gpt2-train", "gpt2-weights", "gpt2-weights download"],
)
def test_help_of_an_installation_names_no_file_of_ours(installed, capsys, main, argv):
    with pytest.raises(SystemExit):
        main(argv)
    page = capsys.readouterr().out
    assert page.startswith("usage: gpt2")
    assert not re.search(r"\b(gpt2|train|encoder|utils)\.py\b|\bpython\b", page)


def test_error_of_an_installation_begins_with_its_word(installed, capsys):
    with pytest.raises(SystemExit) as exit:
        weights_cli.main(["download", "nonesuch"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("gpt2-weights download: error: argument NAME: ")


@pytest.fixture
def run(monkeypatch):
    """`run(main)` is cli.run where all three streams are closed, as no reader of pytest's is."""

    def run(main):
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, None)
        cli.run(main)

    return run


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("two\n lines"), "x: error: two lines"),
        (FileNotFoundError("gone"), "x: error: gone"),
        (MemoryError(), "x: error: out of memory"),
        (OverflowError("too large"), "x: error: too large"),
        (TimeoutError(), "x: error: TimeoutError"),
        (KeyboardInterrupt(), 130),
        (SystemExit(2), 2),
    ],
    ids=repr,
)
def test_run_makes_errors_an_exit_status(run, monkeypatch, error, status):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/venv/bin/x.exe"])
    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == status


def test_run_discards_what_goes_to_a_closed_stream(run):
    def main():
        print("text")
        print("note", file=sys.stderr)
        cli.ArgumentParser(prog="x").error("no")

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2
    assert sys.stdout.name == sys.stderr.name == os.devnull
    assert sys.stdin is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "main", [lambda: print("a"), lambda: print("a" * 10**5), lambda: print("a") or sys.exit(0)]
)
def test_run_of_a_full_disk_is_an_error_and_no_traceback_at_the_end(main, monkeypatch):
    """The interpreter flushes standard output once more as it ends."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdin", None)
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as exit:
            cli.run(main)
        assert "No space left on device" in exit.value.code
        full.flush()  # to where it cannot fail


def test_run_does_not_hide_a_bug(run):
    def main():
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run(main)


@pytest.fixture
def parser():
    parser = cli.ArgumentParser(prog="x", aliases={"--len": "--n_tokens"}, guess=guess_words)
    parser.add_argument("word", nargs="?")
    parser.add_argument("--n_tokens", type=cli.positive_int, default=1)
    parser.add_argument("--batch_size", type=cli.natural)
    parser.add_argument("--stop", type=cli.text)
    return parser


def guess_words(args, words):
    return f"{args.word} and {words}?"


def refusal(parser, argv, capsys):
    """The line that refuses some arguments."""
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_parser_takes_dashes_and_aliases(parser):
    args = parser.parse_args(["--n-tokens=3", "--batch-size", "4", "--stop=--a-b"])
    assert (args.n_tokens, args.batch_size, args.stop) == (3, 4, "--a-b")
    assert parser.parse_args(["--len", "5"]).n_tokens == 5
    assert parser.parse_args(["--n-tok", "5"]).n_tokens == 5


@pytest.mark.parametrize(
    "argv, message",
    [
        (["w", "--ntokens", "3"], "unrecognized arguments: --ntokens 3; did you mean --n_tokens? "),
        (["--batchsize=3"], "unrecognized arguments: --batchsize=3; did you mean --batch_size? "),
        (["-n_tokens", "3"], "unrecognized arguments: -n_tokens; did you mean --n_tokens? "),
        (["-help"], "unrecognized arguments: -help; did you mean --help? "),
        (["--nothing_like_it"], "unrecognized arguments: --nothing_like_it (see --help)"),
        (["--nothing", "word", "too"], "unrecognized arguments: --nothing too (see --help)"),
        (["one", "two", "three"], "unrecognized arguments: two three; one and ['two', 'three']? "),
        (["-Hi"], "unrecognized arguments: -Hi; None and ['-Hi']? "),
        (["one", "a\nb"], "unrecognized arguments: a b; one and ['a\\nb']? "),
        (["--", "one", "--n_tokens"], "unrecognized arguments: --n_tokens; flags come before --"),
        (["--stop", "--"], "argument --stop: expected one argument; one that begins with a dash "),
        (["--n_tokens"], "argument --n_tokens: expected one argument (see --help)"),
        (["--n_tokens", "abc"], "argument --n_tokens: 'abc' is not a whole number of 1 or more"),
        (["--n_tokens", "0"], "argument --n_tokens: '0' is not a whole number of 1 or more"),
        (["--batch_size", "-1"], "argument --batch_size: '-1' is not a whole number of 0 or more"),
    ],
    ids=str,
)
def test_parser_says_what_was_probably_meant(parser, argv, message, capsys):
    assert refusal(parser, argv, capsys).startswith(f"x: error: {message}")


def test_parser_of_a_command_knows_its_own_flags(capsys):
    parser = cli.ArgumentParser(prog="x")
    command = parser.add_subparsers().add_parser("run", prog="x run")
    command.add_argument("--learning_rate", type=cli.number)
    assert parser.parse_args(["run", "--learning-rate", "1e-3"]).learning_rate == 1e-3
    line = refusal(parser, ["run", "--learningrate", "1"], capsys)
    assert line.startswith("x run: error: unrecognized arguments: --learningrate 1; did you mean -")
    for bad in ("abc", "-1", "nan", "inf"):
        line = refusal(parser, ["run", "--learning_rate", bad], capsys)
        assert f"argument --learning_rate: '{bad}' is not a number of 0 or more" in line


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.fraction, {"1": 1, "0.5": 0.5}, ["0", "1.01", "-1", "nan"]),
        (cli.positive_number, {"1e-9": 1e-9, "2": 2}, ["0", "inf", "nan", "-1", ""]),
        (cli.positive_int, {"1": 1, " 20 ": 20}, ["1.0", "", "1e3", "9" * 5000]),
    ],
    ids=["fraction", "positive_number", "positive_int"],
)
def test_types_of_flags_say_what_they_want(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r" is not a (whole )?number"):
            kind(text)


@pytest.mark.parametrize(
    ("main", "argv", "flag"),
    [
        (gpt2.main, ["x", "--model", ""], "--model: '' is not a name or a path"),
        (train.main, ["--data", ""], "--data: '' is not a path"),
        (train.main, ["--data", "x", "--init", ""], "--init: '' is not a name or a path"),
        (train.main, ["--data", "x", "--out", ""], "--out: '' is not a folder"),
        (encoder.main, ["show", "x", "--tokenizer", ""], "--tokenizer: '' is not a name or a path"),
        (encoder.main, ["train", ""], "TEXT: '' is not a path"),
        (evaluate.main, ["x", "--model", ""], "--model: '' is not a name or a path"),
        (weights_cli.main, ["convert", "", "x"], "SOURCE: '' is not a path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_empty_path_is_not_the_current_folder(main, argv, flag, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert f"error: argument {flag} (see --help)" in capsys.readouterr().err


def test_text_is_what_was_typed_in_any_locale():
    for typed in ("é€😀", "plain", "a\ufffdb"):
        for encoding in ("ascii", "utf-8"):
            assert cli.text(typed.encode().decode(encoding, "surrogateescape")) == typed
    assert cli.text(b"\xff\xe2\x82".decode("utf-8", "surrogateescape")) == "\ufffd\ufffd"
    assert cli.text("\ud800") == "\ud800"
