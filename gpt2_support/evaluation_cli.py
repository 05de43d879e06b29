"""The flags of evaluate.py, and what it prints: figures of a text, of LAMBADA, of HellaSwag.

The modules gpt2 and encoder are passed in by the caller.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_support import checks, cli, corpus, datasets, evaluation, hub, tasks
from gpt2_support.messages import write
from gpt2_support.prompts import standard_input, without_line_end
from gpt2_support.scoring import score
from gpt2_support.weights import load_params

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from jaxtyping import Integer
    from numpy import ndarray

    from gpt2_support.distributed import ProcessGroup
    from gpt2_support.params import Params

TEXT_FLAGS = {"stride", "seq_len", "docs", "raw"}


def make_parser() -> cli.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(
        prog="evaluate.py",
        usage="%(prog)s [TEXT] [flags]",
        description="Measure how well a model predicts: each token of a short TEXT; or --data, a "
        "text of any size (perplexity, bits per byte), LAMBADA (the last word of a passage) or "
        "HellaSwag (the right one of four endings). Figures go to standard output.",
        examples=[
            'python evaluate.py "Once upon a time" --model stories',
            "python evaluate.py --data other_stories.txt --model stories --stride 128",
            "python evaluate.py --data lambada --model 124M --limit 1000",
            "python evaluate.py --data hellaswag.jsonl --model models/mine --json",
        ],
        guess=lambda args, words: f"quote a TEXT with spaces; a file is --data {words[0]}",
    )
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="?", type=cli.text, help="text whose tokens are scored; - "
        "reads it from standard input, without its last line end")  # fmt: skip
    add("--json", action="store_true", help="print the figures as JSON")
    add = parser.add_argument_group("model").add_argument
    add("--model", type=cli.name, help="a name or path, as for gpt2.py --model (default: 124M, or "
        "stories where that cannot be downloaded)")  # fmt: skip
    add("--models_dir", type=cli.folder, default=hub.MODELS_DIR, help="folder of the models")
    add("--tokenizer", type=cli.name, help="a tokenizer file, or a folder or model that has one "
        "(default: that of the model)")  # fmt: skip
    add = parser.add_argument_group("data").add_argument
    add("--data", type=cli.path, help="lambada or hellaswag, which are downloaded once, or a "
        ".jsonl file of one of them; or a text, a tokens .bin or a data set as for train.py --data "
        "(default: only TEXT)")  # fmt: skip
    add("--limit", type=cli.positive_int, help="the most items, or tokens of a text, from the "
        "beginning (default: all)")  # fmt: skip
    add("--way", choices=["both", *tasks.WAYS], default="both", help="how HellaSwag is written and "
        "counted: as by lm-evaluation-harness, as by llm.c")  # fmt: skip
    add = parser.add_argument_group("data that are a text").add_argument
    add("--seq_len", type=cli.positive_int, help="tokens a window (default: n_ctx)")
    add("--stride", type=cli.positive_int, help="tokens between windows (default: --seq_len). The "
        "usual perplexity in windows of L tokens is --seq_len L-1 here: the last target is not "
        "counted")  # fmt: skip
    add("--docs", choices=corpus.SEPARATORS, default="eot", help="what a document of a text is: "
        "see encoder.py encode")  # fmt: skip
    add(
        "--raw", action="store_true", help="--data is nanoGPT's train.bin: uint16, without a header"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and one line for a bad argument."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.is_task = args.data is not None and is_task(args.data)
    if (args.text is None) == (args.data is None):
        parser.error("give either a TEXT to score or --data to measure with")
    if args.text == "":
        parser.error("TEXT is empty")
    if args.text in tasks.TASKS or (args.text and is_file(args.text)):
        parser.error(f"to measure with {args.text}: --data {args.text}; a TEXT is scored as it is")
    given = parser.given(argv)
    rules = [
        (args.data is None, {"limit", "way", *TEXT_FLAGS}, "a TEXT is read whole"),
        (args.is_task, TEXT_FLAGS, f"{args.data} holds items, not a text"),
        (not args.is_task, {"way"}, "it belongs to HellaSwag"),
    ]
    for applies, flags, reason in rules:
        for name in sorted(flags & given if applies else ()):
            parser.error(f"argument --{name}: it would do nothing, since {reason}")
    if args.data is not None and "docs" not in given:
        args.docs = datasets.default_docs(args.data)
    return args


def is_task(data: Path) -> bool:
    """Tell LAMBADA and HellaSwag, by their names or in a .jsonl file, from texts."""
    return data.suffix == ".jsonl" or (str(data) in tasks.TASKS and not data.is_file())


def is_file(text: str) -> bool:
    """Return whether a text is the path of a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def run_evaluation(gpt2: Any, encoder: Any, argv: Sequence[str] | None = None) -> None:
    """Run the command line: `python evaluate.py --help`."""
    args = parse_args(argv)
    if args.data is not None and str(args.data) not in tasks.TASKS:
        datasets.find(args.data)  # before a model is downloaded
    path = hub.find_model_or_default(args.model, args.models_dir)
    params, folder = load_params(path), path if path.is_dir() else path.parent
    enc = encoder.load(args.tokenizer, args.models_dir) if args.tokenizer else encoder.load(folder)
    checks.check_tokenizer(path, params.config, enc.n_vocab)
    name = model_name(args.model, path)
    if args.is_task:
        result, text = measure_task(gpt2, params, enc, args, name)
    elif args.data is not None:
        tokens = datasets.read_tokens(args.data, enc, args.docs, args.raw)[: args.limit]
        result, text = measure_text(gpt2, params, enc, tokens, args)
    else:
        result, text = score_text(gpt2, params, enc, args)
    write(json.dumps(finite({"model": name, **result}), indent=1) if args.json else text)


def model_name(name: str | None, path: Path) -> str:
    """Return "124M" or its like for one of OpenAI's models by any of its names, or the path."""
    names = hub.MODEL_ALIASES | {other: ours for ours, other in hub.COMMUNITY.items()}
    name = names.get(name or path.name, name or path.name)
    return name if name in hub.MODEL_NAMES else str(path)


# ----------------------------------------------------------------------------------------------
# A text


def window_lengths(args: argparse.Namespace, n_ctx: int) -> tuple[int, int]:
    """Return --seq_len and --stride; raises BadArgument if they do not fit."""
    seq_len = args.seq_len or n_ctx
    stride = args.stride or seq_len
    if seq_len > n_ctx:
        raise cli.BadArgument(f"--seq_len {seq_len} exceeds n_ctx = {n_ctx}")
    if stride > seq_len:
        limit = "--seq_len" if args.seq_len else "n_ctx ="
        raise cli.BadArgument(f"--stride {stride} exceeds {limit} {seq_len}")
    return seq_len, stride


def measure_text(
    gpt2: Any,
    params: Params,
    enc: Any,
    tokens: Integer[ndarray, " N"],
    args: argparse.Namespace,
    group: ProcessGroup | None = None,
) -> tuple[dict[str, Any], str]:
    """Return how well a model predicts the tokens of --data, as a dict and as a line."""
    seq_len, stride = window_lengths(args, params.config.n_ctx)
    lengths = datasets.token_lengths(enc)
    result = evaluation.measure(gpt2, params, tokens, lengths, seq_len, stride, group)
    evaluation.check_finite(result.nats)
    line = (
        f"{args.data}: {result}; {result.n_tokens} tokens ({result.n_bytes} bytes), in windows of "
        f"{seq_len}, stride {stride}; standard error {result.standard_error:.4f} nats"
    )
    return {"data": str(args.data), **totals(result), "seq_len": seq_len, "stride": stride}, line


def totals(result: evaluation.Evaluation) -> dict[str, Any]:
    """Return the figures of an evaluation for JSON."""
    return {
        **{"n_tokens": result.n_tokens, "n_bytes": result.n_bytes},
        **{"nats_per_token": result.loss, "stderr": result.standard_error},
        **{"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte},
    }


def finite(x: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def score_text(
    gpt2: Any, params: Params, enc: Any, args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """Return loss and probability of each token of TEXT, as a dict and as a table.

    The first is predicted from end-of-text or, if the tokenizer has none, not at all.
    """
    text = without_line_end(standard_input().read()) if args.text == "-" else args.text
    if not text:
        raise cli.BadArgument("standard input is empty")
    tokens = np.array([] if enc.eot is None else [enc.eot], np.int64)
    tokens = np.append(tokens, np.array(enc.encode(cli.text(text)), np.int64))
    n_ctx = params.config.n_ctx
    windows = evaluation.Windows(tokens, n_ctx, max(1, n_ctx // 2))
    nats = evaluation.token_losses(lambda batch: gpt2.token_losses(params, *batch), windows)
    evaluation.check_finite(nats)
    n_bytes = int(datasets.token_lengths(enc)[tokens[1:]].sum())
    total, squares = evaluation.sum_and_squares(nats)
    result = evaluation.Evaluation(total, len(nats), n_bytes, squares)
    rows = [
        {"id": id, "text": enc.decode([id]), "nats": loss, "prob": math.exp(-loss)}
        for id, loss in zip(tokens[1:].tolist(), nats.tolist(), strict=True)
    ]
    lines = [f"{row['nats']:9.4f} {row['prob']:11.3%}  {row['text']!r}" for row in rows]
    table = "\n".join(["     nats probability  token", *lines, str(result)])
    return {**totals(result), "tokens": rows}, table


# ----------------------------------------------------------------------------------------------
# LAMBADA and HellaSwag


def measure_task(
    gpt2: Any, params: Params, enc: Any, args: argparse.Namespace, model: str
) -> tuple[dict[str, Any], str]:
    """Return the figures of a task beside those that are published, as a dict and as a table."""
    path = datasets.download(str(args.data)) if str(args.data) in tasks.TASKS else args.data
    task, items = tasks.load_items(path, args.limit)
    if task == "lambada" and args.way != "both":
        raise ValueError(f"{path}: --way belongs to HellaSwag, and this is LAMBADA")
    began = time.perf_counter()
    figures = task_figures(gpt2, params, enc, task, items, args.way)
    seconds = time.perf_counter() - began
    rows = []
    for figure in figures:
        other, source = tasks.published(task, figure.name, model)
        rows.append({"name": figure.name, "value": figure.value, "stderr": figure.stderr,
                     "published": other, "source": source})  # fmt: skip
    speed = len(items) / seconds
    head = f"{path}: {len(items)} items of {task} by {model}, {speed:.1f} a second"
    result = {"data": str(path), "task": task, "n_items": len(items), "seconds": seconds}
    return {**result, "figures": rows}, "\n".join([head, *map(figure_line, rows)])


def task_figures(
    gpt2: Any, params: Params, enc: Any, task: str, items: list[tasks.Item], way: str
) -> list[tasks.Figure]:
    """Return the figures of a model on items of a task; `way` is one of tasks.WAYS or "both"."""
    if task == "lambada":
        requests = [tasks.lambada_request(item, enc.encode, enc.eot) for item in items]
        return tasks.lambada_figures(score(gpt2, params, requests))
    figures = []
    for each in tasks.WAYS if way == "both" else [way]:
        requests = [tasks.hellaswag_request(item, each, enc.encode, enc.eot) for item in items]
        figures += tasks.hellaswag_figures(items, score(gpt2, params, requests), each)
    return figures


def figure_line(row: dict[str, Any]) -> str:
    """Return a figure, its standard error, and what is published, as a line of a table."""
    error = "unknown" if math.isnan(row["stderr"]) else f"{row['stderr']:.4f}"
    line = f"{row['name']:18} {row['value']:10.4f}  (standard error {error})"
    if row["published"] is not None:
        line += f"  published: {row['published']:.4f}, {row['source']}"
    return line
