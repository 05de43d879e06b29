"""Tests of evaluate.py, the command: figures of texts, items and tokens, and its refusals."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import openai_files
import pytest
from helpers import TEXT
from task_items import write_items

import encoder
import evaluate
import gpt2
import train
import utils
from gpt2_support import datasets, evaluation_cli, folders, tasks
from gpt2_support.formats import llmc
from gpt2_support.http import Effort
from gpt2_support.params import Config, Params


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The paths of a few items of LAMBADA and of HellaSwag."""
    return write_items(tmp_path_factory.mktemp("items"), 5)


def figures_of(call, *args):
    done = call(evaluate, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def last_line(done):
    return done.stderr.splitlines()[-1]


# --- tokens of a text ---------------------------------------------------------------------------


def test_tokens_of_a_text_have_their_loss_and_probability(call):
    text = "Once upon a time, there was Ä"
    result = figures_of(call, text, "--model", "stories")
    params, enc = gpt2.load("stories"), encoder.load("stories")
    ids = enc.encode(text)
    logits = gpt2.forward(params, [enc.eot, *ids])[:-1].astype(np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    expected = probs[np.arange(len(ids)), ids] / probs.sum(-1)
    assert [row["id"] for row in result["tokens"]] == ids
    assert [row["prob"] for row in result["tokens"]] == pytest.approx(expected, rel=1e-4)
    assert result["nats_per_token"] == pytest.approx(-np.log(expected).mean(), rel=1e-5)
    assert result["n_bytes"] == len(text.encode())
    assert result["bits_per_byte"] == pytest.approx(-np.log2(expected).sum() / len(text.encode()))


def test_tokens_of_a_text_are_a_table(call):
    lines = call(evaluate, "Once upon", "--model", "stories").stdout.splitlines()
    assert lines[0].split() == ["nats", "probability", "token"]
    assert [line.split(maxsplit=2)[2] for line in lines[1:3]] == ["'Once'", "' upon'"]
    assert "perplexity" in lines[3]


def test_text_from_standard_input_may_be_longer_than_the_context(call):
    text = "Lily was happy. " * 100
    done = call(evaluate, "-", "--model", "stories", "--json", stdin=text)
    rows = json.loads(done.stdout)["tokens"]
    assert [row["id"] for row in rows] == encoder.load("stories").encode(text)
    assert len(rows) > 256 and all(0 < row["prob"] <= 1 for row in rows)


def test_empty_standard_input_is_refused(call):
    done = call(evaluate, "-", "--model", "stories", stdin="\n")
    assert done.returncode == 2 and "standard input is empty" in last_line(done)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_end_of_standard_input_is_not_scored(call, end):
    expected = figures_of(call, "Once upon\n", "--model", "stories")
    done = call(evaluate, "-", "--model", "stories", "--json", stdin=f"Once upon\n{end}")
    assert json.loads(done.stdout) == expected


def test_text_without_an_end_of_text_begins_with_its_second_token(call, tmp_path):
    encoder.Encoder(encoder.load("stories").tokens, eot=None).save(tmp_path / "t.bin")
    if encoder.load(tmp_path / "t.bin").eot is not None:
        pytest.skip("the format keeps an end-of-text")
    result = figures_of(call, "Once upon", "--model", "stories", "--tokenizer", tmp_path / "t.bin")
    assert result["n_tokens"] == 1


@pytest.mark.parametrize("text", ["", "Once"])
def test_text_of_a_token_or_none_is_told_or_scored(call, text):
    done = call(evaluate, text, "--model", "stories")
    assert done.returncode == (0 if text else 2)
    assert text or "TEXT is empty" in last_line(done)


# --- texts of any size --------------------------------------------------------------------------


def test_text_file_is_measured_as_by_train_eval_only(call, trained, text):
    flags = ("--data", text, "--seq_len", 8, "--stride", 3)
    done = call(evaluate, "--model", trained, *flags)
    assert done.stdout == call(train, "--eval_only", "--init", trained, *flags).stdout
    result = figures_of(call, "--model", trained, *flags)
    enc, params = encoder.load(trained), gpt2.load(trained)
    tokens = np.array([enc.eot, *enc.encode(TEXT)])
    expected = evaluate.evaluate(params, tokens, datasets.token_lengths(enc), 8, 3)
    assert result["nats_per_token"] == expected.loss
    assert result["stderr"] == expected.standard_error
    assert result["perplexity"] == pytest.approx(math.exp(expected.loss))
    assert (result["seq_len"], result["stride"]) == (8, 3)


def test_limit_of_a_text_is_in_tokens(call, trained, text):
    assert figures_of(call, "--model", trained, "--data", text, "--limit", 9)["n_tokens"] == 8


# --- items --------------------------------------------------------------------------------------


def test_items_give_figures_in_every_way(call, files):
    lambada, hellaswag = (
        figures_of(call, "--model", "stories", "--data", path, "--limit", 4) for path in files
    )
    assert (lambada["task"], lambada["n_items"]) == ("lambada", 4)
    names = ["acc", "acc, last token", "perplexity"]
    assert [row["name"] for row in lambada["figures"]] == names
    assert {*names} == {*tasks.PUBLISHED["lambada"]}
    assert {row["name"] for row in hellaswag["figures"]} == {*tasks.PUBLISHED["hellaswag"]}
    assert all(row["published"] is None for row in hellaswag["figures"])
    one = figures_of(call, "--model", "stories", "--data", files[1], "--limit", 4, "--way", "llm.c")
    assert one["figures"] == hellaswag["figures"][2:]


def test_items_are_a_table_with_the_published_figures(call, files, monkeypatch):
    monkeypatch.setattr(evaluation_cli, "model_name", lambda name, path: "124M")
    done = call(evaluate, "--model", "stories", "--data", files[1], "--limit", 2)
    head, *lines = done.stdout.splitlines()
    assert head.startswith(f"{files[1]}: 2 items of hellaswag by 124M, ")
    assert len(lines) == 4
    assert "published: 0.3114, karpathy/llm.c" in lines[1]
    assert "(standard error 0." in lines[0]


def test_model_that_has_diverged_is_refused_and_has_no_figures(call, tmp_path, text, files):
    """Its logits are NaN, and argmax takes the first NaN: one ending in four would be right."""
    model = tmp_path / "diverged"
    params = Params(Config(encoder.load("stories").n_vocab, 64, 8, 2, 1))
    params.wte[...] = np.nan
    llmc.save_params(model / "model.bin", params)
    encoder.load("stories").save(model / "tokenizer.bin")
    message = "the logits are not finite: the model is damaged or has diverged"
    for args in (["some text"], *(["--data", path] for path in (text, *files))):
        done = call(evaluate, *args, "--model", model)
        assert done.returncode == 1 and done.stdout == ""
        assert message in last_line(done)
    done = call(train, "--eval_only", "--init", model, "--data", text)
    assert done.returncode == 1 and message in last_line(done)


def test_standard_error_of_one_item_is_unknown(call, files):
    done = call(evaluate, "--model", "stories", "--data", files[0], "--limit", 1)
    assert "(standard error unknown)" in done.stdout
    result = figures_of(call, "--model", "stories", "--data", files[0], "--limit", 1)
    assert result["figures"][0]["stderr"] is None


@pytest.mark.parametrize("name", tasks.TASKS)
def test_task_by_name_is_fetched_once_and_checked(call, files, tmp_path, monkeypatch, name):
    data = files[tasks.TASKS.index(name)].read_bytes()
    (tmp_path / "items.jsonl").write_bytes(data)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai_files.serve(tmp_path) as server:
        known = datasets.TASKS[name]._replace(
            url=f"{server.url}/items.jsonl", size=None, sha256=hashlib.sha256(data).hexdigest()
        )
        monkeypatch.setitem(datasets.TASKS, name, known._replace(sha256="0" * 64))
        with pytest.raises(ValueError, match=rf"{name}\.jsonl"):
            datasets.download(name, Effort(pause=lambda seconds: None))
        monkeypatch.setitem(datasets.TASKS, name, known)
        server.log.clear()
        done = call(utils, "download", name)
        assert done.returncode == 0 and f"{name}.jsonl: downloaded" in last_line(done)
        for _ in range(2):
            result = figures_of(call, "--model", "stories", "--data", name, "--limit", 2)
        assert len(server.log) == 1
    assert result["data"] == str(folders.datasets_dir() / f"{name}.jsonl")


@pytest.mark.parametrize("name", ["gpt2", "117M", "124M", "openai-community/gpt2"])
def test_openais_models_are_known_by_any_of_their_names(name, tmp_path):
    assert evaluation_cli.model_name(name, tmp_path) == "124M"
    assert evaluation_cli.model_name(None, Path("models/124M")) == "124M"
    assert evaluation_cli.model_name("models/mine", tmp_path) == str(tmp_path)


# --- refusals -----------------------------------------------------------------------------------

REFUSALS = {
    "nothing": ([], 2, "give either a TEXT to score or --data to measure with"),
    "both": (["hello", "--data", "x.txt"], 2, "give either a TEXT"),
    "name as text": (["lambada"], 2, "to measure with lambada: --data lambada"),
    "file as text": (["README.md"], 2, "to measure with README.md: --data README.md"),
    "words": (["one", "two"], 2, "quote a TEXT with spaces"),
    "limit of TEXT": (["hello", "--limit", "3"], 2, "--limit: it would do nothing, since a TEXT"),
    "stride of items": (["--data", "lambada", "--stride", "3"], 2, "lambada holds items"),
    "way of a text": (["--data", "README.md", "--way", "llm.c"], 2, "it belongs to HellaSwag"),
    "stride": (
        ["--data", "README.md", "--stride", "9", "--seq_len", "8"],
        2,
        "--stride 9 exceeds --seq_len 8",
    ),
    "no file": (["--data", "no.jsonl"], 1, "no.jsonl"),
    "no text": (["--data", "no.txt"], 1, "no.txt: no such file, nor a data set of that name"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_command_refuses_in_one_clear_line(call, case):
    arguments, status, message = REFUSALS[case]
    done = call(evaluate, *arguments, "--model", "stories")
    assert done.returncode == status and message in last_line(done)
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_way_is_refused_for_a_file_of_lambada(call, files):
    done = call(evaluate, "--model", "stories", "--data", files[0], "--way", "llm.c")
    assert done.returncode == 1 and "--way belongs to HellaSwag" in last_line(done)


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl"])
@pytest.mark.parametrize("command", [evaluate, train, "tune"])
def test_absent_data_are_reported_before_a_model_is_downloaded(call, monkeypatch, name, command):
    monkeypatch.setattr("gpt2_support.hub.download", None)  # a call of it would be another error
    flags = {
        evaluate: ["--model", "someone/else"],
        train: ["--eval_only", "--init", "someone/else"],
    }
    module = train if command == "tune" else command
    done = call(module, "--data", name, *flags.get(command, ["--init", "someone/else"]))
    assert done.returncode == 1 and f"error: {name}: no such file" in done.stderr.splitlines()[-1]
