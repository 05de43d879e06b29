"""Conversions from any format into any other, and their command."""

import os

import numpy as np
import openai_files
import pytest
from helpers import TINY, random_params
from model_files import contents, hf_arrays, refusal, write_bin, write_hf

import utils
from gpt2_support import run_folder, weights
from gpt2_support.formats import llmc, token_table
from gpt2_support.params import Config


def test_convert_says_when_there_is_no_tokenizer(tmp_path, capsys):
    write_hf(tmp_path / "in")
    weights.convert(tmp_path / "in", tmp_path / "out")
    assert "no tokenizer there" in capsys.readouterr().err
    assert list(contents(tmp_path / "out")) == ["model.bin"]


@pytest.mark.parametrize("version", [1, 3, 5])
def test_convert_accepts_a_model_file_of_every_version(tmp_path, version):
    params = random_params(TINY, np.float32)
    params.flat.view("u4")[:] &= 0xFFFF0000  # what bf16 holds exactly
    start, end = TINY.n_vocab * TINY.n_embd, TINY.n_vocab_padded * TINY.n_embd
    values = {1: np.delete(params.flat, np.s_[start:end]), 3: params.flat}.get(version)
    values = (params.flat.view("u4") >> 16).astype("<u2") if version == 5 else values
    openai_files.write_tokenizer(tmp_path)
    write_bin(tmp_path / "model.bin", version, TINY, values)
    weights.convert(tmp_path / "model.bin", tmp_path / "out")
    assert llmc.load_params(tmp_path / "out").flat.tobytes() == params.flat.tobytes()
    assert len(token_table.load_tokenizer(tmp_path / "out")[0]) == 260


@pytest.mark.parametrize("to", ["bin", "hf"])
def test_convert_onto_itself_is_refused_and_harmless(tmp_path, to):
    llmc.save_params(tmp_path / "model.bin", random_params(TINY, np.float32))
    before = contents(tmp_path)
    for source in (tmp_path, tmp_path / "model.bin"):
        with pytest.raises(ValueError, match="is the source itself"):
            weights.convert(source, tmp_path / "x" / "..", to)
    assert contents(tmp_path) == before


def test_convert_to_an_unknown_format_is_refused(tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    with pytest.raises(ValueError, match="to = 'safetensors': expected bin or hf"):
        weights.convert(tmp_path / "in", tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


def test_convert_keeps_the_old_target_when_the_source_is_bad(tmp_path):
    openai_files.write_checkpoint(tmp_path / "good")
    openai_files.write_checkpoint(tmp_path / "bad", **{"model/wte": {"crc": b"abcd"}})
    weights.convert(tmp_path / "good", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="wrong CRC of tensor model/wte"):
        weights.convert(tmp_path / "bad", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_convert_does_not_mix_two_models_files(tmp_path):
    openai_files.write_checkpoint(tmp_path / "with")
    write_hf(tmp_path / "without")
    for to, name in (("bin", "tokenizer.bin"), ("hf", "vocab.json")):
        weights.convert(tmp_path / "with", tmp_path / to, to)
        before = contents(tmp_path / to)
        with pytest.raises(ValueError, match=f"{name} would be left from another model"):
            weights.convert(tmp_path / "without", tmp_path / to, to)
        assert contents(tmp_path / to) == before


def test_convert_compares_tokenizer_and_model(tmp_path, capsys):
    small = Config(n_vocab=259, n_ctx=8, n_embd=8, n_head=2, n_layer=1)
    openai_files.write_checkpoint(tmp_path / "small", small)
    assert "260 tokens exceed the model's 259" in refusal(tmp_path / "small", tmp_path / "out")
    large = Config(n_vocab=300, n_ctx=8, n_embd=8, n_head=2, n_layer=1)
    openai_files.write_checkpoint(tmp_path / "large", large)
    weights.convert(tmp_path / "large", tmp_path / "out")
    assert "260 tokens, fewer than the model's 300" in capsys.readouterr().err


def test_convert_of_something_else_says_what_was_found(tmp_path):
    (tmp_path / "in").mkdir()
    assert "found nothing; expected model.bin" in refusal(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "notes.txt").touch()
    assert "found notes.txt" in refusal(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "pytorch_model.bin").touch()
    assert "safetensors" in refusal(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        weights.convert(tmp_path / "absent", tmp_path / "out")


def test_convert_to_a_file_is_refused(tmp_path):
    write_hf(tmp_path / "in")
    (tmp_path / "file").touch()
    for name in ("file", "model.bin"):
        with pytest.raises(ValueError, match="give a folder"):
            weights.convert(tmp_path / "in", tmp_path / name)


def test_convert_command_writes_nothing_to_standard_output(call, tmp_path):
    openai_files.write_checkpoint(tmp_path / "in")
    done = call(utils, "convert", tmp_path / "in", tmp_path / "out", "--to", "hf")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["convert", "absent", "out"], 1, "utils.py: error: absent: no such file or folder"),
        (["convert", "x"], 2, "required: TARGET"),
        (["convert", "x", "y", "--to", "z"], 2, "invalid choice: 'z'"),
        (["download", "../124M"], 2, "unknown model '../124M', expected one of 124M"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_command_with_an_error_says_it_on_one_line(call, args, status, message):
    done = call(utils, *args)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------------------
# Files that change meanwhile


def write_model(folder, layout, seed):
    """Write a small model of arbitrary parameters in the layout of ours, OpenAI's or HF's."""
    folder.mkdir()
    if layout == "ours":
        llmc.save_params(folder / "model.bin", random_params(TINY, np.float32, seed))
        return folder / "model.bin"
    if layout == "hf":
        arrays = {name: array + seed for name, array in hf_arrays().items()}
        write_hf(folder, arrays)
        return folder / "model.safetensors"
    openai_files.write_checkpoint(folder, TINY, openai_files.random_arrays(TINY, seed))
    return folder / "model.ckpt.data-00000-of-00001"


@pytest.mark.parametrize("layout", ["ours", "hf", "openai"])
def test_convert_of_a_model_that_is_replaced_meanwhile_gives_the_first(
    tmp_path, monkeypatch, layout
):
    first = write_model(tmp_path / "first", layout, seed=1)
    second = write_model(tmp_path / "second", layout, seed=2)
    weights.convert(tmp_path / "first", tmp_path / "expected")
    monkeypatch.setattr(llmc, "write_array", after(2, lambda: second.replace(first)))
    weights.convert(tmp_path / "first", tmp_path / "actual")
    assert not second.exists()
    assert contents(tmp_path / "actual") == contents(tmp_path / "expected")


def after(n, act, function=llmc.write_array):
    """Return `function`, but its call number n does something else first."""
    calls = iter(range(1, 10**6))

    def wrapped(*args):
        if next(calls) == n:
            act()
        return function(*args)

    return wrapped


@pytest.mark.parametrize("layout", ["ours", "hf"])
def test_convert_of_a_model_that_is_written_to_meanwhile_is_refused(tmp_path, monkeypatch, layout):
    first = write_model(tmp_path / "first", layout, seed=1)
    second = write_model(tmp_path / "second", layout, seed=2).read_bytes()
    os.utime(first, (1, 1))  # the clock of a file system may be coarse
    monkeypatch.setattr(llmc, "write_array", after(2, lambda: first.write_bytes(second)))
    with pytest.raises(ValueError, match="another program has written to it meanwhile"):
        weights.convert(tmp_path / "first", tmp_path / "actual")
    assert contents(tmp_path / "actual") == {}


# ----------------------------------------------------------------------------------------------
# What is in the way


@pytest.mark.parametrize("name", ["state.npz", "log.csv", "best"])
@pytest.mark.parametrize("to", ["bin", "hf"])
def test_convert_onto_a_training_run_is_refused(tmp_path, call, name, to):
    openai_files.write_checkpoint(tmp_path / "in", TINY)
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True) if name == "best" else run.mkdir()
    (run / "best" / "model.bin" if name == "best" else run / name).write_bytes(b"x")
    before = sorted(run.rglob("*"))
    done = call(utils, "convert", tmp_path / "in", run, "--to", to)
    assert done.returncode == 1
    assert f"{run}: a training run ({name}) would lose its model" in done.stderr
    assert "--overwrite" in done.stderr
    assert sorted(run.rglob("*")) == before
    assert call(utils, "convert", tmp_path / "in", run, "--to", to, "--overwrite").returncode == 0
    assert not (run / name).exists()
    assert len(list(run.iterdir())) == (2 if to == "bin" else 5)


def test_convert_leaves_a_run_alone_that_is_writing(tmp_path):
    write_model(tmp_path / "in", "ours", seed=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.npz").touch()
    with run_folder.lock(tmp_path / "run"), pytest.raises(ValueError, match="another run is wri"):
        weights.convert(tmp_path / "in", tmp_path / "run", overwrite=True)
    assert sorted(contents(tmp_path / "run")) == ["state.npz"]


def test_convert_keeps_a_run_whose_best_model_is_the_source(tmp_path):
    run = tmp_path / "run"
    write_model(tmp_path / "other", "ours", seed=1)
    run.mkdir()
    (tmp_path / "other").rename(run / "best")
    with pytest.raises(ValueError, match="which would be replaced"):
        weights.convert(run / "best", run, overwrite=True)
    assert (run / "best" / "model.bin").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_convert_onto_the_source_by_another_name_is_refused(tmp_path):
    write_model(tmp_path / "in", "ours", seed=1)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = contents(tmp_path / "in")
    for source, target in (("in", "link"), ("link", "in"), ("link", "link")):
        with pytest.raises(ValueError, match="is the source itself"):
            weights.convert(tmp_path / source, tmp_path / target)
    assert contents(tmp_path / "in") == before


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_convert_with_a_circle_of_links_is_an_error_on_one_line(tmp_path, call):
    write_model(tmp_path / "in", "ours", seed=1)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for source, target in (("in", "a"), ("a", "out"), ("in", "a/x")):
        done = call(utils, "convert", tmp_path / source, tmp_path / target)
        assert done.returncode == 1, (source, target)
        assert "utils.py: error: " in done.stderr.splitlines()[-1]
        assert target != "a" or "give a folder as the target" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("ours", "model.bin"),
        ("openai", "hparams.json"),
        ("openai", "model.ckpt.index"),
        ("openai", "model.ckpt.data-00000-of-00001"),
        ("openai", "vocab.bpe"),
        ("hf", "config.json"),
        ("hf", "model.safetensors"),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pipe_or_folder_in_place_of_a_file_is_refused(tmp_path, layout, name, kind):
    write_model(tmp_path / "in", layout, seed=1)
    path = tmp_path / "in" / name
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    if name == "vocab.bpe":  # a folder without it has no tokenizer
        with pytest.raises(OSError, match=r"a pipe or a device|a folder"):
            token_table.load_tokenizer(tmp_path / "in" / "encoder.json")
        return
    with pytest.raises((OSError, ValueError), match=r"a pipe or a device|a folder") as caught:
        weights.convert(tmp_path / "in", tmp_path / "out")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists() or not contents(tmp_path / "out")


# ----------------------------------------------------------------------------------------------
# Loading without converting


@pytest.mark.parametrize("layout", ["ours", "hf", "openai", "safetensors"])
def test_load_params_reads_every_format_as_convert_does(tmp_path, layout):
    path = write_model(tmp_path / "in", layout.replace("safetensors", "hf"), seed=1)
    weights.convert(tmp_path / "in", tmp_path / "out")
    loaded = weights.load_params(path if layout == "safetensors" else tmp_path / "in")
    assert loaded.flat.tobytes() == llmc.load_params(tmp_path / "out").flat.tobytes()
    assert not loaded.flat.flags.writeable and not loaded.wte.flags.writeable


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_load_params_of_a_file_of_pytorch_says_how_to_save_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=f"{name}: a file of PyTorch.*save_pretrained.*nanoGPT"):
        weights.load_params(tmp_path / name)
