"""The command line of utils.py: flags that would do nothing."""

import pytest
from helpers import TINY
from openai_files import write_checkpoint

import utils
from gpt2_support import weights


def test_base_url_of_a_model_of_the_hub_is_refused(call):
    done = call(utils, "download", "distilgpt2", "--base_url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "argument --base_url: it would do nothing, since distilgpt2 comes from" in done.stderr


@pytest.mark.parametrize("kept", [None, "openai", "huggingface"])
def test_keep_of_a_model_that_is_there_says_that_it_does_nothing(call, tmp_path, kept):
    write_checkpoint(tmp_path / "source", TINY)
    weights.convert(tmp_path / "source", tmp_path / "124M")
    if kept:
        (tmp_path / "124M" / kept).mkdir()
    done = call(utils, "download", "124M", "--models_dir", tmp_path, "--keep")
    assert done.returncode == 0
    assert ("not there any more" in done.stderr) == (kept is None)
