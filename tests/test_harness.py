"""The same choices and log-likelihoods as lm-evaluation-harness and a plain scorer in PyTorch.

Needs the extra `harness` (lm_eval, accelerate, torch, transformers); without it these tests are
skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, random_params
from task_items import write_items

import encoder
import gpt2
from gpt2_support import evaluation_cli, scoring, tasks, weights
from gpt2_support.formats import llmc
from gpt2_support.params import Config

NEEDED = ("lm_eval", "accelerate", "torch", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def bundled_model(folder):
    return gpt2.load("stories"), 40


def random_124m(folder):
    """124M's shape with the bundled tokenizer, whose ids are the first 4,096."""
    params = random_params(Config(), np.float32, scale=0.05)
    return params, 6


@pytest.fixture(scope="module", params=[bundled_model, random_124m])
def both(request, tmp_path_factory):
    """(params, the paths of items, what harness.py makes of them)."""
    folder = tmp_path_factory.mktemp("model")
    params, n = request.param(folder)
    encoder.load("stories").save(folder / "tokenizer.bin")
    llmc.save_params(folder / "model.bin", params)
    weights.convert(folder, folder / "hf", "hf")
    (folder / "model.bin").unlink()
    paths = write_items(folder, n)
    argv = [sys.executable, ROOT / "tests" / "harness.py", folder / "hf", *paths]
    env = {**os.environ, "HF_HOME": str(folder / "cache")}
    done = subprocess.run([*map(str, argv)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    yield params, paths, json.loads(done.stdout)
    (folder / "hf" / "model.safetensors").unlink()


def likelihoods(scores):
    return [[-float(score.nats.sum(dtype=np.float64)) for score in endings] for endings in scores]


def test_scores_and_figures_are_those_of_the_harness(both, capsys):
    params, paths, theirs = both
    enc, lines = encoder.load("stories"), []
    for path in paths:
        task, items = tasks.load_items(path)
        start = time.perf_counter()
        if task == "lambada":
            requests = [tasks.lambada_request(item, enc.encode, enc.eot) for item in items]
        else:
            requests = [
                tasks.hellaswag_request(item, "harness", enc.encode, enc.eot) for item in items
            ]
        scores = scoring.score(gpt2, params, requests)
        seconds = time.perf_counter() - start
        expected = theirs[task]["scores"]
        if task == "lambada":
            figures = tasks.lambada_figures(scores)
            is_greedy = [[bool(score.is_best.all()) for score in endings] for endings in scores]
            assert is_greedy == [[greedy for _, greedy in endings] for endings in expected]
        else:
            figures = tasks.hellaswag_figures(items, scores, "harness")
        ours = np.array(likelihoods(scores))
        other = np.array([[ll for ll, _ in endings] for endings in expected])
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-4)
        assert (ours.argmax(1) == other.argmax(1)).all()
        for figure in figures:
            name = figure.name.removesuffix(", harness")
            if f"{name},none" in theirs[task]["figures"]:
                value = theirs[task]["figures"][f"{name},none"]
                assert figure.value == pytest.approx(value, rel=1e-4)
                lines.append(f"{task} {name}: ours {figure.value:.4f}, the harness's {value:.4f}")
                if name != "perplexity":  # the harness draws samples for that
                    stderr = theirs[task]["figures"][f"{name}_stderr,none"]
                    assert figure.stderr == pytest.approx(stderr, rel=1e-9)
        lines.append(
            f"{task}: largest difference {np.abs(ours - other).max():.1e} nats, "
            f"{len(items) / seconds:.1f} items a second, the harness "
            f"{len(items) / theirs[task]['seconds']:.1f}"
        )
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_llmc_scores_are_those_of_a_plain_scorer_in_pytorch(both):
    params, (_, path), theirs = both
    enc, (_, items) = encoder.load("stories"), tasks.load_items(path)
    requests = [tasks.hellaswag_request(item, "llm.c", enc.encode, enc.eot) for item in items]
    scores = scoring.score(gpt2, params, requests)
    expected = np.array(theirs["llm.c"])  # (items, endings, (log-likelihood, tokens))
    ours = np.array(likelihoods(scores))
    np.testing.assert_allclose(ours, expected[..., 0], rtol=1e-5, atol=1e-4)
    assert (ours.argmax(1) == expected[..., 0].argmax(1)).all()
    labels = np.array([item["label"] for item in items])
    acc, acc_norm = tasks.hellaswag_figures(items, scores, "llm.c")
    assert acc.value == np.mean(expected[..., 0].argmax(1) == labels)
    assert acc_norm.value == np.mean((expected[..., 0] / expected[..., 1]).argmax(1) == labels)


def test_figures_of_the_command_are_these(both, monkeypatch, tmp_path):
    """task_figures, on which the command line stands, gives what the scores above give."""
    params, paths, theirs = both
    enc = encoder.load("stories")
    for path in paths:
        task, items = tasks.load_items(path)
        figures = evaluation_cli.task_figures(gpt2, params, enc, task, items, "both")
        named = {figure.name.removesuffix(", harness"): figure.value for figure in figures}
        for name in ("acc", "acc_norm", "perplexity"):
            if name in named:
                value = theirs[task]["figures"][f"{name},none"]
                assert named[name] == pytest.approx(value, rel=1e-4)
