"""The command line of utils.py: flags that would do nothing."""

import numpy as np
import pytest
from helpers import TINY
from openai_files import write_checkpoint

import utils
from gpt2_support import weights


def test_convert_takes_the_name_of_a_model_that_is_here(call, tmp_path):
    done = call(utils, "convert", "stories", tmp_path / "hf", "--to", "hf")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_base_url_of_a_model_of_the_hub_is_refused(call):
    done = call(utils, "download", "distilgpt2", "--base_url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "--base_url: it would do nothing, since it is for OpenAI's models" in done.stderr


@pytest.mark.parametrize("kept", [None, "openai", "huggingface"])
def test_keep_of_a_model_that_is_there_says_that_it_does_nothing(call, tmp_path, kept):
    write_checkpoint(tmp_path / "source", TINY)
    weights.convert(tmp_path / "source", tmp_path / "124M")
    if kept:
        (tmp_path / "124M" / kept).mkdir()
    done = call(utils, "download", "124M", "--models_dir", tmp_path, "--keep")
    assert done.returncode == 0
    assert ("no longer there" in done.stderr) == (kept is None)


def test_convert_to_bf16_halves_the_file_and_is_read_again(call, tmp_path):
    write_checkpoint(tmp_path / "source", TINY)
    for name, flags in (("whole", []), ("half", ["--dtype", "bf16"]), ("back", [])):
        source = tmp_path / ("half" if name == "back" else "source")
        done = call(utils, "convert", source, tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("whole", "half", "back")]
    assert sizes[0] - 1024 == 2 * (sizes[1] - 1024) and sizes[2] == sizes[0]
    whole, half, back = (
        utils.load_params(tmp_path / name).flat for name in ("whole", "half", "back")
    )
    np.testing.assert_allclose(half, whole, rtol=2**-8, atol=0)
    assert (half != whole).any() and (back == half).all()


def test_convert_refuses_bf16_for_transformers(call, tmp_path):
    write_checkpoint(tmp_path / "source", TINY)
    arguments = ("convert", tmp_path / "source", tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    done = call(utils, *arguments)
    assert done.returncode == 2
    assert "argument --dtype: bf16 is for model.bin" in done.stderr
    with pytest.raises(ValueError, match="dtype 'fp16': expected fp32, or bf16"):
        weights.convert(tmp_path / "source", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "out").exists()
