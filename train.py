"""Train GPT-2 in NumPy: gradients into better parameters.

Reading order: where a model starts (`init_params`), what it reads (`Windows`), how it learns
(`AdamW`, `learning_rate`, `train_step`), with whom (`Team`, `Ranks`), how well it does
(`evaluate`), what is kept of it (`save_checkpoint`, `Log`), the loop (`train`), and the command
line.

    params = init_params(Config(n_vocab=1024, n_ctx=128, n_embd=64, n_head=4, n_layer=2))
    run = Run(params, Settings(steps=1000))
    train(run, Windows(tokens, run.settings))
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import gpt2_support  # isort: skip (before NumPy: it configures its BLAS)  # noqa: F401

import numpy as np

import encoder
import gpt2
from gpt2_support import blas, cli, files, folders, hub, messages
from gpt2_support.formats import llmc
from gpt2_support.params import Config, Params, layout

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable, Iterable, Iterator

    from jaxtyping import Float, Integer
    from numpy import ndarray

    from encoder import Encoder

    Batch = tuple[Integer[ndarray, "B T"], Integer[ndarray, "B T"]]  # tokens and targets
    Share = Callable[[Callable[[int, int], object]], list]

# ----------------------------------------------------------------------------------------------
# The start, and the settings of a run


def init_params(config: Config, seed: int = 0) -> Params:
    """Return new Params: weights from N(0, 0.02), biases 0, gains 1, as GPT-2 starts.

    The projections back into the residual stream, to which 2 n_layer branches add, are smaller by
    sqrt(2 n_layer). Radford et al. 2019, section 2.3. The same seed gives the same values.
    """
    params = Params(config)
    rng = np.random.default_rng(seed)
    for name, array in params.named.items():
        if name.endswith("/g"):
            array[...] = 1
        elif not name.endswith("/b"):
            std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
            array[...] = std * rng.standard_normal(array.shape, np.float32)
    return params


@dataclass
class Settings:
    """How to train; the command line has a flag for each."""

    data: str | None = None  # where the tokens come from, for --resume
    val_data: str | None = None
    docs: str = "eot"
    steps: int = 2000
    batch_size: int = 16  # windows a micro-batch, over all ranks
    seq_len: int = 128  # tokens a window
    grad_accum: int = 1  # micro-batches a step
    order: str = "random"  # of the windows
    lr: float = 1e-3  # at its highest
    min_lr: float = 1e-4  # at the end of the decay
    warmup: int = 100  # steps
    decay_steps: int | None = None  # steps until min_lr; None is `steps`
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # the largest norm of the gradient
    seed: int = 0
    ranks: int = 1  # processes that share a batch; must divide batch_size
    threads: int = 1  # of a rank, that share its part; must divide that
    eval_every: int = 250  # steps
    eval_tokens: int = 50_000  # the most that are used each time
    save_every: int = 250  # steps
    sample_every: int = 500  # steps
    prompt: str = ""  # of the samples

    @property
    def tokens_per_step(self):
        return self.batch_size * self.seq_len * self.grad_accum


@dataclass
class Run:
    """A training run between two steps: all that a checkpoint holds."""

    params: Params
    settings: Settings = field(default_factory=Settings)
    step: int = 0  # steps done; the position in the data follows from it
    best_loss: float = math.inf  # the lowest validation loss so far, in nats a token
    optimizer: AdamW = None  # type: ignore[assignment]  # made below

    def __post_init__(self):
        self.optimizer = self.optimizer or AdamW(self.params)


# ----------------------------------------------------------------------------------------------
# Data


class Windows:
    """Batches of windows of T = seq_len tokens, each token with the next as its target.

    Each pass over the data cuts it at another offset and takes the windows in another order (with
    order "random"; otherwise first to last). Pass n depends on the seed and n only, so that a
    window's number is all one needs to know to go on from it. Of n ranks, `rank` reads the windows
    rank, rank + n, ... of each batch: together they read what one alone would.

    tokens (N,). Raises ValueError if they are fewer than a batch, B T + 1.
    """

    def __init__(self, tokens, settings, rank=0):
        B, T = settings.batch_size, settings.seq_len
        if len(tokens) < B * T + 1:
            raise ValueError(
                f"data of {len(tokens)} tokens is shorter than one batch of {B} windows of {T} "
                "tokens and a last target: give more text, or a smaller --batch_size or --seq_len"
            )
        self.tokens, self.settings, self.rank = tokens, settings, rank
        self.n_windows = max(1, (len(tokens) - 1) // T - 1)  # one less leaves room for the offset
        self._pass, self._starts = None, None

    def batch(self, number: int) -> Batch:
        """Return tokens and targets, (B / ranks, T) each, of batch `number`: 0, 1, 2, ..."""
        B, T, n = self.settings.batch_size, self.settings.seq_len, self.settings.ranks
        starts = [self._start(i) for i in range(number * B + self.rank, (number + 1) * B, n)]
        rows = np.stack([self.tokens[start : start + T + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]

    def _start(self, window):
        n_pass, i = divmod(window, self.n_windows)
        if n_pass != self._pass:
            self._pass, self._starts = n_pass, self._cut(n_pass)
        return self._starts[i]

    def _cut(self, n_pass):
        """Return where the windows of a pass start, (n_windows,), in their order."""
        T = self.settings.seq_len
        starts = np.arange(self.n_windows) * T
        if self.settings.order == "random":
            rng = np.random.default_rng([self.settings.seed, n_pass])
            starts += rng.integers(len(self.tokens) - starts[-1] - T)
            rng.shuffle(starts)
        return starts


# ----------------------------------------------------------------------------------------------
# Learning


def alone(work):
    """Do what can be shared among threads in this one; `Team.share` is the same for several."""
    return [work(0, 1)]


class AdamW:
    """Adam with decoupled weight decay, over the packed buffer of the parameters.

    m and v, running means of the gradient and of its square, are buffers of the same layout, or of
    a `part` (a slice) of it: then only that part is updated, and other ranks see to the rest
    (ZeRO stage 1; Rajbhandari et al. 2019, arXiv:1910.02054). Only matrices decay. Loshchilov and
    Hutter 2017, arXiv:1711.05101; Kingma and Ba 2014, arXiv:1412.6980.
    """

    BLOCK = 1 << 18  # values at a time: few enough for the cache, but a thread holds Python's lock
    # between two operations, and with fewer values to work on the others would wait for it

    def __init__(self, params, part=None):
        self.part = part or slice(0, params.flat.size)
        first, stop = self.part.start, self.part.stop
        self.m, self.v = np.zeros((2, stop - first), params.flat.dtype)
        self.is_whole = self.m.size == params.flat.size
        self._blocks = [
            (slice(at, min(at + self.BLOCK, end - first, stop - first)), decays)
            for start, end, decays in decay_spans(params.config)
            for at in range(max(start - first, 0), min(end, stop) - first, self.BLOCK)
        ]

    def step(self, params, grads, lr, step, settings, scale=1.0, share=alone):
        """Update params by gradients times `scale`, in place; `step` counts from 1.

        p -= lr weight_decay p (matrices) and p -= lr m' / (sqrt(v') + eps), where m' and v' are m
        and v with the weight of their start from zero taken out.
        """
        s = settings
        root = math.sqrt(1 - s.beta2**step)
        rate, eps = lr * root / (1 - s.beta1**step), s.eps * root
        values, gradient = params.flat[self.part], grads.flat[self.part]

        def update(i, n):
            temporary = np.empty(min(self.BLOCK, values.size), values.dtype)
            for block, decays in self._blocks[i::n]:
                p, m, v = values[block], self.m[block], self.v[block]
                g = np.multiply(gradient[block], scale * (1 - s.beta1), out=temporary[: len(p)])
                m *= s.beta1
                m += g
                g *= g
                g *= (1 - s.beta2) / (1 - s.beta1) ** 2
                v *= s.beta2
                v += g
                change = np.sqrt(v, out=g)  # m and v are corrected by way of rate and eps
                change += eps
                np.divide(m, change, out=change)
                change *= rate
                if decays:
                    p *= 1 - lr * s.weight_decay
                p -= change

        share(update)


def decay_spans(config: Config) -> list[tuple[int, int, bool]]:
    """Return [(start, end, decays)], the stretches of the packed buffer that decay and do not."""
    spans: list[tuple[int, int, bool]] = []
    end = 0
    for name, shape in layout(config).items():
        start, end = end, end + math.prod(shape)
        decays = not name.endswith(("/b", "/g"))
        if spans and spans[-1][2] == decays:
            start = spans.pop()[0]
        spans.append((start, end, decays))
    return spans


def learning_rate(step: int, settings: Settings) -> float:
    """Return the rate of a step (from 0): a linear warm-up, then half a cosine down to min_lr.

    Loshchilov and Hutter 2016, arXiv:1608.03983.
    """
    s = settings
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    decay_steps = s.decay_steps or s.steps
    done = min(1.0, (step - s.warmup) / max(1, decay_steps - s.warmup))
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def norm(values: Float[ndarray, " N"], share: Share = alone, block: int = 1 << 16) -> float:
    """Return the Euclidean norm of an array (N,), its squares summed in blocks for precision."""
    starts = range(0, len(values), block)

    def squares(i, n):
        parts = (values[at : at + block] for at in starts[i::n])
        return [float(np.dot(part, part)) for part in parts]

    return math.sqrt(math.fsum(itertools.chain(*share(squares))))  # the same in any order


class Team:
    """Threads that share each batch: data parallelism within a process.

    Every thread runs the whole model on its rows and adds to its own gradient, with one BLAS
    thread: so the elementwise work, which NumPy does on one core, is shared as well as the matrix
    products, and no thread waits for another within a step. A single thread leaves the matrix
    products to all of BLAS's, unless the model is so small that they would only wait.

    With several `ranks` each has a team, and the gradients of all teams are added up: those of a
    layer while those of the layers before it are computed.
    """

    def __init__(self, params, n=1, ranks=None):
        self.n, self.ranks = n, ranks or Ranks()
        self.early, self.late = pieces(params.config, self.ranks.size)
        self.grads = [Params(params.config, np.zeros_like(params.flat)) for _ in range(n)]
        is_large = params.flat.size > 1 << 20  # so that waking a thread costs less than it does
        self.n_elementwise = max(n, blas.get_threads()) if is_large else n
        self.pool = ThreadPoolExecutor(self.n_elementwise)

    def share(self, work):
        """Return [work(0, n), work(1, n), ...], elementwise work on parts of the buffers."""
        return self._in_threads(work, self.n_elementwise)

    def _in_threads(self, work, n):
        if n == 1:
            return alone(work)
        return list(self.pool.map(work, range(n), [n] * n))

    def gradient(self, params: Params, batches: Iterable[Batch]) -> tuple[float, Params]:
        """Return the loss and the gradient (a Params), means over batches of (tokens, targets).

        Each rank gives its rows of the batches, and gets the means over those of all ranks.
        """
        batches, ranks = list(batches), self.ranks
        weight = 1 / (len(batches) * self.n * ranks.size)
        arrived = {layer: itertools.count(1) for layer in self.early}

        def done(layer):  # in each thread; the last one to come sends the sum on its way
            if layer in arrived and next(arrived[layer]) == self.n:
                ranks.start(self.add_threads, self.early[layer], weight)
                ranks.start(self.add_ranks, self.early[layer])

        hooks = [lambda layer: None] * (len(batches) - 1) + [done]

        def add_gradients(i, n):  # of the rows i, i + n, ... of each batch
            grads, rows = self.grads[i], slice(i, None, n)
            grads.flat[...] = 0
            with np.errstate(all="ignore"):  # train_step tells when the result is not finite
                return [
                    gpt2.loss_and_grads(params, x[rows], y[rows], grads, hook)[0]
                    for (x, y), hook in zip(batches, hooks, strict=True)
                ]

        with blas_threads(params.config, self.n):
            losses = np.concatenate(self._in_threads(add_gradients, self.n))
        self.share(functools.partial(self.add_threads, self.late, weight))
        ranks.start(self.add_ranks, self.late)
        ranks.wait()
        return float(np.mean(ranks.gather(losses.mean()))), self.grads[0]

    def add_threads(self, parts, weight, i=0, n=1):
        """Add up the threads' gradients, times `weight`, in these parts: share i of n of each."""
        for part in parts:
            first, *others = (np.array_split(grads.flat[part], n)[i] for grads in self.grads)
            for other in others:
                first += other
            if weight < 1:
                first *= weight

    def add_ranks(self, parts):
        for part in parts:
            self.ranks.add(self.grads[0].flat[part])


def blas_threads(config, n=1):
    """Give a matrix product one thread within a `with`, if n threads of ours share the work.

    So too for a small model, whose products are done before a second thread has woken up. Does
    nothing where NumPy has another BLAS than OpenBLAS.
    """
    if n > 1 or config.n_embd < 256:
        return blas.one_thread(then=blas.get_threads())
    return contextlib.nullcontext()


def pieces(config, n_ranks, least=1 << 23):
    """Return {layer: parts}, what of a gradient is whole when the backward pass has been through
    which layer, and the list of the other parts. A part is a slice of the packed buffer.

    The weights of the layers come some layers, and `least` values, at a time. The rest comes at the
    end, the embeddings because they are also the head; and so does all of a smaller model.
    """
    L, stacks, end = config.n_layer, [], 0
    for shape in layout(config).values():
        start, end = end, end + math.prod(shape)
        if len(shape) == 3:  # the weights (L, O, I)
            stacks.append((start, math.prod(shape[1:])))
    n = -(-least // sum(size for _, size in stacks))  # layers at a time
    if n >= L or n_ranks == 1:
        return {}, [slice(0, end)]
    early = {}
    for top in range(L, 0, -n):
        low = max(0, top - n)
        early[low] = [slice(start + low * size, start + top * size) for start, size in stacks]
    edges = [edge for start, size in stacks for edge in (start, start + L * size)]
    return early, [slice(*pair) for pair in zip([0, *edges[1::2]], [*edges[::2], end], strict=True)]


def train_step(run: Run, team: Team, batches: Iterable[Batch]) -> tuple[float, float, float]:
    """Take one step on the mean gradient of batches (tokens, targets); return loss, norm, rate.

    The gradient is clipped to a norm of grad_clip (Pascanu et al. 2012, arXiv:1211.5063); the norm
    returned is that before. Raises ValueError, with the parameters as they were, if the loss or
    the gradient is not finite.
    """
    s, ranks = run.settings, team.ranks
    loss, grads = team.gradient(run.params, batches)
    own = norm(grads.flat[ranks.part(grads.flat.size)], team.share)
    grad_norm = math.hypot(*ranks.gather(own))
    if not math.isfinite(loss + grad_norm):
        raise ValueError(
            f"training has diverged: at step {run.step + 1} the loss is {loss} and the norm of the "
            f"gradient {grad_norm}. The last checkpoint is untouched; try a lower --lr"
        )
    lr = learning_rate(run.step, s)
    run.step += 1
    scale = min(1.0, s.grad_clip / (grad_norm + 1e-6))
    run.optimizer.step(run.params, grads, lr, run.step, s, scale, team.share)
    if not run.optimizer.is_whole:
        ranks.exchange(run.params.flat)
    return loss, grad_norm, lr


# ----------------------------------------------------------------------------------------------
# Beyond one process: ranks, each of which trains the same model on its own rows of every batch


class Ranks:
    """The processes that train together: here one, which has nobody to wait for."""

    rank, size = 0, 1
    cores = os.cpu_count() or 1  # of this rank

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Nobody has to know of an error."""

    def part(self, n):
        """Return the slice of n values that is this rank's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def start(self, work, *args):
        """Call work(*args), which may call `add`, after all that was started before it."""
        work(*args)

    def wait(self):
        """Return when all that was started is done."""

    def add(self, array):
        """Make an array the sum of all ranks' arrays, in place."""

    def gather(self, value):
        """Return the values of all ranks, the same list on each."""
        return [value]

    def exchange(self, array):
        """Fill an array, of which this rank has made its `part`, with the parts of the others."""

    def collect(self, part):
        """Yield the parts of all ranks, one by one."""
        yield part

    @contextlib.contextmanager
    def first(self):
        """Let rank 0 go through a block before the others do, even if it ends with an error."""
        if self.rank > 0:
            self.gather(None)
        try:
            yield
        finally:
            if self.rank == 0:
                self.gather(None)


class MPIRanks(Ranks):
    """The processes that mpiexec has started, on one machine or many.

    A thread of its own calls MPI, in the order of the calls here: so a sum is made while the main
    thread computes, and that one always hears Ctrl-C. Only rank 0 is heard; an error anywhere ends
    the whole job. Raises ImportError if mpi4py is missing or belongs to another MPI than mpiexec.
    """

    PATIENCE = 10  # seconds for all ranks to meet the same error

    def __init__(self, rank, size):
        if rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"{size} ranks need mpi4py: pip install mpi4py ({error})") from None
        self.mpi, self.comm, self.rank, self.size = MPI, MPI.COMM_WORLD, rank, size
        if self.comm.size != size:
            raise ImportError(
                f"mpiexec has started {size} ranks, but mpi4py finds {self.comm.size}: it uses the "
                f"MPI library of another mpiexec: {MPI.Get_library_version()[:30]}"
            )
        self.errors, self.thread, self.started = self.comm.Dup(), ThreadPoolExecutor(1), []
        self._share_cores()

    def _share_cores(self):
        """Leave BLAS no more than this rank's part of the cores of its machine."""
        n_here = self.comm.Split_type(self.mpi.COMM_TYPE_SHARED).size
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else Ranks.cores
        self.cores = max(1, min(allowed, Ranks.cores // n_here))
        blas.set_threads(min(blas.get_threads(), self.cores))

    def __exit__(self, kind, error, trace):
        """After an error that all ranks meet, end as one would; otherwise tell it, and end all."""
        if error is None:
            return
        try:
            if kind is not KeyboardInterrupt:
                return self.thread.submit(self.errors.Barrier).result(self.PATIENCE)
        except (TimeoutError, self.mpi.Exception):
            message = f"train.py: error: rank {self.rank}: {' '.join(str(error).split())}"
            print(message, file=sys.__stderr__, flush=True)
            time.sleep(0.5)  # until mpiexec has passed it on
        self.comm.Abort(130 if kind is KeyboardInterrupt else 1)

    def start(self, work, *args):
        self.started.append(self.thread.submit(work, *args))

    def wait(self):
        try:
            results = [self.started.pop(0).result() for _ in range(len(self.started))]
        except self.mpi.Exception as error:
            raise OSError(f"another rank cannot be reached: {error}") from None
        return results[-1]

    def _call(self, function, *args):
        self.start(function, *args)
        return self.wait()

    def add(self, array):
        self.comm.Allreduce(self.mpi.IN_PLACE, array)

    def gather(self, value):
        return self._call(self.comm.allgather, value)

    def exchange(self, array):
        sizes = self.gather(array[self.part(array.size)].size)
        self._call(self.comm.Allgatherv, self.mpi.IN_PLACE, [array, sizes])

    def collect(self, part):
        for rank, size in enumerate(self.gather(part.size)):
            theirs = part if rank == self.rank else np.empty(size, part.dtype)
            self._call(self.comm.Bcast, theirs, rank)
            yield theirs


LAUNCHERS = (  # the variables that Open MPI, MPICH and its kin, and Slurm set
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
)


def find_ranks():
    """Return the Ranks that this process is one of: those of mpiexec, or it alone, without MPI."""
    for names in LAUNCHERS:
        rank, size = (int(os.environ.get(name, 0)) for name in names)
        if size > 1 and names[0] in os.environ:
            return MPIRanks(rank, size)
    return Ranks()


# ----------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    params: Params,
    tokens: Integer[ndarray, " N"],
    seq_len: int,
    stride: int | None = None,
    batch_size: int | None = None,
) -> Iterator[Float[ndarray, " n"]]:
    """Yield, batch by batch, the losses in nats (n,) of tokens (N,) after the first: N - 1 in all.

    They are read in windows of seq_len, one every `stride` tokens (by default, and at most,
    seq_len). Each token counts once, in the first window that reaches it: a smaller stride gives
    it more context, and takes more time. Raises ValueError if there are not two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"cannot evaluate on {len(tokens)} tokens: two at least are needed")
    overlap = seq_len - (stride or seq_len)
    batch_size = batch_size or max(1, 2048 // seq_len)
    starts = range(0, max(1, len(tokens) - 1 - overlap), seq_len - overlap)
    for i in range(0, len(starts), batch_size):
        group = starts[i : i + batch_size]
        x = np.zeros((len(group), seq_len), np.int64)
        y = np.full_like(x, gpt2.IGNORE)
        for row, start in enumerate(group):
            window = tokens[start : start + seq_len + 1]
            x[row, : len(window) - 1] = window[:-1]
            y[row, : len(window) - 1] = window[1:]
            if start > 0:
                y[row, :overlap] = gpt2.IGNORE  # counted in the window before
        yield gpt2.token_losses(params, x, y)[y != gpt2.IGNORE]


@dataclass
class Score:
    """How well a model predicts `n_tokens` tokens, which are `n_bytes` bytes of text."""

    nats: float  # in total
    n_tokens: int
    n_bytes: int

    @property
    def loss(self):
        """Nats a token."""
        return self.nats / self.n_tokens

    @property
    def bits_per_byte(self):
        """Comparable between tokenizers, as nats a token are not."""
        return self.nats / math.log(2) / max(1, self.n_bytes)

    def __str__(self):
        perplexity = math.exp(min(self.loss, 700))  # what a float can hold
        return (
            f"{self.loss:.4f} nats a token, perplexity {perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits a byte"
        )


def score(
    params: Params,
    enc: Encoder,
    tokens: Integer[ndarray, " N"],
    seq_len: int,
    stride: int | None = None,
    batch_size: int | None = None,
) -> Score:
    """Return the Score of a model on tokens (N,), with a progress bar if it takes long.

    An end-of-text token must be predicted as any other, and counts as no bytes.
    """
    from tqdm import tqdm

    bar = tqdm(total=len(tokens) - 1, desc="evaluate", unit="tok", leave=False, delay=2)
    nats = 0.0
    with bar, blas_threads(params.config):
        for losses in evaluate(params, tokens, seq_len, stride, batch_size):
            nats += float(losses.sum(dtype=np.float64))
            bar.update(len(losses))
    lengths = np.array([len(token) for token in enc.tokens])
    if enc.eot is not None:
        lengths[enc.eot] = 0
    return Score(nats, len(tokens) - 1, int(lengths[tokens[1:]].sum()))


# ----------------------------------------------------------------------------------------------
# What is kept of a run: checkpoints, the log and its picture


def save_checkpoint(folder: Path, run: Run, ranks: Ranks | None = None) -> None:
    """Write model.bin, for everyone, and state.npz, from which a run goes on, each atomically.

    state.npz holds the parameters too: whenever the process dies, it is of one step throughout.
    All ranks call this, and rank 0 writes; the files do not tell how many there are.
    """
    meta = {"step": run.step, "best_loss": run.best_loss, "settings": asdict(run.settings)}
    meta["config"] = asdict(run.params.config)
    ranks, optimizer = ranks or Ranks(), run.optimizer
    collect = (lambda array: [array]) if optimizer.is_whole else ranks.collect
    arrays = {"params": [run.params.flat], "m": collect(optimizer.m), "v": collect(optimizer.v)}
    if ranks.rank > 0:
        for _ in itertools.chain(*arrays.values()):
            pass
        return
    with files.atomic_write(folder / "state.npz") as file:
        write_npz(file, json.dumps(meta), arrays, run.params.flat)
    llmc.save_params(folder / "model.bin", run.params)


def write_npz(file, meta, arrays, like):
    """Write what np.savez would: `meta`, a str, and arrays {name: parts} of the shape of `like`.

    The parts, which come from anywhere, are written one by one, and never are all in memory.
    """
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("meta.npy", "w", force_zip64=True) as member:
            np.save(member, np.array(meta))
        for name, parts in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(like)
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(part.data)


def load_checkpoint(folder: str | Path, part: Callable[[int], slice] | None = None) -> Run:
    """Return the Run of a folder's state.npz, with all or a `part` of the optimizer's buffers.

    `part` is a function of their length that returns a slice. Raises ValueError for a damaged file.
    """
    path = Path(folder) / "state.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file: there is no run to resume in {folder}")
    try:
        check_npz(path)
        with np.load(path) as state:
            meta = json.loads(str(state["meta"]))
            flat, m, v = (state[name] for name in ("params", "m", "v"))
        params = Params(Config(**meta["config"]), flat)
        optimizer = AdamW(params, part and part(flat.size))
        run = Run(params, Settings(**meta["settings"]), meta["step"], meta["best_loss"], optimizer)
        check_run(run, flat, m, v)
        optimizer.m[...], optimizer.v[...] = m[optimizer.part], v[optimizer.part]
    except Exception as error:  # of damaged files, zipfile and NumPy raise a dozen kinds
        reason = messages.preview(str(error) or type(error).__name__)
        raise ValueError(f"{path}: not a whole checkpoint of train.py: {reason}") from None
    return run


def check_npz(path):
    """Raise an error if the arrays of an .npz would take more memory than the file has bytes."""
    left = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = max(info.file_size, abs(math.prod(shape)) * dtype.itemsize)
            left -= size
            if left < 0:
                raise ValueError(f"{info.filename} claims {size} bytes, more than are there")


def check_run(run, *arrays):
    """Raise ValueError unless everything in a run that was read has its type and range."""
    for array in arrays:
        if array.dtype != np.float32 or array.shape != run.params.flat.shape:
            raise ValueError(f"an array of {array.dtype} and shape {array.shape}")
    for name, kind in get_type_hints(Settings).items():
        value = getattr(run.settings, name)
        low = 1 if kind is int and name not in ("warmup", "seed") else 0
        good = isinstance(value, kind | int if kind is float else kind)
        if isinstance(value, int | float):
            good = good and low <= value < math.inf and type(value) is not bool
        if not good:
            raise ValueError(f"{name} = {value!r}")
    if run.settings.docs not in encoder.SEPARATORS or type(run.step) is not int or run.step < 0:
        raise ValueError(f"docs = {run.settings.docs!r}, step = {run.step!r}")
    if not isinstance(run.best_loss, int | float) or math.isnan(run.best_loss):
        raise ValueError(f"best_loss = {run.best_loss!r}")


class Log:
    """log.csv: a row a step, written as it happens; a resumed run drops the rows it makes anew."""

    COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "val_loss", "bits_per_byte")

    def __init__(self, path, step):
        self.rows = [row for row in read_log(path) if int(row["step"]) <= step] if step else []
        with files.atomic_write(path) as file:
            text = "".join(",".join(row.values()) + "\n" for row in self.rows)
            file.write((",".join(self.COLUMNS) + "\n" + text).encode())
        self.path = path

    def add(self, *values):
        """Write a row; None is an empty cell."""
        cells = ["" if x is None else str(x) if type(x) is int else f"{x:.6g}" for x in values]
        with files.with_path(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join(cells) + "\n")
        self.rows.append(dict(zip(self.COLUMNS, cells, strict=True)))


def read_log(path):
    """Return the rows of a log.csv as dicts; none if there is no such file.

    A last row that was cut short is left out. Raises ValueError for any other that is no row.
    """
    if not Path(path).exists():
        return []
    text = Path(path).read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
    header, *lines = text.split("\n")[:-1] or [",".join(Log.COLUMNS)]
    if header != ",".join(Log.COLUMNS):
        raise ValueError(
            f"{path}: begins with {messages.preview(header)}, not as a log of train.py"
        )
    return [parse_row(path, line) for line in lines]


def parse_row(path, line):
    """Return a row of log.csv as a dict {column: text}, each a number or empty."""
    cells = line.split(",")
    try:
        int(cells[0])
        list(map(float, filter(None, cells)))
        return dict(zip(Log.COLUMNS, cells, strict=True))
    except ValueError:
        raise ValueError(f"{path}: {messages.preview(line)} is no row of a training log") from None


def plot_log(rows, path):
    """Draw training and validation loss over the steps to a PNG, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for name, label in (("loss", "training (a batch)"), ("val_loss", "validation")):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        style = {"linewidth": 0.8, "alpha": 0.6} if name == "loss" else {"marker": "."}
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=Path(path).parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------
# The loop


def train(run, data, on_step=lambda loss, grad_norm, lr: None, stop=lambda: False, team=None):
    """Take the steps that are left of `run`, in place, on the batches of `data`, a Windows.

    After each, `on_step` is called; `stop()` ends the loop between two steps. Step n reads the
    batches n grad_accum, n grad_accum + 1, ..., so a resumed run goes on with the very same ones.
    """
    s = run.settings
    team = team or Team(run.params, s.threads)
    while run.step < s.steps and not stop():
        numbers = range(run.step * s.grad_accum, (run.step + 1) * s.grad_accum)
        on_step(*train_step(run, team, (data.batch(number) for number in numbers)))


class Saver:
    """What every rank does after a step: its share of the checkpoints."""

    def __init__(self, run, out, ranks):
        self.run, self.out, self.ranks = run, out, ranks
        self.saved_step = None  # a kill may have come between the two files of the last one

    def on_step(self, loss, grad_norm, lr):
        if self.is_due(self.run.settings.save_every):
            self.save()

    def close(self):
        pass

    def is_due(self, every):
        return self.run.step == self.run.settings.steps or self.run.step % every == 0

    def save(self):
        """Write a checkpoint, unless the last one is of this very step."""
        if self.saved_step != self.run.step:
            save_checkpoint(self.out, self.run, self.ranks)
            self.saved_step = self.run.step


class Reporter(Saver):
    """What rank 0 tells and keeps beside: the progress line, log, validation, samples."""

    def __init__(self, run, out, ranks, enc, val):
        from tqdm import tqdm

        super().__init__(run, out, ranks)
        s = run.settings
        self.enc, self.val = enc, val[: s.eval_tokens]
        self.log = Log(out / "log.csv", run.step)
        self.bar = tqdm(total=s.steps, initial=run.step, unit="step", dynamic_ncols=True)
        self.time = time.perf_counter()

    def on_step(self, loss, grad_norm, lr):
        """Report a step, and do what is due after it."""
        run, s = self.run, self.run.settings
        speed = s.tokens_per_step / (time.perf_counter() - self.time)
        figures = f"loss {loss:.3f} lr {lr:.1e} norm {grad_norm:.2f} {speed:.0f} tok/s"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update()
        validation = None
        if self.is_due(s.eval_every):
            validation = self.validate()
        scores = (validation.loss, validation.bits_per_byte) if validation else (None, None)
        self.log.add(run.step, loss, lr, grad_norm, speed, *scores)
        if self.is_due(s.sample_every):
            self.sample()
        super().on_step(loss, grad_norm, lr)
        self.time = time.perf_counter()

    def validate(self):
        """Score the validation data, and keep the model if it is the best so far."""
        run = self.run
        found = score(run.params, self.enc, self.val, run.settings.seq_len)
        self.note(f"step {run.step}: validation loss {found}")
        if found.loss < run.best_loss:
            run.best_loss = found.loss
            llmc.save_params(self.out / "best" / "model.bin", run.params)
        return found

    def sample(self):
        """Write a sample to standard output."""
        s, enc = self.run.settings, self.enc
        prompt = enc.encode(s.prompt)[-self.run.params.config.n_ctx :]
        ids = gpt2.generate(
            self.run.params, prompt, 100, 0.8, seed=s.seed, eot=enc.eot, n_vocab=enc.n_vocab
        )
        self.note(f"step {self.run.step}: a sample at temperature 0.8")
        self.bar.write(s.prompt + enc.decode(list(ids)), file=sys.stdout)

    def note(self, message):
        self.bar.write(message, file=sys.stderr)

    def close(self):
        self.bar.close()
        plot_log(self.log.rows, self.out / "loss.png")


@contextlib.contextmanager
def interrupts():
    """Give a function that tells whether Ctrl-C (or a polite kill) has come since; twice is enough.

    A step is thus never left half done: the loop asks between steps. The second Ctrl-C ends the
    program at once, unless it comes within a second: mpiexec may pass on one that all have had.
    """
    times = []

    def ask(number, frame):
        if not times:
            print("\nstopping after this step ...", file=sys.stderr)
        elif time.monotonic() > times[0] + 1:
            raise KeyboardInterrupt
        times.append(time.monotonic())

    signals = [signal.SIGINT, signal.SIGTERM]
    old = [signal.signal(number, ask) for number in signals]
    try:
        yield lambda: bool(times)
    finally:
        for number, handler in zip(signals, old, strict=True):
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------
# The command line

FINE_TUNING = {  # the defaults that differ where --init names a model
    "steps": 200,
    "batch_size": 4,
    "lr": 5e-5,
    "warmup": 20,
    "eval_every": 50,
    "eval_tokens": 10_000,
    "save_every": 50,
    "sample_every": 50,
}


positive = cli.positive_int
DEFAULTS = asdict(Settings()) | {
    "n_vocab": 1024,
    "init": "scratch",
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "n_ctx": 128,
    "models_dir": hub.MODELS_DIR,
    "seq_len": None,
    "lr": None,
    "min_lr": None,
    "threads": None,
}


def natural(text):
    """Return the whole number of 0 or more that a flag was given."""
    return 0 if text.strip() == "0" else positive(text)


def number(text):
    """Return the finite number of 0 or more that a flag was given."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def make_parser():
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(
        prog="train.py",
        description="Train GPT-2 on your own text, from scratch or from a model. Ctrl-C saves and "
        "exits; --resume goes on, to the same result as if the run had never stopped.",
        usage="%(prog)s --data PATH [flags]\n       %(prog)s --resume --out PATH [flags]",
        examples=[
            "python train.py --data stories.txt",
            "python train.py --data stories.txt --n_layer 6 --n_embd 192 --steps 8000",
            "python train.py --data letters.txt --init 124M --out models/letters",
            "python train.py --resume --out models/letters",
            "python train.py --eval_only --init models/letters --data others.txt",
        ],
    )

    def add_all(title, *flags):
        """Add a group of flags: (name, type or choices, help), with defaults from Settings."""
        group = parser.add_argument_group(title)
        for name, kind, help in flags:
            kind = {"choices": kind} if isinstance(kind, list) else {"type": kind}
            group.add_argument(f"--{name}", default=DEFAULTS.get(name), help=help, **kind)
        return group

    add_all(
        "data",
        ("data", Path, "a text file, or a tokens .bin made by `encoder.py encode` (required "
         "without --resume)"),
        ("val_data", Path, "the same for validation (default: the last tenth of --data)"),
        ("tokenizer", str, "a tokenizer file, or a folder or model that has one (default: that of "
         "--init, or the tokenizer.bin beside a .bin, or one learned from the text)"),
        ("n_vocab", positive, "size of the vocabulary that is learned from a text"),
        ("docs", list(encoder.SEPARATORS), "what a document of a text is: see encoder.py encode"),
    )  # fmt: skip
    add_all(
        "model",
        ("init", str, "scratch, or the name or path of a model to fine-tune or evaluate"),
        ("n_layer", positive, "layers of a model from scratch"),
        ("n_head", positive, "attention heads of each layer"),
        ("n_embd", positive, "channels of a model from scratch"),
        ("n_ctx", positive, "tokens that it can look back on"),
        ("models_dir", Path, "folder of the models"),
    )
    group = add_all(
        "output",
        ("out", Path, "folder to write (default: one in --models_dir, named after --data)"),
    )
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    group = add_all(
        "training",
        ("steps", positive, "steps of the optimizer in all"),
        ("batch_size", positive, "windows at a time, shared by all ranks under mpiexec"),
        ("seq_len", positive, "tokens a window (default: n_ctx, or at most 256 to fine-tune)"),
        ("grad_accum", positive, "batches a step, their gradients averaged"),
        ("order", ["random", "sequential"], "how windows follow each other"),
        ("lr", number, "the highest learning rate (default: 0.5 / n_embd from scratch)"),
        ("min_lr", number, "the learning rate at the end (default: a tenth of --lr)"),
        ("warmup", natural, "steps until the highest learning rate"),
        ("decay_steps", positive, "steps until --min_lr (default: --steps)"),
        ("beta1", number, "AdamW: decay of the mean gradient"),
        ("beta2", number, "AdamW: decay of the mean squared gradient"),
        ("eps", number, "AdamW: keeps the division from overflowing"),
        ("weight_decay", number, "AdamW: decay of the matrices"),
        ("grad_clip", number, "the largest norm of the gradient"),
        ("threads", positive, "threads that share a batch; the last bits depend on their number "
         "(default: as many as help a model of this size)"),
        ("seed", natural, "decides the first weights, the order of the data, the samples"),
    )  # fmt: skip
    tuned = ", ".join(f"{name} {value}" for name, value in FINE_TUNING.items())
    group.description = f"With --init NAME the defaults are {tuned}."
    group = add_all("training on several machines: mpiexec -n N python train.py --data ...")
    group.add_argument(
        "--shard",
        action="store_true",
        help="share AdamW's memory among the ranks: less memory, more communication",
    )
    add_all(
        "reports",
        ("eval_every", positive, "steps between validations"),
        ("eval_tokens", positive, "the most tokens that a validation takes"),
        ("save_every", positive, "steps between checkpoints"),
        ("sample_every", positive, "steps between samples"),
        ("prompt", None, "beginning of the samples (default: none, they begin a text)"),
    )
    group = add_all(
        "evaluation", ("stride", positive, "tokens between windows (default: --seq_len)")
    )
    group.add_argument(
        "--eval_only", action="store_true", help="only print how well --init predicts --data"
    )
    return parser


def parse_args(argv=None, ranks=None):
    """Parse the command line; --resume takes the settings of the run as defaults.

    The threads, too, if there are as many ranks as before; otherwise they are chosen anew.
    """
    ranks = ranks or Ranks()
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if not (args.out or args.data):
            parser.error("--resume needs --out, the folder of the run")
        run = load_checkpoint(out_folder(args), ranks.part if args.shard else None)
        if run.settings.ranks != ranks.size:
            run.settings.threads = None
        parser.set_defaults(run=run, **asdict(run.settings), **asdict(run.params.config))
    elif args.init != "scratch":
        parser.set_defaults(**FINE_TUNING)
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data is needed: a text file or a tokens .bin")
    if args.eval_only and args.init == "scratch":
        parser.error("--eval_only needs --init, the model to evaluate")
    args.out, args.ranks = out_folder(args), ranks
    return args


def out_folder(args):
    return args.out or folders.trained_models_dir(args.models_dir) / args.data.stem


def is_text(path):
    """Tell a text file from a tokens .bin, by its name and its first bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    return path.suffix != ".bin" and magic != llmc.TOKENS_MAGIC


def find_tokenizer(args):
    """Return the Encoder for --data, learning one from it where there is none."""
    if args.resume:
        return encoder.load(args.out)
    if args.tokenizer:
        return encoder.load(args.tokenizer, args.models_dir)
    if args.init != "scratch":
        path = hub.find_model(args.init, args.models_dir)
        return encoder.load(path if path.is_dir() else path.parent)
    if is_text(args.data):
        return learn_tokenizer(args.data, args.n_vocab)
    beside = args.data.with_name("tokenizer.bin")
    if not beside.exists():
        raise ValueError(f"{args.data}: no tokenizer.bin beside it: give its --tokenizer")
    return encoder.load(beside)


def learn_tokenizer(text, n_vocab):
    """Return the Encoder of n_vocab tokens learned from a text file, once, and kept beside it."""
    path = text.with_name(f"{text.name}.{n_vocab}.tokenizer.bin")
    if not is_newer(path, text):
        messages.info(f"{path}: learning a vocabulary of {n_vocab} tokens from {text}")
        encoder.train_files([text], n_vocab).save(path)
    return encoder.load(path)


def is_newer(path, source):
    return path.exists() and path.stat().st_mtime_ns >= source.stat().st_mtime_ns


def read_data(path, enc, docs):
    """Return the ids (N,) of a tokens .bin or of a text file, which is encoded once, beside it.

    Raises ValueError for ids that `enc` does not have, or a file made with another vocabulary.
    """
    if is_text(path):
        table = b"".join(bytes([len(token)]) + token for token in enc.tokens)
        mark = hashlib.sha256(table + docs.encode()).hexdigest()[:8]
        text, path = path, path.with_name(f"{path.name}.{mark}.bin")
        if not is_newer(path, text):
            messages.info(f"{path}: encoding {text}")
            encoder.encode_files(enc, [text], path, docs, os.cpu_count())
    tokens, n_vocab = llmc.load_tokens(path)
    top = max(
        (int(part.max()) for part in np.array_split(tokens, 1 + len(tokens) // 2**24) if part.size),
        default=0,
    )
    if top >= enc.n_vocab or n_vocab not in (0, enc.n_vocab):
        found = f"a vocabulary of {n_vocab}" if n_vocab else f"the id {top}"
        raise ValueError(
            f"{path}: has {found}, but the tokenizer has {enc.n_vocab} tokens: they do not belong "
            "together; give the --tokenizer it was encoded with"
        )
    return tokens


def split_data(args, enc):
    """Return the ids to train on and to validate with."""
    tokens = read_data(args.data, enc, args.docs)
    if args.val_data:
        return tokens, read_data(args.val_data, enc, args.docs)
    n = len(tokens) - len(tokens) // 10
    return tokens[:n], tokens[n:]


def make_settings(args, config):
    """Return the Settings of the command line; raises ValueError if they do not fit the model."""
    n_ctx, n_embd = config.n_ctx, config.n_embd
    seq_len = args.seq_len or (n_ctx if args.init == "scratch" else min(n_ctx, 256))
    if seq_len > n_ctx:
        raise ValueError(f"--seq_len {seq_len} exceeds n_ctx = {n_ctx}")
    ranks = args.ranks
    if args.batch_size % ranks.size:
        raise ValueError(f"{ranks.size} ranks cannot share --batch_size {args.batch_size} equally")
    rows = args.batch_size // ranks.size
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    lr = 0.5 / n_embd if args.lr is None else args.lr  # 0.03 for 16 channels, 6.5e-4 for 768
    threads = args.threads or choose_threads(rows, seq_len, n_embd, ranks.cores)
    if rows % threads:
        among = f" / {ranks.size} ranks" if ranks.size > 1 else ""
        raise ValueError(
            f"--threads {threads} does not divide --batch_size {args.batch_size}{among}"
        )
    given |= {"seq_len": seq_len, "lr": lr, "threads": threads, "ranks": ranks.size}
    given["min_lr"] = lr / 10 if args.min_lr is None else args.min_lr
    given |= {name: given[name] and str(given[name].resolve()) for name in ("data", "val_data")}
    return Settings(**given)


def choose_threads(n_rows, seq_len, n_embd, n_cores):
    """Return how many threads to share rows among: as many as there are cores and work for.

    On few tokens they would only wait for Python's lock or, in a wide model, have less to compute
    than to add up: a gradient each, of all parameters.
    """
    n_tokens = n_rows * seq_len
    if n_tokens * n_embd < 1 << 17 or (n_tokens < 1024 and n_embd >= 256):
        return 1
    return max(n for n in range(1, n_cores + 1) if n_rows % n == 0)


def make_run(args, enc):
    """Return the Run that the command line asks for: resumed, from scratch, or from a model."""
    n_vocab = args.n_vocab if args.resume else enc.n_vocab  # a tuned model may have more than enc
    shape = Config(n_vocab, args.n_ctx, args.n_embd, args.n_head, args.n_layer)
    if args.resume:
        run = args.run
        if shape != run.params.config:
            raise ValueError(f"{args.out}: the run has {run.params.config}; that cannot be changed")
        run.settings = make_settings(args, shape)
        return run
    if args.init == "scratch":
        params = init_params(shape, args.seed)
    else:
        loaded = gpt2.load(args.init, args.models_dir)
        params = Params(loaded.config, loaded.flat.copy())
        gpt2.check_tokenizer(args.init, params, enc)
    part = args.ranks.part(params.flat.size) if args.shard else None
    return Run(params, make_settings(args, params.config), optimizer=AdamW(params, part))


def describe(run, n_tokens, seconds):
    """Tell what was chosen and what it will cost; `seconds` is the measured time of a step."""
    c, s = run.params.config, run.settings
    n = sum(array.size for array in run.params.named.values())
    left = s.steps - run.step
    n_passes = left * s.tokens_per_step / n_tokens
    per_token = c.n_layer * (20 * c.n_embd + c.n_head * s.seq_len)  # activations kept: see gpt2.py
    rows = s.batch_size // s.ranks * s.seq_len
    logits = s.threads * min(gpt2.HEAD_ROWS, rows // s.threads) * c.n_vocab
    buffers = (1 + s.threads) * n + 2 * run.optimizer.m.size
    memory = 4 * (buffers + rows * per_token + logits)
    who = f" in each of {s.ranks} ranks, threads: {s.threads}" if s.ranks > 1 else ""
    messages.info(
        f"{n:,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, "
        f"{c.n_ctx} tokens of context, a vocabulary of {c.n_vocab}\n"
        f"{left} steps of {s.tokens_per_step} tokens, {n_passes:.1f} passes over {n_tokens}, at a "
        f"learning rate of {s.lr:.2g}: about "
        f"{left * seconds / 60:.1f} minutes and {memory / 1e6:.0f} MB of memory{who}"
    )


def time_step(run, data, team):
    """Return the seconds that the gradient of a step takes here; the run stays as it is."""
    for _ in range(2):  # the first also fetches memory and wakes threads
        start = time.perf_counter()
        team.gradient(run.params, [data.batch(0)])
        seconds = max(team.ranks.gather(time.perf_counter() - start))
        if seconds > 2:
            break
    return seconds * run.settings.grad_accum


def claim_folder(args, enc):
    """Make --out a folder for a new run; raises ValueError if a model is there already."""
    resume = "--resume goes on with it, " if (args.out / "state.npz").exists() else ""
    if not args.overwrite and any((args.out / name).exists() for name in OUTPUT):
        raise ValueError(
            f"{args.out}: there is a model already: {resume}--overwrite replaces it, and another "
            "--out leaves it alone"
        )
    if args.ranks.rank > 0:
        return
    for folder in (args.out, args.out / "best"):
        for name in OUTPUT:
            (folder / name).unlink(missing_ok=True)
        enc.save(folder / "tokenizer.bin")


OUTPUT = ("model.bin", "state.npz", "log.csv")


def train_command(args):
    """Do what the command line asks for, and say how to go on from there."""
    ranks = args.ranks
    with ranks.first():  # it learns and encodes, and the others find that beside the text
        enc = find_tokenizer(args)
        tokens, val = split_data(args, enc)
    run = make_run(args, enc)
    data = Windows(tokens, run.settings, ranks.rank)
    check_validation(val)
    check_alike(ranks, tokens, run)
    if not args.resume:
        claim_folder(args, enc)
    team = Team(run.params, run.settings.threads, ranks)
    describe(run, len(tokens), time_step(run, data, team))
    here = run, args.out, ranks
    reporter = Reporter(*here, enc, val) if ranks.rank == 0 else Saver(*here)
    with interrupts() as asked:
        try:
            train(run, data, reporter.on_step, lambda: any(ranks.gather(asked())), team)
            reporter.save()
        finally:
            reporter.close()
    if run.step < run.settings.steps:
        command = command_line("train.py", "--resume", "--out", args.out, *["--shard"] * args.shard)
        command = f"mpiexec -n {ranks.size} {command}" if ranks.size > 1 else command
        messages.info(f"{args.out}: saved at step {run.step}; go on with: {command}")
        sys.exit(130)
    say_done(args.out, run)


def check_alike(ranks, tokens, run):
    """Raise ValueError if a rank has read something else than another, from another disk say."""
    read = {"data": tokens, "parameters": run.params.flat, "step": np.array(run.step)}
    marks = ranks.gather([zlib.crc32(values) for values in read.values()])
    for what, of_all in zip(read, zip(*marks, strict=True), strict=True):
        if len(set(of_all)) > 1:
            raise ValueError(f"the {what} that the ranks have read are not the same: {of_all}")


def check_validation(val):
    if len(val) < 2:
        raise ValueError(f"{len(val)} tokens to validate with: give more text, or --val_data")


def say_done(out, run):
    """Say where the models are and how to sample from the last one."""
    sampling = ("--model", out, "--n_tokens", 100, "--temperature", 0.8)
    command = command_line("gpt2.py", run.settings.prompt, *sampling)
    best = f"the lowest validation loss was {run.best_loss:.4f}, by {out / 'best'}"
    messages.info(f"{out / 'model.bin'}: done; {best}. To sample: {command}")


def command_line(program, *arguments):
    """Return what to type here to run one of our programs."""
    path = os.path.relpath(Path(__file__).with_name(program))
    return shlex.join(["python", path, *map(str, arguments)])


def eval_command(args):
    """Print how well --init predicts --data."""
    params = gpt2.load(args.init, args.models_dir)
    enc = find_tokenizer(args)
    gpt2.check_tokenizer(args.init, params, enc)
    tokens = read_data(args.data, enc, args.docs)
    seq_len = args.seq_len or params.config.n_ctx
    stride = args.stride or seq_len
    if not stride <= seq_len <= params.config.n_ctx:
        limits = f"--stride {stride} <= --seq_len {seq_len} <= n_ctx {params.config.n_ctx}"
        raise ValueError(f"expected {limits}")
    found = score(params, enc, tokens, seq_len, stride)
    print(
        f"{args.data}: {found}; {found.n_tokens} tokens ({found.n_bytes} bytes), in windows of "
        f"{seq_len}, stride {stride}"
    )


def main(argv=None):
    with find_ranks() as ranks:
        args = parse_args(argv, ranks)
        if args.eval_only:
            eval_command(args)
        else:
            train_command(args)


def command():
    """Run the installed command `gpt2-train`."""
    cli.run(main)


if __name__ == "__main__":
    command()
