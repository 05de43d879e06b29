"""Models of the Hugging Face hub by name, from a server that behaves as the hub does, or not."""

import json
import os
import re
import time

import hub_server
import numpy as np
import openai_files
import pytest
from helpers import TINY
from model_files import assert_equal, contents, hf_arrays, write_hf, write_safetensors

import encoder
import gpt2
import train
import utils
from gpt2_support import http, hub, huggingface_hub
from gpt2_support.formats import llmc, token_table
from gpt2_support.params import Config

NAME = "someone/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A folder of Hugging Face's, with tokenizer."""
    write_hf(tmp_path / "in")
    openai_files.write_hf_tokenizer(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def site(monkeypatch, folder):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(http, "PATIENCE", 2)
    with hub_server.serve() as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url + "/")
        site.add(NAME, folder)
        yield site


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models_dir").mkdir()
    return tmp_path / "models_dir"


def download(models, name=NAME, **kwargs):
    return hub.download(name, models, pause=lambda seconds: None, **kwargs)


def assert_fetched(folder):
    assert sorted(contents(folder)) == ["model.bin", "tokenizer.bin"]
    assert_equal(llmc.load_params(folder), openai_files.random_arrays(TINY))
    assert len(token_table.load_tokenizer(folder)[0]) == 260


def test_model_of_the_hub_is_fetched_by_name(site, models, capsys):
    assert download(models) == models / NAME
    assert_fetched(models / NAME)
    assert sorted(path.name for path in models.rglob("*")) == [
        *("model.bin", "someone", "tiny", "tokenizer.bin")
    ]
    err = capsys.readouterr().err
    size = len(site.repositories[NAME][WEIGHTS]) / 1e6
    assert f"{NAME}: downloading {size:,.1f} MB from {site.url}/{NAME} to {models / NAME}\n" in err
    paths = [path for _, path, *_ in site.log]
    assert all("/resolve/main/" not in path for path in paths[1:])  # all of the commit of the first
    site.log.clear()
    download(models)
    assert not site.log


def test_greedy_ids_of_the_reference_model_from_nothing(site, models, call, shared, tmp_path):
    """As a user types it, with a tokenizer in which the ids of the prompt are text."""
    reference = np.load(shared("hf_tiny/expected.npz"))
    expected = reference["greedy"].ravel().tolist()
    site.add(NAME, shared("hf_tiny"))
    letters = token_table.bytes_to_unicode()
    ids = list(dict.fromkeys(expected))  # these stand for letters, which encode to themselves
    plain = [byte for byte in range(33, 127) if byte != 60]
    order = dict(zip(ids, plain, strict=False))
    rest = iter([byte for byte in range(256) if byte not in order.values()])
    vocab = {letters[order[id] if id in order else next(rest)]: id for id in range(256)}
    assert 256 not in ids and len(vocab) == 256
    vocab["<|endoftext|>"] = 256
    site.repositories[NAME] |= {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\n",
    }
    text = "".join(chr(order[id]) for id in expected)
    prompt, continuation = text[:8], text[8:]
    args = (prompt, "--model", NAME, "--models_dir", models, "--n_tokens", 24)
    first, second = call(gpt2, *args), call(gpt2, *args)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert [first.stdout.strip("\n"), second.stdout.strip("\n")] == [continuation] * 2
    assert "downloading" in first.stderr and "downloading" not in second.stderr
    logits = gpt2.forward(gpt2.load(NAME, models), reference["tokens"])
    np.testing.assert_allclose(logits, reference["logits"], atol=2e-5)


def test_every_command_takes_a_name(no_picture, site, models, call, tmp_path):
    site.repositories |= {f"someone/{i}": site.repositories[NAME] for i in range(4)}
    text = tmp_path / "text.txt"
    text.write_text("the cat and the hat. " * 40)
    flags = ("--models_dir", models)
    assert gpt2.load("someone/0", models).config == TINY
    assert encoder.load("someone/1", models).n_vocab == 260
    assert call(utils, "download", "someone/2", *flags).returncode == 0
    args = ("--data", text, "--init", "someone/3", "--out", tmp_path / "out", "--steps", 1)
    done = call(train, *args, *flags, "--batch_size", 2)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (models / "someone").iterdir()} == set("0123")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("distilgpt2", "distilgpt2"),
        ("distilbert/distilgpt2", "distilbert/distilgpt2"),
        (f"{NAME}@v1.0", f"{NAME}@v1.0"),
        (f"{NAME}@{hub_server.COMMIT}", f"{NAME}@{hub_server.COMMIT}"),
        ("gpt2@main", "gpt2@main"),
    ],
)
def test_old_names_and_revisions(site, models, name, kept):
    site.repositories["distilbert/distilgpt2"] = site.repositories[NAME]
    site.repositories["openai-community/gpt2"] = site.repositories[NAME]
    assert hub.find_model(name, models) == models / kept
    assert_fetched(models / kept)
    site.log.clear()
    assert hub.find_model(name, models) == models / kept
    assert not site.log


def test_shards_are_fetched(site, models):
    files, arrays = site.repositories[NAME], hf_arrays()
    del files[WEIGHTS]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    shards = {name: names[i % 2] for i, name in enumerate(arrays)}
    for shard in names:
        path = models / shard
        write_safetensors(path, {name: arrays[name] for name in arrays if shards[name] == shard})
        files[shard] = path.read_bytes()
        path.unlink()
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    assert_fetched(download(models))
    shards[next(iter(shards))] = "../../evil.safetensors"
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    with pytest.raises(ValueError, match="no weight_map that names safetensors files beside it"):
        download(models, f"{NAME}@v1.0")
    assert not list(models.rglob("evil*"))


def test_tokenizer_json_is_taken_where_there_is_no_vocabulary(site, models, folder):
    files = site.repositories[NAME]
    vocab, merges = json.loads(files.pop("vocab.json")), files.pop("merges.txt").decode()
    model = {"type": "BPE", "vocab": vocab, "merges": merges.strip().split("\n")[1:]}
    split = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    table = {"model": model, "pre_tokenizer": split, "added_tokens": []}
    files["tokenizer.json"] = json.dumps(table).encode()
    assert_fetched(download(models))


def test_model_without_a_tokenizer_is_fetched_once(site, models, capsys):
    del site.repositories[NAME]["merges.txt"]
    download(models)
    assert list(contents(models / NAME)) == ["model.bin"]
    assert "no tokenizer there" in capsys.readouterr().err
    site.log.clear()
    download(models)
    assert not site.log


def test_kept_files_are_those_of_the_hub(site, models):
    download(models, keep=True)
    kept = contents(models / NAME / "huggingface")
    assert sorted(kept) == ["config.json", "merges.txt", WEIGHTS, "vocab.json"]
    assert kept.items() <= site.repositories[NAME].items()


# ----------------------------------------------------------------------------------------------
# A hub that fails


@pytest.mark.parametrize(
    "faults",
    [
        {WEIGHTS: [429, 503]},
        {WEIGHTS: [503, "drop", "drop"]},
        {WEIGHTS: ["altered", "altered"]},
        {"config.json": [429, 429], "vocab.json": [500]},
    ],
)
def test_download_recovers(site, models, faults):
    site.faults = faults
    assert_fetched(download(models))


def test_encoder_load_goes_on_with_an_interrupted_download(site, models):
    site.faults[WEIGHTS] = ["drop", "drop"]
    with pytest.raises(ZeroDivisionError):
        hub.download(NAME, models, pause=lambda seconds: 1 / 0)
    assert encoder.load(NAME, models).n_vocab == 260
    assert_fetched(models / NAME)


def test_download_leaves_a_training_run_alone_and_fetches_nothing(site, models):
    (models / NAME).mkdir(parents=True)
    (models / NAME / "log.csv").write_text("step")
    before = contents(models)
    with pytest.raises(ValueError, match=r"holds a training run \(log.csv\), not the model"):
        download(models)
    assert contents(models) == before and site.log == []


def test_interrupted_download_goes_on_at_its_commit(site, models):
    body = site.repositories[NAME][WEIGHTS]
    site.faults[WEIGHTS] = ["drop", "drop"]  # of the first one only the size is wanted
    with pytest.raises(ZeroDivisionError):
        hub.download(NAME, models, pause=lambda seconds: 1 / 0)
    part = models / NAME / ".download" / hub_server.COMMIT / f"{WEIGHTS}.part"
    n_bytes = part.stat().st_size
    assert 0 < n_bytes < len(body)
    site.log.clear()
    assert_fetched(download(models))
    assert f"bytes={n_bytes}-" in [asked for *_, asked in site.log]


@pytest.mark.parametrize("fault", [401, "page"])
def test_partial_weights_outlive_an_answer_that_is_refused(site, models, fault):
    site.faults[WEIGHTS] = ["drop", "drop"]
    with pytest.raises(ZeroDivisionError):
        hub.download(NAME, models, pause=lambda seconds: 1 / 0)
    part = models / NAME / ".download" / hub_server.COMMIT / f"{WEIGHTS}.part"
    n_bytes = part.stat().st_size
    site.faults["vocab.json"] = [fault]
    with pytest.raises((OSError, ValueError), match=r"private or gated|sent a page") as caught:
        download(models)
    assert "not a GPT-2" not in str(caught.value)
    assert part.stat().st_size == n_bytes > 0
    assert_fetched(download(models))


def test_hub_that_names_no_commit_is_asked_for_the_small_files_again(site, models, monkeypatch):
    monkeypatch.setattr(hub_server, "COMMIT", "")
    site.faults[WEIGHTS] = ["drop", "drop"]
    with pytest.raises(ZeroDivisionError):
        hub.download(NAME, models, pause=lambda seconds: 1 / 0)
    (models / NAME / ".download" / "main" / "config.json").write_text("{}")  # of another commit
    site.log.clear()
    assert_fetched(download(models))
    assert any(asked for *_, asked in site.log)  # the weights went on


def test_files_of_another_commit_are_not_mixed_in(site, models):
    other = models / NAME / ".download" / ("f" * 40)
    other.mkdir(parents=True)
    (other / WEIGHTS).write_bytes(b"of another commit")
    (other / "config.json").write_bytes(b"{}")
    assert_fetched(download(models))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["altered"] * 10, "does not have the SHA-256"),
        (["truncated"] * 10, "the server sends .* bytes, expected"),
        (["wrong size"] * 10, "the server sends .* bytes, expected"),
        (["file:///etc/passwd"] * 10, "redirects to file:///etc/passwd"),
        (["http://127.0.0.1:1/"] * 10, "refused"),
        ([404] * 10, "no model.safetensors at|only pytorch"),
    ],
)
def test_server_that_lies_is_refused(site, models, faults, message):
    site.faults[WEIGHTS] = faults
    with pytest.raises((ValueError, OSError), match=message):
        download(models)
    assert not list(models.rglob("model.bin"))
    site.faults.clear()
    assert_fetched(download(models))


def test_redirects_in_a_circle_are_refused(site, models):
    site.faults[WEIGHTS] = [f"{site.url}/{NAME}/resolve/main/{WEIGHTS}"] * 30
    with pytest.raises(ValueError, match="redirects more than 10 times"):
        download(models)


def test_weights_larger_than_such_a_model_needs_are_refused(site, models):
    site.repositories[NAME][WEIGHTS] += bytes(10_000_000)
    with pytest.raises(ValueError, match="bytes, expected at most"):
        download(models)
    assert len([path for is_far, path, *_ in site.log if is_far]) <= 1


# ----------------------------------------------------------------------------------------------
# What is refused, and what it says


def refusal(call, models, name=NAME):
    """Return the last line on standard error of a download that has to fail and leave nothing."""
    done = call(utils, "download", name, "--models_dir", models)
    assert (done.returncode, done.stdout) == (1, "")
    assert not list(models.iterdir()), list(models.rglob("*"))
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "llama"},
            "not a GPT-2 that can run here: config.json: model_type = 'llama'",
        ),
        (
            {"activation_function": "relu"},
            "activation_function = 'relu', GPT-2 as written here has",
        ),
        ({"n_head": 3}, "not a GPT-2 that can run here: config.json: n_embd = 8"),
    ],
)
def test_model_that_is_no_gpt2_is_refused_before_its_weights(site, models, call, change, message):
    config = json.loads(site.repositories[NAME]["config.json"]) | change
    site.repositories[NAME]["config.json"] = json.dumps(config).encode()
    assert f"{NAME}: " in (line := refusal(call, models)) and message in line
    assert not any(path.endswith(WEIGHTS) for _, path, *_ in site.log)


def test_model_with_another_kind_of_tokenizer_is_refused(site, models, call):
    site.repositories[NAME]["merges.txt"] = b"#version: 0.2\nh e\n"
    assert "merge 0 is" in refusal(call, models)


def test_model_of_pytorch_alone_says_how_to_save_it(site, models, call):
    site.repositories[NAME]["pytorch_model.bin"] = site.repositories[NAME].pop(WEIGHTS)
    line = refusal(call, models)
    assert f"{NAME}: only pytorch_model.bin at {site.url}/{NAME}" in line
    assert "save_pretrained" in line


def test_model_with_other_tensors_says_so_and_not_to_try_again(site, models, call, tmp_path):
    write_safetensors(tmp_path / "x", {**hf_arrays(), "score.weight": np.ones((2, 8), "f4")})
    site.repositories[NAME][WEIGHTS] = (tmp_path / "x").read_bytes()
    done = call(utils, "download", NAME, "--models_dir", models)
    assert done.returncode == 1
    assert "unexpected tensor score.weight" in done.stderr and "run this again" not in done.stderr
    assert not list(models.rglob("*.safetensors")) + list(models.rglob("model.bin"))


def test_passwords_of_servers_are_in_no_message(both, models, monkeypatch, capsys):
    openai, site = both
    monkeypatch.setenv("GPT2_BASE_URL", openai.url.replace("//", "//me:hunter2@"))
    monkeypatch.setenv("HF_ENDPOINT", site.url.replace("//", "//me:hunter3@"))
    openai.faults["vocab.bpe"] = [404, 500, 404]
    assert_fetched(download(models, "124M"))
    del site.repositories["openai-community/gpt2"]
    (models / "124M" / "model.bin").unlink()
    with pytest.raises(OSError, match="124M") as caught:
        download(models, "124M")
    for name in ("someone/none", NAME + "@v7"):
        with pytest.raises(OSError, match=r"no such model|no revision") as second:
            download(models, name)
        assert "hunter" not in str(second.value)
    assert "hunter" not in str(caught.value) + capsys.readouterr().err


def test_shard_that_is_not_there_is_named(site, models, call):
    files = site.repositories[NAME]
    del files[WEIGHTS]
    index = {"weight_map": {"wte.weight": "model-1.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert f"{NAME}: no model-1.safetensors at {site.url}" in refusal(call, models)


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("nobody/nothing", "", "nobody/nothing: no such model at .*, or a private or gated one"),
        ("someone/private", "", "no such model at .* put a token that may into HF_TOKEN"),
        ("someone/private", "wrong", "HF_TOKEN may not read it"),
        ("someone/gated", "", "accept its terms at http.*someone/gated, and put a token"),
        ("someone/gated", "wrong", "accept its terms at http.*, and HF_TOKEN may not read it"),
        (f"{NAME}@v2", "", "someone/tiny: no revision v2 at http"),
        ("someone/empty", "", "no config.json at .*: not a model that transformers loads"),
        (NAME, "a b", "HF_TOKEN: has a space or another character"),
        (NAME, "a\nX-Evil: b", "HF_TOKEN: has a space or another character"),
    ],
)
def test_refusal_of_the_hub_says_what_to_do(site, models, call, monkeypatch, name, token, message):
    site.repositories |= {"someone/private": {}, "someone/gated": {}, "someone/empty": {}}
    site.private.add("someone/private")
    site.gated.add("someone/gated")
    monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(call, models, name)
    assert re.search(message, line), line
    assert "Evil" not in line and not (len(token) > 3 and token in line)


def test_token_opens_private_models_and_stays_at_home(site, models, capsys, monkeypatch):
    site.private.add(NAME)
    monkeypatch.setenv("HF_TOKEN", f" {hub_server.TOKEN}\n")
    site.faults[WEIGHTS] = [500, "drop"]
    assert_fetched(download(models))
    tokens = {is_far: token for is_far, _, token, _ in site.log}
    assert tokens == {False: f"Bearer {hub_server.TOKEN}", True: None}
    assert hub_server.TOKEN not in capsys.readouterr().err


NAMES = [
    "../tiny",
    "someone/../tiny",
    "/tiny",
    "someone/",
    "someone//tiny",
    "a/b/c",
    "..",
    "a/..",
    "",
]
NAMES += ["someone/tiny@", "someone/tiny@..", "someone/tiny@a/b", "someone/.tiny", "someone/tiny."]
NAMES += ["some one/tiny", "someone\\tiny", "someone/tiny\n", "someone/tiny\0", "~/tiny", "-x/tiny"]
NAMES += ["someone/tiny?x", "someone/tiny#x", "someone/%2e%2e", "someone:x@host/tiny", "x" * 5000]
NAMES += [
    "someone/ti..ny",
    "sömeone/tiny",
    "models/tiny",
    "datasets/tiny",
    "tiny",
    "someone/ti@n@y",
]


def test_name_that_is_none_is_refused_without_a_request(site, models):
    for name in NAMES:
        with pytest.raises(ValueError, match="unknown model"):
            hub.download(name, models)
        with pytest.raises((FileNotFoundError, OSError)):
            hub.find_model(name, models)
        assert not site.log, name
        assert not list(models.iterdir()), name


def test_path_that_does_not_exist_is_not_taken_for_a_name(site, models, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="no model runs/mine"):
        hub.find_model("runs/mine", models)
    assert not site.log
    download(models)
    site.repositories["someone/other"] = site.repositories[NAME]
    assert hub.find_model("someone/other", models) == models / "someone/other"


def test_hostile_commit_is_not_used_in_a_path(site, models, monkeypatch):
    monkeypatch.setattr(hub_server, "COMMIT", "../../evil")
    assert_fetched(download(models, f"{NAME}@main"))
    assert not list(models.parent.rglob("evil*"))


# ----------------------------------------------------------------------------------------------
# OpenAI's models by another road


@pytest.fixture
def both(site, tmp_path, monkeypatch):
    """OpenAI's server of a small 124M, and the hub with the same weights."""
    with openai_files.serve_model(tmp_path / "site", TINY, monkeypatch) as openai:
        site.repositories["openai-community/gpt2"] = site.repositories[NAME]
        monkeypatch.setenv("GPT2_BASE_URL", openai.url)
        yield openai, site


def test_openais_token_table_comes_from_the_hub_without_the_weights(both, models):
    openai, site = both
    openai.faults["encoder.json"] = [404]
    assert encoder.load("gpt2", models).n_vocab == TINY.n_vocab
    assert [path.name for path in models.rglob("*") if path.is_file()] == ["tokenizer.bin"]
    assert not any("safetensors" in str(entry) for entry in site.log)


@pytest.mark.parametrize("fault", [404, 403, "page", "hidden page", "gzip", 500])
@pytest.mark.parametrize(
    "name",
    ["encoder.json", pytest.param("model.ckpt.data-00000-of-00001", marks=pytest.mark.thorough)],
)
def test_openais_model_comes_from_the_hub_where_its_server_answers_badly(
    both, models, capsys, fault, name
):
    openai, _ = both
    openai.faults[name] = [fault] * 20
    assert download(models, "gpt2") == models / "124M"
    assert_fetched(models / "124M")
    assert sorted(path.name for path in models.rglob("*")) == ["124M", "model.bin", "tokenizer.bin"]
    assert (
        "The Hugging Face hub has the same model: openai-community/gpt2" in capsys.readouterr().err
    )


def test_both_roads_give_the_same_bytes(both, models, tmp_path, monkeypatch):
    first = contents(download(models, "124M"))
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:1")
    (tmp_path / "second").mkdir()
    assert contents(download(tmp_path / "second", "124M")) == first


def test_error_of_openais_server_is_told_where_the_hub_fails_too(both, models, capsys):
    openai, site = both
    del site.repositories["openai-community/gpt2"]
    openai.faults["encoder.json"] = [404]
    with pytest.raises(OSError, match=r"124M/encoder\.json: HTTP status 404"):
        download(models, "124M")
    assert "openai-community/gpt2: no such model" in capsys.readouterr().err
    assert not list(models.iterdir())


RARER = [403, "page", "drop", "altered"]
RARER = [pytest.param(fault, marks=pytest.mark.thorough) for fault in RARER]


@pytest.mark.parametrize("fault", [404, 500, "hidden page", "hang", *RARER])
def test_bundled_model_is_used_at_once_for_every_failed_first_download(
    both, models, call, monkeypatch, fault
):
    openai, site = both
    del site.repositories["openai-community/gpt2"]
    monkeypatch.setattr(http, "HURRY", 0.3)
    openai.faults["encoder.json"] = [fault] * 20
    started = time.monotonic()
    done = call(gpt2, "Once upon a time", "--n_tokens", 3, "--models_dir", models)
    assert time.monotonic() - started < 3
    assert done.returncode == 0, done.stderr
    assert "using the bundled model `stories`" in done.stderr.splitlines()[-1]
    assert done.stdout.strip() and "trying again" not in done.stderr
    assert done.stderr.count(f"{openai.url}/124M/encoder.json: ") == 1  # the reason is told once


def test_bundled_model_is_used_where_the_models_cannot_be_written(both, tmp_path, call):
    (tmp_path / "file").touch()
    done = call(gpt2, "Once upon a time", "--n_tokens", 3, "--models_dir", tmp_path / "file/in")
    assert done.returncode == 0, done.stderr
    assert "using the bundled model" in done.stderr


# ----------------------------------------------------------------------------------------------
# Folders of others, without a download


@pytest.mark.parametrize("kind", ["huggingface", "safetensors", "openai"])
def test_folder_of_others_is_a_model_without_convert(folder, models, call, tmp_path, kind):
    path = folder / WEIGHTS if kind == "safetensors" else folder
    if kind == "openai":
        path = tmp_path / "openai"
        openai_files.write_checkpoint(path, TINY)
    utils.convert(path, tmp_path / "ours")
    args = ("the cat", "--n_tokens", 5, "--model")
    done, expected = call(gpt2, *args, path), call(gpt2, *args, tmp_path / "ours")
    assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr
    assert encoder.load(path).encode("the") == encoder.load(tmp_path / "ours").encode("the")
    assert "model.bin" not in os.listdir(folder)


def test_folder_of_pytorch_says_how_to_save_it(models, call, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "pytorch_model.bin").touch()
    done = call(gpt2, "x", "--model", tmp_path / "torch")
    assert done.returncode == 1
    assert "save_pretrained" in done.stderr and len(done.stderr.splitlines()) == 1


def test_limit_of_the_weights_allows_what_gpt2_has():
    """548,105,171 bytes: the weights in float32, and the masks of 12 layers."""
    size = huggingface_hub.max_bytes(Config(50257, 1024, 768, 12, 12))
    assert 548_105_171 < size < 1.5 * 548_105_171
