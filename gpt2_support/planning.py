"""What `train.py --minutes` chooses: the vocabulary, the model, the batch and the steps.

A model that is too large reads too little in the time; one that is too small stops improving early.
So models are tried from the smallest on: a step of each is timed, which tells how much it would
read. The choice is the largest that reads enough for its size. The runs behind the constants are in
docs/training.md.
"""

from __future__ import annotations

import functools
import math
import os
import time
from typing import TYPE_CHECKING, Any

from gpt2_support.data_parallel import DataParallel, fastest, largest_divisor, proc_counts
from gpt2_support.messages import info
from gpt2_support.optimizers import time_update
from gpt2_support.params import Config, n_params

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy import ndarray

    from gpt2_support.distributed import ProcessGroup

EVERY = ("eval_every", "save_every", "sample_every")
SHAPE = ("n_layer", "n_head", "n_embd", "n_ctx")
MODELS = (  # of these shapes, the smallest first
    (2, 2, 32, 128),
    (2, 3, 48, 128),
    (2, 4, 64, 128),
    (3, 4, 64, 128),
    (3, 4, 96, 128),
    (4, 4, 128, 128),
    (4, 6, 192, 128),
    (6, 4, 256, 256),
    (6, 6, 384, 256),
    (8, 8, 512, 256),
    (12, 12, 768, 512),
)
TOKENS_PER_PARAMETER = 10  # that a model is to read
# (size of the vocabulary, from so many bytes of text on); (tokens a step, from such a size on)
VOCABULARIES = ((4096, 10_000_000), (1024, 300_000), (512, 100_000), (257, 0))
BATCHES = ((2048, 4096), (1024, 0))
MAX_STEPS = 4000  # with more steps than that, the batch is doubled
WORTH_OF_PASSES = 15  # however often a text is read, that is worth this many other texts
MAX_PASSES = 40
DROPOUT, DROPOUT_PASSES = 0.1, 4  # of a text that is read more often, and could be learned by heart
REPORTS = 10  # validations and checkpoints, which take a tenth of the time at most
REPORT_SECONDS = 0.3, 2e-7  # of a checkpoint, the best model and a sample; for each parameter


# ----------------------------------------------------------------------------------------------
# The rules


def worth(n_read: float, n_tokens: int) -> float:
    """Return how many new tokens teach as much as n_read tokens of a text of n_tokens.

    Reading it R times more after the first pass is worth R* (1 - exp(-R / R*)) such texts, with
    R* = 15: the fifth pass three quarters of the first, the fiftieth next to nothing. Muennighoff
    et al. 2023, arXiv:2305.16264.
    """
    again = max(0.0, n_read / n_tokens - 1)
    n_texts = WORTH_OF_PASSES * (1 - math.exp(-again / WORTH_OF_PASSES))
    return min(n_read, n_tokens) + n_texts * n_tokens


def n_enough(model: Config) -> int:
    """Return how many tokens a model is to read."""
    return TOKENS_PER_PARAMETER * 12 * model.n_layer * model.n_embd**2


def choose_model(
    models: Iterable[Config], n_read: Callable[[Config], float], n_tokens: int
) -> Config:
    """Return the largest of some models, the smallest first, that reads enough for its size.

    n_read(model) are the tokens that it reads in the time, of a text of n_tokens. By their worth
    there are to be TOKENS_PER_PARAMETER for each parameter of its blocks. The first model that
    reads less ends the search, unless it is the smallest.
    """
    best = None
    for model in models:
        if best and worth(n_read(model), n_tokens) < n_enough(model):
            break
        best = model
    assert best, "there is no model to choose"
    return best


def candidates(given: dict[str, int], n_vocab: int) -> list[Config]:
    """Return the models to try: MODELS, with what is given of n_layer, n_head, ...

    Heads and context, if not given, are those of the model of MODELS that is closest in width.
    """
    models = []
    for values in MODELS:
        shape = dict(zip(SHAPE, values, strict=True)) | given
        close = min(MODELS, key=lambda model: abs(model[2] - shape["n_embd"]))
        shape |= {"n_head": close[1], "n_ctx": close[3]} | given
        n_head, n_embd = shape["n_head"], shape["n_embd"]
        if "n_embd" not in given:
            shape["n_embd"] = -(-n_embd // n_head) * n_head
        elif "n_head" not in given:
            shape["n_head"] = largest_divisor(n_embd, n_head)
        models.append(Config(n_vocab, **shape))
    return [*dict.fromkeys(models)]


def default_warmup(n_steps: int) -> int:
    """Return the steps in which the rate of a run rises."""
    return min(100, n_steps // 10)


def memory(model: Config, config: Any, head_rows: int, n_sharing: int = 1) -> int:
    """Return about how many bytes a rank needs: parameters, gradients, moments, activations.

    config is a train.TrainConfig, head_rows gpt2's; n_sharing ranks share the moments (--shard).
    """
    n = n_params(model)
    buffers = 2 * n + 2 * n // n_sharing
    n_rows = config.batch_size // config.ranks * config.seq_len
    per_row = model.n_layer * (20 * model.n_embd + model.n_head * config.seq_len)
    logits = config.threads * min(head_rows, n_rows // config.threads) * model.n_vocab
    return 4 * (buffers + n_rows * per_row + logits)


def memory_limit(group: ProcessGroup) -> float:
    """Return the bytes that a rank may need: its part of half of the memory of its machine.

    The smallest of all ranks; infinity if it cannot be told.
    """
    try:
        n_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # on Windows
        n_bytes = math.inf
    return min(group.all_gather(n_bytes / group.n_ranks_here)) / 2


# ----------------------------------------------------------------------------------------------
# The speed of a machine


def fastest_step(
    loss_and_grads: Callable, state: Any, batch: tuple[ndarray, ndarray], args: Namespace
) -> tuple[DataParallel, float]:
    """Return the processes that are fastest on a batch, and the seconds of a step with them.

    --threads tells how many, or else some are tried. The state, a train.TrainState, receives their
    number, and parameters that they share.
    """
    config, model = state.config, state.params.config
    n_rows = config.batch_size // config.ranks
    counts = proc_counts(n_rows, config.seq_len, model.n_embd, args.group.n_cores)
    counts = [args.threads] if args.threads else counts
    options = batch, counts, args.group, config.dropout
    workers, seconds = fastest(loss_and_grads, state.params, *options)
    config.threads, state.params = workers.n_procs, workers.params
    update = time_update(state.optimizer, state.params, config, workers)
    return workers, config.grad_accum * seconds + update


# ----------------------------------------------------------------------------------------------
# The plan of a run


def seconds_left(args: Namespace) -> float:
    """Return the seconds until --minutes have passed since the start, the same on all ranks."""
    return args.group.all_gather(60 * args.minutes - (time.perf_counter() - args.started))[0]


def choose(args: Namespace, settings: Any, **values: Any) -> None:
    """Set some settings, of args itself for example, except the flags that are given."""
    vars(settings).update({name: x for name, x in values.items() if name not in args.given})


def look_up(table: Iterable[tuple[int, int]], n: int) -> int:
    """Return the first value of [(value, least n)] for which n is enough."""
    return next(value for value, enough in table if n >= enough)


def choose_vocabulary(args: Namespace, text: Path) -> None:
    """Choose --n_vocab for --minutes: 257 are the bytes and end-of-text alone."""
    n_bytes = text.stat().st_size
    choose(args, args, n_vocab=look_up(VOCABULARIES, n_bytes))


def choose_batch(args: Namespace, model: Config, n_tokens: int, n_steps: float = 1.0) -> None:
    """Choose --batch_size: by BATCHES, doubled until n_steps become MAX_STEPS at most.

    n_tokens are those of the text, which has to fill a batch. Ranks and --threads can share it.
    """
    seq_len, n_shares = args.seq_len or model.n_ctx, args.group.size * (args.threads or 1)
    n_doubled = math.ceil(math.log2(max(1, n_steps / MAX_STEPS)))
    per_step = look_up(BATCHES, model.n_vocab) * 2**n_doubled
    n_windows = min(per_step, n_tokens - 1) // seq_len
    choose(args, args, batch_size=max(1, n_windows // n_shares) * n_shares)


def plan_model(
    args: Namespace, n_vocab: int, n_tokens: int, time_step: Callable[[Config], float]
) -> None:
    """Choose model, batch and dropout, except the flags that are given, and say why.

    n_tokens are those of the data. time_step(model) are the seconds of a step with the flags of
    args, or infinity if it does not fit into memory. All ranks choose the same.
    """
    left = seconds_left(args)

    def tokens_per_step(model: Config) -> int:
        return args.batch_size * (args.seq_len or model.n_ctx) * args.grad_accum

    @functools.cache
    def n_read(model: Config) -> float:
        choose_batch(args, model, n_tokens)
        return left / time_step(model) * tokens_per_step(model)

    given = {"n_ctx": args.seq_len} if args.seq_len else {}
    given |= {name: vars(args)[name] for name in SHAPE if name in args.given}
    models = candidates(given, n_vocab)
    model = choose_model(models, n_read, n_tokens)
    n_passes = n_read(model) / n_tokens
    reads_enough = worth(n_read(model), n_tokens) >= n_enough(model)
    reason = reason_for(reads_enough) if len(models) > 1 else "as the flags say"
    choose_batch(args, model, n_tokens)
    choose_batch(args, model, n_tokens, n_read(model) / tokens_per_step(model))
    vars(args).update({name: vars(model)[name] for name in SHAPE})
    overfits = n_passes > DROPOUT_PASSES and n_params(model) > n_tokens
    choose(args, args, dropout=DROPOUT if overfits else 0.0)
    info(
        f"--minutes {args.minutes:g}: {model.n_layer} layers of {model.n_embd} channels, {reason}; "
        f"dropout {args.dropout:g} for about {max(0, n_passes):.1f} passes over the text"
    )


def reason_for(reads_enough: bool) -> str:
    """Return why a model was chosen among several."""
    enough = f"{TOKENS_PER_PARAMETER:g} tokens for each parameter of its layers"
    if reads_enough:
        return f"of those tried the largest that reads {enough}"
    return f"the smallest, though it reads fewer than {enough}"


def plan_steps(args: Namespace, state: Any, seconds: float, n_tokens: int) -> None:
    """Choose how many steps a train.TrainState takes in the time that is left, and its reports.

    seconds are those of a step, n_tokens those of the data. The passes are MAX_PASSES at most. A
    run that is resumed reports as before. Raises ValueError if there is no time for a step.
    """
    config, left = state.config, seconds_left(args)
    n_reports, report = plan_reports(left, n_params(state.params.config))
    n_steps = int((0.95 * left - n_reports * report) / seconds)
    if n_steps < 1:
        raise ValueError(
            f"--minutes {args.minutes:g}: {max(0, left):.0f} s are left, and a step takes "
            f"{seconds:.2g} s: give more, or a smaller model or batch"
        )
    n_most = math.ceil(MAX_PASSES * n_tokens / config.tokens_per_step)
    if n_steps > n_most:
        info(f"--minutes {args.minutes:g}: the run ends before, with {MAX_PASSES} passes")
        n_steps = n_most
    config.steps = state.step + n_steps
    if not args.resume:
        every = dict.fromkeys(EVERY, math.ceil(n_steps / n_reports))
        # Validations take a twentieth of the time. They are forward only, a third of a step's work.
        steps_worth = 3 * 0.05 * left / n_reports / seconds
        n_eval = min(config.eval_tokens, 2 + int(steps_worth * config.tokens_per_step))
        choose(args, config, **every, eval_tokens=n_eval, warmup=default_warmup(n_steps))


def plan_reports(left: float, n_params: int) -> tuple[int, float]:
    """Return how many reports a run makes in so many seconds, and those of one, validation apart.

    They are REPORTS, or as many as take a twentieth of the time; the validations take another.
    """
    fixed, for_each = REPORT_SECONDS
    report = fixed + for_each * n_params
    return min(REPORTS, max(1, int(0.05 * left / report))), report
