"""LAMBADA and HellaSwag: their items as requests to score, and the figures that papers report.

LAMBADA (Paperno et al. 2016, arXiv:1606.06031) asks for the last word of a passage. HellaSwag
(Zellers et al. 2019, arXiv:1905.07830) asks which of four endings goes on from a context.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpt2_support.evaluation import perplexity, standard_error
from gpt2_support.messages import preview
from gpt2_support.scoring import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpt2_support.scoring import Score

    Item = dict[str, Any]
    Encode = Callable[[str], list[int]]

FIELDS: dict[str, dict[str, Any]] = {  # of an item, with their types
    "lambada": {"text": str},
    "hellaswag": {
        "ctx_a": str, "ctx_b": str, "ctx": str, "activity_label": str, "endings": list, "label": int
    },
}  # fmt: skip
TASKS = tuple(FIELDS)
WAYS = ("harness", "llm.c")  # in which people count HellaSwag

PAPER = "Radford et al. 2019, table 3"
LLMC = "karpathy/llm.c, dev/data/hellaswag.py"
HARNESS = "EleutherAI/lm-evaluation-harness#"
# What others report: {task: {figure: (where, {model: value})}}.
PUBLISHED: dict[str, dict[str, tuple[str, dict[str, float]]]] = {
    "lambada": {
        "acc, last token": (
            PAPER, {"124M": 0.4599, "355M": 0.5548, "774M": 0.6012, "1558M": 0.6324}
        ),
        "acc": (f"{HARNESS}2159", {"124M": 0.3256}),
        "perplexity": (f"{HARNESS}2159, 911", {"124M": 40.0554, "1558M": 10.63}),
    },
    "hellaswag": {
        "acc, harness": (LLMC, {"124M": 0.2892, "1558M": 0.4004}),
        "acc_norm, harness": (LLMC, {"124M": 0.3114, "1558M": 0.5089}),
        "acc, llm.c": (LLMC, {"124M": 0.2859, "1558M": 0.3842}),
        "acc_norm, llm.c": (LLMC, {"124M": 0.2955, "1558M": 0.4893}),
    },
}  # fmt: skip


class Figure(NamedTuple):
    """A mean over the items, or the perplexity that follows from one, and its standard error."""

    name: str
    value: float
    stderr: float


# ----------------------------------------------------------------------------------------------
# Items


def load_items(path: Path, limit: int | None = None) -> tuple[str, list[Item]]:
    """Return which task a file of JSON lines is of, "lambada" or "hellaswag", and its items.

    Raises ValueError, naming the line, for what is no item of that task.
    """
    task = ""
    items: list[Item] = []
    with open(path, "rb") as file:
        for n, line in enumerate(file, start=1):
            if len(items) == limit:
                break
            if line.strip():
                try:
                    item = json.loads(line.decode("utf-8-sig"))  # it may have a BOM
                    task = task or find_task(item)
                    check_item(item, task)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}: line {n}: {error}") from None
                items.append(item)
    if not items:
        raise ValueError(f"{path}: has no items, expected one of {' or '.join(TASKS)} a line")
    return task, items


def find_task(item: Any) -> str:
    """Return the task that an item is of, by its fields."""
    for task, fields in FIELDS.items():
        if isinstance(item, dict) and fields.keys() <= item.keys():
            return task
    expected = " or ".join(f"{task} ({', '.join(fields)})" for task, fields in FIELDS.items())
    raise ValueError(f"found {preview(item)}, expected an item of {expected}")


def check_item(item: Any, task: str) -> None:
    """Raise ValueError unless an item has the fields of its task, of the right types."""
    if not isinstance(item, dict):
        raise ValueError(f"found {preview(item)}, expected an item of {task}")
    for name, expected_type in FIELDS[task].items():
        value = item.get(name)
        if name == "label" and isinstance(value, str) and value.isdecimal():
            value = item[name] = int(value)
        if not isinstance(value, expected_type):
            expected = {str: "a text", list: "a list", int: "a number"}[expected_type]
            raise ValueError(f"{name} is {preview(value)}, expected {expected}")
    if task == "lambada":
        return
    endings = item["endings"]
    if len(endings) < 2 or not all(isinstance(ending, str) for ending in endings):
        raise ValueError(f"endings are {preview(endings)}, expected two texts or more")
    if not 0 <= item["label"] < len(endings):
        raise ValueError(f"label is {item['label']}, expected 0 to {len(endings) - 1}")


def encode_pair(encode: Encode, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of an ending, as lm-evaluation-harness cuts them.

    Spaces at the end of the context belong to the ending, whose ids are those of both together
    without those of the context alone.
    """
    stripped = context.rstrip()
    first = encode(stripped)
    return first, encode(context + ending)[len(first) :]


def start(context: list[int], eot: int | None) -> list[int]:
    """Return a context, or end-of-text in place of an empty one."""
    return context or ([] if eot is None else [eot])


def lambada_request(item: Item, encode: Encode, eot: int | None) -> Request:
    """Return the last word, with the space before it, after all other words."""
    context, _, word = item["text"].rpartition(" ")
    ids, ending = encode_pair(encode, context, f" {word}")
    return Request(start(ids, eot), [ending])


def hellaswag_request(item: Item, way: str, encode: Encode, eot: int | None) -> Request:
    """Return the endings after the context, as lm-evaluation-harness or llm.c writes them."""
    if way == "llm.c":  # "completion style"
        ids, endings = encode(item["ctx"]), [encode(f" {ending}") for ending in item["endings"]]
        return Request(start(ids, eot), endings)
    context = harness_text(
        f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    )
    pairs = [encode_pair(encode, context, f" {harness_text(e)}") for e in item["endings"]]
    return Request(start(pairs[0][0], eot), [ending for _, ending in pairs])


def harness_text(text: str) -> str:
    """Return a text of HellaSwag as lm-evaluation-harness detokenizes it.

    Brackets are left from WikiHow, half of the data's source.
    """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# ----------------------------------------------------------------------------------------------
# Figures


def lambada_figures(scores: Sequence[list[Score]]) -> list[Figure]:
    """Return the accuracy of the whole word, that of its last token, and the word's perplexity.

    GPT-2's paper seems to count the last token, which those before it in the word may give away.
    """
    words = [score for (score,) in scores]
    nats = mean("nats", [float(score.nats.sum(dtype=np.float64)) for score in words])
    value = perplexity(nats.value)
    return [
        mean("acc", [bool(score.is_best.all()) for score in words]),
        mean("acc, last token", [bool(score.is_best[-1]) for score in words]),
        Figure("perplexity", value, value * nats.stderr),
    ]


def hellaswag_figures(
    items: Sequence[Item], scores: Sequence[list[Score]], way: str
) -> list[Figure]:
    """Return how often the right ending is the likeliest: acc as a whole, acc_norm by its length.

    The length is in characters in lm-evaluation-harness's way, in tokens in llm.c's.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for item, endings in zip(items, scores, strict=True):
        nats = np.array([score.nats.sum(dtype=np.float64) for score in endings])
        lengths = np.array([float(len(score.nats)) for score in endings])
        if way == "harness":
            lengths = np.array([float(len(harness_text(ending))) for ending in item["endings"]])
        with np.errstate(divide="ignore"):  # an empty ending is never chosen
            by_length = nats / lengths
        right["acc"].append(bool(nats.argmin() == item["label"]))
        right["acc_norm"].append(bool(by_length.argmin() == item["label"]))
    return [mean(f"{name}, {way}", values) for name, values in right.items()]


def mean(name: str, values: Sequence[float]) -> Figure:
    """Return the mean of values, one an item, as a Figure."""
    n, total = len(values), math.fsum(values)
    squares = math.fsum(value * value for value in values)
    return Figure(name, total / n, standard_error(n, total, squares))


def published(task: str, figure: str, model: str) -> tuple[float | None, str]:
    """Return what others report for one of OpenAI's models, and where: (None, "") if nothing."""
    source, values = PUBLISHED[task].get(figure, ("", {}))
    return (values[model], source) if model in values else (None, "")
