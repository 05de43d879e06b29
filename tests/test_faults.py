"""Faults: processes killed, disks that fill up, folders that cannot be written, two at once.

`python tests/faults.py --trials 300` does many more.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faults
import numpy as np
import openai_files
import pytest
import tqdm

import encoder
import train
from gpt2_support import corpus, files, hub, runlog, weights
from gpt2_support.formats import llmc, token_table
from gpt2_support.params import Config

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
TINY = Config(n_vocab=openai_files.N_VOCAB, n_ctx=64, n_embd=16, n_head=2, n_layer=2)
DATA = "model.ckpt.data-00000-of-00001"


# ----------------------------------------------------------------------------------------------
# Kills


SLOW = ("train", "overwrite", "failing output")
SLOW_MARKS = [pytest.mark.thorough, pytest.mark.no_cover]


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=SLOW_MARKS if x in SLOW else []) for x in faults.JOBS],
)
def test_disturbed_job_loses_nothing_and_comes_to_its_result(name, tmp_path, thorough):
    if name == "two namespaces" and not faults.has_namespaces():
        pytest.skip("this system does not let us make PID namespaces")
    counts = faults.run_job(name, 3 if thorough else 1, random.Random(7), tmp_path)
    assert counts["lost"] == 0 and counts["ended"] >= 1


def test_process_that_is_killed_while_it_draws_a_bar_stops_no_other():
    receive, send = faults.multiprocessing.get_context("fork").Pipe(duplex=False)
    tqdm.tqdm.get_lock()  # is there, and shared with forked processes, since the first bar

    def draw_for_ever():
        with tqdm.tqdm.get_lock():
            send.send("drawing")
            time.sleep(60)

    killed = faults.in_process(draw_for_ever)
    assert receive.poll(20) and receive.recv() == "drawing"
    killed.kill()
    killed.join()
    other = faults.in_process(lambda: list(tqdm.tqdm([1, 2])))
    other.join(20)
    exitcode = other.exitcode
    other.kill()
    assert exitcode == 0


@pytest.mark.thorough
def test_kill_between_the_files_of_the_last_checkpoint_is_mended(tmp_path):
    """state.npz was of the last step, model.bin of the one before: --resume had nothing to do."""
    job = faults.Train(tmp_path)
    faults.run_whole(job)
    good = (job.out / "model.bin").read_bytes()
    (job.out / "model.bin").write_bytes(good[:1024] + bytes(len(good) - 1024))
    faults.run_whole(job)
    assert (job.out / "model.bin").read_bytes() == good


def test_temporary_file_of_a_dead_process_goes_and_that_of_a_living_one_stays(tmp_path):
    dead, living = (tmp_path / f"model[1].bin.{digit * 16}.tmp" for digit in "9a")
    others = [tmp_path / name for name in (f"model1.bin.{'9' * 16}.tmp", "model[1].bin.old.tmp")]
    for path in (dead, *others):
        path.touch()
    code = (
        "import sys\n"
        "from gpt2_support import files\n"
        "file = open(sys.argv[1], 'wb')\n"
        "assert files.try_lock(file)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, living], cwd=faults.ROOT, **pipes) as writer:
        assert writer.stdout.readline() == b"ready\n"
        with files.atomic_write(tmp_path / "model[1].bin") as file:
            file.write(b"x")
        assert not dead.exists() and living.exists()
        assert all(path.exists() for path in others)
        writer.kill()
    with files.atomic_write(tmp_path / "model[1].bin") as file:
        file.write(b"y")
    assert not living.exists() and all(path.exists() for path in others)
    assert (tmp_path / "model[1].bin").read_bytes() == b"y"


def test_log_of_over_a_million_steps_is_read_again(tmp_path):
    log = runlog.LogFile(tmp_path / "log.csv", 0)
    for step in (999_999, 1_000_000, 1_234_567):
        log.add(step, 2.5, 1e-3, 1.0, 100.0, None, None)
    assert runlog.LogFile(tmp_path / "log.csv", 1_000_000).rows == log.rows[:2]
    assert [int(row["step"]) for row in log.rows] == [999_999, 1_000_000, 1_234_567]


# ----------------------------------------------------------------------------------------------
# A full disk


def outcome(function, before=lambda: None):
    """Run a function in another process; return "" if it ended well, else its error."""
    receive, send = faults.multiprocessing.get_context("fork").Pipe(duplex=False)

    def tell():
        before()
        try:
            function()
            send.send("")
        except BaseException as error:
            send.send(f"{type(error).__name__}: {error}")

    process = faults.in_process(tell)
    process.join(60)
    return receive.recv() if receive.poll() else f"exit code {process.exitcode}"


def limit_files(size):
    """Make writes beyond `size` bytes of a file fail, as on a full disk, in this process."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def tiny_run(step=1):
    tokens = np.arange(300) % TINY.n_vocab
    config = train.TrainConfig(steps=9, batch_size=2, seq_len=8, val_data=str(len(tokens)))
    run = train.TrainState(train.init_params(TINY), config, step=step)
    run.optimizer.m[:] = step
    return run


@pytest.fixture
def jobs(tmp_path):
    """{name: (function, the folder it writes)} of everything that writes files."""
    openai_files.write_checkpoint(tmp_path / "source", TINY)
    (tmp_path / "text.txt").write_text("some text to encode, and more of it. " * 300)
    enc = encoder.Encoder(*token_table.load_tokenizer(tmp_path / "source"))
    run, out = tiny_run(), tmp_path / "out"
    text = [tmp_path / "text.txt"]
    return {
        "model": (lambda: llmc.save_params(out / "model.bin", run.params), out),
        "tokenizer": (lambda: enc.save(out / "tokenizer.bin"), out),
        "tokens": (lambda: corpus.encode_files(enc, text, out / "x.bin"), out),
        "convert": (lambda: weights.convert(tmp_path / "source", out), out),
        "convert to hf": (lambda: weights.convert(tmp_path / "source", out, "hf"), out),
        "checkpoint": (lambda: train.save_checkpoint(out, run), out),
    }


def without_time(files):
    """Leave out what differs each time: the date in an .npz."""
    return {name: data for name, data in files.items() if not name.endswith(".npz")}


@pytest.mark.parametrize(
    "name", ["model", "tokenizer", "tokens", "convert", "convert to hf", "checkpoint"]
)
def test_full_disk_is_a_clear_error_and_nothing_is_lost(name, jobs, tmp_path, thorough):
    function, out = jobs[name]
    function()
    whole = faults.read_files(out)
    for path in out.iterdir():
        path.write_bytes(b"old " + path.name.encode())
    old = faults.read_files(out)
    largest = max(map(len, whole.values()))
    for size in (0, 1, 100, 1500, largest // 2, largest - 1)[:: 1 if thorough else 2]:
        error = outcome(function, lambda size=size: limit_files(size))
        assert error.startswith("OSError: [Errno 27] File too large: ") and str(out) in error
        actual = faults.read_files(out)
        assert actual.keys() == old.keys(), f"at {size} bytes: {sorted(actual)}"
        for file in old:  # of several files some may be new already, but each is whole
            assert actual[file] in (old[file], whole[file]) or file == "state.npz"
        if name != "checkpoint" and len(old) == 1:
            assert actual == old
    function()
    assert without_time(faults.read_files(out)) == without_time(whole)


@pytest.fixture
def small_disk():
    """A folder on a file system of 420 KB, where we may make one."""
    folder = Path(tempfile.mkdtemp())
    command = ["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    try:
        if not mounted:
            pytest.skip("cannot mount a small tmpfs here")
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_full_file_system_keeps_the_last_checkpoint(small_disk):
    train.save_checkpoint(small_disk, tiny_run(step=1))
    (small_disk / "ballast").write_bytes(bytes(60_000))
    before = faults.read_files(small_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*state\.npz"):
        train.save_checkpoint(small_disk, tiny_run(step=2))
    assert faults.read_files(small_disk) == before
    (small_disk / "ballast").unlink()
    train.save_checkpoint(small_disk, tiny_run(step=2))
    assert train.load_checkpoint(small_disk).step == 2


def test_full_file_system_lets_the_log_wait(small_disk, capsys):
    log = runlog.LogFile(small_disk / "log.csv", 0)
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    for step in range(1000):
        log.add(step, 2.5, 1e-3, 1.0, 100.0, None, None)
    assert capsys.readouterr().err.count("No space left on device") == 1
    (small_disk / "ballast").unlink()
    log.save()
    assert [*runlog.iterate_log(small_disk / "log.csv")] == log.rows and len(log.rows) == 1000


# ----------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server of a small model as 124M."""
    with openai_files.serve_model(tmp_path / "site", TINY, monkeypatch) as server:
        yield server


def test_full_disk_stops_a_download_which_then_goes_on(site, tmp_path):
    def download():
        hub.download("124M", tmp_path / "models", site.url)

    for size in (0, 10, 2000, 9000):
        error = outcome(download, lambda size=size: limit_files(size))
        assert error.startswith("OSError: [Errno 27] File too large: ")
        assert str(tmp_path / "models" / "124M" / ".download") in error
        assert not (tmp_path / "models" / "124M" / "model.bin").exists()
    n_requests = len(site.log)
    download()
    assert any(requested for _, requested, _ in site.log[n_requests:]), "it began anew"
    names = [path.name for path in (tmp_path / "models").rglob("*")]
    assert sorted(names) == ["124M", "model.bin", "tokenizer.bin"]


def test_failed_first_download_leaves_nothing(tmp_path):
    with pytest.raises(ConnectionError):
        hub.download("124M", tmp_path, "http://127.0.0.1:1", pause=lambda seconds: None)
    assert not list(tmp_path.iterdir())


def test_download_killed_before_it_removed_its_lock_is_cleaned_up(site, tmp_path):
    hub.download("124M", tmp_path / "models", site.url)
    (tmp_path / "models" / ".124M.lock").touch()
    hub.download("124M", tmp_path / "models", site.url)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["124M"]
    assert len(site.log) == len(hub.OPENAI_FILES)


def test_busy_server_is_given_the_time_it_asks_for(site, tmp_path):
    site.faults["encoder.json"] = ["busy", "busy", 429]
    pauses = []
    hub.download("124M", tmp_path / "models", site.url, pause=pauses.append)
    assert pauses == [7, 7, 4]


@pytest.mark.parametrize("n", [2, 5])
def test_several_processes_downloading_at_once_all_succeed(site, tmp_path, n):
    site.delay = 0.01
    models = tmp_path / "models"
    processes = [
        faults.in_process(lambda: hub.download("124M", models, site.url)) for _ in range(n)
    ]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * n
    assert len(site.log) == len(hub.OPENAI_FILES), "a file was fetched twice"
    names = [path.name for path in models.rglob("*")]
    assert sorted(names) == ["124M", "model.bin", "tokenizer.bin"]
    for name, array in openai_files.random_arrays(TINY).items():
        actual = llmc.load_params(models / "124M").named[name]
        np.testing.assert_array_equal(actual, array[0].T if name.endswith("/w") else array)


def test_process_that_waited_for_one_that_failed_downloads_itself(site, tmp_path):
    site.faults["encoder.json"] = ["hang", 404]  # the first is killed while it hangs
    models = tmp_path / "models"
    first = faults.in_process(lambda: hub.download("124M", models, site.url))
    for _ in range(1000):
        if site.log:
            break
        first.join(0.01)
    others = [faults.in_process(lambda: hub.download("124M", models, site.url)) for _ in range(3)]
    first.join(0.5)
    assert all(other.exitcode is None for other in others), "they did not wait"
    first.kill()
    for other in others:
        other.join(60)
    assert sorted(other.exitcode for other in others) == [0, 0, 1]  # one of them got the 404
    assert sorted(path.name for path in models.rglob("*")) == ["124M", "model.bin", "tokenizer.bin"]


# ----------------------------------------------------------------------------------------------
# A folder that cannot be written


@pytest.fixture
def read_only():
    """A folder that only its owner can write, and a function that makes a process another user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    if os.geteuid() == 0:
        yield folder, lambda: os.setuid(65534)
    else:
        folder.chmod(0o555)
        yield folder, lambda: None
        folder.chmod(0o755)
    shutil.rmtree(folder)


def test_read_only_models_folder_is_a_clear_error(site, read_only):
    folder, become_another = read_only
    jobs = [
        (lambda: hub.download("124M", folder, site.url), ".124M.lock"),
        (lambda: hub.download("124M", folder / "models", site.url), "models"),
        (lambda: weights.convert(site.root / "124M", folder / "new"), "new"),
        (lambda: llmc.save_params(folder / "model.bin", tiny_run().params), "model.bin"),
        (lambda: train.save_checkpoint(folder, tiny_run()), "state.npz"),
    ]
    for path in (site.root, *site.root.parents):  # pytest's own folders are for their owner alone
        if path.owner() == Path(tempfile.gettempdir()).owner() and path.stat().st_mode & 0o77 == 0:
            path.chmod(0o711)
    for function, name in jobs:
        error = outcome(function, become_another)
        assert error.startswith("PermissionError: [Errno 13] Permission denied: "), error
        assert str(folder) in error and name in error
        assert not list(folder.iterdir())
    assert not site.log


def test_read_only_model_is_used(read_only, tmp_path):
    """What needs no writing asks for none: a model that is there already is found and loaded."""
    folder, become_another = read_only
    openai_files.write_checkpoint(tmp_path / "source", TINY)
    folder.chmod(0o755)
    weights.convert(tmp_path / "source", folder / "124M")

    def use():
        assert hub.download("124M", folder) == folder / "124M"
        assert llmc.load_params(hub.find_model("gpt2", folder)).config == TINY
        assert encoder.load("124M", folder).n_vocab == TINY.n_vocab

    assert outcome(use, become_another) == ""
