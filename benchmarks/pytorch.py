"""The peer that trains: GPT-2 in plain PyTorch, eager or compiled.

A short module of fused operations (scaled_dot_product_attention, tanh GELU), fused AdamW, gradients
set to None between steps: what a knowing user of PyTorch writes, without transformers' generality.
"""

import json
import math
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import worker
from gpt2_support.formats import llmc
from gpt2_support.params import Config
from worker import Task


class Block(nn.Module):
    """One transformer block, pre-norm: x (B, T, C) -> (B, T, C)."""

    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](out.transpose(1, 2).reshape(B, T, C))
        h = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](h)


class GPT(nn.Module):
    """The model, with our names for its parameters: tokens, targets (B, T) -> mean loss."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.n_vocab, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def load(self, params):
        """Take the values of our Params; returns self."""
        state = {}
        for name, array in params.named.items():  # model/h3/ln_1/g is h.3.ln_1.weight here
            name = re.sub("^h(?=[0-9])", "h.", name.removeprefix("model/")).replace("/", ".")
            name = re.sub(r"\.b$", ".bias", re.sub(r"\.[wg]$|(?<=^w[tp]e)$", ".weight", name))
            state[name] = torch.from_numpy(array.copy())
        self.load_state_dict(state)
        return self

    def start(self):
        """Take new values, as GPT-2 starts: N(0, 0.02), biases 0; returns self."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        return self


def make_optimizer(model, lr, beta2=worker.BETA2):
    """Return fused AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": worker.WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (worker.BETA1, beta2)
    return torch.optim.AdamW(groups, lr, betas, worker.EPS, fused=True)


def take_step(model, optimizer, tokens, targets):
    """Take a training step; return the loss before it."""
    loss = model(tokens, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), worker.GRAD_CLIP)
    optimizer.step()
    return loss.item()


def load(job):
    """Return a GPT with the job's weights."""
    params = llmc.load_params(job.folder / job.model)
    return GPT(params.config).load(params)


def step(job):
    """Take a training step: loss, gradient, clipping, AdamW."""
    torch.set_num_threads(job.threads)
    model, losses = load(job), []
    optimizer = make_optimizer(model, worker.LR)
    batch = worker.random_batch(job, model.wte.num_embeddings)
    batch = [torch.from_numpy(ids.copy()) for ids in batch]
    compiled = torch.compile(model) if job.compiled else model

    def work():
        losses.append(take_step(compiled, optimizer, *batch))

    return Task(work, check=lambda: losses[:2])


def adamw(job):
    """Update all parameters, given the gradient."""
    torch.set_num_threads(job.threads)
    model = load(job)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = make_optimizer(model, worker.LR)
    return Task(lambda: optimizer.step() and None)


def names(job):
    """Train a tiny model from scratch for n_steps on names, on one thread, as we do.

    Its tensors are too small to share: a second thread would only be waited for.
    """
    torch.set_num_threads(1)
    tokens, n_vocab = llmc.load_tokens(job.folder / "names.bin")
    tokens, losses = torch.from_numpy(tokens.astype(np.int64)), []
    config = Config(n_vocab, *job.shape)

    def work(n_steps=job.n_steps):
        losses.clear()
        torch.manual_seed(0)
        model = GPT(config).start()
        optimizer = make_optimizer(model, job.lr)
        start = time.perf_counter()
        for _ in range(n_steps):
            starts = torch.randint(len(tokens) - job.T, (job.B,)).tolist()
            x = torch.stack([tokens[i : i + job.T] for i in starts])
            y = torch.stack([tokens[i + 1 : i + 1 + job.T] for i in starts])
            losses.append(take_step(model, optimizer, x, y))
        return time.perf_counter() - start

    return Task(work, lambda: work(20), lambda: [float(np.mean(losses[-100:]))])


def recipe(job):
    """Train the recipe's model from scratch for n_steps; check its validation loss."""
    torch.set_num_threads(job.threads)
    tokens, _ = llmc.load_tokens(job.folder / "recipe.bin")
    tokens, state = torch.from_numpy(tokens.astype(np.int64)), {}
    n = len(tokens) * 9 // 10

    def work(n_steps=job.n_steps):
        torch.manual_seed(0)
        model = load(job)
        compiled = torch.compile(model) if job.compiled else model
        optimizer = make_optimizer(model, worker.RECIPE["lr"], worker.RECIPE["beta2"])
        begin = time.perf_counter()
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps)
            starts = torch.randint(n - job.T, (job.B,)).tolist()
            x = torch.stack([tokens[i : i + job.T] for i in starts])
            y = torch.stack([tokens[i + 1 : i + 1 + job.T] for i in starts])
            take_step(compiled, optimizer, x, y)
        state["model"] = model
        return time.perf_counter() - begin

    def check():
        return [mean_loss(state["model"], tokens[n:], job.T)]

    return Task(work, lambda: work(min(20, job.n_steps)), check)


def learning_rate(step, n_steps):
    """Return the rate of a step: a linear warm-up, then half a cosine."""
    lr, min_lr, warmup = (worker.RECIPE[name] for name in ("lr", "min_lr", "warmup"))
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def mean_loss(model, tokens, T):
    """Return the mean loss of all tokens after the first, in windows of T."""
    losses, n = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, 8 * T):
            chunk = tokens[start : start + 8 * T + 1]
            rows = (len(chunk) - 1) // T * T
            for x, y in ((chunk[:rows], chunk[1 : rows + 1]), (chunk[rows:-1], chunk[rows + 1 :])):
                if len(x):
                    shape = (-1, T) if len(x) % T == 0 else (1, -1)
                    losses += len(x) * model(x.view(shape), y.view(shape)).item()
                    n += len(x)
    return losses / n


def validate(job):
    """Compute the loss of `stories` on n_tokens ids, in windows of T."""
    torch.set_num_threads(job.threads)
    model, losses = load(job), []
    ids = worker.random_text_ids(job, model.wte.num_embeddings).astype(np.int64)
    tokens = torch.from_numpy(ids)
    return Task(lambda: losses.append(mean_loss(model, tokens, job.T)), check=lambda: losses[:1])


def sgemm(job):
    """Multiply two square matrices."""
    torch.set_num_threads(job.threads)
    a, b = torch.randn(2, job.size, job.size)
    out = torch.empty_like(a)

    def work():
        torch.mm(a, b, out=out)

    return Task(work)


def matvec(job):
    """Multiply every matrix of a model with a vector."""
    torch.set_num_threads(job.threads)
    weights = [torch.randn(shape) for shape in job.shapes]
    vectors = {w.shape[1]: torch.randn(w.shape[1]) for w in weights}

    def work():
        for w in weights:
            w @ vectors[w.shape[1]]

    return Task(work)


def scale(job):
    """Scale a large array in place."""
    torch.set_num_threads(job.threads)
    values = torch.ones(job.size)

    def work():
        values.mul_(1.0)

    return Task(work)


def machine(job):
    """Print what PyTorch computes with; for a Task there is nothing left to do."""
    torch.set_num_threads(job.threads)
    kernels = torch.backends.cpu.get_cpu_capability()
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    facts = f"{torch.__version__}, {blas}, {kernels} kernels, {torch.get_num_threads()} threads"
    print(json.dumps({"PyTorch": facts}))
    return Task(lambda: None)


if __name__ == "__main__":
    worker.main(
        step=step,
        adamw=adamw,
        names=names,
        recipe=recipe,
        validate=validate,
        sgemm=sgemm,
        matvec=matvec,
        scale=scale,
        machine=machine,
    )
