"""GPT-2 as a tutorial writes it: a page of NumPy, no cache, everything computed anew each token.

The form is picoGPT's, the code our own. One common slip is left out, since it would make the
comparison cheap: `np.sqrt(2 / np.pi)` is a float64, and under NumPy 2 it turns all that follows
into float64.
"""

# isort: off
import numpy as np  # first of all: NumPy as it comes, whatever our modules would ask of it

# isort: on
import math

import worker
from gpt2_support.formats import llmc
from worker import Task


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    exp = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exp / np.sum(exp, axis=-1, keepdims=True)


def layer_norm(x, g, b):
    mean, variance = np.mean(x, axis=-1, keepdims=True), np.var(x, axis=-1, keepdims=True)
    return g * (x - mean) / np.sqrt(variance + 1e-5) + b


def linear(x, w, b):
    return x @ w + b


def attention(x, p, n_head):
    """Causal attention, a head at a time: x (T, C) -> (T, C)."""
    qkv = np.split(linear(x, *p["c_attn"]), 3, axis=-1)
    heads = zip(*(np.split(part, n_head, axis=-1) for part in qkv), strict=True)
    mask = (1 - np.tri(len(x), dtype=x.dtype)) * -1e10
    out = [softmax(q @ k.T / math.sqrt(q.shape[-1]) + mask) @ v for q, k, v in heads]
    return linear(np.hstack(out), *p["c_proj"])


def block(x, p, n_head):
    x = x + attention(layer_norm(x, *p["ln_1"]), p["attn"], n_head)
    return x + linear(gelu(linear(layer_norm(x, *p["ln_2"]), *p["c_fc"])), *p["c_proj"])


def forward(tokens, p, n_head):
    """Return the logits after each token: (T,) -> (T, V)."""
    x = p["wte"][tokens] + p["wpe"][range(len(tokens))]
    for layer in p["h"]:
        x = block(x, layer, n_head)
    return layer_norm(x, *p["ln_f"]) @ p["wte"].T


def generate(tokens, p, n_head, n_tokens):
    """Return the n_tokens most probable ids, one after the other."""
    tokens = list(tokens)
    for _ in range(n_tokens):
        tokens.append(int(np.argmax(forward(tokens, p, n_head)[-1])))
    return tokens[-n_tokens:]


def convert(params):
    """Return our Params as nested dicts, each layer's weight (in, out) with its bias."""

    def weight(p):
        return np.ascontiguousarray(p.w.T), p.b.copy()

    layers = [
        {
            "ln_1": (h.ln_1.g, h.ln_1.b),
            "attn": {"c_attn": weight(h.attn.c_attn), "c_proj": weight(h.attn.c_proj)},
            "ln_2": (h.ln_2.g, h.ln_2.b),
            "c_fc": weight(h.mlp.c_fc),
            "c_proj": weight(h.mlp.c_proj),
        }
        for h in params.h
    ]
    ln_f = (params.ln_f.g, params.ln_f.b)
    return {"wte": params.wte, "wpe": params.wpe, "h": layers, "ln_f": ln_f}


def load(job):
    """Return the parameters of the job's model, its number of heads, and the prompt."""
    params = llmc.load_params(job.folder / job.model)
    prompt = worker.prompt_ids(job.n_prompt, params.config.n_vocab)
    return convert(params), params.config.n_head, prompt


def decode(job):
    """Continue a prompt by n_tokens."""
    p, n_head, prompt = load(job)
    ids = []

    def work(n_tokens=job.n_tokens):
        ids[:] = generate(prompt, p, n_head, n_tokens)

    return Task(work, lambda: work(1), lambda: ids)


def logits(job):
    """Compute the logits after every token of a prompt."""
    p, n_head, prompt = load(job)
    out = []

    def work():
        out[:] = forward(prompt, p, n_head)[-1, :8].tolist()

    return Task(work, check=lambda: out)


if __name__ == "__main__":
    worker.main(decode=decode, forward=logits)
