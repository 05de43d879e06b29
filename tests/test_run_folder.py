"""Tests of gpt2_support/run_folder.py: one run at a time, and what replaces an older run, when."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import read_files
from helpers import ROOT, TEXT, TINY

import encoder
import gpt2
import train
from gpt2_support import checkpoint, interrupts, optimizers, run_folder, runlog, weights
from gpt2_support.distributed import ProcessGroup


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def diverge(monkeypatch):
    """Make the first step diverge."""

    def loss_and_grads(params, *args):
        loss, grads = original(params, *args)
        return loss * np.nan, grads

    original = gpt2.loss_and_grads
    monkeypatch.setattr(gpt2, "loss_and_grads", loss_and_grads)


def fill_disk(monkeypatch):
    """Make the first save fail in its midst."""

    def write(file, *args):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_npz", write)


def stop_early(monkeypatch):
    """Send SIGTERM before the first step."""
    enter = runlog.RunLog.__enter__

    def enter_with_signal(log):
        signal.raise_signal(signal.SIGTERM)
        return enter(log)

    monkeypatch.setattr(runlog.RunLog, "__enter__", enter_with_signal)


EVENTS = {diverge: (1, "diverged"), fill_disk: (1, "No space left"), stop_early: (130, "nothing")}


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("event", EVENTS)
def test_overwrite_that_comes_to_no_checkpoint_leaves_the_old_run(
    trained, call, fish, monkeypatch, event, tuned
):
    """Also where the old model is the one that is being fine-tuned."""
    (trained / "loss.png").write_bytes(b"the picture of the old run")
    before = read_files(trained)
    event(monkeypatch)
    more = ("--init", trained) if tuned else ("--n_vocab", 258)
    done = call(train, *fish("--overwrite", *more))
    status, message = EVENTS[event]
    assert done.returncode == status and message in done.stderr.splitlines()[-1]
    assert read_files(trained) == before
    assert sorted(os.listdir(trained)) == sorted(
        ["best", "log.csv", "loss.png", "model.bin", "state.npz", "tokenizer.bin"]
    )


@pytest.mark.parametrize("event", [diverge, stop_early])
def test_new_run_that_comes_to_no_checkpoint_leaves_no_tokenizer(
    no_picture, call, fish, out, monkeypatch, event
):
    event(monkeypatch)
    assert call(train, *fish()).returncode == EVENTS[event][0]
    assert not list(out.rglob("tokenizer.bin"))


def test_new_run_keeps_the_tokenizer_that_is_there(no_picture, call, fish, out, monkeypatch):
    encoder.train(TEXT, 258).save(out / "tokenizer.bin")
    before = read_files(out)
    done = call(train, *fish())
    assert done.returncode == 1 and "another tokenizer than this run's" in done.stderr
    with monkeypatch.context() as patch:
        diverge(patch)
        assert call(train, *fish("--overwrite")).returncode == 1
    assert read_files(out)["tokenizer.bin"] == before["tokenizer.bin"]
    assert call(train, *fish("--tokenizer", out / "tokenizer.bin")).returncode == 0
    assert encoder.load(out).n_vocab == 258
    assert read_files(out)["tokenizer.bin"] == before["tokenizer.bin"]


def test_rank_that_writes_nothing_removes_no_tokenizer(tmp_path):
    tokenizer = tmp_path / "tokenizer.bin"
    tokenizer.write_bytes(b"there before the run")
    with run_folder.RunFolder(tmp_path, None, is_new=True):
        pass  # it came to no checkpoint
    assert tokenizer.exists()


def test_new_run_leaves_a_model_of_hugging_face_alone(no_picture, call, fish, trained, tmp_path):
    theirs = tmp_path / "theirs"
    weights.convert(trained, theirs, "hf")
    before = read_files(theirs)
    done = call(train, *fish("--init", theirs, "--out", theirs))
    assert done.returncode == 1 and "there is a model already" in done.stderr
    assert read_files(theirs) == before


DIVERGING = [
    pytest.param(
        ["--steps", 7, "--lr", 1e35],
        id="validation",
        marks=pytest.mark.filterwarnings("error"),
    ),
    pytest.param(
        ["--steps", 9, "--weight_decay", 1e42, "--eval_every", 9, "--save_every", 7],
        id="parameters",
        marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    ),
]


@pytest.mark.parametrize("flags", DIVERGING)
def test_update_that_diverges_leaves_the_checkpoint(trained, call, flags):
    before = read_files(trained)
    done = call(train, "--resume", "--out", trained, *flags)
    assert done.returncode == 1
    assert "diverged: after step 7 the parameters" in done.stderr.splitlines()[-1]
    assert "Warning" not in done.stderr
    after = read_files(trained)
    assert all(after[name] == before[name] for name in before if name != "log.csv")


def test_losses_of_other_validation_data_count_anew(trained, call, text):
    best = train.load_checkpoint(trained).best_loss
    other = text.with_name("other.txt")
    other.write_bytes(b"quite another text, which is harder: xyzzy QWERTY 0123456789\n" * 20)
    flags = ("--data", other, "--other_data", "--steps", 8, "--lr", 0)
    assert call(train, "--resume", "--out", trained, *flags).returncode == 0
    state = train.load_checkpoint(trained)
    assert best < state.best_loss < np.inf and state.best_step == 8


def test_convert_refuses_the_folder_of_a_run_that_has_no_checkpoint_yet(trained, tmp_path):
    weights.convert(trained, tmp_path / "target")
    before = read_files(tmp_path / "target")
    running = run_folder.hold(tmp_path / "target", ProcessGroup())
    with running, pytest.raises(ValueError, match="another run is writing there"):
        weights.convert(trained, tmp_path / "target")
    assert read_files(tmp_path / "target") == before


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_convert_leaves_the_model_alone_that_a_link_leads_to(trained, tmp_path):
    target, shared = tmp_path / "target", tmp_path / "shared"
    shared.mkdir(), target.mkdir()
    (shared / "tokenizer.bin").write_bytes(b"of another model")
    (target / "tokenizer.bin").symlink_to(shared / "tokenizer.bin")
    weights.convert(trained, target)
    assert (shared / "tokenizer.bin").read_bytes() == b"of another model"
    assert encoder.load(target).n_vocab == 260


@pytest.mark.parametrize("path", ["", "dangling"])
def test_path_that_is_no_folder_is_refused(call, fish, tmp_path, path):
    link = tmp_path / "dangling"
    link.symlink_to("nowhere")
    done = call(train, *fish("--out", path and link))
    assert done.returncode == 2 and "argument --out:" in done.stderr
    assert os.path.lexists(link)


@pytest.mark.parametrize("flag", ["--out", "--models_dir"])
def test_file_in_place_of_a_folder_is_refused(call, fish, text, flag):
    done = call(train, *fish(flag, text))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"train.py: error: argument {flag}: '{text}' is")


def test_overwrite_leaves_nothing_of_the_old_run(trained, call, fish, text):
    (trained / "loss.png").write_bytes(b"the picture of the old run")
    (trained / "notes.txt").write_text("my own")
    before = read_files(trained)
    done = call(train, *fish("--overwrite", "--n_vocab", 258, "--steps", 3))
    assert done.returncode == 0, done.stderr
    after = read_files(trained)
    assert after.pop("notes.txt") == b"my own"
    assert sorted(after) == sorted(set(before) - {"loss.png", "notes.txt"})
    assert not [name for name in after if after[name] == before[name]]
    assert len([*runlog.iterate_log(trained / "log.csv")]) == 3
    assert encoder.load(trained).n_vocab == encoder.load(trained / "best").n_vocab == 258


def save_files(folder, *names):
    """Write files that say where they have been written."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"{name} of {folder}")


def write_tokenizer(path):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("new tokenizer")


@pytest.mark.parametrize("n", range(7))
def test_move_that_is_killed_is_finished_by_the_next_run(tmp_path, monkeypatch, n, capsys):
    """The new run has not been validated: the best model of the old one goes, with its loss."""
    old = ("model.bin", "state.npz", "log.csv", "best/model.bin", "best/val_loss.json", "loss.png")
    save_files(tmp_path, *old, "tokenizer.bin", "best/tokenizer.bin", "best/mine.txt")
    run = run_folder.RunFolder(tmp_path, write_tokenizer, is_new=True)
    save_files(run.current, "model.bin", "state.npz", "log.csv")
    calls, replace = [], os.replace

    def replace_or_die(*args):
        if len(calls) == n:
            raise KeyboardInterrupt
        calls.append(args)
        replace(*args)

    monkeypatch.setattr(os, "replace", replace_or_die)
    if n < 6:
        with pytest.raises(KeyboardInterrupt):
            run.settle()
    else:
        run.settle()
    monkeypatch.undo()
    before = {path.name for path in tmp_path.iterdir()}
    with run_folder.hold(tmp_path, ProcessGroup()):
        files = read_files(tmp_path)
    assert files.pop("best/mine.txt") and files.pop(".lock")
    if n == 0:  # it was not ready
        assert "ended before its first checkpoint" in capsys.readouterr().err
        assert ".new" in before and "loss.png" in files and len(files) == 8
        assert all("old" not in str(data) and b".new" not in data for data in files.values())
        return
    names = ["best/tokenizer.bin", "log.csv", "model.bin", "state.npz", "tokenizer.bin"]
    assert sorted(files) == names
    assert all(b".new" in data or data == b"new tokenizer" for data in files.values())


# --- one run at a time --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["new", "--overwrite", "--resume"])
def test_second_run_in_a_folder_is_refused_before_anything_is_written(
    trained, call, fish, how, monkeypatch
):
    if how == "new":
        shutil.rmtree(trained)
        trained.mkdir()
    monkeypatch.setattr(encoder, "load", failing(AssertionError("began to work")))
    before = read_files(trained)
    with run_folder.hold(trained, ProcessGroup()):
        flags = ["--out", trained, how] if how == "--resume" else fish(*[how] * (how != "new"))
        done = call(train, *flags)
        assert done.returncode == 1
        line = done.stderr.splitlines()[-1]
        assert f"{trained}: another run is writing there, process {os.getpid()} on " in line
    assert read_files(trained) == before


def test_convert_replaces_no_run_that_is_running(trained, tmp_path):
    before = read_files(trained)
    refused = pytest.raises(ValueError, match="another run is writing there")
    with run_folder.hold(trained, ProcessGroup()), refused:
        weights.convert(ROOT / "models" / "stories", trained, overwrite=True)
    assert read_files(trained) == before


def test_lock_that_a_killed_run_has_left_is_no_obstacle(trained, call):
    (trained / ".lock").write_text("process 1 on elsewhere")
    assert call(train, "--out", trained, "--resume", "--steps", 7).returncode == 0
    assert not (trained / ".lock").exists()


def test_failed_command_leaves_no_empty_folder(call, fish, tmp_path):
    out = tmp_path / "some" / "where"
    assert call(train, *fish("--out", out, "--data", tmp_path / "none.txt")).returncode == 1
    assert call(train, "--resume", "--out", out).returncode == 1
    assert not out.parent.exists()


# --- a folder that has been used ----------------------------------------------------------------


def test_model_that_is_there_is_told_of_before_the_text_is_encoded(trained, call, fish, text):
    text.write_text(TEXT + "another text", encoding="utf-8")
    before = sorted(text.parent.iterdir())
    done = call(train, *fish("--n_vocab", 258))
    assert done.returncode == 1 and "there is a model already" in done.stderr
    assert "encoding" not in done.stderr and "learning" not in done.stderr
    assert sorted(text.parent.iterdir()) == before


def test_best_model_alone_is_a_model_and_a_log_alone_is_none(tmp_path):
    save_files(tmp_path, "log.csv", "tokenizer.bin", "best/tokenizer.bin")
    run_folder.check_unused(tmp_path, overwrite=False)
    save_files(tmp_path, "best/model.bin")
    with pytest.raises(ValueError, match=r"a model already: --overwrite replaces it"):
        run_folder.check_unused(tmp_path, overwrite=False)


def test_run_that_has_diverged_does_not_block_its_folder(no_picture, call, fish, out, monkeypatch):
    with monkeypatch.context() as patch:
        diverge(patch)
        assert call(train, *fish()).returncode == 1
    assert not (out / "model.bin").exists()
    done = call(train, *fish("--n_vocab", 258))
    assert done.returncode == 0, done.stderr
    assert len([*runlog.iterate_log(out / "log.csv")]) == 6 and encoder.load(out).n_vocab == 258


# --- errors in the midst of a run ---------------------------------------------------------------


def test_folder_that_is_removed_during_a_run_is_made_again(
    no_picture, call, fish, out, monkeypatch
):
    step = train.train_step

    def step_without_folder(state, *args):
        if state.step == 3:
            shutil.rmtree(out)
        return step(state, *args)

    monkeypatch.setattr(train, "train_step", step_without_folder)
    done = call(train, *fish())
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not write a row of the log") == 1
    assert train.load_checkpoint(out).step == len([*runlog.iterate_log(out / "log.csv")]) == 6
    assert encoder.load(out).n_vocab == gpt2.load(out).config.n_vocab


def test_error_between_two_steps_is_saved_before_it_ends_the_run(
    no_picture, call, fish, out, monkeypatch
):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", failing(MemoryError("no room to evaluate")))
    done = call(train, *fish("--save_every", 100, "--eval_every", 4))
    assert done.returncode == 1 and "no room to evaluate" in done.stderr.splitlines()[-1]
    assert train.load_checkpoint(out).step == 4
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert call(train, "--resume", "--out", out).returncode == 0


@pytest.mark.parametrize("where, n_saved", [("loss_and_grads", 3), ("update", 0)])
def test_error_within_a_step_is_saved_unless_parameters_are_half_updated(
    no_picture, call, fish, out, monkeypatch, where, n_saved
):
    step = train.train_step

    def failing_step(state, batches, workers):
        if state.step == 3 and where == "update":
            monkeypatch.setattr(optimizers, "adamw_update", failing(MemoryError("no room")))
        elif state.step == 3:
            monkeypatch.setattr(workers, "loss_and_grads", failing(MemoryError("no room")))
        return step(state, batches, workers)

    monkeypatch.setattr(train, "train_step", failing_step)
    done = call(train, *fish("--save_every", 100))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("no room")
    assert (out / "state.npz").exists() == bool(n_saved)
    assert not n_saved or train.load_checkpoint(out).step == n_saved


def test_sample_or_picture_that_fails_ends_no_run(call, fish, out, monkeypatch):
    monkeypatch.setattr(train, "sample_text", failing(ValueError("no sample")))
    monkeypatch.setattr(runlog, "plot_log", failing(AttributeError("matplotlib is broken")))
    done = call(train, *fish())
    assert done.returncode == 0
    assert "could not sample: no sample" in done.stderr
    assert "could not draw loss.png: matplotlib is broken" in done.stderr
    assert train.load_checkpoint(out).step == 6


class FullStream:
    """A stream that cannot be written."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def fileno(self):
        raise OSError("no file")

    def isatty(self):
        return False


ERRORS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "no reader": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "no terminal": OSError(errno.EIO, "Input/output error"),
    "closed": ValueError("I/O operation on closed file"),
    "absent": None,
}


@pytest.mark.parametrize("names", [("stdout",), ("stderr",), ("stdout", "stderr")])
@pytest.mark.parametrize("problem", ERRORS)
def test_run_goes_on_when_its_output_fails(no_picture, fish, out, monkeypatch, names, problem):
    error = ERRORS[problem]
    for name in names:
        monkeypatch.setattr(train.sys, name, FullStream(error) if error else None)
    train.main(fish("--steps", "4"))
    monkeypatch.undo()
    assert train.load_checkpoint(out).step == 4


def test_forgiving_output_says_what_was_lost(capsys, monkeypatch):
    stream = FullStream(ERRORS["full"])
    monkeypatch.setattr("sys.stdout", stream)
    with interrupts.forgiving_output():
        print("a sample")
    assert "standard output could not be written: [Errno 28]" in capsys.readouterr().err
    assert train.sys.stdout is stream


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="Windows has no such terminals")
def test_run_whose_terminal_goes_is_saved(fish, out):
    """The kernel sends SIGHUP, and every write is an error from then on."""
    terminal, end = os.openpty()
    command = [sys.executable, ROOT / "train.py", *fish("--steps", 10**6, "--save_every", 10**6)]
    code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    command = [sys.executable, "-c", code + "os.execv(sys.argv[1], sys.argv[1:])", *command]
    process = subprocess.Popen(
        list(map(str, command)), stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    while not (out / "log.csv").exists() or len([*runlog.iterate_log(out / "log.csv")]) < 5:
        assert process.poll() is None and os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(60) == 130
    assert train.load_checkpoint(out).step == len([*runlog.iterate_log(out / "log.csv")]) >= 5


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("streams", ["> /dev/full", "2> /dev/full", ">&- 2>&-", "2>&1 | head -c 1"])
def test_run_whose_output_goes_nowhere_comes_to_its_end(fish, out, streams):
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *fish()])
    subprocess.run(f"{command} {streams}", shell=True, check=True, capture_output=True)
    assert train.load_checkpoint(out).step == len([*runlog.iterate_log(out / "log.csv")]) == 6


def test_bundled_model_is_not_replaced(call, fish, monkeypatch, tmp_path):
    monkeypatch.setattr("gpt2_support.folders.BUNDLED_DIR", tmp_path)
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "model.bin").touch()
    done = call(train, *fish("--out", tmp_path / "stories", "--overwrite"))
    assert done.returncode == 1 and "the bundled model is there" in done.stderr.splitlines()[-1]


# --- the best model -----------------------------------------------------------------------------


def test_best_model_never_gets_worse_after_a_kill(trained, call):
    """It was written after the checkpoint that the run goes on from."""
    params = train.init_params(TINY)
    checkpoint.save_best(trained, params, 0.001)
    best = (trained / "best" / "model.bin").read_bytes()
    done = call(train, "--resume", "--out", trained, "--steps", 10)
    assert done.returncode == 0, done.stderr
    assert (trained / "best" / "model.bin").read_bytes() == best
    assert "the lowest validation loss was 0.0010" in done.stderr


def test_best_model_that_a_kill_has_kept_from_its_name_is_written_again(
    no_picture, call, fish, out, tmp_path, monkeypatch
):
    """The loss beside it was renamed, the model was not."""
    whole, replace = tmp_path / "whole", os.replace
    assert call(train, *fish("--save_every", 3, "--steps", 4, "--out", whole)).returncode == 0

    def replace_or_die(source, target):
        if Path(target) == out / "best" / "model.bin" and (out / "state.npz").exists():
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    assert call(train, *fish("--save_every", 3, "--steps", 4)).returncode == 130
    monkeypatch.setattr(os, "replace", replace)
    assert train.load_checkpoint(out).step == 3
    facts = json.loads((out / "best" / "val_loss.json").read_text())
    assert facts["val_loss"] < train.load_checkpoint(out).best_loss
    assert checkpoint.best_loss(out) == np.inf  # it is not that of the model
    assert call(train, "--resume", "--out", out).returncode == 0
    for name in ("best/model.bin", "best/val_loss.json", "model.bin"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    "text", ["", "[]", '{"val_loss": 1' + "0" * 400 + "}", '{"val_loss": "low"}', "{}", "\0\0\0"]
)
def test_damaged_loss_of_the_best_model_is_ignored(tmp_path, text, capsys):
    checkpoint.save_best(tmp_path, train.init_params(TINY), 2.5)
    assert checkpoint.best_loss(tmp_path) == 2.5
    (tmp_path / "best" / "val_loss.json").write_text(text)
    assert checkpoint.best_loss(tmp_path) == np.inf
    assert "val_loss.json: ignored" in capsys.readouterr().err


def test_loss_of_the_best_model_that_is_not_finite_does_not_count(tmp_path):
    for loss in (np.nan, -np.inf):
        checkpoint.save_best(tmp_path, train.init_params(TINY), loss)
        assert checkpoint.best_loss(tmp_path) == np.inf


def test_a_run_that_comes_to_no_step_leaves_no_folder(call, fish, out, monkeypatch):
    stop_early(monkeypatch)
    done = call(train, *fish("--steps", 4))
    assert done.returncode == 130 and "nothing is saved" in done.stderr
    assert not out.exists()


# --- other data ---------------------------------------------------------------------------------


def test_resume_on_other_data_is_refused_unless_asked_for(trained, call, text):
    before = read_files(trained)
    text.write_text(TEXT.replace("blue", "pink"), encoding="utf-8")
    later = text.stat().st_mtime + 10
    os.utime(text, (later, later))
    resume = ("--resume", "--out", trained, "--steps", 8)
    refused = call(train, *resume)
    assert refused.returncode == 1
    line = refused.stderr.splitlines()[-1]
    assert "--data has " in line and "tokens, checksum " in line and "--other_data" in line
    assert read_files(trained) == before
    assert call(train, *resume, "--other_data").returncode == 0
    assert call(train, "--resume", "--out", trained, "--steps", 9).returncode == 0  # they are known


def test_resume_with_other_validation_data_is_refused(no_picture, call, fish, out, text):
    other = text.with_name("other.txt")
    other.write_text(TEXT.replace("blue", "pink"), encoding="utf-8")
    assert call(train, *fish("--val_data", text)).returncode == 0
    done = call(train, "--resume", "--out", out, "--val_data", other, "--steps", 8)
    assert done.returncode == 1 and "--val_data has " in done.stderr.splitlines()[-1]


def test_best_loss_on_other_validation_data_does_not_count(no_picture, call, fish, out, text):
    other = text.with_name("other.txt")
    other.write_text(TEXT.replace("blue", "pink"), encoding="utf-8")
    assert call(train, *fish("--val_data", text)).returncode == 0
    state = train.load_checkpoint(out)
    checkpoint.save_best(out, state.params, 0.001, state.data)  # newer than the checkpoint
    assert checkpoint.best_loss(out, state.data) == 0.001
    resume = ("--resume", "--out", out, "--other_data", "--val_data", other, "--steps", 8)
    assert call(train, *resume).returncode == 0
    assert checkpoint.best_loss(out) > 0.001
    assert train.load_checkpoint(out).best_loss == pytest.approx(checkpoint.best_loss(out))


@pytest.mark.parametrize("n_tokens, is_other", [(9, True), (10**6, False)])
def test_best_loss_on_more_validation_tokens_does_not_count(
    no_picture, call, fish, out, text, n_tokens, is_other
):
    assert call(train, *fish("--val_data", text)).returncode == 0
    state = train.load_checkpoint(out)
    state.best_loss = 0.002
    train.save_checkpoint(out, state)
    checkpoint.save_best(out, state.params, 0.001, state.data)
    resume = ("--resume", "--out", out, "--eval_tokens", n_tokens, "--steps", 8)
    assert call(train, *resume).returncode == 0
    assert (checkpoint.best_loss(out) > 0.1) == is_other
    assert (train.load_checkpoint(out).best_loss > 0.1) == is_other


def test_resume_with_another_batch_chooses_its_processes_anew(trained):
    state = train.load_checkpoint(trained)
    state.config.threads = 2
    train.save_checkpoint(trained, state)
    resume = ["--resume", "--out", str(trained)]
    assert train.parse_args(resume).threads == 2
    assert train.parse_args([*resume, "--batch_size", "3"]).threads is None
    assert train.parse_args([*resume, "--batch_size", "3", "--threads", "3"]).threads == 3


def test_checkpoint_of_an_older_version_resumes(trained, call, monkeypatch):
    monkeypatch.setattr(train.checkpoint, "fingerprint", lambda **tokens: None)
    state = train.load_checkpoint(trained)
    state.data = None
    train.save_checkpoint(trained, state)
    (trained / "best" / "val_loss.json").unlink()
    monkeypatch.undo()
    assert call(train, "--resume", "--out", trained, "--steps", 8).returncode == 0
    assert train.load_checkpoint(trained).data.keys() == {"data", "val_data", "eval_tokens"}
