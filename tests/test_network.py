"""OpenAI's real weights, from the servers themselves: 1 GB, so only where GPT2_TEST_NETWORK is set.

GPT2_TEST_NETWORK=1 pytest tests/test_network.py
"""

import os

import numpy as np
import pytest

import encoder
import gpt2
from gpt2_support import hub

pytestmark = pytest.mark.skipif(
    not os.environ.get("GPT2_TEST_NETWORK"), reason="needs a network: set GPT2_TEST_NETWORK=1"
)

# What OpenAI's own code gives, by gpt-jax's README, https://github.com/jaymody/gpt-jax
PROMPT = "Alan Turing theorized that computers would one day become"
CONTINUATION = (
    " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
    "complex calculations, and it can perform these calculations in a way that is very similar to "
    "the human brain."
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """124M from OpenAI's server, and from the Hugging Face hub."""
    models = tmp_path_factory.mktemp("models")
    second = hub.download("openai-community/gpt2", models)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GPT2_BASE_URL", raising=False)
        patch.setattr(hub.huggingface_hub, "fetch_model", refuse)  # OpenAI's server has to answer
        return hub.download("124M", models), second


def refuse(*args):
    raise ConnectionError("not by this road")


def test_both_roads_to_124m_give_equal_logits(folders):
    logits = []
    for folder in folders:
        params, enc = gpt2.load(folder), encoder.load(folder)
        logits.append(gpt2.forward(params, enc.encode(PROMPT)))
    assert np.array_equal(*logits)


@pytest.mark.parametrize("road", [0, 1], ids=["openai", "hub"])
def test_124m_continues_as_openais_own_code(folders, road):
    params, enc = gpt2.load(folders[road]), encoder.load(folders[road])
    ids = list(gpt2.generate(params, enc.encode(PROMPT), 40))
    assert enc.decode(ids) == CONTINUATION


def test_old_name_of_the_hub_is_found(tmp_path):
    """Its 82 million parameters: the redirect, and the check of the SHA-256."""
    params = gpt2.load("distilgpt2", tmp_path)
    assert params.config.n_layer == 6
    assert encoder.load("distilgpt2", tmp_path).encode("Hello, world!") == [15496, 11, 995, 0]
