"""GPT-2 in NumPy: token ids into logits, gradients and new ids.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". In this order: the
layers, each forward followed by its backward; the model made of them; its loss; the key/value
cache; sampling and generation; the command line.

Every layer is a pair of functions. The forward takes its input and its parameters `p`, and returns
`out, cache`. The backward takes `dout`, the gradient of the loss with respect to `out`, and the
cache. It adds the gradients of the parameters to `d`, which has the names of `p`, and returns the
gradient of the input. It goes through the steps of the forward in reverse order.

Shapes: B batch, T tokens (one query each), S keys, C channels, H heads, D = C / H, V vocabulary,
L layers, N rows, I inputs and O outputs of a linear layer. In annotations *N is any number of axes,
and #B is B or 1. A gradient has the shape of what it is the gradient of. No layer names a dtype:
float32 parameters compute in float32, float64 parameters in float64.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque, namedtuple
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# The package comes before NumPy, whose BLAS it configures.
from gpt2_support import blas, checks, cli, gpt2_cli, hooks, hub, tiles  # isort: skip

import numpy as np

from gpt2_support.blas import matmul, max_last, mean_last, sum_last, sum_rows
from gpt2_support.checks import GREEDY, IGNORE_INDEX, Sampling
from gpt2_support.gradients import accumulate, accumulate_matmul, accumulate_rows
from gpt2_support.hooks import NO_HOOK, Hook
from gpt2_support.prompts import answer_prompts
from gpt2_support.weights import load_params

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Iterator, Sequence
    from typing import Any, Literal, SupportsFloat, SupportsIndex

    from jaxtyping import Float, Integer
    from numpy import ndarray
    from numpy.random import Generator
    from numpy.typing import ArrayLike, DTypeLike

    from gpt2_support.hooks import Edit, Record
    from gpt2_support.masks import Dropout
    from gpt2_support.params import MLP, Attention, Block, Config, LayerNorm, Linear, Params
    from gpt2_support.shapes import AnyRows, Caches, Heads, Keys, Logits, Positions  # isort: skip
    from gpt2_support.shapes import Prompt, Rows, Scores, Stream, Tokens, Weights  # isort: skip

# ----------------------------------------------------------------------------------------------
# The layers

# What a backward needs of its forward.
EmbedCache = namedtuple("EmbedCache", "tokens positions")
LayerNormCache = namedtuple("LayerNormCache", "xhat rstd")
GeluCache = namedtuple("GeluCache", "x sigmoid")
AttentionCache = namedtuple("AttentionCache", "x q k v att_tiles heads")
MLPCache = namedtuple("MLPCache", "x gelu h")
BlockCache = namedtuple("BlockCache", "ln_1 attn ln_2 mlp")
CrossEntropyCache = namedtuple("CrossEntropyCache", "exp total targets")


def embed(tokens: Tokens, positions: Positions, p: Params) -> tuple[Stream, EmbedCache]:
    """Add the embeddings of tokens (B, T) and of positions (B or 1, T): -> (B, T, C).

    Both are learned, as in Radford et al. 2018, "Improving Language Understanding by Generative
    Pre-Training".
    """
    return p.wte[tokens] + p.wpe[positions], EmbedCache(tokens, positions)


def embed_backward(dout: Stream, cache: EmbedCache, d: Params) -> None:
    """dwte[tokens] += dout;  dwpe[positions] += dout, for positions (1, T)."""
    accumulate_rows(d.wpe, cache.positions[0], dout.sum(0))
    accumulate_rows(d.wte, cache.tokens.ravel(), as_rows(dout))


def layer_norm(x: AnyRows, p: LayerNorm, eps: float = 1e-5) -> tuple[AnyRows, LayerNormCache]:
    """Normalise each row to mean 0 and variance 1, then scale and shift it: (..., C) -> (..., C).

    Ba et al. 2016, arXiv:1607.06450.
    """
    xhat = x - mean_last(x)
    rstd = 1 / np.sqrt(mean_last(xhat, xhat) + eps)
    xhat *= rstd
    return xhat * p.g + p.b, LayerNormCache(xhat, rstd)


def layer_norm_backward(
    dout: AnyRows, cache: LayerNormCache, p: LayerNorm, d: LayerNorm
) -> AnyRows:
    """dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), where dxhat = dout g."""
    xhat, rstd = cache
    accumulate(d.b, sum_rows(as_rows(dout)))
    accumulate(d.g, sum_rows(as_rows(dout), as_rows(xhat)))
    dxhat = dout * p.g
    dxhat -= mean_last(dxhat) + xhat * mean_last(dxhat, xhat)
    dxhat *= rstd
    return dxhat


def linear(x: AnyRows, p: Linear) -> tuple[Float[ndarray, "*N O"], AnyRows]:
    """x w^T + b: x (..., I) -> (..., O)."""
    out = matmul(as_rows(x), p.w.T)
    out += p.b
    return out.reshape(*x.shape[:-1], -1), x


def linear_backward(dout: Float[ndarray, "*N O"], x: AnyRows, p: Linear, d: Linear) -> AnyRows:
    """dx = dout w;  dw = dout^T x;  db = the sum of dout over all rows."""
    accumulate(d.b, sum_rows(as_rows(dout)))
    accumulate_matmul(d.w, as_rows(dout).T, as_rows(x))
    return (as_rows(dout) @ p.w).reshape(x.shape)


def as_rows(x: AnyRows) -> Rows:
    """View (..., C) as (N, C): one product over all rows is faster than one for each batch row."""
    return x.reshape(-1, x.shape[-1])


GELU_SCALE = math.sqrt(2 / math.pi)  # math, not np: a NumPy scalar would turn float32 into float64


def gelu(x: AnyRows) -> tuple[AnyRows, GeluCache]:
    """0.5 x (1 + tanh(u)) = x sigmoid(2 u), where u = sqrt(2 / pi) (x + 0.044715 x^3).

    Hendrycks and Gimpel 2016, arXiv:1606.08415, in the tanh form that GPT-2 was trained with. The
    sigmoid needs exp, which takes less time than tanh.
    """
    e = x * x
    e *= -2 * 0.044715 * GELU_SCALE
    e -= 2 * GELU_SCALE
    e *= x  # -2 u
    with np.errstate(over="ignore"):  # where exp is infinite, the sigmoid is 0
        np.exp(e, out=e)
    e += 1
    sigmoid = np.reciprocal(e, out=e)
    return x * sigmoid, GeluCache(x, sigmoid)


def gelu_backward(dout: AnyRows, cache: GeluCache) -> AnyRows:
    """dx = dout sigmoid (1 + x (1 - sigmoid) 2 sqrt(2 / pi) (1 + 3 0.044715 x^2))."""
    x, sigmoid = cache
    dx = x * x
    dx *= 6 * 0.044715 * GELU_SCALE
    dx += 2 * GELU_SCALE  # the derivative of 2 u
    dx *= x
    dx *= 1 - sigmoid
    dx += 1
    dx *= sigmoid
    dx *= dout
    return dx


def softmax(x: AnyRows) -> AnyRows:
    """exp(x) / sum(exp(x)) along the last axis, in place.

    Subtracts the row maximum so that exp cannot overflow.
    """
    x -= max_last(x)
    np.exp(x, out=x)
    x /= sum_last(x)
    return x


def softmax_backward(dout: AnyRows, out: AnyRows) -> AnyRows:
    """dx = out (dout - sum(dout out)), written over dout."""
    dout -= sum_last(dout, out)
    dout *= out
    return dout


def scaled_dot_product_attention(
    q: Heads, k: Keys, v: Keys, positions: Positions, hook: Hook = NO_HOOK
) -> tuple[Heads, Weights]:
    """softmax(q k^T / sqrt(D)) v, where query t sees only the keys s <= positions[b, t].

    Vaswani et al. 2017, arXiv:1706.03762, 3.2.1.
    """
    scores = q @ k.swapaxes(-1, -2)  # (B, H, T, S)
    scores *= 1 / math.sqrt(q.shape[-1])
    probs = softmax(mask_future(scores, positions))
    att = hook("attn.att", probs)
    return att @ v, (probs, att)


def mask_future(scores: Scores, positions: Positions) -> Scores:
    """Set the scores of the keys that are later than their query to -inf, in place."""
    S = scores.shape[-1]
    first = positions.min() + 1  # the first key that is later than some query
    if first < S:
        future = np.arange(first, S) > positions[:, None, :, None]
        np.copyto(scores[..., first:], -np.inf, where=future)
    return scores


def scaled_dot_product_attention_backward(
    dout: Heads, cache: tuple[Heads, Keys, Keys, Weights], hook: Hook = NO_HOOK
) -> tuple[Heads, Keys, Keys]:
    """dv = att^T dout;  datt = dout v^T;  dq = dscores k / sqrt(D);  dk = dscores^T q / sqrt(D).

    A score in the future has att = 0, and so no gradient.
    """
    q, k, v, (probs, att) = cache
    dv = att.swapaxes(-1, -2) @ dout
    datt = hook.backward("attn.att", dout @ v.swapaxes(-1, -2))
    dscores = softmax_backward(datt, probs)
    dscores *= 1 / math.sqrt(q.shape[-1])
    return dscores @ k, dscores.swapaxes(-1, -2) @ q, dv


def attention(
    x: Stream,
    p: Attention,
    n_head: int,
    positions: Positions,
    past: Past | None = None,
    hook: Hook = NO_HOOK,
) -> tuple[Stream, AttentionCache]:
    """Multi-head causal self-attention: (B, T, C) -> (B, T, C).

    With `past`, a layer of a KVCache, queries also see the keys and values of earlier calls.
    Vaswani et al. 2017, 3.2.2.
    """
    qkv, x = linear(x, p.c_attn)  # (B, T, 3C)
    q, k, v = split_heads(qkv, 3, n_head)  # (B, H, T, D) each
    if past is not None:
        k, v = past.update(k, v, positions)  # (B, H, S, D)
    q, k, v = hook("attn.q", q), hook("attn.k", k), hook("attn.v", v)
    heads, att_tiles = tiles.apply(scaled_dot_product_attention, q, k, v, positions, hook)
    out, heads = linear(hook("attn.heads", merge_heads(heads)), p.c_proj)
    return hook("attn.out", out), AttentionCache(x, q, k, v, att_tiles, heads)


def attention_backward(
    dout: Stream,
    cache: AttentionCache,
    p: Attention,
    d: Attention,
    n_head: int,
    hook: Hook = NO_HOOK,
) -> Stream:
    """The steps of `attention` in reverse."""
    x, q, k, v, att_tiles, heads = cache
    dmerged = linear_backward(hook.backward("attn.out", dout), heads, p.c_proj, d.c_proj)
    (dheads,) = split_heads(hook.backward("attn.heads", dmerged), 1, n_head)
    dq, dk, dv = tiles.apply_backward(
        scaled_dot_product_attention_backward, dheads, q, k, v, att_tiles, hook
    )
    dv, dk = hook.backward("attn.v", dv), hook.backward("attn.k", dk)
    dq = hook.backward("attn.q", dq)
    dqkv = np.concatenate([merge_heads(part) for part in (dq, dk, dv)], axis=-1)  # (B, T, 3C)
    return linear_backward(dqkv, x, p.c_attn, d.c_attn)


def split_heads(
    x: Float[ndarray, "B T W"], n: int, n_head: int
) -> Float[ndarray, "{n} B {n_head} T D"]:
    """View (B, T, n C) as n arrays (B, H, T, D): the channels of a head are adjacent."""
    B, T, W = x.shape
    return x.reshape(B, T, n, n_head, W // n // n_head).transpose(2, 0, 3, 1, 4)


def merge_heads(x: Heads) -> Float[ndarray, "B T H*D"]:
    """(B, H, T, D) -> (B, T, C)."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


def mlp(x: Stream, p: MLP, hook: Hook = NO_HOOK) -> tuple[Stream, MLPCache]:
    """Two linear layers with GELU between them, 4C wide inside: (B, T, C) -> (B, T, C).

    Vaswani et al. 2017, 3.3, with GELU for ReLU.
    """
    h, x = linear(x, p.c_fc)  # (B, T, 4C)
    h, gelu_caches = tiles.apply_by_rows(gelu, hook("mlp.fc", h))
    out, h = linear(hook("mlp.gelu", h), p.c_proj)  # (B, T, C)
    return hook("mlp.out", out), MLPCache(x, gelu_caches, h)


def mlp_backward(dout: Stream, cache: MLPCache, p: MLP, d: MLP, hook: Hook = NO_HOOK) -> Stream:
    """The steps of `mlp` in reverse."""
    x, gelu_caches, h = cache
    dh = linear_backward(hook.backward("mlp.out", dout), h, p.c_proj, d.c_proj)
    dh = hook.backward("mlp.gelu", dh)
    dh = tiles.apply_by_rows_backward(gelu_backward, dh, gelu_caches)
    return linear_backward(hook.backward("mlp.fc", dh), x, p.c_fc, d.c_fc)


def block(
    x: Stream,
    p: Block,
    n_head: int,
    positions: Positions,
    past: Past | None = None,
    hook: Hook = NO_HOOK,
) -> tuple[Stream, BlockCache]:
    """Add attention, then the MLP, to the residual stream: (B, T, C) -> (B, T, C).

    The sums are the residual connections of He et al. 2015, arXiv:1512.03385. GPT-2 normalises the
    input of each branch instead of its output (pre-norm; Radford et al. 2019, 2.3).
    """
    h, ln_1 = layer_norm(x, p.ln_1)
    h, attn = attention(hook("ln_1", h), p.attn, n_head, positions, past, hook)
    x = x + h
    h, ln_2 = layer_norm(x, p.ln_2)
    h, mlp_ = mlp(hook("ln_2", h), p.mlp, hook)
    x = x + h
    return x, BlockCache(ln_1, attn, ln_2, mlp_)


def block_backward(
    dx: Stream, cache: BlockCache, p: Block, d: Block, n_head: int, hook: Hook = NO_HOOK
) -> Stream:
    """The steps of `block` in reverse: a sum passes its gradient on to both of its terms."""
    dh = mlp_backward(dx, cache.mlp, p.mlp, d.mlp, hook)
    dx = dx + layer_norm_backward(hook.backward("ln_2", dh), cache.ln_2, p.ln_2, d.ln_2)
    dh = attention_backward(dx, cache.attn, p.attn, d.attn, n_head, hook)
    dx = dx + layer_norm_backward(hook.backward("ln_1", dh), cache.ln_1, p.ln_1, d.ln_1)
    return dx


# ----------------------------------------------------------------------------------------------
# The model


def forward(
    params: Params,
    tokens: ArrayLike,
    kv: KVCache | None = None,
    record: Record | None = None,
    edit: Edit | None = None,
) -> Float[ndarray, "*B T V"]:
    """Return the logits of the next token after each token: (T,) -> (T, V), or (B, T) -> (B, T, V).

    Row t depends on tokens 0..t only. With kv, a KVCache of batch size B, `tokens` continue those
    of earlier calls, and only they are computed. The logits have the dtype of the parameters.
    `record`, a dict, receives every activation by name: the residual stream as "embed" and, after
    block 3, "h3"; within the block "h3.attn.att" and the others of `hooks.INNER`; "ln_f" and
    "logits". `edit`, a dict, replaces activations as they are computed, by an array or by what a
    function makes of them; "h*.attn.heads.5" means head 5 in all blocks. Activations have a batch
    axis only if `tokens` has one.
    Raises ValueError for an id outside the vocabulary, a position beyond n_ctx, or an unknown name.
    """
    batch, is_single = checks.check_tokens(params, tokens, kv), np.ndim(tokens) == 1
    hook = hooks.make(params.config, is_single, edit, record)
    x = transformer(params, batch, kv, hook)
    logits = matmul(as_rows(x), params.wte.T)  # tied weights: Press and Wolf 2016, arXiv:1608.05859
    logits = hook("logits", logits.reshape(*x.shape[:-1], -1))
    return logits[0] if is_single else logits


NO_CACHES: Caches = deque(maxlen=0)  # keeps nothing: for a forward without a backward


def transformer(
    params: Params,
    tokens: Tokens,
    kv: KVCache | None = None,
    hook: Hook = NO_HOOK,
    caches: Caches = NO_CACHES,
) -> Stream:
    """Run everything but the LM head, x wte^T: tokens (B, T) -> the output of ln_f, (B, T, C).

    `caches` receives what the backward of each layer needs.
    """
    blas.tune_malloc()
    if hook is NO_HOOK and caches is NO_CACHES:
        hook = hooks.INFERENCE  # so that attention weights are not kept
    start = np.zeros(1, int) if kv is None else kv.length
    positions = start[:, None] + np.arange(tokens.shape[1])  # (B or 1, T)

    def after(name: str, x: Stream, cache: Any) -> Stream:
        """Keep the cache of a layer; return its output as the hook leaves it."""
        caches.append(cache)
        return hook(name, x)

    x = after("embed", *embed(tokens, positions, params))
    for i, p in enumerate(params.h):
        past, inner = None if kv is None else Past(*kv.buffer[i]), hook.within(f"h{i}")
        x = after(f"h{i}", *block(x, p, params.config.n_head, positions, past, inner))
    if kv is not None:
        kv.length += tokens.shape[1]
    return after("ln_f", *layer_norm(x, params.ln_f))


def transformer_backward(
    dx: Stream, caches: Caches, params: Params, d: Params, hook: Hook = NO_HOOK
) -> None:
    """The layers of `transformer` in reverse; each takes its cache off the end of `caches`."""
    dx = layer_norm_backward(hook.backward("ln_f", dx), caches.pop(), params.ln_f, d.ln_f)
    for i in reversed(range(params.config.n_layer)):
        dx, p, inner = hook.backward(f"h{i}", dx), params.h[i], hook.within(f"h{i}")
        dx = block_backward(dx, caches.pop(), p, d.h[i], params.config.n_head, inner)
    embed_backward(hook.backward("embed", dx), caches.pop(), d)


# ----------------------------------------------------------------------------------------------
# The loss


def cross_entropy(
    logits: Float[ndarray, "N V"], targets: Integer[ndarray, " N"]
) -> tuple[Float[ndarray, " N"], CrossEntropyCache]:
    """-log softmax(logits)[target] of each row; 0 where the target is IGNORE_INDEX, which is -1.

    logits (N, V), which it overwrites, targets (N,) -> losses (N,).
    """
    logits -= max_last(logits)
    at_target = logits[np.arange(len(targets)), targets]
    exp = np.exp(logits, out=logits)
    total = sum_last(exp)[:, 0]
    losses = np.log(total) - at_target
    losses[targets == IGNORE_INDEX] = 0
    return losses, CrossEntropyCache(exp, total, targets)


def cross_entropy_backward(
    dout: Float[ndarray, " N"], cache: CrossEntropyCache
) -> Float[ndarray, "N V"]:
    """dlogits = dout (softmax(logits) - onehot(target)), written over cache.exp."""
    exp, total, targets = cache
    dout = np.where(targets == IGNORE_INDEX, 0, dout)
    dlogits = exp
    dlogits *= (dout / total)[:, None]
    dlogits[np.arange(len(targets)), targets] -= dout
    return dlogits


LM_HEAD_ROWS = 256  # rows of logits at a time: 50 MB of float32 for GPT-2's vocabulary


def lm_head_loss(
    x: Rows,
    wte: Float[ndarray, "V C"],
    targets: Integer[ndarray, " N"],
    dwte: Float[ndarray, "V C"] | None = None,
    n_counted: float | None = None,
) -> tuple[Float[ndarray, " N"], Rows | None]:
    """Cross-entropy of the logits x wte^T: x (N, C), targets (N,) -> losses (N,), dx (N, C).

    With dwte, adds to it the gradient of sum(losses) / n_counted for wte, and returns that for x;
    without, dx is None. n_counted is by default the number of targets that count. Works in blocks
    of rows, so the (N, V) logits never exist whole.
    """
    is_counted = targets != IGNORE_INDEX
    dlosses = is_counted.astype(x.dtype) / (n_counted or max(int(is_counted.sum()), 1))
    losses, dx = np.empty(len(x), x.dtype), None if dwte is None else np.empty_like(x)
    for start in range(0, len(x), LM_HEAD_ROWS):
        rows = slice(start, start + LM_HEAD_ROWS)
        logits = x[rows] @ wte.T
        losses[rows], cache = cross_entropy(logits, targets[rows])
        if dwte is not None and dx is not None:
            dlogits = cross_entropy_backward(dlosses[rows], cache)
            accumulate_matmul(dwte, dlogits.T, x[rows])
            dx[rows] = dlogits @ wte
    return losses, dx


def token_losses(params: Params, tokens: ArrayLike, targets: ArrayLike) -> Float[ndarray, "*B T"]:
    """Return -log P(target | tokens up to it), in nats: (T,) -> (T,), or (B, T) -> (B, T).

    It is 0 where the target is -1. Raises ValueError for ids that the model cannot take.
    """
    tokens, flat_targets, _ = checks.check_targets(params, tokens, targets)
    x = transformer(params, tokens)
    losses, _ = lm_head_loss(as_rows(x), params.wte, flat_targets)
    return losses.reshape(np.shape(targets))


def loss_and_grads(
    params: Params,
    tokens: ArrayLike,
    targets: ArrayLike,
    grads: Params | None = None,
    n_counted: float | None = None,
    drop: Dropout | None = None,
    record: Record | None = None,
    record_grads: Record | None = None,
    edit: Edit | None = None,
) -> tuple[float, Params]:
    """Return the mean cross-entropy in nats per token, and its gradient, a Params like `params`.

    tokens and targets are (T,) or (B, T); targets of -1 do not count. With `grads`, the gradient
    is added to it, so that several batches accumulate. With `n_counted`, the sum of the losses is
    divided by that, not by the number of targets that count here: so the parts of a batch add up.
    `drop`, a Dropout, drops values of the embeddings, the attention weights and the branches.
    `record` and `edit` are those of `forward`, without "logits"; `record_grads`, a dict, receives
    the gradient with respect to each activation, by the same names. An edit by an array or a
    function counts as a constant, unless it has a method `backward`, as `hooks.Add` has.
    Raises ValueError as `forward` does, or for targets of another shape, outside the vocabulary,
    or, without n_counted, all -1, or for grads of another model.
    """
    batch, targets, n_counted = checks.check_targets(params, tokens, targets, n_counted)
    grads = checks.check_grads(params, grads)
    is_single = np.ndim(tokens) == 1
    hook = hooks.make(params.config, is_single, edit, record, record_grads, drop, logits=False)
    caches: Caches = deque()
    x = transformer(params, batch, None, hook, caches)
    losses, dx = lm_head_loss(as_rows(x), params.wte, targets, grads.wte, n_counted)
    transformer_backward(dx.reshape(x.shape), caches, params, grads, hook)  # type: ignore
    return float(losses.sum(dtype=np.float64) / n_counted), grads


def gradient(
    params: Params,
    tokens: ArrayLike,
    dlogits: Float[ndarray, "*B T V"],
    grads: Params | None = None,
    record_grads: Record | None = None,
    edit: Edit | None = None,
) -> Params:
    """Return the gradient of any scalar of the logits of `forward`, a Params like `params`.

    `dlogits` is the gradient of the scalar with respect to the logits. The other parameters are
    those of `loss_and_grads`. Raises ValueError as `forward` does, or for another shape of dlogits
    or grads of another model.
    """
    batch, is_single = checks.check_tokens(params, tokens), np.ndim(tokens) == 1
    dout = checks.check_dlogits(params, tokens, dlogits)
    grads = checks.check_grads(params, grads)
    hook = hooks.make(params.config, is_single, edit, None, record_grads, logits=False)
    caches: Caches = deque()
    x = transformer(params, batch, None, hook, caches)
    accumulate_matmul(grads.wte, dout.T, as_rows(x))
    transformer_backward((dout @ params.wte).reshape(x.shape), caches, params, grads, hook)
    return grads


# ----------------------------------------------------------------------------------------------
# The key/value cache


class KVCache:
    """The keys and values of the tokens read so far, so that each token is computed once.

    `buffer` (L, 2, B, H, n_ctx, D) holds keys and values of every layer, `length` (B,) the number
    of tokens in each row; rows may differ. In float32 it takes 8 B n_ctx n_layer n_embd bytes, 75
    MB a row for 124M. Shazeer 2019, arXiv:1911.02150.
    """

    def __init__(self, config: Config, batch_size: int = 1, dtype: DTypeLike = np.float32) -> None:
        shape = (2, batch_size, config.n_head, config.n_ctx, config.n_embd // config.n_head)
        self.buffer = np.zeros((config.n_layer, *shape), dtype)
        self.length = np.zeros(batch_size, int)

    def row(self, b: int) -> KVCache:
        """Return row b as a KVCache of batch size 1 that shares this one's memory."""
        row = copy.copy(self)
        row.buffer, row.length = self.buffer[:, :, b : b + 1], self.length[b : b + 1]
        return row

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` a copy of row `source`."""
        n = self.length[target] = self.length[source]
        self.buffer[:, :, target, :, :n] = self.buffer[:, :, source, :, :n]


class Past(NamedTuple):
    """A layer of a KVCache: keys and values (B, H, n_ctx, D), filled from position 0 up."""

    keys: Float[ndarray, "B H n_ctx D"]
    values: Float[ndarray, "B H n_ctx D"]

    def update(self, k: Heads, v: Heads, positions: Tokens) -> tuple[Keys, Keys]:
        """Write k, v (B, H, T, D) at `positions`; return all keys and values, (B, H, S, D).

        S is the length of the longest row. What lies beyond the end of a shorter row is masked as
        the future.
        """
        T, S = positions.shape[1], positions[:, -1].max() + 1
        for b, start in enumerate(positions[:, 0]):
            self.keys[b, :, start : start + T] = k[b]
            self.values[b, :, start : start + T] = v[b]
        return self.keys[:, :, :S], self.values[:, :, :S]


# ----------------------------------------------------------------------------------------------
# Sampling and generation


def next_token_probs(
    logits: Logits,
    temperature: SupportsFloat = 1.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
) -> tuple[Integer[ndarray, " N"], Float[ndarray, " N"]]:
    """Return the ids that may follow and their probabilities: logits (V,) -> ids (N,), probs (N,).

    The probabilities are softmax(logits / temperature), in float64. top_k keeps the k most probable
    ids (Fan et al. 2018, arXiv:1805.04833), top_p the fewest whose probabilities reach p together
    (Holtzman et al. 2019, arXiv:1904.09751); the most probable id is then the first. Of equal
    logits the lower id counts as the more probable, as in argmax. Temperature 0 leaves argmax only.
    Raises ValueError if the logits are not finite, or a parameter is out of range.
    """
    temperature, top_k, top_p, *_ = checks.check_sampling(temperature, top_k, top_p)
    best = logits.argmax()  # the index of a NaN, if there is one
    if not math.isfinite(logits[best]):
        raise ValueError("the logits are not finite: the model is damaged or has diverged")
    if temperature == 0:
        return np.array([best]), np.ones(1)
    logits = logits.astype(np.float64)  # so that small probabilities are not rounded away
    ids = np.arange(len(logits))
    if top_k is not None or top_p is not None:
        ids = np.argsort(-logits, kind="stable")[:top_k]
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf for all but the best
        probs = softmax((logits[ids] - logits.max()) / temperature)
    if top_p is not None:
        cumulative = probs.cumsum()
        n_kept = np.searchsorted(cumulative, top_p * cumulative[-1]) + 1  # up to where p is reached
        ids, probs = ids[:n_kept], probs[:n_kept] / cumulative[n_kept - 1]
    return ids, probs


def sample(
    logits: Logits,
    rng: Generator,
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
) -> int:
    """Draw an id from `next_token_probs`: logits (V,) -> int."""
    ids, probs = next_token_probs(logits, temperature, top_k, top_p)
    if temperature == 0:
        return int(ids[0])
    # The first id whose cumulative probability exceeds a random point below the total. An id of
    # probability 0 is never drawn, since it adds nothing to the sum before it. Rounding may lift
    # the point to the total: then the last id that has a probability is drawn.
    cumulative = probs.cumsum()
    point = rng.random() * cumulative[-1]
    last = np.searchsorted(cumulative, cumulative[-1])
    return int(ids[min(np.searchsorted(cumulative, point, side="right"), last)])


def apply_repetition_penalty(logits: Logits, ids: Sequence[int], penalty: SupportsFloat) -> Logits:
    """Return logits (V,) with those of `ids` lowered by a penalty > 1.

    Divides positive logits by it and multiplies negative ones (Keskar et al. 2019,
    arXiv:1909.05858, as widely implemented). Raises ValueError unless it is 0.001 to 1000.
    """
    penalty = checks.check_sampling(repetition_penalty=penalty).repetition_penalty
    if penalty == 1:
        return logits
    logits, old = logits.copy(), logits[ids]
    logits[ids] = np.where(old > 0, old / penalty, old * penalty)
    return logits


def generate(
    params: Params,
    tokens: Prompt | Sequence[Prompt],
    n_tokens: int,
    temperature: SupportsFloat = 0.0,
    top_k: int | None = None,
    top_p: SupportsFloat | None = None,
    seed: int | None = None,
    repetition_penalty: SupportsFloat = 1.0,
    eot: int | Literal["last"] | None = "last",
    n_vocab: int | None = None,
    edit: Edit | None = None,
) -> Iterator[int] | Iterator[list[int]]:
    """Return an iterator over the ids that follow `tokens`, n_tokens at most.

    For one prompt, ids (T,), it yields ints and ends before the end-of-text id. For a list of
    prompts of any lengths it yields lists, one id per prompt; a finished prompt repeats end-of-text
    until all have finished. An empty prompt starts from end-of-text. Each prompt gives the same ids
    as alone: prompt b draws from numpy's default_rng(seed + b). At n_ctx the model re-reads the
    last half of the window and goes on.

    `eot` is the end-of-text id, by default the last of the vocabulary, as in GPT-2; None if there
    is none. Ids from `n_vocab` on are never drawn: a tokenizer may lack them. See
    `next_token_probs` and `apply_repetition_penalty` for the sampling parameters. `edit` is that of
    `forward`: its functions see each prompt first, (1, T, C), then the newest tokens, (B, 1, C).
    When a full window is read anew, they see all of it but its newest token, (1, n, C).
    Raises ValueError for a prompt longer than n_ctx, ids outside the vocabulary, or a sampling
    parameter out of range.
    """
    sampling = checks.check_sampling(temperature, top_k, top_p, seed, repetition_penalty)
    n_vocab, eot = checks.check_vocabulary(params, n_vocab, eot)
    n_tokens = checks.check_whole("n_tokens", n_tokens)
    prompts, is_single = checks.check_prompts(params, tokens, eot)
    hook = hooks.make(params.config, False, edit)
    steps = (ids for ids, _ in decode(params, prompts, n_tokens, sampling, eot, n_vocab, hook))
    going = itertools.takewhile(lambda ids: any(id != eot for id in ids), steps)
    return (ids[0] for ids in going) if is_single else going


def decode(
    params: Params,
    prompts: list[list[int]],
    n_tokens: int,
    sampling: Sampling = GREEDY,
    eot: int | None = None,
    n_vocab: int | None = None,
    hook: Hook = NO_HOOK,
) -> Iterator[tuple[list[int], list[Logits]]]:
    """Yield, at each step, a new id per prompt, and the logits (n_vocab,) that each was drawn from.

    The loop of `generate`, whose parameters these are; it ends after the step in which every prompt
    is at its end-of-text id. The prompts are not empty.
    """
    temperature, top_k, top_p, seed, penalty = sampling
    texts = [list(prompt) for prompt in prompts]
    rngs = [np.random.default_rng(None if seed is None else seed + b) for b in range(len(texts))]
    room = min(max(map(len, texts)) + n_tokens, params.config.n_ctx)  # tokens of the longest text
    kv = KVCache(replace(params.config, n_ctx=room), len(texts), params.flat.dtype)
    for n in range(n_tokens):
        read = prefill if n == 0 else decode_step
        logits = read(params, texts, kv, hook)  # (B, V)
        allowed, ids = [], []
        for text, row, rng in zip(texts, logits, rngs, strict=True):
            row = apply_repetition_penalty(row, text, penalty)[:n_vocab]
            ended = n > 0 and text[-1] == eot
            ids.append(text[-1] if ended else sample(row, rng, temperature, top_k, top_p))
            allowed.append(row)
            text.append(ids[-1])
        yield ids, allowed
        if all(id == eot for id in ids):
            return


def prefill(
    params: Params, prompts: list[list[int]], kv: KVCache, hook: Hook = NO_HOOK
) -> Float[ndarray, "B V"]:
    """Read each prompt into its row of the cache; return the logits (B, V) after its last token.

    A prompt that occurs again is read once.
    """
    logits: list[ndarray] = []
    first: dict[tuple, int] = {}
    for b, prompt in enumerate(prompts):
        a = first.setdefault(tuple(prompt), b)
        if a == b:
            logits.append(next_token_logits(params, np.array([prompt]), kv.row(b), hook)[0])
        else:
            kv.copy_row(a, b)
            logits.append(logits[a])
    return np.stack(logits)


def decode_step(
    params: Params, texts: list[list[int]], kv: KVCache, hook: Hook = NO_HOOK
) -> Float[ndarray, "B V"]:
    """Read the newest token of each row; return the logits (B, V) after it.

    A full row is first read anew from the last n_ctx / 2 of its tokens.
    """
    for b in np.flatnonzero(kv.length == params.config.n_ctx).tolist():
        kv.length[b] = 0
        recent = texts[b][-max(params.config.n_ctx // 2, 1) : -1]
        if recent:
            transformer(params, np.array([recent]), kv.row(b), hook)
    return next_token_logits(params, np.array([text[-1:] for text in texts]), kv, hook)


def next_token_logits(
    params: Params, tokens: Tokens, kv: KVCache, hook: Hook = NO_HOOK
) -> Float[ndarray, "B V"]:
    """Return the logits (B, V) after the last of tokens (B, T) only: a prompt needs no others."""
    x = transformer(params, tokens, kv, hook)[:, -1]
    return hook("logits", matmul(x, params.wte.T)[:, None])[:, 0]


def load(name: str | Path = "124M", models_dir: str | Path = hub.MODELS_DIR) -> Params:
    """Return the Params of a model's name, folder or file, read-only; a large file is mapped.

    One of OpenAI's models (124M, 355M, 774M, 1558M) or of the Hugging Face hub's (owner/name) that
    is not in models_dir yet is downloaded. Raises FileNotFoundError for an unknown name, ValueError
    for a damaged file.
    """
    return load_params(hub.find_model(name, models_dir))


# ----------------------------------------------------------------------------------------------
# The command line, whose flags are in gpt2_support/gpt2_cli.py


def main(argv: list[str] | None = None) -> None:
    """Run the command line: `python gpt2.py --help`."""
    import encoder

    args = gpt2_cli.parse_args(argv)
    path = hub.find_model_or_default(args.model, args.models_dir)
    params = load_params(path)
    enc = encoder.load(path if path.is_dir() else path.parent)
    checks.check_tokenizer(path, params.config, enc.n_vocab)
    answer_prompts(args, enc, params, decode, next_token_probs)


def command() -> None:
    """Run the installed command `gpt2`."""
    cli.run(main)


if __name__ == "__main__":
    command()
