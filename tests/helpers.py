"""What several test files need: small models, random parameters and tokens, commands in process.

    from helpers import TINY, random_params, random_tokens

The fixtures are in conftest.py; among them `call`, which runs a command in this process, and
`run`, which starts an interpreter for it.
"""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_support import blas, cli
from gpt2_support.params import Config, Params, n_params

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Config(n_vocab=61, n_ctx=16, n_embd=12, n_head=3, n_layer=2)
TINY = Config(n_vocab=260, n_ctx=8, n_embd=8, n_head=2, n_layer=2)  # for any bytes and 4 more ids
TEXT = "one fish two fish red fish blue fish\nold fish new fish\n" * 60


def only_thorough(value):
    """A value of a parameter that quick runs leave out."""
    return pytest.param(value, marks=pytest.mark.thorough)


def normal(*shape, seed=2):
    """Return numbers from N(0, 1), the same for each seed."""
    return np.random.default_rng(seed).standard_normal(shape)


def random_params(config=CONFIG, dtype=np.float64, seed=0, scale=0.3):
    """Return Params far from any symmetry: N(0, scale), gains around 1, the padding zero."""
    rng = np.random.default_rng(seed)
    params = Params(config, np.zeros(n_params(config), dtype))
    for name, array in params.named.items():
        array[...] = name.endswith("/g") + scale * rng.standard_normal(array.shape)
    return params


def random_tokens(*shape, config=CONFIG, seed=1):
    """Return ids of the vocabulary of a config, int64."""
    return np.random.default_rng(seed).integers(config.n_vocab, size=shape)


def take_steps(state, loader, until=None, threads=1):
    """Train a train.TrainState as far as `until`, by default to its end; return the losses."""
    import gpt2
    import train
    from gpt2_support.data_parallel import DataParallel

    workers, losses = DataParallel(gpt2.loss_and_grads, state.params, threads), []
    while state.step < (until or state.config.steps):
        losses.append(train.train_step(state, loader.batches(state.step), workers)[0])
    return losses


def text_stream(text):
    """Return a stream of bytes in UTF-8, as standard input is: line ends stay as they are."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="\n")


def run_in_process(module, args, stdin=""):
    """Run the command of a module, `gpt2` say, as its own process would: argv, streams, status.

    Returns a CompletedProcess without the output, which pytest captures. A stream of standard
    input that is not a terminal holds `stdin`; it is closed if that is None. BLAS has as
    many threads afterwards as before.
    """
    argv, threads, old = [f"{module.__name__}.py", *map(str, args)], blas.get_threads(), sys.stdin
    before, status, error = sys.argv, 0, ""
    sys.argv, sys.stdin = argv, stdin if stdin is None else text_stream(stdin)
    try:
        cli.run(module.main)
    except SystemExit as exit:
        status, error = (1, f"{exit.code}\n") if isinstance(exit.code, str) else (exit.code, "")
    finally:
        sys.argv, sys.stdin = before, old
        blas.set_threads(threads)
    return subprocess.CompletedProcess(argv, status or 0, "", error)
