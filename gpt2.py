"""GPT-2 in NumPy: token ids into logits, gradients and new ids.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". The reading order is
the order of explanation: the layers, each forward followed by its backward; the model made of
them; the key/value cache; sampling and generation; the command line.

Every layer is a pair of functions. The forward takes its input and its parameters `p` and returns
`out, cache`; the backward takes `dout`, the gradient of the loss with respect to `out`, and that
cache, adds the gradients of the parameters to `d` (a tree of the same names as `p`) and returns
the gradient of the input. Its lines undo the forward's, last line first.

Shapes: B batch, T tokens (queries), S tokens seen (keys), C channels, H heads, D = C / H,
V vocabulary; a gradient has the shape of what it is the gradient of. No layer names a dtype:
float32 parameters compute in float32, float64 in float64.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import gpt2_support  # isort: skip (before NumPy: it configures its BLAS)  # noqa: F401

import numpy as np

import encoder
from gpt2_support import blas, cli, hub, messages
from gpt2_support.formats import llmc
from gpt2_support.params import Params

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable, Sequence
    from typing import Any, SupportsFloat, SupportsIndex

    from jaxtyping import Float, Integer
    from numpy import ndarray
    from numpy.random import Generator
    from numpy.typing import DTypeLike

    from gpt2_support.params import Config

    Node = Any  # parameters, or their gradients, by name: p.w, p.ln_1.g
    Cache = Any  # what a backward needs of its forward
    Ids = Any  # ids (T,) or (B, T) in a list or an array, checked where they come in

# ----------------------------------------------------------------------------------------------
# The layers


def embed(
    tokens: Integer[ndarray, "B T"], positions: Integer[ndarray, "#B T"], p: Node
) -> tuple[Float[ndarray, "B T C"], Cache]:
    """Look up token and position embeddings: tokens (B, T), positions (B or 1, T) -> (B, T, C).

    Both are learned, as in Radford et al. 2018, "Improving Language Understanding by Generative
    Pre-Training".
    """
    return p.wte[tokens] + p.wpe[positions], (tokens, positions)


def embed_backward(dout: Float[ndarray, "B T C"], cache: Cache, d: Node) -> None:
    """Each row of dout is added to the row of wte, and of wpe, that it was looked up from.

    positions (1, T): a batch that is trained on has no KV cache, and its rows start together.
    """
    tokens, positions = cache
    d.wpe[positions[0]] += dout.sum(0)
    np.add.at(d.wte, tokens, dout)  # not `d.wte[tokens] += dout`: a token may occur twice


def layer_norm(
    x: Float[ndarray, "*N C"], p: Node, eps: float = 1e-5
) -> tuple[Float[ndarray, "*N C"], Cache]:
    """Normalise each row to mean 0 and variance 1, then scale and shift: x (..., C) -> (..., C).

    Ba et al. 2016, arXiv:1607.06450.
    """
    norm = x - row_mean(x)
    rstd = 1 / np.sqrt(row_mean(norm, norm) + eps)
    norm *= rstd
    return norm * p.g + p.b, (norm, rstd)


def layer_norm_backward(
    dout: Float[ndarray, "*N C"], cache: Cache, p: Node, d: Node
) -> Float[ndarray, "*N C"]:
    """dx = rstd (dnorm - mean(dnorm) - norm mean(dnorm norm)), where dnorm = dout g."""
    norm, rstd = cache
    d.b += sum_rows(dout)
    d.g += sum_rows(dout * norm)
    dx = dout * p.g
    dx -= row_mean(dx) + norm * row_mean(dx, norm)
    dx *= rstd
    return dx


def row_sum(*factors: Float[ndarray, "*N C"]) -> Float[ndarray, "*N 1"]:
    """Sum the product of arrays (..., C) along the last axis -> (..., 1).

    einsum does it in one pass, without an array for the product, and faster than `sum` does.
    """
    subscripts = ",".join(["...c"] * len(factors)) + "->..."
    return np.einsum(subscripts, *factors)[..., None]


def row_mean(*factors: Float[ndarray, "*N C"]) -> Float[ndarray, "*N 1"]:
    """The mean instead of the sum: (..., C) -> (..., 1)."""
    return row_sum(*factors) / factors[0].shape[-1]


def linear(x: Float[ndarray, "*N I"], p: Node) -> tuple[Float[ndarray, "*N O"], Cache]:
    """x w^T + b: x (..., I) -> (..., O), with w (O, I)."""
    out = times(as_rows(x), p.w)  # x w^T, over all rows at once, not for each batch entry
    out += p.b
    return out.reshape(*x.shape[:-1], -1), x


def linear_backward(
    dout: Float[ndarray, "*N O"], cache: Cache, p: Node, d: Node
) -> Float[ndarray, "*N I"]:
    """dx = dout w;  dw = dout^T x;  db = the sum of dout over all rows."""
    x = cache
    d.b += sum_rows(dout)
    d.w += as_rows(dout).T @ as_rows(x)
    return (as_rows(dout) @ p.w).reshape(x.shape)


def as_rows(x: Float[ndarray, "*N C"]) -> Float[ndarray, "M C"]:
    """View (..., C) as (N, C)."""
    return x.reshape(-1, x.shape[-1])


def sum_rows(x: Float[ndarray, "*N C"]) -> Float[ndarray, " C"]:
    """Sum (..., C) over all but the last axis -> (C,)."""
    return as_rows(x).sum(0)


FEW_ROWS = 32
STACK = 1 << 18  # multiplications that OpenBLAS does at once, in one thread, by small kernels


def times(x: Float[ndarray, "N I"], w: Float[ndarray, "O I"]) -> Float[ndarray, "N O"]:
    """x w^T: x (N, I), w (O, I) -> (N, O).

    BLAS first copies w into another order, which for a few rows of x takes longer than the product
    itself. OpenBLAS's kernels for small matrices do without: then w is taken a few rows at a time.
    """
    if not 1 < len(x) <= FEW_ROWS or not blas.has_small_kernels():
        return x @ w.T
    n = max(1, STACK // x.size)  # rows of w in a small product
    whole = len(w) // n * n
    columns, out = np.ascontiguousarray(x.T), np.empty((len(w), len(x)), x.dtype)
    stack, products = w[:whole].reshape(-1, n, w.shape[1]), out[:whole].reshape(-1, n, len(x))

    def multiply(part):
        np.matmul(stack[part], columns, out=products[part])

    blas.parallel_for(multiply, len(stack), work=w.size * len(x))
    np.matmul(w[whole:], columns, out=out[whole:])
    return np.ascontiguousarray(out.T)


GELU_SCALE = math.sqrt(2 / math.pi)  # math, not np: a NumPy scalar would turn float32 into float64


def gelu(x: Float[ndarray, "*N C"]) -> tuple[Float[ndarray, "*N C"], Cache]:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), elementwise.

    Hendrycks and Gimpel 2016, arXiv:1606.08415, in the tanh form that GPT-2 was trained with.
    """
    tanh = x * x
    tanh *= 0.044715 * GELU_SCALE
    tanh += GELU_SCALE
    tanh *= x
    np.tanh(tanh, out=tanh)
    out = tanh + 1
    out *= x
    out *= 0.5
    return out, (x, tanh)


def gelu_backward(dout: Float[ndarray, "*N C"], cache: Cache) -> Float[ndarray, "*N C"]:
    """dx = dout 0.5 (1 + tanh + x (1 - tanh^2) sqrt(2 / pi) (1 + 3 0.044715 x^2))."""
    x, tanh = cache
    dx = x * x
    dx *= 3 * 0.044715 * GELU_SCALE
    dx += GELU_SCALE
    dx *= x
    dx *= 1 - tanh * tanh
    dx += tanh
    dx += 1
    dx *= dout
    dx *= 0.5
    return dx


def softmax(x: Float[ndarray, "*N S"]) -> Float[ndarray, "*N S"]:
    """Turn scores (..., S) into probabilities along the last axis, in place.

    Taking the largest score off each row first changes nothing and keeps exp from overflowing.
    """
    x -= x.max(-1, keepdims=True)
    np.exp(x, out=x)
    x /= row_sum(x)
    return x


def softmax_backward(
    dout: Float[ndarray, "*N S"], att: Float[ndarray, "*N S"]
) -> Float[ndarray, "*N S"]:
    """dscores = att (dout - sum(dout att)), in place of dout."""
    dout -= row_sum(dout, att)
    dout *= att
    return dout


ATTEND_ROWS = 128  # queries at a time


def attend(
    q: Float[ndarray, "B H T D"],
    k: Float[ndarray, "B H S D"],
    v: Float[ndarray, "B H S D"],
    positions: Integer[ndarray, "#B T"],
) -> tuple[Float[ndarray, "B H T D"], Cache]:
    """Mix the values by how well each query matches each key that is not later than itself.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D): softmax(q k^T / sqrt(D)) v. Key s is at
    position s, query t of row b at positions[b, t], and sees the keys s <= positions[b, t] only:
    a block of queries is compared with the keys that its last one sees, and no later ones.
    Vaswani et al. 2017, arXiv:1706.03762, 3.2.1.
    """
    B, H, T, D = q.shape
    out = np.empty((B, T, H, D), q.dtype).transpose(0, 2, 1, 3)  # so that merging heads is free
    atts = []
    for start in range(0, T, ATTEND_ROWS):
        seen = positions[:, start : start + ATTEND_ROWS]
        atts.append(np.empty((B, H, seen.shape[1], seen.max() + 1), q.dtype))

    def mix(heads):
        for i, att in enumerate(atts):
            rows, S = slice(i * ATTEND_ROWS, (i + 1) * ATTEND_ROWS), att.shape[-1]
            scores, keys = att[:, heads], k[:, heads, :S]  # (B, H, ATTEND_ROWS, S), (B, H, S, D)
            np.matmul(q[:, heads, rows], keys.swapaxes(-1, -2), out=scores)
            scores *= 1 / math.sqrt(D)
            if positions[:, rows].min() < S - 1:  # some query must not see some key
                future = np.arange(S) > positions[:, None, rows, None]
                np.copyto(scores, -np.inf, where=future)
            np.matmul(softmax(scores), v[:, heads, :S], out=out[:, heads, rows])

    blas.parallel_for(mix, H, work=q.size * k.shape[2])
    return out, (q, k, v, atts)


def attend_backward(
    dout: Float[ndarray, "B H T D"], cache: Cache
) -> tuple[Float[ndarray, "B H T D"], Float[ndarray, "B H S D"], Float[ndarray, "B H S D"]]:
    """dv = att^T dout;  dscores = softmax_backward(dout v^T);  dq, dk = dscores (k, q) / sqrt(D).

    Nothing is needed for the keys that were hidden: their att, and so their dscores, are 0.
    """
    q, k, v, atts = cache
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)

    def undo(heads):
        dout_, q_, k_, v_, dq_, dk_, dv_ = (x[:, heads] for x in (dout, q, k, v, dq, dk, dv))
        for i, att in enumerate(atts):
            rows, S = slice(i * ATTEND_ROWS, (i + 1) * ATTEND_ROWS), att.shape[-1]
            att = att[:, heads]
            dv_[:, :, :S] += att.swapaxes(-1, -2) @ dout_[:, :, rows]
            dscores = softmax_backward(dout_[:, :, rows] @ v_[:, :, :S].swapaxes(-1, -2), att)
            dscores *= 1 / math.sqrt(q.shape[-1])
            dq_[:, :, rows] = dscores @ k_[:, :, :S]
            dk_[:, :, :S] += dscores.swapaxes(-1, -2) @ q_[:, :, rows]

    blas.parallel_for(undo, q.shape[1], work=q.size * k.shape[2])
    return dq, dk, dv


def attention(
    x: Float[ndarray, "B T C"],
    p: Node,
    n_head: int,
    positions: Integer[ndarray, "#B T"],
    past: Float[ndarray, "2 B H n_ctx D"] | None = None,
) -> tuple[Float[ndarray, "B T C"], Cache]:
    """Multi-head causal self-attention: x (B, T, C) -> (B, T, C).

    With `past`, one layer of a KVCache, the keys and values of earlier calls are seen too.
    Vaswani et al. 2017, 3.2.2.
    """
    qkv, x = linear(x, p.c_attn)  # (B, T, 3C)
    q, k, v = split_heads(qkv, n_head)  # (B, H, T, D) each
    if past is not None:
        k, v = remember(past, k, v, positions)  # (B, H, S, D)
    out, heads = attend(q, k, v, positions)  # (B, H, T, D)
    out, merged = linear(merge_heads(out), p.c_proj)  # (B, T, C)
    return out, (x, heads, merged)


def attention_backward(
    dout: Float[ndarray, "B T C"], cache: Cache, p: Node, d: Node, n_head: int
) -> Float[ndarray, "B T C"]:
    """The steps of `attention` undone one by one."""
    x, heads, merged = cache
    dout = linear_backward(dout, merged, p.c_proj, d.c_proj)  # (B, T, C)
    dq, dk, dv = attend_backward(split_heads(dout, n_head, 1)[0], heads)
    dqkv = np.concatenate([merge_heads(dx) for dx in (dq, dk, dv)], axis=-1)  # (B, T, 3C)
    return linear_backward(dqkv, x, p.c_attn, d.c_attn)


def split_heads(
    x: Float[ndarray, "B T W"], n_head: int, n_parts: int = 3
) -> Float[ndarray, "{n_parts} B {n_head} T D"]:
    """View (B, T, n_parts C) as n_parts arrays (B, H, T, D); a head's channels are adjacent."""
    B, T, width = x.shape
    x = x.reshape(B, T, n_parts, n_head, width // n_parts // n_head)
    return x.transpose(2, 0, 3, 1, 4)


def merge_heads(x: Float[ndarray, "B H T D"]) -> Float[ndarray, "B T H*D"]:
    """(B, H, T, D) -> (B, T, C), the inverse of `split_heads`."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


def mlp(x: Float[ndarray, "B T C"], p: Node) -> tuple[Float[ndarray, "B T C"], Cache]:
    """Two linear layers with GELU between them, 4C wide inside: x (B, T, C) -> (B, T, C).

    Vaswani et al. 2017, 3.3, there with ReLU.
    """
    h, x = linear(x, p.c_fc)  # (B, T, 4C)
    h, activation = gelu(h)
    out, h = linear(h, p.c_proj)  # (B, T, C)
    return out, (x, activation, h)


def mlp_backward(
    dout: Float[ndarray, "B T C"], cache: Cache, p: Node, d: Node
) -> Float[ndarray, "B T C"]:
    """The steps of `mlp` undone one by one."""
    x, activation, h = cache
    dh = linear_backward(dout, h, p.c_proj, d.c_proj)
    dh = gelu_backward(dh, activation)
    return linear_backward(dh, x, p.c_fc, d.c_fc)


def block(
    x: Float[ndarray, "B T C"],
    p: Node,
    n_head: int,
    positions: Integer[ndarray, "#B T"],
    past: Float[ndarray, "2 B H n_ctx D"] | None = None,
) -> tuple[Float[ndarray, "B T C"], Cache]:
    """One transformer block: attention, then MLP, each added to the residual stream (B, T, C).

    The sums are the residual connections of He et al. 2015, arXiv:1512.03385. GPT-2 normalises the
    input of each branch, not its output (pre-norm; Radford et al. 2019, 2.3).
    """
    h, ln_1 = layer_norm(x, p.ln_1)
    h, attn = attention(h, p.attn, n_head, positions, past)
    x = x + h
    h, ln_2 = layer_norm(x, p.ln_2)
    h, mlp_ = mlp(h, p.mlp)
    x = x + h
    return x, (ln_1, attn, ln_2, mlp_)


def block_backward(
    dx: Float[ndarray, "B T C"], cache: Cache, p: Node, d: Node, n_head: int
) -> Float[ndarray, "B T C"]:
    """A sum passes its gradient on to both terms: each branch adds to what the stream carries."""
    ln_1, attn, ln_2, mlp_ = cache
    dh = mlp_backward(dx, mlp_, p.mlp, d.mlp)
    dx = dx + layer_norm_backward(dh, ln_2, p.ln_2, d.ln_2)
    dh = attention_backward(dx, attn, p.attn, d.attn, n_head)
    dx = dx + layer_norm_backward(dh, ln_1, p.ln_1, d.ln_1)
    return dx


# ----------------------------------------------------------------------------------------------
# The model


def forward(
    params: Params, tokens: Ids, kv: KVCache | None = None, record: dict[str, ndarray] | None = None
) -> Float[ndarray, "*B T V"]:
    """Return the logits of the next token after each token: (T,) -> (T, V), or (B, T) -> (B, T, V).

    With kv, a KVCache of batch size B, `tokens` continue those of earlier calls and only they are
    computed. Row t of the logits depends on tokens 0..t only. The dtype is that of the parameters.
    The head is wte once more (tied weights; Press and Wolf 2016, arXiv:1608.05859).
    `record`, a dict, receives what the model computes on the way, by name: the residual stream as
    "embed" and, after block 3, "h3"; within a block what `name_activations` says, as
    "h3.attn.att"; "ln_f" and "logits". Their shapes begin with B only if that of `tokens` does.
    Raises ValueError for an id outside the vocabulary or a position beyond n_ctx.
    """
    batch, single = check_tokens(params.config, tokens, kv), np.ndim(tokens) == 1
    recorded: dict[str, ndarray] = {}
    x = transformer(params, batch, kv, record=None if record is None else recorded)
    logits = x @ params.wte.T
    if record is not None:
        recorded |= {"ln_f": x, "logits": logits}
        record |= {name: array[0] if single else array for name, array in recorded.items()}
    return logits[0] if single else logits


def check_tokens(config: Config, tokens: Ids, kv: KVCache | None = None) -> Integer[ndarray, "B T"]:
    """Return tokens as an array (B, T); raise ValueError if the model cannot take them."""
    tokens = np.asarray(tokens)
    if tokens.ndim not in (1, 2) or tokens.size == 0 or tokens.dtype.kind not in "iu":
        found = f"shape {tokens.shape}, dtype {tokens.dtype}"
        raise ValueError(f"tokens must be whole numbers of shape (T,) or (B, T), found {found}")
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= config.n_vocab:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary of {config.n_vocab}")
    tokens = np.atleast_2d(tokens)
    B, T = tokens.shape
    if kv is not None and len(kv.length) != B:
        raise ValueError(f"{B} rows of tokens, but the KV cache has {len(kv.length)}")
    end = T if kv is None else T + kv.length.max()
    if end > config.n_ctx:
        raise ValueError(f"position {end} exceeds n_ctx = {config.n_ctx}")
    return tokens


def transformer(
    params: Params,
    tokens: Integer[ndarray, "B T"],
    kv: KVCache | None = None,
    caches: list | None = None,
    record: dict[str, ndarray] | None = None,
) -> Float[ndarray, "B T C"]:
    """Run everything but the head: tokens (B, T) -> x (B, T, C), normalised by ln_f.

    `caches`, a list, receives what `transformer_backward` needs; without it the cache of a layer
    is dropped as soon as the layer is done. `record`, a dict, receives activations by name.
    """
    blas.tune_malloc()
    keep = (lambda cache: None) if caches is None else caches.append
    n_head = params.config.n_head
    start = np.zeros(1, int) if kv is None else kv.length
    positions = start[:, None] + np.arange(tokens.shape[1])  # (B or 1, T)
    x, cache = embed(tokens, positions, params)
    keep(cache)
    if record is not None:
        record["embed"] = x
    for i, p in enumerate(params.h):
        x, cache = block(x, p, n_head, positions, None if kv is None else kv.layers[i])
        keep(cache)
        if record is not None:
            named = name_activations(cache, p)
            record |= {f"h{i}.{name}": array for name, array in named.items()} | {f"h{i}": x}
    x, cache = layer_norm(x, params.ln_f)
    keep(cache)
    if kv is not None:
        kv.length += tokens.shape[1]
    return x


def transformer_backward(
    dx: Float[ndarray, "B T C"],
    caches: list,
    params: Params,
    grads: Params,
    done: Callable[[int], None] = lambda layer: None,
) -> None:
    """Add to grads what dx (B, T, C), the gradient of the transformer's output, implies.

    `done(i)` is called when the gradients of layer i are whole.
    """
    dx = layer_norm_backward(dx, caches.pop(), params.ln_f, grads.ln_f)
    for i in reversed(range(params.config.n_layer)):
        dx = block_backward(dx, caches.pop(), params.h[i], grads.h[i], params.config.n_head)
        done(i)
    embed_backward(dx, caches.pop(), grads)


def name_activations(cache: Cache, p: Node) -> dict[str, ndarray]:
    """Return what the cache of a block holds, by name; all are (B, T, C) but where it says more.

    ln_1, ln_2: what the branches read, normalised. attn.q, attn.k, attn.v: (B, H, T or S, D).
    attn.att: who looks at whom, (B, H, T, S). attn.heads: what they bring, side by side. mlp.fc
    and mlp.gelu: before and after the activation, (B, T, 4C). attn.out, mlp.out: what each branch
    adds to the residual stream.
    """
    _, (ln_1, (q, k, v, atts), heads), _, (ln_2, (fc, _), gelu) = cache
    att = np.zeros((*q.shape[:3], k.shape[2]), q.dtype)
    for i, rows in enumerate(atts):
        att[:, :, i * ATTEND_ROWS : (i + 1) * ATTEND_ROWS, : rows.shape[-1]] = rows
    attn = {"q": q, "k": k.copy(), "v": v.copy(), "att": att, "heads": heads}  # a KVCache changes
    attn["out"] = linear(heads, p.attn.c_proj)[0]
    mlp = {"fc": fc, "gelu": gelu, "out": linear(gelu, p.mlp.c_proj)[0]}
    named = {"ln_1": ln_1, "ln_2": ln_2}
    named |= {f"attn.{name}": array for name, array in attn.items()}
    return named | {f"mlp.{name}": array for name, array in mlp.items()}


IGNORE = -1  # a target that takes no part in the loss


def cross_entropy(
    logits: Float[ndarray, "N V"], targets: Integer[ndarray, " N"]
) -> tuple[Float[ndarray, " N"], Cache]:
    """-log softmax(logits)[target] of each row, 0 where the target is IGNORE.

    logits (N, V), which is overwritten, targets (N,) -> losses (N,).
    """
    logits -= logits.max(-1, keepdims=True)
    at_target = logits[np.arange(len(targets)), targets]
    exp = np.exp(logits, out=logits)
    total = row_sum(exp)[:, 0]
    losses = np.log(total) - at_target
    losses[targets == IGNORE] = 0
    return losses, (exp, total, targets)


def cross_entropy_backward(dout: Float[ndarray, " N"], cache: Cache) -> Float[ndarray, "N V"]:
    """dlogits = dout (softmax(logits) - onehot(target)), in the memory of the logits: (N, V)."""
    exp, total, targets = cache
    dout = np.where(targets == IGNORE, 0, dout)
    dlogits = exp
    dlogits *= (dout / total)[:, None]
    dlogits[np.arange(len(targets)), targets] -= dout
    return dlogits


HEAD_ROWS = 256  # rows whose logits exist at one time: 50 MB of float32 for GPT-2's vocabulary
HEAD_IDS = 4096  # ids whose gradient is added up at one time


def head(
    x: Float[ndarray, "N C"], p: Node, targets: Integer[ndarray, " N"], d: Node = None
) -> tuple[Float[ndarray, " N"], Any]:
    """The logits x wte^T and their cross-entropy: x (N, C), targets (N,) -> losses (N,), dx (N, C).

    Forward and backward in one, over blocks of rows, since the logits (N, V) are the largest array
    of training and need never exist whole. With d, the gradient of the mean loss over all targets
    that count is added to d.wte and returned as dx; without d, dx is None.
    """
    counted = targets != IGNORE
    dout = counted.astype(x.dtype) / max(int(counted.sum()), 1)
    losses = np.empty(len(x), x.dtype)
    dx = None if d is None else np.empty_like(x)
    for start in range(0, len(x), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        logits = x[rows] @ p.wte.T  # (HEAD_ROWS, V)
        losses[rows], cache = cross_entropy(logits, targets[rows])
        if dx is not None:
            dlogits = cross_entropy_backward(dout[rows], cache)
            for first in range(0, len(d.wte), HEAD_IDS):  # a product as large as wte is not made
                ids = slice(first, first + HEAD_IDS)
                d.wte[ids] += dlogits[:, ids].T @ x[rows]
            dx[rows] = dlogits @ p.wte
    return losses, dx


def token_losses(params: Params, tokens: Ids, targets: Ids) -> Float[ndarray, "*B T"]:
    """Return -log P(target | tokens up to it), in nats: (T,) -> (T,), or (B, T) -> (B, T).

    It is 0 where the target is -1. Raises ValueError for ids that the model cannot take.
    """
    tokens, flat_targets = check_targets(params.config, tokens, targets)
    x = transformer(params, tokens)
    losses, _ = head(as_rows(x), params, flat_targets)
    return losses.reshape(np.shape(targets))


def loss_and_grads(
    params: Params,
    tokens: Ids,
    targets: Ids,
    grads: Params | None = None,
    done: Callable[[int], None] = lambda layer: None,
) -> tuple[float, Params]:
    """Return the mean cross-entropy in nats a token, and its gradient, a Params like `params`.

    tokens and targets are (T,) or (B, T); a target of -1 takes no part. With `grads`, the gradient
    is added to it, so that several batches accumulate; `done(i)` is called when those of layer i
    are whole, the last layer first. Raises ValueError as `forward` does, or for targets of another
    shape, outside the vocabulary, or all -1.
    """
    tokens, targets = check_targets(params.config, tokens, targets)
    if grads is None:
        grads = Params(params.config, np.zeros_like(params.flat))
    caches: list = []
    x = transformer(params, tokens, caches=caches)
    losses, dx = head(as_rows(x), params, targets, grads)
    transformer_backward(dx.reshape(x.shape), caches, params, grads, done)
    return float(losses.sum(dtype=np.float64) / np.sum(targets != IGNORE)), grads


def check_targets(
    config: Config, tokens: Ids, targets: Ids
) -> tuple[Integer[ndarray, "B T"], Integer[ndarray, " B*T"]]:
    """Return tokens (B, T) and targets (B * T,); raise ValueError where they do not fit."""
    tokens, found = check_tokens(config, tokens), np.shape(tokens)
    targets = np.asarray(targets)
    if targets.shape != found or targets.dtype.kind not in "iu":
        raise ValueError(f"targets of shape {targets.shape} for tokens of shape {found}")
    if targets.min() < IGNORE or targets.max() >= config.n_vocab:
        bad = targets.min() if targets.min() < IGNORE else targets.max()
        raise ValueError(f"target {bad} is outside the vocabulary of {config.n_vocab}")
    if (targets == IGNORE).all():
        raise ValueError("every target is -1: there is no loss to take the mean of")
    return tokens, targets.ravel()


# ----------------------------------------------------------------------------------------------
# The key/value cache


class KVCache:
    """The keys and values of the tokens read so far, so that each token is computed once.

    Incremental inference is described in Shazeer 2019, arXiv:1911.02150.
    `layers` (L, 2, B, H, n_ctx, D) is allocated at the start and filled from position 0 up;
    `length` (B,) counts the tokens in each row, which need not be equal. It takes
    8 B n_ctx n_layer n_embd bytes in float32: 75 MB a row for 124M, touched only as it fills.
    """

    def __init__(self, config: Config, batch_size: int = 1, dtype: DTypeLike = np.float32) -> None:
        c = config
        shape = (c.n_layer, 2, batch_size, c.n_head, c.n_ctx, c.n_embd // c.n_head)
        self.layers = np.zeros(shape, dtype)
        self.length = np.zeros(batch_size, int)

    def row(self, b: int) -> KVCache:
        """Return row b as a KVCache of batch size 1 that shares this one's memory."""
        row = copy.copy(self)
        row.layers = self.layers[:, :, b : b + 1]
        row.length = self.length[b : b + 1]
        return row

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` a copy of row `source`."""
        n = self.length[target] = self.length[source]
        self.layers[:, :, target, :, :n] = self.layers[:, :, source, :, :n]


def remember(
    past: Float[ndarray, "2 B H n_ctx D"],
    k: Float[ndarray, "B H T D"],
    v: Float[ndarray, "B H T D"],
    positions: Integer[ndarray, "B T"],
) -> tuple[Float[ndarray, "B H S D"], Float[ndarray, "B H S D"]]:
    """Write k, v (B, H, T, D) into `past` (2, B, H, n_ctx, D); return all so far, (B, H, S, D).

    S is the length of the longest row; what a shorter row has there is later than its queries, and
    so hidden from them.
    """
    T, S = positions.shape[1], positions[:, -1].max() + 1
    for b, start in enumerate(positions[:, 0]):
        past[0, b, :, start : start + T] = k[b]
        past[1, b, :, start : start + T] = v[b]
    return past[0, :, :, :S], past[1, :, :, :S]


# ----------------------------------------------------------------------------------------------
# Sampling and generation


def distribution(
    logits: Float[ndarray, " V"],
    temperature: SupportsFloat = 1.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
) -> tuple[Integer[ndarray, " N"], Float[ndarray, " N"]]:
    """Return the ids that may follow and their probabilities: logits (V,) -> ids (N,), probs (N,).

    That is softmax(logits / temperature), of which top_k keeps only the k most probable ids (Fan et
    al. 2018, arXiv:1805.04833), top_p the fewest that have a probability of p together (Holtzman et
    al. 2019, arXiv:1904.09751); of equal logits the lower id counts as the more probable, as in
    argmax, which alone is left at temperature 0. probs is float64 and sums to 1. With top_k or
    top_p the most probable id comes first, without them ids is 0..V-1.
    """
    if temperature == 0:
        return np.array([logits.argmax()]), np.ones(1)
    logits = logits.astype(np.float64)  # so that no small probability is rounded away
    ids = np.arange(len(logits))
    if top_k is not None or top_p is not None:
        ids = np.argsort(-logits, kind="stable")[:top_k]
    with np.errstate(over="ignore"):  # a tiny temperature: all but the best become -inf, exp to 0
        probs = softmax((logits[ids] - logits.max()) / temperature)
    if top_p is not None:
        cumulative = probs.cumsum()
        n_kept = np.searchsorted(cumulative, top_p * cumulative[-1]) + 1  # the one that crosses p
        ids, probs = ids[:n_kept], probs[:n_kept] / cumulative[n_kept - 1]
    return ids, probs


def sample(
    logits: Float[ndarray, " V"],
    rng: Generator,
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
) -> int:
    """Draw an id from `distribution`: logits (V,) -> int. `rng` is a numpy.random.Generator."""
    ids, probs = distribution(logits, temperature, top_k, top_p)
    if temperature == 0:
        return int(ids[0])
    # The first id whose cumulative probability exceeds a point below the total: never one of
    # probability 0, since that adds nothing to the cumulative probability before it.
    cumulative = probs.cumsum()
    point = rng.random() * cumulative[-1]
    last = np.searchsorted(cumulative, cumulative[-1])
    return int(ids[min(np.searchsorted(cumulative, point, side="right"), last)])


def penalise(
    logits: Float[ndarray, " V"], ids: Sequence, penalty: SupportsFloat
) -> Float[ndarray, " V"]:
    """Return logits (V,) with those of `ids` made less probable by `penalty` > 1.

    Positive logits are divided by it and negative ones multiplied (Keskar et al. 2019,
    arXiv:1909.05858, as widely implemented).
    """
    logits, old = logits.copy(), logits[ids]
    logits[ids] = np.where(old > 0, old / penalty, old * penalty)
    return logits


def generate(
    params,
    tokens,
    n_tokens,
    temperature=0.0,
    top_k=None,
    top_p=None,
    seed=None,
    repetition_penalty=1.0,
    eot="last",
    n_vocab=None,
    watch=None,
):
    """Return an iterator over the ids that follow `tokens`, n_tokens at most.

    `tokens` is one prompt, ids (T,), and each item an int; it ends before the end-of-text id. Or
    it is a list of prompts, of any lengths, and each item a list of one id for each; a prompt that
    has reached end-of-text goes on giving that id until all have. Each prompt gives what it gives
    alone: prompt number b draws its samples from numpy's default_rng(seed + b). An empty prompt
    starts from end-of-text. Past n_ctx the model re-reads the last half of the window and goes on.

    `eot` is the end-of-text id: by default the last of the vocabulary, as in GPT-2; None if there
    is none, and then a prompt must not be empty. `n_vocab` leaves out the ids from there on, which
    a model may have and its tokenizer not. `watch(b, logits, id)`, if given, is called for every id
    drawn for prompt number b, the end-of-text id too, with the logits it was drawn from: penalised,
    and without the ids left out. See `distribution` and `penalise` for the rest.
    Raises ValueError for a prompt longer than n_ctx, ids outside the vocabulary, or a sampling
    parameter out of range.
    """
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    if n_tokens < 0:
        raise ValueError(f"n_tokens = {n_tokens} is negative")
    config = params.config
    eot = config.n_vocab - 1 if eot == "last" else eot
    single = all(np.ndim(token) == 0 for token in tokens)
    if not single and any(np.ndim(prompt) != 1 for prompt in tokens):
        raise ValueError("tokens are neither one list of ids nor a list of such lists")
    start = [] if eot is None else [eot]
    prompts = [list(prompt) or start.copy() for prompt in ([tokens] if single else tokens)]
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty, and there is no end-of-text token to start from")
        if len(prompt) > config.n_ctx:
            raise ValueError(f"prompt of {len(prompt)} tokens exceeds n_ctx = {config.n_ctx}")
        check_tokens(config, prompt)

    seeds = [None if seed is None else seed + b for b in range(len(prompts))]
    rngs = [np.random.default_rng(seed) for seed in seeds]

    def choose(b, logits):
        logits = logits[:n_vocab]
        if repetition_penalty != 1:
            logits = penalise(logits, prompts[b], repetition_penalty)
        id = sample(logits, rngs[b], temperature, top_k, top_p)
        if watch is not None:
            watch(b, logits, id)
        return id

    steps = generate_batch(params, prompts, n_tokens, choose, eot)
    return (ids[0] for ids in steps) if single else steps


def check_sampling(temperature, top_k, top_p, repetition_penalty):
    """Raise ValueError, with value and limit, for a sampling parameter out of its range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature} is not a finite number of 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} is not 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} is not over 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty = {repetition_penalty} is not a finite number over 0")


def generate_batch(params, prompts, n_tokens, choose, eot):
    """Yield lists of one id for each prompt, appended to it, chosen by `choose(b, logits)`."""
    kv = KVCache(params.config, len(prompts), params.flat.dtype)
    histories = prompts
    logits = prefill(params, prompts, kv)  # (B, V)
    for n in range(n_tokens):
        for b, history in enumerate(histories):
            ended = n > 0 and history[-1] == eot
            history.append(eot if ended else choose(b, logits[b]))
        if all(history[-1] == eot for history in histories):
            return
        yield [history[-1] for history in histories]
        if n + 1 < n_tokens:
            logits = step(params, histories, kv)


def prefill(params: Params, prompts: list[list], kv: KVCache) -> Float[ndarray, "B V"]:
    """Read each prompt into its row of the cache; return the logits (B, V) after its last token.

    A prompt that occurs again is read once.
    """
    logits: list[ndarray] = []
    first: dict[tuple, int] = {}
    for b, prompt in enumerate(prompts):
        a = first.setdefault(tuple(prompt), b)
        if a == b:
            logits.append(last_logits(params, np.array([prompt]), kv.row(b))[0])
        else:
            kv.copy_row(a, b)
            logits.append(logits[a])
    return np.stack(logits)


def step(params: Params, histories: list[list], kv: KVCache) -> Float[ndarray, "B V"]:
    """Read the newest token of each row; return the logits (B, V) after it.

    A full row is first read anew from the last n_ctx / 2 of its tokens.
    """
    for b in np.flatnonzero(kv.length == params.config.n_ctx).tolist():
        kv.length[b] = 0
        recent = histories[b][-max(params.config.n_ctx // 2, 1) : -1]
        if recent:
            transformer(params, np.array([recent]), kv.row(b))
    return last_logits(params, np.array([history[-1:] for history in histories]), kv)


def last_logits(
    params: Params, tokens: Integer[ndarray, "B T"], kv: KVCache
) -> Float[ndarray, "B V"]:
    """Logits after the last of tokens (B, T) only -> (B, V): a prompt's others are not needed."""
    return times(transformer(params, tokens, kv)[:, -1], params.wte)


# ----------------------------------------------------------------------------------------------
# The command line


def load(name: str | Path = "124M", models_dir: str | Path = hub.MODELS_DIR) -> Params:
    """Return the Params, memory-mapped and read-only, of a model's name, folder or model.bin.

    One of OpenAI's models (124M, 355M, 774M, 1558M) that is not in models_dir yet is downloaded.
    Raises FileNotFoundError for an unknown name, ValueError for a damaged file.
    """
    return llmc.load_params(hub.find_model(name, models_dir))


class TextStream:
    """Turns ids into text that can be shown at once, until end-of-text or a stop string.

    It holds back bytes that are not yet a whole character, and text that the ids to come may make
    into one of `stops`. `feed(id)` and `flush()` return what is ready; `done` is True at the end.
    """

    def __init__(self, enc, stops=()):
        self.enc, self.stops, self.done = enc, stops, False
        self.decoder, self.held = enc.stream(), ""

    def feed(self, id):
        """Return the text, possibly none, that is ready after one more id."""
        if self.done or id == self.enc.eot:
            return self.flush()
        return self._release(self.decoder.feed(id))

    def flush(self):
        """Return the text that was held back; there will be no more."""
        text = "" if self.done else self._release(self.decoder.flush()) + self.held
        self.held, self.done = "", True
        return text

    def _release(self, text):
        self.held += text
        starts = [(stop, self.held.find(stop)) for stop in self.stops]
        found = [(at + len(stop), at) for stop, at in starts if at >= 0]
        if found:  # the one that ends first, however the text came in tokens
            text, self.held, self.done = self.held[: min(found)[1]], "", True
            return text
        begun = max((overlap(self.held, stop) for stop in self.stops), default=0)
        ready = len(self.held) - begun
        text, self.held = self.held[:ready], self.held[ready:]
        return text


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    lengths = range(min(len(text), len(stop)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def generate_texts(params, enc, ids, args, times, rows):
    """Yield, token by token, a list of the text that each sample goes on with.

    `times` receives the moment at which each token is there, after that of the start; rows[b], with
    --explain, a line about each token of sample b.
    """
    streams = [TextStream(enc, args.stop) for _ in range(args.n_samples)]
    sampling = {name: getattr(args, name) for name in SAMPLING}
    sampling |= {"seed": args.seed, "eot": enc.eot, "n_vocab": enc.n_vocab}

    def watch(b, logits, id):
        if not streams[b].done:
            rows[b].append(explain(enc, logits, id, args))

    if args.explain:
        sampling["watch"] = watch
    prompts = [ids] * args.n_samples
    times.append(time.perf_counter())
    for step_ids in generate(params, prompts, args.n_tokens, **sampling):
        times.append(time.perf_counter())
        yield [stream.feed(id) for stream, id in zip(streams, step_ids, strict=True)]
        if all(stream.done for stream in streams):
            return
    yield [stream.flush() for stream in streams]


def explain(enc, logits, id, args):
    """Return a line: the id drawn, its probability, then the most probable ids that it could be.

    They are the probabilities that `sample` drew from, but at temperature 0, where that leaves one
    id, those of temperature 1. The line is as long as the terminal is wide.
    """
    limits = (args.temperature, args.top_k, args.top_p) if args.temperature else ()
    ids, probs = distribution(logits, *limits)
    n_shown = max(1, (shutil.get_terminal_size().columns - 19) // 20)
    shown = [*np.flatnonzero(ids == id), *np.argsort(-probs, kind="stable")[:n_shown]]
    drawn, *others = (f"{show_token(enc, ids[i])} {show_percent(probs[i]):>6}" for i in shown)
    return f"{drawn} | {'  '.join(others)}"


def show_token(enc, id, width=11):
    r"""Return a token as Python would write it, filled or cut to `width`: ' cat', '\n', b'\xe2'."""
    try:
        text = repr(enc.tokens[id].decode())
    except UnicodeDecodeError:
        text = repr(enc.tokens[id])  # a part of a character
    text = "end of text" if id == enc.eot else text
    while columns(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text + " " * (width - columns(text))


def columns(text):
    """Return the width of a text in a terminal, where Chinese, say, takes two columns a letter."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def show_percent(p):
    """Return a probability in percent; neither 0 nor 100 unless it is that exactly."""
    if 0 < p < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= p < 1 else f"{p:.1%}"


def write_samples(params, enc, ids, args):
    """Continue a prompt, and write the text to standard output.

    A single sample is written as it is made, but with --explain after the lines about its tokens,
    which go to standard error.
    """
    texts, times = [], []
    header = "drawn              | most probable" + (" at temperature 1" * (not args.temperature))
    rows = [[header] if args.explain else [] for _ in range(args.n_samples)]
    live = args.n_samples == 1 and not args.explain
    for pieces in generate_texts(params, enc, ids, args, times, rows):
        texts.append(pieces)
        if live:
            print(pieces[0], end="", flush=True)
        elif args.n_samples == 1:
            print_rows(rows[0])
    if live:
        print()
    for b in range(0 if live else args.n_samples):
        if args.n_samples > 1:
            print(f"--- sample {b + 1} of {args.n_samples} ---", file=sys.stderr, flush=True)
        print_rows(rows[b])
        print("".join(pieces[b] for pieces in texts), flush=True)
    if args.stats:
        print_stats(max(1, len(ids)), args.n_samples, times)


def print_rows(rows):
    """Write lines to standard error, and forget them."""
    for row in rows:
        print(row, file=sys.stderr, flush=True)
    rows.clear()


def print_stats(n_prompt: int, n_samples: int, times: list[float]) -> None:
    """Report the speed of reading the prompt and of the tokens after the first one."""
    if len(times) == 1:
        print("no token was generated: the text was at its end", file=sys.stderr)
        return
    prefill, decode, n = times[1] - times[0], times[-1] - times[1], (len(times) - 2) * n_samples
    text = f"prefill: {n_prompt} tokens in {prefill:.3f} s, {n_prompt / prefill:.1f} tokens/s"
    if n:
        text += f"; decode: {n} tokens in {decode:.3f} s, {n / decode:.1f} tokens/s"
    print(text, file=sys.stderr)
    print(f"BLAS: {blas.kernels()} kernels, threads: {blas.get_threads()}", file=sys.stderr)


SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def parse_args(argv=None):
    """Parse the command line; exit with status 2 and one line for a bad argument."""
    parser = cli.ArgumentParser(
        prog="gpt2.py",
        usage="%(prog)s [PROMPT] [flags]",
        description="Continue a text with GPT-2, on NumPy. Only the generated text goes to "
        "standard output: notes, speeds and explanations go to standard error.",
        examples=[
            'python gpt2.py "The meaning of life is"',
            'python gpt2.py "Once upon a time" --n_tokens 200 --temperature 0.8 --seed 1',
            'python gpt2.py "Q: What is 2 + 2? A:" --stop "Q:" --explain',
            "python gpt2.py - --model models/mine --n_samples 3 --top_p 0.9 < prompt.txt",
        ],
    )
    positive = cli.positive_int
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="text to continue; "
        "- reads it from standard input; without one the model starts a text")  # fmt: skip
    add = parser.add_argument_group("model").add_argument
    add("--model", type=str, help="124M, 355M, 774M or 1558M, another in --models_dir, or a path; "
        "one of these four is downloaded if it is not there (default: 124M, or stories where that "
        "is not there and there is no network)")  # fmt: skip
    add("--models_dir", type=Path, default=hub.MODELS_DIR, help="folder of the models")
    add = parser.add_argument_group("text").add_argument
    add("--n_tokens", type=positive, default=40, help="tokens to generate at most")
    add("--stop", action="append", default=[], help="end before this text; may be repeated "
        "(default: end at the end-of-text token only)")  # fmt: skip
    add("--n_samples", type=positive, default=1, help="continuations to write")
    add("--interactive", action="store_true", help="read a prompt a line until end of input")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.0, help="the logits are divided by it: below 1 "
        "makes the probable more probable; 0 takes the most probable token each time")  # fmt: skip
    add("--top_k", type=int, help="sample from the k most probable tokens (default: from all)")
    add("--top_p", type=float, help="sample from the fewest tokens of this total probability "
        "(default: from all)")  # fmt: skip
    add("--repetition_penalty", type=float, default=1.0, help="over 1 discourages tokens seen")
    add("--seed", type=int, help="makes samples repeatable; sample i draws from seed + i "
        "(default: different each time)")  # fmt: skip
    add = parser.add_argument_group("reports, on standard error").add_argument
    add("--explain", action="store_true", help="a line for each token: its probability, and the "
        "most probable ones, as it was drawn from; at temperature 0, those of 1")  # fmt: skip
    add("--stats", action="store_true", help="the speed of reading and of writing")
    args = parser.parse_args(argv)
    try:
        check_sampling(*(getattr(args, name) for name in SAMPLING))
    except ValueError as error:
        parser.error(f"argument --{error}")
    if args.seed is not None and args.seed < 0:
        parser.error(f"argument --seed: {args.seed} is negative")
    if "" in args.stop:
        parser.error("argument --stop: the empty text would stop at once")
    return args, parser


def read_prompts(args):
    """Yield the prompts: the argument, or standard input, whole or (--interactive) line by line."""
    if args.prompt == "-":
        yield sys.stdin.read()
    elif args.prompt or not args.interactive:
        yield args.prompt
    while args.interactive:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\r\n")


def check_tokenizer(name: str | Path, params: Params, enc: encoder.Encoder) -> None:
    """Raise ValueError if a tokenizer has ids that the model `name` does not know."""
    if enc.n_vocab > params.config.n_vocab:
        found = f"{enc.n_vocab} tokens, the model only {params.config.n_vocab}"
        raise ValueError(f"{name}: the tokenizer has {found}: they do not belong together")


def main(argv=None):
    """Run the command line: `python gpt2.py --help`."""
    args, parser = parse_args(argv)
    if args.model is None:
        path = hub.find_default_model(args.models_dir)
    else:
        path = hub.find_model(args.model, args.models_dir)
    params = llmc.load_params(path)
    enc = encoder.load(path if path.is_dir() else path.parent)
    check_tokenizer(path, params, enc)
    n_ctx = params.config.n_ctx
    for prompt in read_prompts(args):
        ids = enc.encode(prompt)
        if len(ids) <= n_ctx:
            write_samples(params, enc, ids, args)
            continue
        message = f"prompt of {len(ids)} tokens exceeds n_ctx = {n_ctx}"
        if not args.interactive:
            parser.error(message)
        messages.info(message)


def command():
    """Run the installed command `gpt2`."""
    cli.run(main)


if __name__ == "__main__":
    command()
