"""Downloads from a server that fails in every known way."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import openai_files
import pytest
from conftest import ROOT
from helpers import TINY
from model_files import assert_equal, contents

import encoder
import utils
from gpt2_support import http, hub
from gpt2_support.formats import llmc
from gpt2_support.params import Config

DATA = "model.ckpt.data-00000-of-00001"
RESULT = ["model.bin", "tokenizer.bin"]
SITE = Config(n_vocab=openai_files.N_VOCAB, n_ctx=2048, n_embd=16, n_head=2, n_layer=2)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server of a small model as 124M."""
    with openai_files.serve_model(tmp_path / "site", SITE, monkeypatch) as server:
        yield server


@pytest.fixture
def fetch(site, tmp_path):
    """`fetch()` downloads 124M from the site; the pauses it would make go to `fetch.pauses`."""

    def fetch(name="124M", **kwargs):
        kwargs = {"base_url": site.url, "pause": fetch.pauses.append, **kwargs}
        return hub.download(name, tmp_path / "models", **kwargs)

    fetch.pauses, fetch.folder = [], tmp_path / "models" / "124M"
    return fetch


def assert_fetched(folder):
    assert sorted(path.name for path in folder.iterdir()) == RESULT
    assert_equal(llmc.load_params(folder), openai_files.random_arrays(SITE))


def test_download_converts_and_cleans_up(fetch, site, capsys):
    assert fetch() == fetch.folder
    assert_fetched(fetch.folder)
    assert [name for name, *_ in site.log] == list(hub.OPENAI_FILES)
    err = capsys.readouterr().err
    assert "hparams.json: not the file known for this model" in err
    assert "encoder.json: not the file" not in err
    assert f"{DATA}: 100%" in err
    assert fetch.pauses == []


def test_download_again_finds_the_work_done(fetch, site, capsys):
    fetch()
    site.log.clear()
    fetch("gpt2")
    assert site.log == []
    assert "already downloaded" in capsys.readouterr().err


def test_encoder_load_downloads_the_token_table_alone(fetch, site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPT2_BASE_URL", site.url)
    enc = encoder.load("gpt2", tmp_path / "models")
    assert [name for name, *_ in site.log] == ["encoder.json", "vocab.bpe"]
    assert [path.name for path in fetch.folder.iterdir()] == ["tokenizer.bin"]
    sizes = [hub.MAX_BYTES[name] for name in hub.TOKENIZER_SHA256]
    told = re.escape(f"124M: downloading {sum(sizes) / 1e6:,.1f} MB from")
    assert re.search(rf"{told} .* to .*124M\n", capsys.readouterr().err)
    site.log.clear()
    assert encoder.load("124M", tmp_path / "models").tokens == enc.tokens
    assert site.log == []
    fetch()  # the weights join it
    assert_fetched(fetch.folder)
    told = f"124M: downloading {hub.DATA_BYTES['124M'] / 1e6:,.1f} MB from"
    assert told in capsys.readouterr().err
    assert encoder.load(fetch.folder).tokens == enc.tokens


def test_encoder_load_leaves_an_unfinished_download_of_the_model(
    fetch, site, tmp_path, monkeypatch
):
    monkeypatch.setenv("GPT2_BASE_URL", site.url)
    part = fetch.folder / ".download" / f"{DATA}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    encoder.load("124M", tmp_path / "models")
    assert part.read_bytes() == b"half"


def test_download_keeps_openais_files_when_asked(fetch):
    fetch(keep=True)
    kept = fetch.folder / "openai"
    assert sorted(path.name for path in kept.iterdir()) == sorted(hub.OPENAI_FILES)
    assert sorted(path.name for path in fetch.folder.iterdir()) == [RESULT[0], "openai", RESULT[1]]


def test_download_replaces_a_damaged_model(fetch, capsys):
    fetch()
    (fetch.folder / "model.bin").write_bytes(b"x" * 2000)
    fetch()
    assert_fetched(fetch.folder)
    assert "downloading the model again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "faults",
    [
        ["drop"],
        ["drop"] * 6,  # each brings something, so that it goes on
        [500, 500],
        [503, 429, "drop", 500],
        ["drop", "no range"],
        ["corrupt"],
        ["drop", 416],
        ["drop", "wrong part"],
        ["drop", "short part", "short part"],
    ],
)
@pytest.mark.parametrize("etag", [True, False])
def test_download_recovers(fetch, site, faults, etag):
    site.etag = etag
    site.faults[DATA] = list(faults)
    fetch()
    assert_fetched(fetch.folder)
    assert site.faults[DATA] == []
    assert len(fetch.pauses) == len(faults) - faults.count("no range")


def test_download_goes_on_where_it_stopped(fetch, site):
    site.faults[DATA] = ["drop", "drop"]
    fetch()
    ranges = [asked for name, asked, _ in site.log if name == DATA]
    starts = [int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) for asked in ranges[1:]]
    assert ranges[0] is None
    assert 0 < starts[0] <= 20_000 < starts[1] <= 40_000  # whole chunks of what had arrived


def test_download_waits_longer_after_every_failure(fetch, site):
    site.faults["hparams.json"] = [500, 502, 503, 429]
    fetch()
    assert fetch.pauses == [1, 2, 4, 8]


def test_download_gives_up_in_the_end(fetch, site):
    site.faults["hparams.json"] = [500] * 5
    with pytest.raises(ConnectionError, match=r"hparams\.json: HTTP status 500 .*Run this again"):
        fetch()
    assert not (fetch.folder / "model.bin").exists()
    site.log.clear()
    fetch()
    assert [name for name, *_ in site.log] == list(hub.OPENAI_FILES[2:])
    assert_fetched(fetch.folder)


@pytest.mark.parametrize(
    ("config", "etag"),
    [(SITE, True), (TINY, True), (TINY, False)],  # the same size, and one beyond which we ask
)
def test_download_of_a_file_that_changed_starts_over(fetch, site, config, etag):
    site.md5, site.etag = False, etag
    site.faults[DATA] = ["drop", *[500] * 5]
    with pytest.raises(ConnectionError):
        fetch()
    arrays = openai_files.random_arrays(config, seed=1)
    openai_files.write_checkpoint(site.root / "124M", config, arrays)
    for name in ("hparams.json", "model.ckpt.index"):
        (fetch.folder / ".download" / name).unlink()
    fetch()  # half of each would fail the CRC
    assert_equal(llmc.load_params(fetch.folder), arrays)


@pytest.mark.parametrize("fault", [403, 404, 410])
def test_download_does_not_repeat_what_is_refused(fetch, site, fault):
    site.faults["hparams.json"] = [fault]
    with pytest.raises(OSError, match=rf"/124M/hparams\.json: HTTP status {fault}") as caught:
        fetch()
    assert not isinstance(caught.value, ConnectionError)
    assert fetch.pauses == [1]  # for the hub, which is not there either


@pytest.mark.parametrize("fault", ["page", "hidden page", "gzip"])
@pytest.mark.parametrize("name", ["encoder.json", DATA])
def test_download_refuses_what_is_not_the_file(fetch, site, name, fault):
    site.faults[name] = [fault]
    with pytest.raises(ValueError, match=rf"{name}: the server sent (a page|the file encoded)"):
        fetch()
    assert not (fetch.folder / ".download" / name).exists()
    assert not (fetch.folder / "model.bin").exists()
    fetch()
    assert_fetched(fetch.folder)


@pytest.mark.parametrize("name", ["hparams.json", "model.ckpt.index", DATA])
@pytest.mark.parametrize("fault", ["truncated", "altered"])
def test_download_of_a_damaged_file_says_so_and_recovers_when_repeated(fetch, site, name, fault):
    site.faults[name] = [fault]
    with pytest.raises(ValueError, match="run this again") as caught:
        fetch()
    assert name in str(caught.value) or name == "hparams.json"
    assert not (fetch.folder / "model.bin").exists()
    fetch()
    assert_fetched(fetch.folder)


def test_download_without_md5_finds_a_damaged_file_by_its_crc(fetch, site):
    site.md5 = False
    site.faults[DATA] = ["corrupt"]
    with pytest.raises(ValueError, match="wrong CRC of tensor"):
        fetch()
    fetch()
    assert_fetched(fetch.folder)


@pytest.mark.parametrize("fault", ["corrupt", "altered"])
def test_download_refuses_other_token_tables(fetch, site, fault):
    site.md5 = False
    site.faults["encoder.json"] = [fault] * 5
    with pytest.raises(ValueError, match=r"encoder\.json: .* SHA-256"):
        fetch()
    assert list(contents(fetch.folder / ".download")) == ["encoder.json.part.json"]


def test_download_stopped_and_repeated_goes_on(fetch, site):
    def stop(seconds):
        raise KeyboardInterrupt

    site.faults[DATA] = ["drop"]
    with pytest.raises(KeyboardInterrupt):
        fetch(pause=stop)
    assert not (fetch.folder / "model.bin").exists()
    fetch()
    assert site.log[-1][1].startswith("bytes=")
    assert_fetched(fetch.folder)


def test_download_stopped_before_a_rename_asks_for_nothing_again(fetch, site, monkeypatch):
    monkeypatch.setattr(http, "check_hashes", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch()
    monkeypatch.undo()
    monkeypatch.setattr(hub, "TOKENIZER_SHA256", {})
    site.log.clear()
    fetch()
    assert [name for name, *_ in site.log] == list(hub.OPENAI_FILES[1:])


def test_download_stopped_while_cleaning_up_is_cleaned_up(fetch, capsys):
    fetch()
    (fetch.folder / ".download").mkdir()
    (fetch.folder / ".download" / DATA).touch()
    fetch()
    assert_fetched(fetch.folder)


def test_download_stopped_while_converting_is_cleaned_up(fetch):
    fetch.folder.mkdir(parents=True)
    (fetch.folder / "model.bin.0123456789abcdef.tmp").write_bytes(b"half")
    fetch()
    assert_fetched(fetch.folder)


def test_download_twice_at_once_fetches_once(fetch, site, capsys):
    site.faults[DATA] = ["drop"]
    entered, finished = threading.Event(), threading.Event()

    def wait(seconds):
        entered.set()
        assert finished.wait(10)

    first = threading.Thread(target=fetch, kwargs={"pause": wait})
    second = threading.Thread(target=fetch)
    first.start()
    assert entered.wait(10)
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    finished.set()
    first.join(10)
    second.join(10)
    assert len(site.log) == len(hub.OPENAI_FILES) + 1
    assert "waiting for another download" in capsys.readouterr().err
    assert_fetched(fetch.folder)


def test_download_without_a_network_fails_at_once(fetch):
    with pytest.raises(ConnectionError, match=r"encoder\.json: .*refused.*--base_url"):
        fetch(base_url="http://127.0.0.1:1")
    assert fetch.pauses == [1, 1]  # for OpenAI's server, and for the hub


def test_download_goes_through_a_proxy(fetch, site, monkeypatch):
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", site.url)
    fetch(base_url="http://models.invalid")
    assert_fetched(fetch.folder)


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x", "http://", "http://[::1"])
def test_download_from_a_bad_address_is_refused(fetch, url):
    with pytest.raises(ValueError, match="not an address to download from"):
        fetch(base_url=url)


def test_download_into_a_file_fails_on_one_line(site, call, tmp_path):
    (tmp_path / "file").touch()
    args = ["download", "124M", "--base_url", site.url, "--models_dir", tmp_path / "file"]
    done = call(utils, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"argument --models_dir: '{tmp_path / 'file'}' is not a folder" in done.stderr


@pytest.mark.thorough
def test_download_command_as_a_user_walks_it(shared, run, tmp_path):
    (tmp_path / "site").mkdir()
    shutil.copytree(shared("openai_tiny"), tmp_path / "site" / "124M")
    with openai_files.serve(tmp_path / "site") as server:
        server.faults[DATA] = ["drop"]
        env = {**os.environ, "GPT2_BASE_URL": server.url, "NO_PROXY": "127.0.0.1"}
        args = ("utils.py", "download", "gpt2", "--models_dir", tmp_path / "models")
        first, second = run(*args, env=env), run(*args, env=env)
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    assert (second.returncode, second.stdout) == (0, "")
    assert "already downloaded" in second.stderr
    folder = tmp_path / "models" / "124M"
    assert sorted(path.name for path in folder.iterdir()) == RESULT
    assert llmc.load_params(folder).config.n_embd == 16


@pytest.mark.skipif(os.name == "nt", reason="needs a signal that cannot be caught")
def test_download_killed_outright_goes_on(site, fetch):
    site.faults["encoder.json"] = ["hang"]
    code = "import sys; from gpt2_support import http, hub; hub.download('124M', sys.argv[1])"
    env = {**os.environ, "GPT2_BASE_URL": site.url, "NO_PROXY": "127.0.0.1"}
    argv = [sys.executable, "-c", code, str(fetch.folder.parent)]
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    part = fetch.folder / ".download" / "encoder.json.part"
    for _ in range(1000):
        if part.exists():
            break
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert part.exists()
    fetch()
    assert_fetched(fetch.folder)


@pytest.mark.parametrize("name", ["../124M", "125M", "", "/tmp/124M"])
def test_download_refuses_an_unknown_name(fetch, name):
    with pytest.raises(ValueError, match="unknown model"):
        fetch(name)


def test_names_of_every_model_are_known():
    known = ["117M", "124M", "gpt2", "345M", "gpt2-medium", "774M", "gpt2-large", "gpt2-xl"]
    names = [hub.resolve_name(name) for name in known]
    assert names == ["124M"] * 3 + ["355M"] * 2 + ["774M"] * 2 + ["1558M"]
