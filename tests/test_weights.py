"""Conversions from any format into any other, and their command."""

import numpy as np
import openai_files
import pytest
from helpers import TINY, random_params
from model_files import contents, refusal, write_bin, write_hf

import utils
from gpt2_support import weights
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
    with pytest.raises(FileNotFoundError, match="no such folder"):
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
        (["convert", "absent", "out"], 1, "utils.py: error: absent: no such folder"),
        (["convert", "x"], 2, "required: TARGET"),
        (["convert", "x", "y", "--to", "z"], 2, "invalid choice: 'z'"),
        (["download", "../124M"], 2, "invalid choice"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_command_with_an_error_says_it_on_one_line(call, args, status, message):
    done = call(utils, *args)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
