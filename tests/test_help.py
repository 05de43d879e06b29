"""`--help` of every command reads like a manual page, and what it says can be done."""

import re
import shlex

import pytest

import encoder
import evaluate
import gpt2
import train
import utils
from gpt2_support import (
    __version__,
    cli,
    encoder_cli,
    evaluation_cli,
    folders,
    gpt2_cli,
    weights_cli,
)

COMMANDS = [
    (utils,),
    (utils, "download"),
    (utils, "convert"),
    (encoder,),
    (encoder, "train"),
    (encoder, "encode"),
    (gpt2,),
    (train,),
    (evaluate,),
]
PARSERS = {
    "utils.py": weights_cli.parse_args,
    "encoder.py": encoder_cli.parse_args,
    "gpt2.py": gpt2_cli.parse_args,
    "evaluate.py": evaluation_cli.parse_args,
    "train.py": lambda argv: train.make_parser().parse_args(argv),  # does not look at the files
}
each_command = pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: " ".join([command[0].__name__, *command[1:]])
)


@pytest.fixture
def page(command, capsys, monkeypatch):
    """The `--help` of a command in a terminal of 80 columns, in the folder of the project."""
    module, *names = command
    monkeypatch.chdir(folders.PACKAGE.parent)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        module.main([*names, "--help"])
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    return out


def flags(page):
    """The flags of a page: {"--seed": (its metavar or "", its help on one line)}."""
    entries = re.findall(r"^  (--\w+) ?(.*?)(?:\n {5,}|  +)(.+\n(?: {5,}.+\n)*)", page, re.M)
    return {flag: (metavar, " ".join(help.split())) for flag, metavar, help in entries}


@each_command
def test_help_tells_what_how_and_the_exit_status(command, page):
    usage, description, *_ = page.split("\n\n")
    assert usage.startswith(f"usage: {command[0].__name__}.py")
    assert len(description) > 50
    assert page.endswith(f"\n\n{cli.EXIT_STATUS}\n")


@each_command
def test_help_fits_80_columns(command, page):
    too_long = [line for line in page.splitlines() if len(line) > 80]
    assert all(len(line.split()) == 1 for line in too_long), too_long  # a path cannot be broken


@pytest.mark.parametrize(
    "module", [gpt2, train, encoder, utils, evaluate], ids=lambda module: module.__name__
)
def test_version_is_that_of_the_package(module, capsys):
    with pytest.raises(SystemExit) as exit:
        module.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"{module.__name__}.py {__version__}\n"


@each_command
def test_help_of_every_flag_says_its_default(command, page):
    described = flags(page)
    assert set(described) == set(re.findall(r"^  (--\w+)", page, re.M))
    for flag, (metavar, help) in described.items():
        assert len(help) > 8, flag
        if metavar:  # the others are off
            assert re.search(r"\(default: [^)]+\)|\(required", help), f"{flag} {help}"


@each_command
def test_help_examples_are_accepted(command, page):
    examples = page.split("\nexamples:\n")[1].split("\n\n")[0].replace("\\\n", "")
    lines = [line.strip() for line in examples.splitlines()]
    assert lines
    for line in lines:
        python, script, *argv = shlex.split(line.split(" < ")[0])
        assert (python, script) == ("python", f"{command[0].__name__}.py")
        assert list(command[1:]) == argv[: len(command) - 1]
        if "--help" not in argv:
            PARSERS[script](argv)


@pytest.mark.parametrize("command", [(gpt2,), (train,)], ids=["gpt2", "train"])
def test_help_groups_the_flags(command, page):
    """Only --help and --version are left under "options"."""
    options = page.split("\noptions:\n")[1].split("\n\n")[0]
    assert options.split()[:2] == ["-h,", "--help"]
    assert set(flags(options + "\n")) == {"--version"}
    assert len(flags(page)) > 10


def test_help_wraps_paragraphs_and_leaves_indented_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    parser = cli.ArgumentParser(
        prog="x",
        usage="x",
        description="one two three four five six seven eight\n\n  as   it   is",
        examples=["x --long example that is left as it is"],
    )
    parser.add_argument("--rate", type=float, default=0.0, help="a rate")
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    page = parser.format_help()
    assert "one two three four five six\nseven eight\n\n  as   it   is\n" in page
    assert "\nexamples:\n  x --long example that is left as it is\n\nexit status:\n" in page
    assert "--rate X" in page
    assert "a rate (default: 0.0)" in " ".join(page.split())
    assert page.count("default") == 1
