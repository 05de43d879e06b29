"""Our side of every work item: the project's public functions, called as a user would."""

# isort: off
import gpt2  # first of all: it may choose NumPy's kernels, which must be before NumPy is imported

# isort: on
import ctypes
import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import encoder
import train
import worker
from gpt2_support import files
from gpt2_support.data_parallel import DataParallel, fastest, proc_counts
from gpt2_support.formats import llmc, token_table
from gpt2_support.params import Config, Params
from worker import Task


def decode(job):
    """Continue a prompt by n_tokens; with n_samples, so many copies of it at once."""
    params, ids = gpt2.load(job.folder / job.model), []
    prompt = worker.prompt_ids(job.n_prompt, params.config.n_vocab)
    prompts = prompt if job.n_samples == 1 else [prompt] * job.n_samples

    def work(n_tokens=job.n_tokens):
        ids[:] = gpt2.generate(params, prompts, n_tokens, eot=None)

    return Task(work, lambda: work(min(2, job.n_tokens)), lambda: np.ravel(ids).tolist())


def decode_late(job):
    """Continue a long prompt; only the tokens after the first one are timed."""
    params, ids = gpt2.load(job.folder / job.model), []
    prompt = worker.prompt_ids(job.n_prompt, params.config.n_vocab)

    def work(n_tokens=job.n_tokens + 1):
        ids.clear()
        return worker.after_first(gpt2.generate(params, prompt, n_tokens, eot=None), ids)

    return Task(work, lambda: work(2), lambda: ids)


def forward(job):
    """Compute the logits after every token of a prompt."""
    params, out = gpt2.load(job.folder / job.model), {}
    prompt = worker.prompt_ids(job.n_prompt, params.config.n_vocab)

    def work():
        out["logits"] = gpt2.forward(params, prompt)

    return Task(work, check=lambda: out["logits"][-1, :8].tolist())


def step(job):
    """Take a training step: loss, gradient, clipping, AdamW."""
    loaded = gpt2.load(job.folder / job.model)
    state, losses = train.TrainState(loaded.copy(), settings(job, loaded.config)), []
    batch = worker.random_batch(job, loaded.config.n_vocab)
    workers = choose_workers(job, state, batch)
    return Task(
        lambda: losses.append(train.train_step(state, [batch], workers)[0]),
        check=lambda: losses[:2],
    )


def settings(job, model, steps=1, lr=worker.LR, **more):
    """Return the TrainConfig that train.py chooses for a batch B x T."""
    flags = {"batch_size": job.B, "seq_len": job.T, "steps": steps, "lr": lr, "min_lr": lr}
    flags |= {"warmup": 0, "optimizer": "adamw", **more}  # as the others
    flags |= {"data": __file__}  # any file: nothing is read
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return train.make_config(train.parse_args(argv), model)


def choose_workers(job, state, batch):
    """Return the processes that train.py chooses for a run, job.threads at most."""
    config = state.config
    counts = proc_counts(job.B, job.T, state.params.config.n_embd, job.threads)
    workers, _ = fastest(gpt2.loss_and_grads, state.params, batch, counts)
    config.threads, state.params = workers.n_procs, workers.params
    worker.begin_peak()
    return workers


def adamw(job):
    """Update all parameters, given the gradient."""
    params = gpt2.load(job.folder / job.model)
    params = params.copy()
    grads = Params(params.config, np.full_like(params.flat, 1e-3))
    chosen, optimizer = settings(job, params.config), train.AdamW(params)
    workers = DataParallel(gpt2.loss_and_grads, params)
    steps = iter(range(1, 1 << 30))

    def work():
        optimizer.step(params, grads, worker.LR, next(steps), chosen, parallel=workers.parallel)

    return Task(work)


def names(job):
    """Train a tiny model from scratch for n_steps on names."""
    tokens, n_vocab = llmc.load_tokens(job.folder / "names.bin")
    config, losses = Config(n_vocab, *job.shape), []

    def work(n_steps=job.n_steps):
        losses.clear()
        state = train.TrainState(train.init_params(config), settings(job, config, n_steps, job.lr))
        loader = train.DataLoader(tokens, state.config)
        workers = choose_workers(job, state, loader.batch(0))
        start = time.perf_counter()
        while state.step < n_steps:
            losses.append(train.train_step(state, loader.batches(state.step), workers)[0])
        return time.perf_counter() - start

    return Task(work, lambda: work(20), lambda: [float(np.mean(losses[-100:]))])


def recipe(job):
    """Train the recipe's model from scratch for n_steps; check its validation loss."""
    tokens, n_vocab = llmc.load_tokens(job.folder / "recipe.bin")
    start, state = gpt2.load(job.folder / job.model), {}
    n = len(tokens) * 9 // 10

    def work(n_steps=job.n_steps):
        config = settings(job, start.config, n_steps, **worker.RECIPE)
        run = train.TrainState(start.copy(), config)
        loader = train.DataLoader(tokens[:n], run.config)
        workers = choose_workers(job, run, loader.batch(0))
        begin = time.perf_counter()
        while run.step < n_steps:
            train.train_step(run, loader.batches(run.step), workers)
        state["params"] = run.params
        return time.perf_counter() - begin

    def check():
        lengths = np.ones(n_vocab, int)
        return [train.evaluate(state["params"], tokens[n:], lengths, job.T).loss]

    return Task(work, lambda: work(min(20, job.n_steps)), check)


def validate(job):
    """Compute the loss of `stories` on n_tokens ids, in windows of T."""
    params, losses = gpt2.load(job.folder / job.model), []
    ids = worker.random_text_ids(job, params.config.n_vocab)
    lengths = np.ones(params.config.n_vocab, int)
    return Task(
        lambda: losses.append(train.evaluate(params, ids, lengths, job.T).loss),
        check=lambda: losses[:1],
    )


def encode(job):
    """Encode a text; unless job.warm, every time with a new Encoder, whose cache is empty."""
    text = (job.folder / "text.txt").read_text(encoding="utf-8")
    table, state = token_table.load_tokenizer(job.folder / job.model), {}

    def work():
        if not (job.warm and state):
            state["enc"] = encoder.Encoder(*table)
        start = time.perf_counter()
        state["ids"] = state["enc"].encode(text)
        return time.perf_counter() - start

    def check():
        ids = np.array(state["ids"], np.uint16)
        return [len(ids), hashlib.sha256(ids.tobytes()).hexdigest()]

    return Task(work, check=check)


def train_bpe(job):
    """Learn a vocabulary from a text."""
    text = (job.folder / "text.txt").read_text(encoding="utf-8")
    return Task(lambda: encoder.train(text, job.n_vocab) and None, warm=lambda: None)


def sgemm(job):
    """Multiply two square matrices: the limit for what computes."""
    a, b = np.random.default_rng(0).standard_normal((2, job.size, job.size), np.float32)
    out = np.empty_like(a)
    return Task(lambda: np.matmul(a, b, out=out) is None or None)


def matvec(job):
    """Multiply every matrix of a model with a vector: the limit for what reads memory."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape, np.float32) for shape in job.shapes]
    vectors = {w.shape[1]: rng.standard_normal(w.shape[1], np.float32) for w in weights}

    def work():
        for w in weights:
            w @ vectors[w.shape[1]]

    return Task(work)


def scale(job):
    """Scale a large array in place, in all threads: the limit for what reads and writes memory."""
    parts = np.array_split(np.ones(job.size, np.float32), 64)
    threads = ThreadPoolExecutor(job.threads)

    def work():
        list(threads.map(lambda part: np.multiply(part, 1, out=part), parts))

    return Task(work)


def copy(job):
    """Copy a model file and wait until it is on the disk: the limit for what converts."""
    source, target = job.folder / job.model / "model.bin", job.folder / "copy.bin"

    def work():
        with open(source, "rb") as read, open(target, "wb") as write:
            shutil.copyfileobj(read, write, 1 << 22)
            files.sync(write)
        target.unlink()

    return Task(work)


def machine(job):
    """Print what NumPy computes with; for a Task there is nothing left to do."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    facts = {
        "Python": sys.version.split()[0],
        "NumPy": np.__version__,
        "BLAS": f"{blas['name']} {blas['version']}",
        "BLAS kernels": ask_openblas("corename", ctypes.c_char_p),
        "BLAS threads": ask_openblas("num_threads", ctypes.c_int),
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", "not set"),
    }
    print(json.dumps(facts))
    return Task(lambda: None)


def ask_openblas(what, kind):
    """Return what NumPy's OpenBLAS answers to `openblas_get_<what>`, as text."""
    numpy = Path(np.__file__).parent
    for path in [*numpy.parent.glob("numpy.libs/*openblas*"), *numpy.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))
        for name in (f"scipy_openblas_get_{what}64_", f"openblas_get_{what}64_"):
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype = kind
                answer = function()
                return answer.decode() if isinstance(answer, bytes) else str(answer)
    return "unknown"


if __name__ == "__main__":
    worker.main(
        decode=decode,
        decode_late=decode_late,
        forward=forward,
        step=step,
        adamw=adamw,
        names=names,
        recipe=recipe,
        validate=validate,
        encode=encode,
        train_bpe=train_bpe,
        sgemm=sgemm,
        matvec=matvec,
        scale=scale,
        copy=copy,
        machine=machine,
    )
