"""OpenAI's real weights, from the servers themselves: 1 GB, so only where GPT2_TEST_NETWORK is set.

And LAMBADA and HellaSwag by 124M, on the first 1,000 items, which take half an hour.

GPT2_TEST_NETWORK=1 pytest tests/test_network.py
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

import encoder
import gpt2
from gpt2_support import datasets, evaluation_cli, hub, tasks, weights

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


# --- LAMBADA and HellaSwag ----------------------------------------------------------------------

N_ITEMS = 1000


@pytest.fixture(scope="module")
def figures(folders, tmp_path_factory):
    """{task: {figure: it}} of 124M on the first items of each, and the paths of those."""
    params, enc = gpt2.load(folders[0]), encoder.load(folders[0])
    folder = tmp_path_factory.mktemp("items")
    found, paths = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_DATASETS_DIR", str(folder))
        for name in tasks.TASKS:
            path = datasets.download(name)
            task, items = tasks.load_items(path, N_ITEMS)
            done = evaluation_cli.task_figures(gpt2, params, enc, task, items, "both")
            found[name] = {figure.name: figure for figure in done}
            paths.append(folder / f"first.{name}.jsonl")
            paths[-1].write_text("\n".join(map(json.dumps, items)) + "\n", encoding="utf-8")
    return found, paths


def test_tasks_have_as_many_items_as_published(figures):
    lines = {path.name: path.read_bytes().count(b"\n") for path in figures[1][0].parent.iterdir()
             if path.name.startswith(tasks.TASKS)}  # fmt: skip
    assert lines == {"lambada.jsonl": 5153, "hellaswag.jsonl": 10042}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_124m_is_within_the_standard_errors_of_the_published_figures(figures, task):
    """Those are of all items, and of HellaSwag the first are from one of its two sources."""
    for name, figure in figures[0][task].items():
        expected, source = tasks.published(task, name, "124M")
        within = 4 * figure.stderr + (0.05 if task == "hellaswag" else 0)
        assert abs(figure.value - expected) < within, f"{name}: {figure}, {source}: {expected}"


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs the extra `harness`")
def test_124m_has_the_figures_of_the_harness(figures, folders, tmp_path):
    """On the same items, run by tests/harness.py, which takes longer than ours."""
    found, paths = figures
    weights.convert(folders[0], tmp_path / "hf", "hf")
    argv = [sys.executable, ROOT / "tests" / "harness.py", tmp_path / "hf", *paths]
    done = subprocess.run([*map(str, argv)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout)
    for task, names in (("lambada", ("acc", "perplexity")), ("hellaswag", ("acc", "acc_norm"))):
        for name in names:
            ours = found[task][f"{name}, harness" if task == "hellaswag" else name]
            expected = theirs[task]["figures"][f"{name},none"]
            assert ours.value == pytest.approx(expected, rel=1e-3), name


def test_old_name_of_the_hub_is_found(tmp_path):
    """Its 82 million parameters: the redirect, and the check of the SHA-256."""
    params = gpt2.load("distilgpt2", tmp_path)
    assert params.config.n_layer == 6
    assert encoder.load("distilgpt2", tmp_path).encode("Hello, world!") == [15496, 11, 995, 0]
