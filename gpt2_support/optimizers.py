"""The optimizers: how a gradient changes the parameters. AdamW, and Muon for the matrices.

Each has its formula in one function, `adamw_update` or `muon_update`, and a class that keeps its
state between steps (m, v) and shares the parts of the packed buffer among threads and ranks. `c`
is a train.TrainConfig.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import blas
from gpt2_support.data_parallel import DataParallel, serial
from gpt2_support.params import Config, Params, parameter_shapes

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable, Iterator
    from typing import Any

    from jaxtyping import Float
    from numpy import ndarray

    from gpt2_support.distributed import ProcessGroup
    from gpt2_support.shapes import Flat, Parallel

    Matrices = Float[ndarray, "*N O I"]
    Span = tuple[int, int, bool]  # start, stop, whether the values decay
    BlockMatrix = tuple[int, int, tuple[int, ...]]  # start, stop, shape

# ----------------------------------------------------------------------------------------------
# The formulas


def adamw_update(
    p: Flat, g: Flat, m: Flat, v: Flat, t: int, lr: float, c: Any, spans: list[Span], scale: float
) -> None:
    """Step t (from 1) of AdamW on parameters p (N,) and their moments m and v, in place.

        m <- beta1 m + (1 - beta1) g                 g being `scale` times the gradient given
        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr weight_decay p - lr m' / (sqrt(v') + eps)

    The spans of p tell which values decay; for the others weight_decay is 0. m' = m / (1 - beta1^t)
    and v' = v / (1 - beta2^t) make up for the start from zero. Kingma and Ba 2014,
    arXiv:1412.6980; decoupled weight decay: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    blas.axpby(scale * (1 - c.beta1), g, c.beta1, m)
    square = g * g
    blas.axpby(scale**2 * (1 - c.beta2), square, c.beta2, v)
    root = math.sqrt(1 - c.beta2**t)  # m and v are corrected by way of lr and eps
    update = np.sqrt(v, out=square)
    update += c.eps * root
    np.divide(m, update, out=update)
    step = lr * root / (1 - c.beta1**t)
    for start, stop, decays in spans:
        decay = lr * c.weight_decay if decays else 0.0
        blas.axpby(-step, update[start:stop], 1 - decay, p[start:stop])


def muon_update(p: Matrices, g: Matrices, m: Matrices, lr: float, c: Any, scale: float) -> None:
    """A step of Muon on matrices p (..., O, I) and their momenta m, in place.

        m <- momentum m + g                          g being `scale` times the gradient given
        p <- p - lr weight_decay p - lr sqrt(max(1, O / I)) orthogonalize(g + momentum m)

    g + momentum m looks a step ahead (Nesterov). AdamW scales each value by itself; Muon changes a
    matrix in all directions alike, including those that are rare in gradients. Jordan et al. 2024,
    "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon;
    the decay: Liu et al. 2025, "Muon is scalable for LLM training", arXiv:2502.16982.
    """
    g = g * scale
    m *= c.momentum
    m += g
    g += c.momentum * m
    update = orthogonalize(g)
    update *= lr * math.sqrt(max(1, p.shape[-2] / p.shape[-1]))
    p *= 1 - lr * c.weight_decay
    p -= update


def orthogonalize(x: Matrices) -> Matrices:
    """Return about u w^T, where x = u s w^T is the singular value decomposition of x.

    Five Newton-Schulz steps from x / |x| bring its singular values, at most 1, to 0.7 to 1.2:

        x <- (a + b x x^T + c (x x^T)^2) x           a = 3.4445, b = -4.775, c = 2.0315

    Each step applies one polynomial to every singular value. Jordan's a, b, c raise small ones
    fast, and bring none exactly to 1. A matrix of zeros stays as it is.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    x = transpose(x) if is_tall else x
    norm = np.sqrt(np.einsum("...oi,...oi->...", x, x))[..., None, None]
    x = x / np.where(norm > 0, norm, 1)
    is_wide = 2 * x.shape[-2] < x.shape[-1]
    for n_steps in (3, 2) if is_wide else (1, 1, 1, 1, 1):
        x = newton_schulz(x @ transpose(x), n_steps) @ x
    return transpose(x) if is_tall else x


def newton_schulz(gram: Matrices, n_steps: int) -> Matrices:
    """Return the matrix by which n_steps steps multiply x, given gram = x x^T: q_n ... q_2 q_1.

    q = a + b gram + c gram^2 takes x to q x, and so gram to q gram q. All of them are symmetric and
    commute. So a wide x is read twice, not five times. In more than 3 steps rounding errors grow.
    """
    q = total = quadratic(gram)
    for _ in range(n_steps - 1):
        gram = q @ transpose(q) @ gram
        q = quadratic(gram)
        total = q @ total
    return total


def quadratic(x: Matrices) -> Matrices:
    """a + b x + c x^2 of symmetric x. BLAS may take half the time for a product x x^T."""
    out = x @ transpose(x)
    out *= 2.0315
    out -= 4.775 * x
    out.reshape(*x.shape[:-2], -1)[..., :: x.shape[-1] + 1] += 3.4445  # the diagonal
    return out


def transpose(x: Matrices) -> Float[ndarray, "*N I O"]:
    return x.swapaxes(-1, -2)


# ----------------------------------------------------------------------------------------------
# The optimizers


class AdamW:
    """AdamW for all parameters, with their moments m and v; only matrices decay.

    Given a `shard`, a slice of the packed buffer, an optimizer keeps and updates that part, and
    other ranks the rest (ZeRO stage 1; Rajbhandari et al. 2019, arXiv:1910.02054).
    """

    def __init__(self, params: Params, shard: slice | None = None) -> None:
        self.shard = shard or slice(0, params.flat.size)
        self.is_sharded = self.shard.stop - self.shard.start < params.flat.size
        self._cut(params.config)
        self.m, self.v = np.zeros((2, *params.flat[self.shard].shape), params.flat.dtype)

    def _cut(self, config: Config) -> None:
        """Cut the shard into parts, which are updated one by one."""
        self._blocks = blocks(spans(config), self.shard)

    def step(
        self,
        params: Params,
        grads: Params,
        lr: float,
        t: int,
        config: Any,
        scale: float = 1.0,
        parallel: Parallel = serial,
    ) -> None:
        """Update params by gradients times `scale`, in place; step t counts from 1."""
        p, g = params.flat[self.shard], grads.flat[self.shard]

        def update(i: int, n: int) -> None:
            with np.errstate(all="ignore"):  # train.py tells of parameters that are not finite
                self._update(i, n, p, g, lr, t, config, scale)

        with blas.one_thread():  # each thread of ours has one, so their number changes no bit
            parallel(update)

    def _update(
        self, i: int, n: int, p: Flat, g: Flat, lr: float, t: int, c: Any, scale: float
    ) -> None:
        """Update the parts i, i + n, ... of the shard's parameters p by its gradients g."""
        for at, spans in self._blocks[i::n]:
            adamw_update(p[at], g[at], self.m[at], self.v[at], t, lr, c, spans, scale)


class Muon(AdamW):
    """Muon for the matrices of the blocks, AdamW for embeddings, gains and biases.

    The rate of the matrices is muon_lr, and follows the same schedule as lr, that of the others.
    Their momentum is in m, and their v stays zero. A shard is moved so that it cuts no matrix.
    """

    def _cut(self, config: Config) -> None:
        matrices = block_matrices(config)
        self.shard = shard = whole_matrices(self.shard, matrices)
        self._blocks = blocks(spans(config, with_block_matrices=False), shard)
        self._matrices = [
            (slice(start - shard.start, stop - shard.start), shape)
            for start, stop, shape in sorted(join_equal(matrices, shard), key=size, reverse=True)
        ]  # the largest first, so that threads get about equal shares

    def _update(
        self, i: int, n: int, p: Flat, g: Flat, lr: float, t: int, c: Any, scale: float
    ) -> None:
        super()._update(i, n, p, g, lr, t, c, scale)
        muon_lr = c.muon_lr * (lr / c.lr if c.lr else 0)
        for at, shape in self._matrices[i::n]:
            p_, g_, m_ = (flat[at].reshape(shape) for flat in (p, g, self.m))
            muon_update(p_, g_, m_, muon_lr, c, scale)


OPTIMIZERS: dict[str, type[AdamW]] = {"adamw": AdamW, "muon": Muon}


def make_optimizer(name: str, params: Params, group: ProcessGroup | None = None) -> AdamW:
    """Return a new optimizer, one of OPTIMIZERS; given a group, with this rank's shard only."""
    return OPTIMIZERS[name](params, group.shard(params.flat.size) if group else None)


TIMED = 1 << 24  # values that `time_update` updates, about


def time_update(optimizer: AdamW, params: Params, config: Any, workers: DataParallel) -> float:
    """Return the seconds that an optimizer's step takes on the slowest rank.

    A second optimizer steps zeros with the gradient of `workers`, so the run is unaffected. For a
    large model it updates one part in n, which takes little memory.
    """
    zeros = Params(params.config, np.zeros(params.flat.shape, params.flat.dtype))  # not touched yet
    other = type(optimizer)(zeros, optimizer.shard)
    one_in = max(1, -(-other.m.size // TIMED))  # a shard may be empty

    def sample(work: Callable[[int, int], object]) -> list:
        return workers.parallel(lambda i, n: work(i, n * one_in))

    seconds = []
    for t in (1, 2):  # the first also fetches memory
        start = time.perf_counter()
        other.step(zeros, workers.grads, config.lr, t, config, 1.0, sample)
        seconds.append(max(workers.group.all_gather(time.perf_counter() - start)))
    return one_in * min(seconds)


# ----------------------------------------------------------------------------------------------
# The parts of the packed buffer

BLOCK = 1 << 18  # values: few enough for the cache, but so many that threads do not wait for
# Python's lock, which each holds between two operations


def blocks(given: list[Span], shard: slice) -> list[tuple[slice, list[Span]]]:
    """Cut what a shard has of some spans into blocks for AdamW, which threads share.

    Those of a stretch without gaps are equal. Each is (its slice of the shard, its spans): many
    that are short, or a part of a long one.
    """
    parts, here = [], cut(given, shard.start, shard.stop)
    for first, end, _ in join([(start, stop, True) for start, stop, _ in here]):
        n = -(-(end - first) // BLOCK)
        bounds = [first + (end - first) * i // n for i in range(n + 1)]
        for start, stop in itertools.pairwise(bounds):
            parts.append((slice(start, stop), cut(here, start, stop)))
    return parts


def join(spans: list[Span]) -> list[Span]:
    """Join the spans that follow each other and are alike in decay."""
    joined: list[Span] = []
    for start, stop, decays in spans:
        if joined and joined[-1][1:] == (start, decays):
            start = joined.pop()[0]
        joined.append((start, stop, decays))
    return joined


def cut(spans: list[Span], first: int, end: int) -> list[Span]:
    """Return what lies between `first` and `end` of some spans, counted from `first`."""
    parts = [(max(start, first), min(stop, end), decays) for start, stop, decays in spans]
    return [(start - first, stop - first, decays) for start, stop, decays in parts if start < stop]


def spans(config: Config, with_block_matrices: bool = True) -> list[Span]:
    """Return [(start, stop, decays)], the stretches of the packed buffer that decay and do not."""
    return join(
        [
            (start, start + math.prod(shape), not name.endswith(("/b", "/g")))
            for name, start, shape in stacks(config)
            if with_block_matrices or not is_block_matrix(name)
        ]
    )


def block_matrices(config: Config) -> list[BlockMatrix]:
    """Return [(start, stop, shape)], the weights of the blocks; q, k and v of c_attn are apart."""
    matrices: list[BlockMatrix] = []
    for name, start, shape in stacks(config):
        if is_block_matrix(name):
            n_in = shape[-1]
            n_out = n_in if "c_attn" in name else shape[-2]
            for at in range(start, start + math.prod(shape), n_out * n_in):
                matrices.append((at, at + n_out * n_in, (n_out, n_in)))
    return matrices


def stacks(config: Config) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield (name, start, shape) of each parameter of all layers in the packed buffer."""
    start = 0
    for name, shape in parameter_shapes(config).items():
        yield name, start, shape
        start += math.prod(shape)


def is_block_matrix(name: str) -> bool:
    return name.startswith("h/") and name.endswith("/w")


def size(matrix: BlockMatrix) -> int:
    start, stop, _ = matrix
    return stop - start


JOINED = 1 << 16  # values of matrices that Muon updates at once, at most


def join_equal(matrices: list[BlockMatrix], shard: slice) -> list[BlockMatrix]:
    """Join neighbours among the matrices of a shard, as (n, O, I), JOINED values at most.

    Neighbours are equal: between different ones lie biases. Two threads update small matrices a
    sixth faster so, in fewer calls.
    """
    joined: list[BlockMatrix] = []
    for start, stop, shape in matrices:
        if not shard.start <= start < shard.stop:
            continue
        first, end, (n, *_) = joined[-1] if joined else (0, 0, (0,))
        if end == start and stop - first <= JOINED:
            joined[-1] = first, stop, (n + 1, *shape)
        else:
            joined.append((start, stop, (1, *shape)))
    return joined


def whole_matrices(shard: slice, matrices: list[BlockMatrix]) -> slice:
    """Move the ends of a shard that lie within a matrix to its start, as all ranks do."""

    def move(at: int) -> int:
        return next((start for start, stop, _ in matrices if start < at < stop), at)

    return slice(move(shard.start), move(shard.stop))
