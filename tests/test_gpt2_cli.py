"""The command line of gpt2.py: what it writes and where, its flags, its errors."""

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import random_params
from scripted import ENC, EOT, TOKENS, save_model, script_model

import gpt2
from gpt2_support import streaming
from gpt2_support.params import Config

pytestmark = pytest.mark.filterwarnings("error")  # an overflow or an invalid value is a failure


@pytest.fixture
def random_model(tmp_path):
    """The folder of a model that makes noise."""
    params = random_params(Config(260, 32, 12, 3, 2), np.float32, scale=0.5)
    return save_model(tmp_path / "noise", params)


STORY = "The cat sat on the mat.\nThe end. é€😀!"


@pytest.fixture
def cat(tmp_path):
    """The folder of a model that goes on with STORY."""
    return script_model(tmp_path / "cat", STORY)


@pytest.fixture
def cli(capsys, monkeypatch):
    """`cli(*args, stdin="")` runs main in this process; returns standard output and error."""

    def command(*args, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        gpt2.main(list(map(str, args)))
        out, err = capsys.readouterr()
        return out, err

    return command


def test_cli_writes_the_generated_text_and_nothing_else(cat, run):
    done = run("gpt2.py", "The cat", "--model", cat, env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == STORY.removeprefix("The cat") + "\n"


def test_cli_finds_a_model_by_its_name_in_models_dir(cat, cli):
    out, err = cli("The", "--model", "cat", "--models_dir", cat.parent, "--n_tokens", 4)
    assert (out, err) == (" cat\n", "")


def test_cli_takes_the_path_of_a_model_bin(cat, cli):
    assert cli("The", "--model", cat / "model.bin", "--n_tokens", 4) == (" cat\n", "")


def test_cli_stops_at_a_text_over_token_borders(cat, cli):
    assert cli("The cat", "--model", cat, "--stop", "on the")[0] == " sat \n"
    out, _ = cli("The cat", "--model", cat, "--stop", "mat", "--stop", "he m", "--stop", "zzz")
    assert out == " sat on t\n"


def test_cli_stats_go_to_standard_error(cat, cli):
    out, err = cli("The cat", "--model", cat, "--n_tokens", 5, "--stats")
    assert out == " sat \n"
    pattern = (
        r"prefill: 6 tokens in \d+\.\d+ s, [\d.]+ tokens/s; "
        r"decode: 4 tokens in \d+\.\d+ s, [\d.]+ tokens/s\n"
        r"BLAS: \w+ kernels, threads: \d+\n"
    )
    assert re.fullmatch(pattern, err)
    _, err = cli("The cat", "--model", cat, "--n_tokens", 1, "--stats")
    assert re.match(r"prefill: 6 tokens in \d+\.\d+ s, [\d.]+ tokens/s\nBLAS", err)


EXPLAINED = re.compile(r"(.{11}) (.{6}) \| (.*)")


def explained(err):
    """The rows of --explain in a standard error: [(token, percent, [(token, percent), ...])]."""
    rows = []
    for line in err.splitlines():
        if line.startswith(("drawn", "---")):
            continue
        token, percent, others = EXPLAINED.fullmatch(line).groups()
        others = [others[i : i + 18] for i in range(0, len(others), 20)]
        pairs = [(other[:11].rstrip(), other[12:].strip()) for other in others]
        rows.append((token.rstrip(), percent.strip(), pairs))
    return rows


def test_cli_explains_each_token_on_standard_error(cat, cli):
    out, err = cli("The cat", "--model", cat, "--explain")
    assert out == STORY.removeprefix("The cat") + "\n"
    tokens = [ENC.tokens[id] for id in ENC.encode(STORY)][len(ENC.encode("The cat")) :]
    rows = explained(err)
    assert err.startswith("drawn              | most probable at temperature 1\n")
    assert len(rows) == len(tokens) + 1
    for token, (drawn, percent, others) in zip(tokens, rows, strict=False):
        assert eval(drawn) in (token, token.decode("utf-8", "replace"))
        assert (drawn, percent) == others[0]
        assert percent in ("100.0%", ">99.9%")
    assert rows[-1][0] == "end of text"


@pytest.mark.parametrize(
    "flags, limits",
    [
        ("", ()),
        ("--top_k 7 --top_p 0.9", ()),
        ("--temperature 0.7", (0.7,)),
        ("--temperature 2 --top_k 3", (2.0, 3)),
        ("--temperature 1 --top_p 0.6", (1.0, None, 0.6)),
        ("--temperature 1.5 --top_k 9 --top_p 0.8", (1.5, 9, 0.8)),
    ],
)
def test_cli_explains_by_the_probabilities_that_it_drew_from(flags, limits, random_model, cli):
    sampling = "--seed 2 --repetition_penalty 1.3 --n_tokens 6 " + flags
    out, err = cli("ab", "--model", random_model, "--explain", *sampling.split())
    assert out == cli("ab", "--model", random_model, *sampling.split())[0]
    params, history = gpt2.load(random_model), ENC.encode("ab")
    ids_of = {streaming.token_column(ENC, id).rstrip(): id for id in range(len(TOKENS))}
    rows = explained(err)
    assert len(rows) == 6
    for drawn, percent, others in rows:
        logits = gpt2.apply_repetition_penalty(gpt2.forward(params, history)[-1], history, 1.3)
        ids, probs = gpt2.next_token_probs(logits, *limits)
        expected = dict(zip(ids.tolist(), probs, strict=True))
        assert percent == streaming.percent(expected[ids_of[drawn]])
        assert len(others) == min(3, len(ids))
        top = sorted(expected.values(), reverse=True)[: len(others)]
        assert [percent for _, percent in others] == [streaming.percent(p) for p in top]
        for token, percent in others:
            assert percent == streaming.percent(expected[ids_of[token]])
        history.append(ids_of[drawn])
    assert ENC.decode(history) == "ab" + out.removesuffix("\n")


def test_cli_explains_each_sample_under_its_name_and_no_further_than_its_end(cat, cli):
    args = ("--model", cat, "--stop", "sat", "--explain")
    _, alone = cli("The cat", *args)
    n_rows = len(explained(alone))
    assert n_rows == len(ENC.encode(" sat"))
    out, err = cli("The cat", *args, "--n_samples", 2)
    assert out == " \n \n"
    assert err == f"--- sample 1 of 2 ---\n{alone}--- sample 2 of 2 ---\n{alone}"
    out, err = cli("--interactive", *args, stdin="The cat\nThe cat\n")
    assert (out, err) == (" \n \n", 2 * alone)


def test_cli_explanation_is_as_wide_as_the_terminal(random_model, cli, monkeypatch):
    for width, n_shown in ((80, 3), (100, 4), (1, 1)):
        monkeypatch.setenv("COLUMNS", str(width))
        _, err = cli("a", "--model", random_model, "--explain", "--n_tokens", 4)
        assert {len(others) for _, _, others in explained(err)} == {n_shown}
        assert max(map(len, err.splitlines())) <= max(width, 55)


def test_cli_writes_n_samples(cat, random_model, cli):
    out, err = cli("The cat", "--model", cat, "--n_samples", 3, "--stop", ".")
    assert out == " sat on the mat\n" * 3
    assert err.count("sample") == 3
    sampling = ("x", "--model", random_model, "--temperature", 1, "--n_tokens", 8)
    out, _ = cli(*sampling, "--seed", 5, "--n_samples", 3)
    alone = [cli(*sampling, "--seed", seed)[0] for seed in (5, 6, 7)]
    assert out == "".join(alone)
    assert len(set(alone)) == 3


def test_cli_reads_the_prompt_from_standard_input(cat, run):
    done = run("gpt2.py", "-", "--model", cat, "--n_tokens", 4, input="The cat")
    assert (done.returncode, done.stdout, done.stderr) == (0, " sat\n", "")


def test_cli_interactive_reads_lines_until_the_end_of_input(cat, cli):
    stdin = "The cat\nThe cat sat\r\n\nThe"  # the third is empty: it starts from end-of-text
    out, err = cli("--interactive", "--model", cat, "--n_tokens", 4, stdin=stdin)
    assert (out, err) == (" sat\n on the\nhe ca\n cat\n", "")
    out, _ = cli("The", "--interactive", "--model", cat, "--n_tokens", 4, stdin="The cat")
    assert out == " cat\n sat\n"
    assert cli("--interactive", "--model", cat) == ("", "")


def test_cli_seed_makes_samples_repeatable(random_model, cli):
    args = ("x", "--model", random_model, "--temperature", 1, "--n_tokens", 12)
    first = cli(*args, "--seed", 1)
    assert cli(*args, "--seed", 1) == first
    assert cli(*args, "--seed", 2) != first


def test_cli_without_a_prompt_starts_from_end_of_text(cat, cli):
    out, _ = cli("--model", cat, "--n_tokens", 3)
    assert out == ENC.decode(ENC.encode(STORY)[1:4]) + "\n"


def test_cli_sampling_flags_reach_decode(cat, cli, monkeypatch):
    seen = []
    monkeypatch.setattr(gpt2, "decode", lambda params, *args: seen.append(args) or iter(()))
    flags = "--temperature 0.7 --top_k 9 --top_p 0.8 --repetition_penalty 1.2 --seed 4 --n_tokens 6"
    assert cli("The", "--model", cat, *flags.split()) == ("\n", "")
    assert seen == [([ENC.encode("The")], 6, 0.7, 9, 0.8, 4, 1.2, EOT, len(TOKENS))]


@pytest.mark.parametrize("prompt", ["é€😀", "\u4e2d\u6587", "\ud800", "a\x00b", "\r\n\t "])
def test_cli_takes_any_prompt(prompt, cat, cli):
    out, err = cli(prompt, "--model", cat, "--n_tokens", 1)
    assert err == ""
    assert out


@pytest.mark.thorough
def test_cli_output_cannot_crash_a_console_of_few_characters(cat, random_model, run):
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = run("gpt2.py", "The cat", "--model", cat, env=env, encoding="cp1252")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("The end. é€?!\n")
    args = ("--model", random_model, "--temperature", 1, "--seed", 0, "--n_samples", 4)
    done = run("gpt2.py", "x", *args, env=env, encoding="cp1252")
    assert done.returncode == 0


@pytest.mark.parametrize(
    "args, message",
    [
        (["--temperature", "-1"], "argument --temperature = -1.0 is not a finite number"),
        (["--temperature", "nan"], "argument --temperature = nan"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["--top_p", "0"], "argument --top_p = 0.0 is not over 0 and at most 1"),
        (["--top_p", "1.5"], "argument --top_p = 1.5"),
        (["--top_k", "0"], "argument --top_k = 0 is not 1 or more"),
        (["--top_k", "1.5"], "argument --top_k: invalid int value: '1.5'"),
        (["--repetition_penalty", "0"], "argument --repetition_penalty = 0.0"),
        (["--n_tokens", "0"], "argument --n_tokens: '0' is not a whole number of 1 or more"),
        (["--n_tokens", "-3"], "argument --n_tokens: "),
        (["--n_tokens", "many"], "argument --n_tokens: "),
        (["--n_samples", "0"], "argument --n_samples: "),
        (["--seed", "-1"], "argument --seed: -1 is negative"),
        (["--stop", ""], "argument --stop: "),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=" ".join,
)
def test_cli_refuses_a_bad_argument_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        gpt2.main(["x", *args])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith(f"gpt2.py: error: {message}")
    assert err.count("\n") == 1


def assert_fails(done, status, *fragments):
    """One line on standard error with these fragments, nothing on standard output."""
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("gpt2.py: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for fragment in fragments:
        assert str(fragment) in done.stderr


def test_cli_prompt_too_long_is_one_line(cat, run):
    done = run("gpt2.py", "x" * 65, "--model", cat)
    assert_fails(done, 2, "prompt of 65 tokens exceeds n_ctx = 64")


def test_cli_prompt_may_fill_the_window(cat, cli):
    assert cli("x" * 64, "--model", cat, "--n_tokens", 3)[1] == ""


def test_cli_missing_model_is_one_line(tmp_path, run):
    done = run("gpt2.py", "x", "--model", "nonesuch", "--models_dir", tmp_path)
    assert_fails(done, 1, "no model nonesuch", tmp_path, "124M")


def test_cli_without_network_says_so(tmp_path, run):
    env = {**os.environ, "GPT2_BASE_URL": "http://127.0.0.1:9", "NO_PROXY": "*", "no_proxy": "*"}
    done = run("gpt2.py", "x", "--model", "124M", "--models_dir", tmp_path, env=env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gpt2.py: error: http://127.0.0.1:9/124M/")
    assert not (tmp_path / "124M" / "model.bin").exists()


def test_cli_names_a_damaged_model(cat, run):
    path = cat / "model.bin"
    path.write_bytes(path.read_bytes()[:-4])
    assert_fails(run("gpt2.py", "x", "--model", cat), 1, path, "bytes")
    path.write_bytes(b"<html>" * 300)
    assert_fails(run("gpt2.py", "x", "--model", cat), 1, path, "magic number")


@pytest.mark.thorough
def test_cli_names_a_damaged_or_missing_tokenizer(cat, run):
    path = cat / "tokenizer.bin"
    path.write_bytes(path.read_bytes()[:-4])
    assert_fails(run("gpt2.py", "x", "--model", cat), 1, path)
    path.unlink()
    assert_fails(run("gpt2.py", "x", "--model", cat), 1, cat)


def test_cli_refuses_a_tokenizer_larger_than_the_model(tmp_path, run):
    folder = save_model(tmp_path / "odd", random_params(dtype=np.float32))
    done = run("gpt2.py", "x", "--model", folder)
    assert_fails(done, 1, folder, "the tokenizer has 260 tokens, the model only 61")


def test_cli_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        gpt2.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for flag in ("--n_tokens", "--temperature", "--top_k", "--stop", "--interactive", "--stats"):
        assert flag in out
    assert "default: 40" in out
    assert "default: 0.0" in out


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error there")
def test_cli_closed_output_shows_no_traceback(random_model):
    args = ["x", "--model", str(random_model), "--n_tokens", "3000"]
    root = os.path.dirname(gpt2.__file__)
    command = subprocess.Popen(
        [sys.executable, os.path.join(root, "gpt2.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    command.stdout.read(1)
    command.stdout.close()
    err = command.stderr.read().decode()
    command.stderr.close()
    command.wait(60)
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_cli_with_nobody_reading_its_output_says_nothing(random_model):
    argv = [sys.executable, gpt2.__file__, "a", "--model", str(random_model), "--n_tokens", "9999"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


@pytest.mark.skipif(os.name == "nt", reason="a parent cannot close it there")
def test_cli_without_standard_output_has_no_traceback(random_model):
    argv = [sys.executable, gpt2.__file__, "a", "--model", str(random_model)]
    done = subprocess.run(argv, stdout=None, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert b"Traceback" not in done.stderr


def test_cli_stats_of_nothing_generated(cli, cat):
    out, err = cli(STORY, "--model", cat, "--stats")
    assert out == "\n"
    assert "no token was generated" in err


def test_cli_interactive_goes_on_after_a_prompt_too_long(cli, cat):
    out, err = cli("--interactive", "--model", cat, stdin="x" * 100 + "\nThe cat\n")
    assert out == STORY.removeprefix("The cat") + "\n"
    assert err == "prompt of 100 tokens exceeds n_ctx = 64\n"


UNREACHABLE = "http://127.0.0.1:9"


def test_cli_default_is_124m_where_it_is(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", UNREACHABLE)
    script_model(tmp_path / "124M", STORY)
    script_model(tmp_path / "stories", "Once upon")
    assert cli("The cat", "--models_dir", tmp_path) == (STORY.removeprefix("The cat") + "\n", "")


def test_cli_default_without_network_is_the_bundled_model(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", UNREACHABLE)
    script_model(tmp_path / "stories", STORY)
    out, err = cli("The cat", "--models_dir", tmp_path)
    assert out == STORY.removeprefix("The cat") + "\n"
    assert "using the bundled model `stories`" in err.splitlines()[-1]
    assert "python utils.py download 124M" in err.splitlines()[-1]


@pytest.mark.thorough
def test_cli_explicit_model_never_falls_back(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", UNREACHABLE)
    script_model(tmp_path / "stories", STORY)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        cli("The cat", "--model", "124M", "--models_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stories"]  # no empty folder, no lock
