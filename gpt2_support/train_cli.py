"""The flags of train.py, and what it says before and after a run."""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support import checkpoint, cli, corpus, datasets, folders, hub, run_folder
from gpt2_support.cli import BadArgument
from gpt2_support.encoder_cli import vocabulary_size
from gpt2_support.messages import info
from gpt2_support.optimizers import OPTIMIZERS
from gpt2_support.params import Config, named_shapes
from gpt2_support.planning import default_warmup, memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from numpy import ndarray

    from gpt2_support.distributed import ProcessGroup

FINE_TUNING = {  # the defaults that differ where --init names a model
    "optimizer": "adamw",
    "steps": 200,
    "batch_size": 4,
    "lr": 5e-5,
    "eval_every": 50,
    "eval_tokens": 10_000,
    "save_every": 50,
    "sample_every": 50,
}
DEFAULTS = {  # of the flags that are no settings of a run, or depend on the model
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
    "optimizer": "muon",
    "warmup": None,
    "muon_lr": None,
    "threads": None,
}

MODEL = {"n_vocab", "n_layer", "n_head", "n_embd", "n_ctx"}
EVALUATION = {"eval_only", "data", "docs", "raw", "tokenizer", "init", "models_dir", "seq_len"}
EVALUATION |= {"stride"}

positive, natural, number = cli.positive_int, cli.natural, cli.number


def make_parser(settings: dict[str, Any]) -> cli.ArgumentParser:
    """Return the parser; `settings` are the defaults of a run."""
    parser = cli.ArgumentParser(
        prog="train.py",
        description="Train GPT-2 on your own text, from scratch or from a model. Ctrl-C saves and "
        "exits; --resume goes on, to the same result as if the run had never stopped.",
        usage="%(prog)s --data PATH [flags]\n       %(prog)s --resume --out PATH [flags]",
        examples=[
            "python train.py --data mystory.txt --minutes 10",
            "python train.py --data mystory.txt --n_layer 6 --n_embd 192 --steps 8000",
            "python train.py --data letters.txt --init 124M --out models/letters",
            "python train.py --resume --out models/letters",
            "python train.py --eval_only --init models/letters --data others.txt",
        ],
        guess=lambda args, words: f"did you mean --data {shlex.quote(words[0])}?",
    )
    defaults = settings | DEFAULTS

    def add_group(title: str, *flags: tuple[str, Any, str]) -> Any:
        """Add a group of flags: (name, type or choices, help)."""
        group = parser.add_argument_group(title)
        for name, type, help in flags:
            values = {"choices": type} if isinstance(type, list) else {"type": type}
            group.add_argument(f"--{name}", default=defaults.get(name), help=help, **values)
        return group

    group = add_group(
        "data",
        ("data", cli.path, "a text file, a tokens .bin made by `encoder.py encode`, or the name of "
         f"a data set to fetch: {', '.join(datasets.DATA_SETS)} (required without --resume)"),
        ("val_data", cli.path, "the same for validation (default: the last tenth of --data)"),
        ("tokenizer", cli.name, "a tokenizer file, or a folder or model that has one (default: "
         "that of --init, or what `encode` left beside a .bin, or one learned from the text)"),
        ("n_vocab", vocabulary_size, "size of the vocabulary that is learned from a text"),
        ("docs", [*corpus.SEPARATORS], "what a document of a text is: see encoder.py encode"),
    )  # fmt: skip
    group.add_argument(
        "--raw",
        action="store_true",
        help="--data and --val_data are nanoGPT's .bin files: uint16, no header",
    )
    add_group(
        "model",
        ("init", cli.name, "scratch, or a model to fine-tune or evaluate, as for gpt2.py --model"),
        ("n_layer", positive, "layers of a model from scratch"),
        ("n_head", positive, "attention heads of each layer"),
        ("n_embd", positive, "channels of a model from scratch"),
        ("n_ctx", positive, "tokens of context"),
        ("models_dir", cli.folder, "folder of the models"),
    )
    group = add_group(
        "output",
        ("out", cli.folder, "folder to write (default: one named after --data, in --models_dir or, "
         "where that is a cache, in models)"),
    )  # fmt: skip
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument(
        "--other_data",
        action="store_true",
        help="with --resume: go on with other data than before",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the model in --out, which stays until the first checkpoint is there",
    )
    group = add_group(
        "training",
        ("steps", positive, "steps of the optimizer in all"),
        ("epochs", cli.up_to_a_million, "passes over the data for --steps (default: by --steps)"),
        ("minutes", cli.positive_number, "choose what is not given for a low validation loss after "
         "this time: from scratch the vocabulary, the model, batch and dropout; always the steps. "
         "The time includes reading the text, validations and checkpoints. With --resume the "
         "run goes on for this long; without --minutes it ends as planned (default: no plan)"),
        ("batch_size", positive, "windows at a time, shared by all ranks under mpiexec"),
        ("seq_len", positive, "tokens a window (default: n_ctx, or at most 256 to fine-tune)"),
        ("grad_accum", positive, "batches a step, their gradients averaged"),
        ("order", ["random", "sequential"], "how windows follow each other"),
        ("lr", number, "the highest learning rate (default: 0.5 / n_embd from scratch)"),
        ("min_lr", number, "the learning rate at the end (default: a tenth of --lr)"),
        ("warmup", natural, "steps until the highest learning rate (default: a tenth of --steps, "
         "100 at most)"),
        ("decay_steps", positive, "steps until --min_lr (default: --steps)"),
        ("optimizer", [*OPTIMIZERS], "muon changes the matrices of the blocks in all directions "
         "alike, which takes fewer steps, and leaves the rest to AdamW"),
        ("muon_lr", number, "Muon: the highest learning rate of those matrices; it follows the "
         "schedule of --lr, that of the others (default: 0.02, scaled with --lr)"),
        ("momentum", cli.below_1, "Muon: decay of the sum of gradients"),
        ("beta1", cli.below_1, "AdamW: decay of the mean gradient"),
        ("beta2", cli.below_1, "AdamW: decay of the mean squared gradient"),
        ("eps", cli.positive_number, "AdamW: added to the root of the mean squared gradient, by "
         "which the mean is divided"),
        ("weight_decay", number, "decay of the matrices, times their rate"),
        ("dropout", cli.below_1, "probability that a value is dropped, of embeddings, attention "
         "weights and branches: for texts that are read many times, 0.1 for example"),
        ("grad_clip", number, "the largest norm of the gradient; 0: no limit"),
        ("threads", positive, "processes that share a batch, one BLAS thread each; the last bits "
         "depend on their number (default: the fastest, measured)"),
        ("seed", natural, "decides the first weights, the order of the data, the samples"),
    )  # fmt: skip
    tuned = ", ".join(f"{name} {value}" for name, value in FINE_TUNING.items())
    group.description = f"With --init NAME the defaults are {tuned}."
    group = add_group("training on several machines: mpiexec -n N python train.py --data ...")
    group.add_argument(
        "--shard",
        action="store_true",
        help="share the optimizer's memory among the ranks: less memory, more communication",
    )
    add_group(
        "reports",
        ("eval_every", positive, "steps between validations"),
        (
            "patience",
            positive,
            "validations without a lower loss that end the run, whose result is "
            "then the model in best/ (default: it goes on to the end)",
        ),
        ("eval_tokens", cli.int_from_2, "the most tokens that a validation takes"),
        ("save_every", positive, "steps between checkpoints"),
        ("sample_every", positive, "steps between samples"),
        ("prompt", cli.text, "beginning of the samples (default: none, they begin a text)"),
    )
    group = add_group(
        "evaluation",
        (
            "stride",
            positive,
            "tokens between windows (default: --seq_len). The usual perplexity in "
            "windows of L tokens is --seq_len L-1 here: the last target is not counted",
        ),
    )
    group.add_argument(
        "--eval_only", action="store_true", help="only print how well --init predicts --data"
    )
    return parser


def parse_args(
    parser: cli.ArgumentParser,
    load_checkpoint: Callable[[Path, ProcessGroup | None], Any],
    argv: Sequence[str] | None,
    group: ProcessGroup,
) -> Namespace:
    """Parse the command line; --resume takes the settings of the run as defaults.

    --threads, too, if ranks and batch are as before; otherwise it is chosen anew.
    """
    args = parser.parse_args(argv)
    if args.resume:
        if not (args.out or args.data):
            parser.error("--resume needs --out, the folder of the run")
        state = load_checkpoint(out_folder(args), group if args.shard else None)
        settings = asdict(state.config)
        if state.config.ranks != group.size or "batch_size" in parser.given(argv):
            settings["threads"] = None
        parser.set_defaults(state=state, **settings, **asdict(state.params.config))
    else:
        parser.set_defaults(**defaults_of(args))
    args = parser.parse_args(argv)
    args.given, args.started = parser.given(argv), time.perf_counter()
    check_args(parser, args, args.given)
    args.out, args.group = out_folder(args), group
    if args.shard and group.size == 1:
        info("--shard: there is one rank, which has nobody to share with")
    return args


def defaults_of(args: Namespace) -> dict[str, Any]:
    """Return the defaults that differ for a model that is tuned, and for a data set by name."""
    defaults: dict[str, Any] = dict(FINE_TUNING) if args.init != "scratch" else {}
    if args.data:
        defaults["docs"] = datasets.default_docs(args.data)
    return defaults


def check_args(parser: cli.ArgumentParser, args: Namespace, given: set[str]) -> None:
    """End with an error if an argument is missing, or if one that was given would do nothing."""
    if not args.data:
        parser.error("--data is needed: a text file or a tokens .bin")
    if args.eval_only and args.init == "scratch":
        parser.error("--eval_only needs --init, the model to evaluate")
    is_chosen = args.minutes and not {"n_embd", "n_head"} <= given
    if not is_chosen and args.n_embd % args.n_head:
        parser.error(f"--n_head {args.n_head} does not divide --n_embd {args.n_embd}")
    for name, reason in ignored_flags(args, given):
        parser.error(f"argument --{name}: it would do nothing, since {reason}")


def ignored_flags(args: Namespace, given: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the flags among those given that do nothing beside the others, and why."""
    rules = [
        (args.eval_only, given - EVALUATION, "--eval_only does not train"),
        (not args.eval_only, {"stride"}, "it belongs to --eval_only"),
        (args.resume, {"init", "tokenizer", "overwrite"}, "--resume goes on with what the run has"),
        (not args.resume, {"other_data"}, "it belongs to --resume"),
        (not args.resume and args.init != "scratch", MODEL, "the model of --init has its own"),
        (args.optimizer != "muon", {"muon_lr", "momentum"}, "it belongs to --optimizer muon"),
        (args.epochs, {"steps"}, "--epochs gives the steps"),
        (args.minutes, {"steps", "epochs"}, "--minutes gives the steps"),
        (args.tokenizer, {"n_vocab"}, "--tokenizer has its own vocabulary"),
    ]
    for flag, paths in (("n_vocab", [args.data]), ("docs", [args.data, args.val_data])):
        texts = (path for path in paths if path and datasets.is_text(Path(path), args.raw))
        if flag in given and not any(texts):
            rules.append((True, {flag}, "a tokens file is encoded already"))
    for applies, flags, reason in rules:
        for name in sorted(flags & given if applies else ()):
            yield name, reason


def out_folder(args: Namespace) -> Path:
    return args.out or folders.trained_models_dir(args.models_dir) / args.data.stem


def read_tokens(args: Namespace, enc: datasets.Encoder) -> tuple[ndarray, ndarray]:
    """Return the ids to train on and to validate with."""
    tokens = datasets.read_tokens(args.data, enc, args.docs, args.raw)
    if args.val_data:
        return tokens, datasets.read_tokens(args.val_data, enc, args.docs, args.raw)
    n = len(tokens) - len(tokens) // 10
    return tokens[:n], tokens[n:]


def hold_folder(args: Namespace, group: ProcessGroup) -> AbstractContextManager:
    """Keep other runs out of the folder that a run writes, during the block."""
    if args.eval_only or not (args.out or args.data):
        return contextlib.nullcontext()
    return run_folder.hold(out_folder(args), group)


def fit_to_model(args: Namespace, model: Config) -> dict[str, Any]:
    """Return the settings that depend on the model and the ranks, {name: value}.

    Raises BadArgument for flags that do not fit them, or the run that they resume.
    """
    group, n_ctx = args.group, model.n_ctx
    seq_len = args.seq_len or (n_ctx if args.init == "scratch" else min(n_ctx, 256))
    if seq_len > n_ctx:
        raise BadArgument(f"--seq_len {seq_len} exceeds n_ctx = {n_ctx}")
    check_division(args)
    lr = 0.5 / model.n_embd if args.lr is None else args.lr  # 0.03 for 16 channels, 6.5e-4 for 768
    muon_lr = 0.04 * model.n_embd * lr if args.muon_lr is None else args.muon_lr
    min_lr = lr / 10 if args.min_lr is None else args.min_lr
    if args.resume:
        min_lr, muon_lr = rates_in_proportion(args, min_lr, muon_lr)
    steps = steps_of(args, seq_len) if args.epochs else args.steps
    if args.resume and steps < args.state.step:
        flag = f"--epochs {args.epochs:g}" if args.epochs else f"--steps {steps}"
        raise BadArgument(
            f"{flag}: the run in {args.out} has taken {args.state.step} steps already: give more"
        )
    warmup = default_warmup(steps) if args.warmup is None else args.warmup
    paths = {"data": args.data, "val_data": args.val_data}
    return {
        **{name: path and str(datasets.find(Path(path)).resolve()) for name, path in paths.items()},
        **{"seq_len": seq_len, "lr": lr, "min_lr": min_lr, "muon_lr": muon_lr},
        **{"steps": steps, "warmup": warmup, "ranks": group.size, "threads": args.threads or 1},
    }


def rates_in_proportion(args: Namespace, min_lr: float, muon_lr: float) -> tuple[float, float]:
    """Return the other rates of a run that goes on with another --lr; those given stay."""
    factor = args.lr / args.state.config.lr if args.state.config.lr else 1
    return (
        min_lr if "min_lr" in args.given else factor * min_lr,
        muon_lr if "muon_lr" in args.given else factor * muon_lr,
    )


def steps_of(args: Namespace, seq_len: int) -> int:
    """Return how many steps --epochs passes over the data are, at least 1."""
    tokens_per_step = args.batch_size * seq_len * args.grad_accum
    return math.ceil(args.epochs * args.n_tokens / tokens_per_step)


def check_division(args: Namespace) -> None:
    """Raise BadArgument if ranks and their processes cannot share a batch equally."""
    batch_size, size = args.batch_size, args.group.size
    if batch_size % size:
        raise BadArgument(f"{size} ranks cannot share --batch_size {batch_size} equally")
    if batch_size // size % (args.threads or 1):
        among = f" / {size} ranks" if size > 1 else ""
        raise BadArgument(
            f"--threads {args.threads} does not divide --batch_size {batch_size}{among}"
        )


def check_same_run(args: Namespace, model: Config, data: dict[str, str]) -> None:
    """Raise an error if --resume is to go on with another model or other data."""
    if model != args.state.params.config:
        raise BadArgument(
            f"{args.out}: the run has {args.state.params.config}; that cannot be changed"
        )
    if args.optimizer != args.state.config.optimizer:
        before = args.state.config.optimizer
        raise BadArgument(f"{args.out}: the run has --optimizer {before}; that cannot be changed")
    if not args.other_data:
        checkpoint.check_data(args.out, args.state.data, data)


def describe(state: Any, n_tokens: int, seconds: float, head_rows: int) -> None:
    """Tell the shape of a train.TrainState, and the time and memory that the rest of it takes.

    n_tokens are those of the data, `seconds` the time of a step, head_rows gpt2's.
    """
    model, config = state.params.config, state.config
    steps = config.steps - state.step
    n_passes = steps * config.tokens_per_step / n_tokens
    ranks, threads = config.ranks, config.threads
    who = f" in each of {ranks} ranks" if ranks > 1 else ""
    n_params = sum(math.prod(shape) for _, shape in named_shapes(model))  # without the padding
    n_bytes = memory(model, config, head_rows, ranks if state.optimizer.is_sharded else 1)
    info(
        f"{n_params:,} parameters: {plural(model.n_layer, 'layer')}, "
        f"{plural(model.n_head, 'head')}, {model.n_embd} channels, "
        f"{model.n_ctx} tokens of context, a vocabulary of {model.n_vocab}\n"
        f"{steps} steps of {config.tokens_per_step} tokens, {n_passes:.1f} passes over {n_tokens}, "
        f"at a learning rate of {config.lr:.2g}: {duration(steps * seconds)} and "
        f"{n_bytes / 1e6:.0f} MB of memory{who}, threads: {threads}"
    )


def plural(n: int, noun: str) -> str:
    """Return "1 layer" or "2 layers"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    """Return about how long something takes."""
    return f"about {seconds / 60:.1f} minutes" if seconds >= 60 else f"about {seconds:.0f} seconds"


def say_stopped(step: int, args: Namespace) -> None:
    """Say how to go on with a run that was interrupted."""
    if step == 0:
        info(f"{args.out}: stopped before the first step: nothing is saved, and nothing replaced")
        return
    command = cli.command("train.py", "--resume", "--out", args.out, *["--shard"] * args.shard)
    if args.group.size > 1:
        command = f"mpiexec -n {args.group.size} {command}"
    info(f"{args.out}: saved at step {step}; go on with: {command}")


def say_done(state: Any, args: Namespace, lowest_loss: float) -> None:
    """Say where the models of a train.TrainState are, and how to sample from the result."""
    best, config = args.out / "best", state.config
    if state.is_stale:
        info(
            f"--patience: no lower validation loss since step {state.best_step}, so the run ends "
            f"at step {state.step} of {config.steps}; the result is {best}"
        )
    result = best if state.is_stale else args.out
    words = [args.prompt, "--model", result, "--n_tokens", 100, "--temperature", 0.8]
    if args.prompt.startswith("-"):
        words = [*words[1:], "--", args.prompt]
    command = cli.command("gpt2.py", *words)
    lowest = f"; the lowest validation loss was {lowest_loss:.4f}, by {best}"
    lowest = lowest if math.isfinite(lowest_loss) else ""
    info(f"{result / 'model.bin'}: done{lowest}. To sample: {command}")
