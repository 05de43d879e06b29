"""Train GPT-2 in NumPy: gradients into better parameters.

Reading order: where a model starts (`init_params`), what a run consists of (`TrainConfig`,
`TrainState`), what it reads (`DataLoader`), how it learns (`learning_rate`, `train_step`, and the
optimizers in gpt2_support/optimizers.py), how well it does (`evaluate`), the loop (`train`), and
the command line.

    params = init_params(Config(n_vocab=1024, n_ctx=128, n_embd=64, n_head=4, n_layer=2))
    state = TrainState(params, TrainConfig(steps=1000))
    loader = DataLoader(tokens, state.config)
    workers = DataParallel(gpt2.loss_and_grads, params)
    while state.step < state.config.steps:
        loss, grad_norm, lr = train_step(state, loader.batches(state.step), workers)
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gpt2_support  # isort: skip (before NumPy: it configures its BLAS)  # noqa: F401

import numpy as np

import encoder
import gpt2
from gpt2_support import checkpoint, cli, corpus, datasets, hub, planning, run_folder, train_cli
from gpt2_support.checks import check_tokenizer, check_writable
from gpt2_support.data_parallel import DataParallel, serial
from gpt2_support.distributed import ProcessGroup, init_process_group
from gpt2_support.evaluation import Evaluation, measure
from gpt2_support.evaluation_cli import measure_text, run_evaluation
from gpt2_support.formats import llmc
from gpt2_support.interrupts import deferred_interrupts, forgiving_output, never_fatal
from gpt2_support.messages import write
from gpt2_support.optimizers import OPTIMIZERS, AdamW, make_optimizer
from gpt2_support.params import Config, Params
from gpt2_support.run_folder import Diverged, RunFolder, check_finite, saved_on_error
from gpt2_support.runlog import RunLog

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from argparse import Namespace
    from collections.abc import Sequence

    from jaxtyping import Integer
    from numpy import ndarray

    from encoder import Encoder
    from gpt2_support.shapes import Batch, Flat, Parallel

    Tokens = Integer[ndarray, " N"]
    Lengths = Integer[ndarray, " V"]

# ----------------------------------------------------------------------------------------------
# The start, and the state of a run


def init_params(config: Config, seed: int = 0) -> Params:
    """Return new Params: gains 1, biases 0, weights normal with a standard deviation of 0.02.

    For c_proj it is 0.02 / sqrt(2 n_layer), since 2 n_layer branches add to the residual stream
    (Radford et al. 2019, section 2.3). OpenAI's code has 0.01 for wpe. The same seed gives the same
    values.
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
class TrainConfig:
    """How to train. The command line has other defaults for some: see train_cli.DEFAULTS."""

    data: str | None = None  # where the tokens come from, for --resume
    val_data: str | None = None
    docs: str = "eot"  # what separates the documents of a text: see corpus.SEPARATORS
    raw: bool = False  # the data are uint16 ids without a header, like nanoGPT's
    steps: int = 2000
    batch_size: int = 16  # windows per batch, over all ranks
    seq_len: int = 128  # tokens per window
    grad_accum: int = 1  # batches per step
    order: str = "random"  # of the windows, or "sequential"
    lr: float = 1e-3  # at its highest
    min_lr: float = 1e-4  # at the end of the decay
    warmup: int = 100  # steps
    decay_steps: int | None = None  # steps until min_lr; None is `steps`
    optimizer: str = "adamw"
    muon_lr: float = 0.02  # of the matrices of the blocks, at its highest
    momentum: float = 0.9  # of Muon
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    dropout: float = 0.0  # probability, of embeddings, attention weights and branches
    grad_clip: float = 1.0  # the largest norm of the gradient; 0: no limit
    seed: int = 0
    ranks: int = 1  # processes of mpiexec that share a batch; must divide batch_size
    threads: int = 1  # processes of a rank that share its rows; must divide their number
    eval_every: int = 250  # steps
    patience: int | None = None  # validations without a lower loss that end a run
    eval_tokens: int = 50_000  # of the validation data, at most, each time
    save_every: int = 250  # steps
    sample_every: int = 500  # steps
    prompt: str = ""  # of the samples

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len * self.grad_accum


@dataclass
class TrainState:
    """A training run between two steps: all that a checkpoint holds."""

    params: Params
    config: TrainConfig = field(default_factory=TrainConfig)
    step: int = 0  # steps done; the position in the data follows from it
    best_loss: float = math.inf  # the lowest validation loss so far, in nats per token
    best_step: int = 0  # where that was
    optimizer: AdamW = None  # type: ignore[assignment]  # made below
    data: dict[str, str] | None = None  # fingerprints of the data
    is_consistent: bool = True  # False in the midst of an update

    def __post_init__(self) -> None:
        self.optimizer = self.optimizer or make_optimizer(self.config.optimizer, self.params)

    @property
    def is_stale(self) -> bool:
        """Whether `patience` validations have passed without a lower loss: early stopping."""
        patience, every = self.config.patience, self.config.eval_every
        return patience is not None and self.step - self.best_step >= patience * every


# ----------------------------------------------------------------------------------------------
# Data


class DataLoader:
    """Batches of windows of T = seq_len tokens, each token with the next as its target.

    With order "random" each pass cuts the data at a new offset and shuffles the windows. With
    "sequential" each pass takes all windows in order; llm.c's loader does too, but drops those at
    the end that do not fill a batch. Pass n depends only on the seed and n, so a resumed run needs
    only the number of the step. Of n ranks, `rank` reads the windows rank, rank + n, ... of each
    batch: together they read what one alone would.

    Raises ValueError if the tokens (N,) are fewer than a batch, B T + 1.
    """

    def __init__(self, tokens: Tokens, config: TrainConfig, rank: int = 0) -> None:
        B, T = config.batch_size, config.seq_len
        if len(tokens) < B * T + 1:
            raise ValueError(
                f"data of {len(tokens)} tokens is shorter than one batch of {B} windows of {T} "
                "tokens and a last target: give more text, or a smaller --batch_size or --seq_len"
            )
        self.tokens, self.config, self.rank = tokens, config, rank
        self.n_windows = (len(tokens) - 1) // T
        if config.order == "random":  # one less leaves room for the offset
            self.n_windows = max(1, self.n_windows - 1)
        self._pass, self._starts = -1, np.zeros(0, int)

    def batches(self, step: int) -> list[Batch]:
        """Return the grad_accum batches of a step: 0, 1, 2, ..."""
        n = self.config.grad_accum
        return [self.batch(number) for number in range(step * n, (step + 1) * n)]

    def batch(self, number: int) -> Batch:
        """Return tokens and targets, (B / ranks, T) each, of batch `number`: 0, 1, 2, ..."""
        B, T, n = self.config.batch_size, self.config.seq_len, self.config.ranks
        starts = [self._start(i) for i in range(number * B + self.rank, (number + 1) * B, n)]
        windows = np.stack([self.tokens[start : start + T + 1] for start in starts])
        return windows[:, :-1], windows[:, 1:]

    def _start(self, window: int) -> int:
        n_pass, i = divmod(window, self.n_windows)
        if n_pass != self._pass:
            self._pass, self._starts = n_pass, self._cut(n_pass)
        return int(self._starts[i])

    def _cut(self, n_pass: int) -> Integer[ndarray, " n_windows"]:
        """Return where the windows of a pass start, in the order of reading."""
        T = self.config.seq_len
        starts = np.arange(self.n_windows) * T
        if self.config.order == "random":
            rng = np.random.default_rng([self.config.seed, n_pass])
            starts += rng.integers(len(self.tokens) - starts[-1] - T)
            rng.shuffle(starts)
        return starts


# ----------------------------------------------------------------------------------------------
# Learning


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of a step (from 0): a linear warm-up, then half a cosine down to min_lr.

    Loshchilov and Hutter 2016, arXiv:1608.03983.
    """
    c = config
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    decay_steps = c.decay_steps or c.steps
    done = min(1.0, (step - c.warmup) / max(1, decay_steps - c.warmup))
    return c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def l2_norm(values: Flat, parallel: Parallel = serial, block: int = 1 << 16) -> float:
    """Return the Euclidean norm of an array (N,), its squares summed in blocks for precision."""
    starts = range(0, len(values), block)

    def squares(i: int, n: int) -> list[float]:
        parts = (values[at : at + block] for at in starts[i::n])
        return [float(np.dot(part, part)) for part in parts]

    return math.sqrt(math.fsum(itertools.chain(*parallel(squares))))  # the same in any order


def train_step(
    state: TrainState, batches: list[Batch], workers: DataParallel
) -> tuple[float, float, float]:
    """Take one step on the mean gradient of batches; return loss, grad_norm, learning rate.

    The gradient is clipped to a norm of grad_clip (Pascanu et al. 2012, arXiv:1211.5063); the norm
    returned is the one before. Raises Diverged, a ValueError, if the loss or the gradient is not
    finite, and leaves the parameters as they were; ValueError if they are read-only.
    """
    config, params, group = state.config, state.params, workers.group
    check_writable(params)
    loss, grads = workers.loss_and_grads(params, batches, config.seed, state.step)
    norm_of_shard = l2_norm(grads.flat[group.shard(grads.flat.size)], workers.parallel)
    grad_norm = math.hypot(*group.all_gather(norm_of_shard))
    if not math.isfinite(loss + grad_norm):
        raise Diverged(
            f"training has diverged: at step {state.step + 1} the loss is {loss} and the norm of "
            f"the gradient {grad_norm}. Checkpoints are as they were; try a lower --lr"
        )
    # 1e-6 as in torch.nn.utils.clip_grad_norm_.
    clip = min(1.0, config.grad_clip / (grad_norm + 1e-6)) if config.grad_clip else 1.0
    lr = learning_rate(state.step, config)
    state.step, state.is_consistent = state.step + 1, False
    state.optimizer.step(params, grads, lr, state.step, config, clip, workers.parallel)
    if state.optimizer.is_sharded:
        group.all_gather_into(params.flat, state.optimizer.shard)
    state.is_consistent = True
    return loss, grad_norm, lr


# ----------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    seq_len: int,
    stride: int | None = None,
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Return how well a model predicts tokens (N,) after the first: see `evaluation.measure`."""
    return measure(gpt2, params, tokens, lengths, seq_len, stride, group)


# ----------------------------------------------------------------------------------------------
# Checkpoints, and the loop


def save_checkpoint(
    folder: str | Path, state: TrainState, group: ProcessGroup | None = None
) -> None:
    """Write model.bin, for any program, and state.npz, to resume from, each atomically.

    state.npz holds the parameters too, so that all of it is from one step whenever the process
    dies. All ranks call this, and rank 0 writes.
    """
    group, params, optimizer = group or ProcessGroup(), state.params, state.optimizer
    meta = {name: vars(state)[name] for name in ("step", "best_loss", "best_step", "data")}
    meta |= {"settings": asdict(state.config), "config": asdict(params.config)}
    shards = group.broadcast_shards if optimizer.is_sharded else lambda array: iter([array])
    arrays = {"params": [params.flat], "m": shards(optimizer.m), "v": shards(optimizer.v)}
    if group.rank > 0:
        for _ in itertools.chain(*arrays.values()):  # takes part in the broadcasts
            pass
        return
    checkpoint.save_state(folder, meta, arrays, params.flat.size)
    llmc.save_params(Path(folder, "model.bin"), params)


def load_checkpoint(folder: str | Path, group: ProcessGroup | None = None) -> TrainState:
    """Return the state of a folder's run; given a group, with its shard of the moments only.

    Raises ValueError for a damaged file.
    """
    with checkpoint.load_state(folder) as (meta, arrays):
        params = Params(Config(**meta["config"]), arrays["params"])
        config = checkpoint.make_settings(TrainConfig, meta["settings"])
        if config.docs not in corpus.SEPARATORS or config.optimizer not in OPTIMIZERS:
            raise ValueError(f"docs = {config.docs!r}, optimizer = {config.optimizer!r}")
        optimizer = make_optimizer(config.optimizer, params, group)
        optimizer.m[...] = arrays["m"][optimizer.shard]
        optimizer.v[...] = arrays["v"][optimizer.shard]
    progress = meta["step"], meta["best_loss"], meta.get("best_step", meta["step"])
    return TrainState(params, config, *progress, optimizer, meta.get("data"))


def train(
    state: TrainState,
    loader: DataLoader,
    val: Tokens,
    enc: Encoder,
    out: Path,
    workers: DataParallel,
) -> float:
    """Take the remaining steps of a run, in place; write its log and checkpoints to `out`.

    All ranks learn and validate; rank 0 also samples and logs. Ctrl-C on any rank ends the loop
    between two steps and saves a checkpoint; after an error `saved_on_error` saves one if it can.
    Returns the lowest validation loss, on rank 0 that of the model in `best/`.
    """
    config, group, lengths = state.config, workers.group, datasets.token_lengths(enc)
    reports = group.rank == 0

    def is_due(every: int) -> bool:
        return state.step % every == 0 or state.step == config.steps

    def save() -> None:
        check_finite(state.params.flat, state.step)
        save_checkpoint(run.current, state, group)
        log.settle(run.settle())

    with (
        deferred_interrupts() as interrupted,
        RunFolder(out, enc.save if reports else None, is_new=state.step == 0) as run,
        RunLog(run.current if reports else None, state.step, config.steps) as log,
        saved_on_error(save, state),
    ):
        # The best model there may be of a later step than the checkpoint.
        kept_loss = checkpoint.best_loss(run.current, state.data) if reports else math.inf
        while state.step < config.steps and not state.is_stale:
            if any(group.all_gather(interrupted())):
                break
            start = time.perf_counter()
            loss, grad_norm, lr = train_step(state, loader.batches(state.step), workers)
            tokens_per_second = config.tokens_per_step / (time.perf_counter() - start)

            figures = [loss, lr, grad_norm, tokens_per_second]
            if is_due(config.eval_every):
                evaluation = validate(state, val, lengths, group)
                log.write(f"step {state.step}: validation loss {evaluation}")
                figures += [evaluation.loss, evaluation.bits_per_byte]
                if evaluation.loss <= state.best_loss:  # equal where a resumed run repeats a step
                    state.best_loss, state.best_step = evaluation.loss, state.step
                    if reports and evaluation.loss <= kept_loss:
                        checkpoint.save_best(run.current, state.params, evaluation.loss, state.data)
            log.add(state.step, *figures)

            if reports and is_due(config.sample_every):
                with never_fatal("sample"):
                    log.write(f"step {state.step}: a sample at temperature 0.8")
                    log.write(sample_text(state, enc), file=sys.stdout)

            if state.step % config.save_every == 0 and state.step < config.steps:
                save()
        if state.step > 0:
            save()
    return min(state.best_loss, kept_loss)


def validate(state: TrainState, val: Tokens, lengths: Lengths, group: ProcessGroup) -> Evaluation:
    """Return how well the model of a run predicts `val`; raise Diverged if that is not finite."""
    check_finite(state.params.flat, state.step)
    evaluation = evaluate(state.params, val, lengths, state.config.seq_len, group=group)
    check_finite(evaluation.loss, state.step)
    return evaluation


def sample_text(state: TrainState, enc: Encoder) -> str:
    """Return the prompt of a run and 100 tokens that follow."""
    prompt = enc.encode(state.config.prompt)[-state.params.config.n_ctx :]
    ids = gpt2.generate(
        state.params, prompt, 100, 0.8, seed=state.config.seed, eot=enc.eot, n_vocab=enc.n_vocab
    )
    return state.config.prompt + enc.decode(np.fromiter(ids, int))


# ----------------------------------------------------------------------------------------------
# The command line, whose flags are in gpt2_support/train_cli.py


def make_parser() -> cli.ArgumentParser:
    """Return the parser of the command line."""
    return train_cli.make_parser(asdict(TrainConfig()))


def parse_args(argv: Sequence[str] | None = None, group: ProcessGroup | None = None) -> Namespace:
    """Parse the command line; --resume takes the settings of the run as defaults."""
    return train_cli.parse_args(make_parser(), load_checkpoint, argv, group or ProcessGroup())


def find_tokenizer(args: Namespace) -> Encoder:
    """Return the Encoder for --data, learning one from it where there is none."""
    if args.resume:
        return encoder.load(args.out)
    if args.tokenizer:
        return encoder.load(args.tokenizer, args.models_dir)
    if args.init != "scratch":
        path = hub.find_model(args.init, args.models_dir)
        return encoder.load(path if path.is_dir() else path.parent)
    if datasets.is_text(args.data, args.raw):
        if args.minutes:
            planning.choose_vocabulary(args, datasets.find(args.data))
        return encoder.load(datasets.learn_tokenizer(args.data, args.n_vocab, encoder.train))
    return encoder.load(datasets.tokenizer_beside(args.data))


def make_config(args: Namespace, model: Config) -> TrainConfig:
    """Return the settings of the command line; raises ValueError if they do not fit the model."""
    settings = {name: vars(args).get(name) for name in asdict(TrainConfig())}
    return checkpoint.make_settings(TrainConfig, settings | train_cli.fit_to_model(args, model))


def make_state(
    args: Namespace, enc: Encoder, data: dict[str, str], val_tokens: Tokens
) -> TrainState:
    """Return the run that the command line asks for: resumed, from scratch, or from a model."""
    n_vocab = args.n_vocab if args.resume else enc.n_vocab  # a tuned model may have more than enc
    shape = Config(n_vocab, args.n_ctx, args.n_embd, args.n_head, args.n_layer)
    if args.resume:
        state = args.state
        train_cli.check_same_run(args, shape, data)
        state.config = make_config(args, shape)
        now = data | checkpoint.measured(val_tokens, state.config)
        if not checkpoint.same_validation(state.data, now):  # losses that cannot be compared
            state.best_loss, state.best_step = math.inf, state.step
        return state
    if args.init == "scratch":
        params = init_params(shape, args.seed)
    else:
        loaded = gpt2.load(args.init, args.models_dir)
        params = loaded.copy()
        check_tokenizer(args.init, params.config, enc.n_vocab)
    config, group = make_config(args, params.config), args.group if args.shard else None
    optimizer = make_optimizer(config.optimizer, params, group)
    return TrainState(params, config, optimizer=optimizer)


def time_step(args: Namespace, tokens: Tokens, model: Config) -> float:
    """Return the seconds of a step of a new model, for --minutes; inf if it does not fit."""
    config, group = make_config(args, model), args.group if args.shard else ProcessGroup()
    need = planning.memory(model, config, gpt2.LM_HEAD_ROWS, n_sharing=group.size)
    if need > planning.memory_limit(args.group):
        return math.inf
    params, batch = Params(model), DataLoader(tokens, config).batch(0)
    state = TrainState(params, config, optimizer=make_optimizer(config.optimizer, params, group))
    return planning.fastest_step(gpt2.loss_and_grads, state, batch, args)[1]


def train_command(args: Namespace) -> None:
    """Train as the command line asks, and say how to go on from there."""
    group, out = args.group, args.out
    if not args.resume:
        run_folder.check_unused(out, args.overwrite)
    with group.rank_zero_first():  # it learns and encodes; the others find that done
        for path in filter(None, (args.data, args.val_data)):
            datasets.find(path)  # before a model is downloaded
        enc = find_tokenizer(args)
        if not (args.resume or args.overwrite):
            run_folder.check_tokenizer(out, (enc.tokens, enc.eot))
        tokens, val_tokens = train_cli.read_tokens(args, enc)
    args.n_tokens, data = len(tokens), checkpoint.fingerprint(data=tokens, val_data=val_tokens)
    if args.minutes and args.init == "scratch" and not args.resume:
        planning.plan_model(args, enc.n_vocab, len(tokens), partial(time_step, args, tokens))
    state = make_state(args, enc, data, val_tokens)
    config = state.config
    loader = DataLoader(tokens, config, group.rank)
    datasets.check_validation(val_tokens)
    fingerprints = np.array(list(data.values()))
    group.check_same(data=fingerprints, parameters=state.params.flat, step=np.array(state.step))
    workers, seconds = planning.fastest_step(gpt2.loss_and_grads, state, loader.batch(0), args)
    if args.minutes:
        planning.plan_steps(args, state, seconds, len(tokens))
    state.data = data | checkpoint.measured(val_tokens, config)
    train_cli.describe(state, len(tokens), seconds, gpt2.LM_HEAD_ROWS)
    lowest_loss = train(state, loader, val_tokens[: config.eval_tokens], enc, out, workers)
    if state.step < config.steps and not state.is_stale:
        train_cli.say_stopped(state.step, args)
        sys.exit(130)
    if group.rank == 0:
        train_cli.say_done(state, args, lowest_loss)


def eval_command(args: Namespace) -> None:
    """Print how well --init predicts --data, as `evaluate.py --data` does."""
    group = args.group
    with group.rank_zero_first():  # it downloads and encodes; the others find that done
        datasets.find(args.data)  # before a model is downloaded
        params = gpt2.load(args.init, args.models_dir)
        enc = find_tokenizer(args)
        check_tokenizer(args.init, params.config, enc.n_vocab)
        tokens = datasets.read_tokens(args.data, enc, args.docs, args.raw)
    group.check_same(data=tokens, parameters=params.flat)
    write(measure_text(gpt2, params, enc, tokens, args, group)[1])


def main(argv: Sequence[str] | None = None) -> None:
    with (
        init_process_group() as group,
        train_cli.hold_folder(make_parser().parse_args(argv), group),
    ):
        args = parse_args(argv, group)
        if args.eval_only:
            eval_command(args)
        else:
            with forgiving_output():
                train_command(args)


def command() -> None:
    """Run the installed command `gpt2-train`."""
    cli.run(main)


def evaluate_command() -> None:
    """Run the installed command `gpt2-evaluate`, which is evaluate.py in a checkout."""
    cli.run(partial(run_evaluation, gpt2, encoder))


if __name__ == "__main__":
    command()
