"""The command line of gpt2.py: what it writes and where, its flags, its errors."""

import functools
import io
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import random_params
from scripted import ENC, EOT, TOKENS, save_model, script_model

import encoder
import gpt2
from gpt2_support import cli as cli_module
from gpt2_support import gpt2_cli, hub, streaming
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
        ("--top_k 7 --top_p 0.9", (1.0, 7, 0.9)),
        ("--temperature 0.7", (0.7,)),
        ("--temperature 2 --top_k 3", (2.0, 3)),
        ("--temperature 1 --top_p 0.6", (1.0, None, 0.6)),
        ("--temperature 1.5 --top_k 9 --top_p 0.8", (1.5, 9, 0.8)),
    ],
)
def test_cli_explains_by_the_probabilities_that_it_drew_from(flags, limits, random_model, cli):
    sampling = "--repetition_penalty 1.3 --n_tokens 6 " + flags + " --seed 2" * bool(flags)
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
    args = ("--model", cat, "--stop", "sat", "--explain", "--temperature", 1)
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


def test_cli_reads_the_prompt_from_standard_input(cat, call):
    done = call(gpt2, "-", "--model", cat, "--n_tokens", 4, stdin="The cat")
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
    assert seen == [([ENC.encode("The")], 6, (0.7, 9, 0.8, 4, 1.2), EOT, len(TOKENS))]


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
        (["--temperature", "-1"], "argument --temperature: '-1' is not a number of 0 or more"),
        (["--temperature", "nan"], "argument --temperature: 'nan' is not a number of 0"),
        (["--temperature", "hot"], "argument --temperature: 'hot' is not a number of 0"),
        (["--top_p", "0"], "argument --top_p: '0' is not a number over 0 and at most 1"),
        (["--top_p", "1.5"], "argument --top_p: '1.5' is not"),
        (["--top_k", "0"], "argument --top_k: '0' is not a whole number of 1 or more"),
        (["--top_k", "1.5"], "argument --top_k: '1.5' is not a whole number"),
        (
            ["--repetition_penalty", "0"],
            "argument --repetition_penalty: '0' is not a number from 0.001 to 1000",
        ),
        (["--n_tokens", "0"], "argument --n_tokens: '0' is not a whole number of 1 or more"),
        (["--n_tokens", "-3"], "argument --n_tokens: "),
        (["--n_tokens", "many"], "argument --n_tokens: "),
        (["--n_samples", "0"], "argument --n_samples: "),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number of 0 or more"),
        (["--stop", ""], "argument --stop: "),
        (["--unknown"], "unrecognized arguments: --unknown (see"),
        (["--ntokens", "5"], "unrecognized arguments: --ntokens 5; did you mean --n_tokens?"),
        (["-n_tokens=5"], "unrecognized arguments: -n_tokens=5; did you mean --n_tokens?"),
        (["--interactive", "-"], "argument --interactive: the prompt - takes all"),
        (["--conversation"], "argument --conversation: it needs --interactive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cli_refuses_a_bad_argument_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        gpt2.main([*["x"] * ("-" not in args), *args])
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


def test_cli_prompt_too_long_is_one_line(cat, call):
    done = call(gpt2, "x" * 65, "--model", cat)
    assert_fails(done, 2, "prompt of 65 tokens exceeds the 64 tokens that")


def test_cli_prompt_may_fill_the_window(cat, cli):
    assert cli("x" * 64, "--model", cat, "--n_tokens", 3)[1] == ""


def test_cli_missing_model_is_one_line(tmp_path, call):
    done = call(gpt2, "x", "--model", "nonesuch", "--models_dir", tmp_path)
    assert_fails(done, 1, "no model nonesuch", tmp_path, "124M")


@pytest.fixture
def unreachable(monkeypatch):
    """No server answers, and nobody waits before trying again."""
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    patient = functools.partial(hub.download, pause=lambda seconds: None)
    monkeypatch.setattr(hub, "download", patient)


def test_cli_without_network_says_so(tmp_path, call, unreachable):
    done = call(gpt2, "x", "--model", "124M", "--models_dir", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gpt2.py: error: http://127.0.0.1:9/124M/")
    assert not (tmp_path / "124M" / "model.bin").exists()


def test_cli_names_a_damaged_model(cat, call):
    path = cat / "model.bin"
    path.write_bytes(path.read_bytes()[:-4])
    assert_fails(call(gpt2, "x", "--model", cat), 1, path, "bytes")
    path.write_bytes(b"<html>" * 300)
    assert_fails(call(gpt2, "x", "--model", cat), 1, path, "magic number")


@pytest.mark.thorough
def test_cli_names_a_damaged_or_missing_tokenizer(cat, call):
    path = cat / "tokenizer.bin"
    path.write_bytes(path.read_bytes()[:-4])
    assert_fails(call(gpt2, "x", "--model", cat), 1, path)
    path.unlink()
    assert_fails(call(gpt2, "x", "--model", cat), 1, cat)


def test_cli_refuses_a_tokenizer_larger_than_the_model(tmp_path, call):
    folder = save_model(tmp_path / "odd", random_params(dtype=np.float32))
    done = call(gpt2, "x", "--model", folder)
    assert_fails(done, 1, folder, "the tokenizer has 260 tokens, the model only 61")


def test_cli_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        gpt2.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for flag in ("--n_tokens", "--temperature", "--top_k", "--stop", "--interactive", "--stats"):
        assert flag in out
    assert "default: 40" in out
    assert "default: 0, or 1 with" in out
    assert "size" not in out  # picoGPT's flags are taken and not shown


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error there")
def test_cli_with_nobody_reading_its_output_says_nothing(random_model):
    argv = [sys.executable, gpt2.__file__, "a", "--model", str(random_model), "--n_tokens", "9999"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


@pytest.mark.skipif(os.name == "nt", reason="a parent cannot close it there")
@pytest.mark.parametrize(
    "closed, status, expected",
    [
        pytest.param([0], 1, "standard input is closed", marks=pytest.mark.thorough),
        pytest.param([1], 0, "prefill", marks=pytest.mark.thorough),
        ([2], 0, "sat"),  # and no --stats
        pytest.param([0, 1, 2], 1, "", marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_cli_with_closed_streams_shows_what_it_can(cat, closed, status, expected):
    prompt = "-" if 0 in closed else "The cat"
    done = subprocess.run(
        [sys.executable, gpt2.__file__, prompt, "--model", str(cat), "--stats"],
        **dict.fromkeys(("stdout", "stderr"), subprocess.PIPE),
        preexec_fn=lambda: [os.close(stream) for stream in closed],
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == status
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "prefill" not in done.stdout


def test_cli_stats_of_nothing_generated(cli, cat):
    out, err = cli(STORY, "--model", cat, "--stats")
    assert out == "\n"
    assert "no token was generated" in err


def test_cli_interactive_goes_on_after_a_prompt_too_long(cli, cat):
    out, err = cli("--interactive", "--model", cat, stdin="x" * 100 + "\nThe cat\n")
    assert out == STORY.removeprefix("The cat") + "\n"
    assert err == "the prompt of 100 tokens exceeds the 64 tokens that the model reads\n"


def test_cli_default_is_124m_where_it_is(cli, tmp_path, unreachable):
    script_model(tmp_path / "124M", STORY)
    script_model(tmp_path / "stories", "Once upon")
    assert cli("The cat", "--models_dir", tmp_path) == (STORY.removeprefix("The cat") + "\n", "")


def test_cli_default_without_network_is_the_bundled_model(cli, tmp_path, unreachable, monkeypatch):
    script_model(tmp_path / "bundled" / "stories", STORY)
    monkeypatch.setattr("gpt2_support.folders.BUNDLED_DIR", tmp_path / "bundled")
    script_model(tmp_path / "stories", "The cat, another model of that name.")
    out, err = cli("The cat", "--models_dir", tmp_path)
    assert out == STORY.removeprefix("The cat") + "\n"
    assert "using the bundled model `stories`" in err.splitlines()[-1]
    assert "python utils.py download 124M" in err.splitlines()[-1]


@pytest.mark.thorough
def test_cli_explicit_model_never_falls_back(cli, tmp_path, unreachable):
    script_model(tmp_path / "stories", STORY)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        cli("The cat", "--model", "124M", "--models_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stories"]  # no empty folder, no lock


@pytest.mark.parametrize(
    "words, meant",
    [
        (["Once", "upon", "a time"], ["Once upon a time"]),
        (["-Hi"], ["--", "-Hi"]),
        (["-hi there"], ["--", "-hi there"]),
    ],
    ids=str,
)
def test_cli_of_a_prompt_in_pieces_says_how_to_give_it(words, meant, call, cat):
    done = call(gpt2, *words, "--n_tokens", 3)
    command = cli_module.command("gpt2.py", *meant)
    assert_fails(done, 2, f"to continue that text: {command} (see --help)")
    assert call(gpt2, "--model", cat, "--n_tokens", 1, *meant).returncode == 0


def test_cli_takes_dashes_and_the_flags_of_picogpt(cat, cli):
    expected = cli("The", "--model", cat, "--n_tokens", 4)
    assert cli("The", "--model_size", cat, "--n_tokens_to_generate", 4) == expected
    assert cli("The", "--model", cat, "--n-tokens=4") == expected
    args = ("--models-dir", cat.parent, "--model", "cat", "--n_tok", 4)
    assert cli("The", *args) == expected


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that are continued, a list that grows; each continuation is empty."""
    texts = []

    def decode(params, prompts, *args):
        texts.append(ENC.decode(prompts[0]))
        return ()

    monkeypatch.setattr(gpt2, "decode", decode)
    return texts


def test_cli_leaves_the_dashes_of_a_prompt(random_model, cli, prompts):
    for words in (["--a-b c-d"], ["--", "--a-b"], ["x", "--stop=--a-b"]):
        cli("--model", random_model, *words)
    assert prompts == ["--a-b c-d", "--a-b", "x"]


@pytest.mark.parametrize(
    "flags, temperature",
    [
        ("", 0.0),
        ("--repetition_penalty 1.2", 0.0),
        ("--top_k 3", 1.0),
        ("--top_p 0.5", 1.0),
        ("--seed 0", 1.0),
        ("--n_samples 2", 1.0),
        ("--seed 1 --temperature 0.5", 0.5),
    ],
)
def test_cli_flags_of_sampling_mean_temperature_1(flags, temperature, capsys):
    assert gpt2_cli.parse_args(flags.split()).temperature == temperature
    assert capsys.readouterr().err == ""


def test_cli_says_which_flags_do_nothing_at_temperature_0(cat, cli):
    args = ("The cat", "--model", cat, "--temperature", 0, "--n_tokens", 4)
    flags = ("--top_k", 3, "--top_p", 0.5, "--seed", 1)
    out, err = cli(*args, *flags, "--n_samples", 2)
    assert out == 2 * cli(*args)[0]
    flags = "--n_samples, --top_k, --top_p, --seed"
    assert err.splitlines()[0] == f"no effect at temperature 0: {flags}"


def test_cli_strips_one_line_end_of_standard_input(cat, call, prompts):
    for end in ("", "\n", "\r\n", "\n\n", " \n"):
        assert call(gpt2, "-", "--model", cat, stdin="The\ncat" + end).returncode == 0
    assert prompts == ["The\ncat", "The\ncat", "The\ncat", "The\ncat\n", "The\ncat "]


@pytest.mark.parametrize("args", [["-"], ["--interactive"], ["x", "--interactive"]], ids=str)
def test_cli_without_standard_input_is_one_line(args, cat, call, monkeypatch):
    done = call(gpt2, *args, "--model", cat, stdin=None)
    assert done.returncode == 1
    message = "gpt2.py: error: standard input is closed: there is nothing to read\n"
    assert done.stderr == message


class Typist(io.StringIO):
    """An endless text, of which it counts what is read."""

    n_read = 0

    def read(self, n):
        self.n_read += n
        return "x" * n

    readline = read


def test_cli_refuses_a_prompt_that_cannot_fit_unread(cat, monkeypatch, capsys):
    """A token of ENC has 13 bytes at most, and n_ctx is 64."""
    monkeypatch.setattr(sys, "stdin", Typist())
    monkeypatch.setattr(encoder.Encoder, "encode", None)
    for prompt in ("-", "x" * (64 * 13 + 1)):
        with pytest.raises(SystemExit) as exit:
            gpt2.main([prompt, "--model", str(cat)])
        assert exit.value.code == 2
        assert "prompt of over 832 characters exceeds the 64 tokens" in capsys.readouterr().err
    assert sys.stdin.n_read == 64 * 13 + 3


def test_cli_interactive_drops_the_rest_of_a_line_that_cannot_fit(cat, cli):
    for n, end in itertools.product((831, 832, 833, 834, 835, 836, 3000), ("\n", "\r\n")):
        stdin = "x" * n + f"{end}The cat{end}" + "y" * n
        out, err = cli("--interactive", "--model", cat, "--n_tokens", 4, stdin=stdin)
        size = f"{n} tokens" if n <= 832 else "over 832 characters"
        assert (out, err) == (
            " sat\n",
            2 * f"the prompt of {size} exceeds the 64 tokens that the model reads\n",
        )


def interrupt_after(monkeypatch, n):
    """Let Ctrl-C come after n tokens of an answer, the first time."""
    decode, left = gpt2.decode, [n]

    def interrupted(*args):
        for step in decode(*args):
            if left and not left[0]:
                left.clear()
                raise KeyboardInterrupt
            left[:] = [n - 1 for n in left]
            yield step

    monkeypatch.setattr(gpt2, "decode", interrupted)


@pytest.mark.parametrize("n", [0, 3])
def test_cli_interrupt_ends_an_answer_and_not_the_conversation(n, cat, call, monkeypatch):
    interrupt_after(monkeypatch, n)
    args = ("--interactive", "--model", cat, "--n_tokens", 4, "--stats")
    done = call(gpt2, *args, stdin="The cat\nThe cat sat\n")
    assert done.returncode == 0
    assert done.stdout == ["", None, None, " sa\n"][n] + " on the\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Keyboard(Terminal):
    """Ctrl-C comes before each line is read."""

    interrupts = True

    def readline(self, *args):
        self.interrupts = not self.interrupts
        if not self.interrupts:
            raise KeyboardInterrupt
        return super().readline(*args)


def test_cli_interrupt_before_a_line_does_not_end_it_on_a_terminal(cat, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Keyboard("The cat\n"))
    gpt2.main(["--interactive", "--model", str(cat), "--n_tokens", "4"])
    out, err = capsys.readouterr()
    assert out == " sat\n"
    assert [err.count("> "), err.count("Ctrl-D")] == [4, 2]
    monkeypatch.setattr(Keyboard, "isatty", lambda self: False)
    monkeypatch.setattr(sys, "stdin", Keyboard("The cat\n"))
    with pytest.raises(KeyboardInterrupt):
        gpt2.main(["--interactive", "--model", str(cat)])


def test_cli_interrupt_prints_the_samples_that_are_there(cat, call, monkeypatch):
    interrupt_after(monkeypatch, 3)
    done = call(gpt2, "The cat", "--model", cat, "--n_samples", 2)
    assert (done.returncode, done.stdout) == (130, " sa\n sa\n")
    assert done.stderr.count("sample") == 2
    interrupt_after(monkeypatch, 3)
    done = call(gpt2, "The cat", "--model", cat)
    assert (done.returncode, done.stdout) == (130, " sa\n")


def test_cli_conversation_goes_on_from_all_before_it(cat, cli, monkeypatch):
    seen, decode = [], gpt2.decode

    def recorded(params, prompts, *args):
        seen.append(ENC.decode(prompts[0]))
        return decode(params, prompts, *args)

    monkeypatch.setattr(gpt2, "decode", recorded)
    args = ("--conversation", "--interactive", "--model", cat, "--n_tokens", 2)
    cli("The cat", *args, stdin="b\n" + "x" * 65 + "\n" + "c" * 55 + "\n")
    first, second, third = seen
    assert (first, second) == ("The cat", "The cat s\nb")
    text = second + cli(second, *args[2:])[0] + "c" * 55
    assert len(ENC.encode(text)) > len(ENC.encode(third)) == 64
    assert text.endswith(third)


@pytest.mark.skipif(os.name == "nt", reason="arguments are Unicode there")
def test_cli_takes_utf_8_in_an_ascii_locale(cat, cli, prompts):
    prompt = "é€😀".encode().decode("ascii", "surrogateescape")  # as Python reads it
    cli(prompt, "--interactive", "--model", cat, stdin=f"{prompt}\n{prompt[:1]}")
    assert prompts == ["é€😀", "é€😀", "\ufffd"]
    args = gpt2_cli.parse_args(["--stop", prompt, "\ud800"])
    assert (args.stop, args.prompt) == (["é€😀"], "\ud800")


def test_cli_escapes_control_characters_on_a_terminal(tmp_path, cli, monkeypatch):
    text = "a\x1b]0;b\x07\tc\n\x9b2Jd\x7f\r"
    model = script_model(tmp_path / "model", text)
    out, _ = cli("a", "--model", model)
    assert out == text[1:] + "\n"
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    cli("a", "--model", model)
    cli("a", "--model", model, "--explain", "--n_samples", 2, "--temperature", 0)
    expected = r"\x1b]0;b\x07" + "\tc\n" + r"\x9b2Jd\x7f\r" + "\n"
    assert terminal.getvalue() == 3 * expected
