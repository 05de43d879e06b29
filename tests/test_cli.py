"""cli.py: programs called by the name that they have here, and errors as an exit status."""

import os
import re
import sys

import pytest

import gpt2
import train
from gpt2_support import cli, folders, weights_cli

QUOTE = '"' if os.name == "nt" else "'"


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
def no_streams(monkeypatch):
    """As it is where all three are closed, and no reader of pytest's in their place."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("two\n lines"), "x: error: two lines"),
        (FileNotFoundError("gone"), "x: error: gone"),
        (KeyboardInterrupt(), 130),
    ],
    ids=["ValueError", "OSError", "Ctrl-C"],
)
def test_run_makes_errors_an_exit_status(no_streams, monkeypatch, error, status):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/venv/bin/x.exe"])
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == status


def test_run_does_not_hide_a_bug(no_streams):
    def main():
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        cli.run(main)
