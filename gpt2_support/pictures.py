"""Pictures for notebooks: a text coloured by its loss, attention, candidates, a heat map.

Each function takes what `gpt2` has computed, and returns a matplotlib figure or an Html, which a
notebook shows when it is the last line of a cell.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support.streaming import percent, token_text

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Sequence

    from jaxtyping import Float
    from matplotlib.figure import Figure
    from numpy import ndarray

    from gpt2_support.streaming import Encoder

BITS_SHOWN = 10.0  # of loss, from which on a token has the full colour
ORANGE, BLUE = (213, 94, 0), (0, 114, 178)  # the colour-blind can tell them apart


PLAIN = 'class="tex2jax_ignore mathjax_ignore" style="color: black; background: white'  # a $ is a $


class Html:
    """HTML that a notebook shows. Its repr is the same as plain text."""

    def __init__(self, code: str, text: str) -> None:
        self.code, self.text = code, text

    def _repr_html_(self) -> str:
        return self.code

    def __repr__(self) -> str:
        return self.text


def token_strip(
    enc: Encoder, tokens: Sequence[int], losses: Float[ndarray, " T"], label: str = "bits"
) -> Html:
    """Show a text with each token coloured by a number: by default its loss, of token_losses.

    tokens (T,), or (T + 1,) where the first has no loss. Losses are in nats, as `token_losses`
    gives them, and are shown in bits. Another `label` shows the numbers as they are, and negative
    ones in blue. The number of a token appears where the mouse points at it.
    """
    values = np.asarray(losses, np.float64).ravel().tolist()
    if len(tokens) - len(values) not in (0, 1):
        raise ValueError(
            f"{len(values)} losses for {len(tokens)} tokens, expected as many or one fewer"
        )
    if label == "bits":
        values, most = [value / math.log(2) for value in values], BITS_SHOWN
    else:
        most = max(map(abs, values), default=0.0)
    values = [0.0] * (len(tokens) - len(values)) + values
    spans, words = [], []
    for id, value in zip(tokens, values, strict=True):
        name, number = token_text(enc, int(id)), f"{value:.2f} {label}"
        text = html.escape(enc.tokens[int(id)].decode("utf-8", "replace")).replace("\n", "↵<br>")
        style = f"background: {color(value, most)}; white-space: pre-wrap"
        spans.append(f'<span style="{style}" title="{html.escape(name)}: {number}">{text}</span>')
        words.append(f"{name} {value:.1f}")
    return Html(f'<div {PLAIN}; line-height: 1.7">{"".join(spans)}</div>', "  ".join(words))


def color(value: float, most: float) -> str:
    """Return a CSS colour, from white at 0 to orange at `most`, or to blue at -`most`."""
    share = min(abs(value) / most, 1) if most else 0
    return f"rgba{(*(ORANGE if value >= 0 else BLUE), round(0.85 * share, 3))}"


def candidates(enc: Encoder, logits: Float[ndarray, "*T V"], n: int = 10) -> Html:
    """Show a table of the n most probable tokens after each row of logits, (V,) or (T, V)."""
    rows = np.atleast_2d(np.asarray(logits, np.float64))
    probs = np.exp(rows - rows.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    order = np.argsort(-probs[:, : len(enc.tokens)], axis=-1, kind="stable")[:, :n]
    lines, code = [], []
    for ids, row in zip(order.tolist(), probs, strict=True):
        cells = [(token_text(enc, id), float(row[id])) for id in ids]
        lines.append("  ".join(f"{name} {percent(p)}" for name, p in cells))
        style = "text-align: left; white-space: pre; background: {}"
        code.append("".join(
            f'<td style="{style.format(color(p, 1))}">{html.escape(name)} {percent(p)}</td>'
            for name, p in cells
        ))  # fmt: skip
    table = "".join(f"<tr>{cells}</tr>" for cells in code)
    return Html(f'<table {PLAIN}">{table}</table>', "\n".join(lines))


def attention(
    att: Float[ndarray, "*H T S"], labels: Sequence[str] = (), titles: Sequence[str] = ()
) -> Figure:
    """Draw who looks at whom: a row of `att`, (T, S) or (H, T, S), for each query.

    `labels` are the tokens' names, those of the S keys; the queries are the last T of them.
    """
    heads = np.asarray(att)
    heads = heads[None] if heads.ndim == 2 else heads
    if heads.ndim != 3:
        raise ValueError(f"att has the shape {heads.shape}, expected (T, S) or (H, T, S)")
    n_columns = min(len(heads), 3)
    n_rows = -(-len(heads) // n_columns)
    side = 3.2 if len(heads) > 1 else 5.0
    figure = new_figure(side * n_columns, side * n_rows)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i >= len(heads):
            ax.set_axis_off()
            continue
        ax.imshow(heads[i], cmap="Blues", vmin=0, vmax=1)
        title = titles[i] if i < len(titles) else f"head {i}" if len(heads) > 1 else ""
        ax.set_title(title, fontsize=9, parse_math=False)
        name_ticks(ax, labels[-heads.shape[1] :], labels)
    return figure


def heat_map(
    values: Float[ndarray, "N M"],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draw values, say of patching layers by positions: red is positive, blue negative."""
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"values have the shape {values.shape}, expected two dimensions")
    most = np.nanmax(np.abs(values), initial=0.0) or 1.0
    height, width = values.shape
    figure = new_figure(min(2.0 + 0.5 * width, 10.0), min(1.6 + 0.35 * height, 8.0))
    ax = figure.subplots()
    image = ax.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    name_ticks(ax, rows, columns)
    ax.set_title(title, fontsize=9, parse_math=False)
    figure.colorbar(image)
    return figure


def name_ticks(ax, rows: Sequence[str], columns: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    """Name the rows and columns of an image, if there are names."""
    if len(rows):
        ax.set_yticks(range(len(rows)), rows, fontsize=7, parse_math=False)
    if len(columns):
        ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7, parse_math=False)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure that a notebook shows once: pyplot, which would show it again, has none."""
    import matplotlib.pyplot  # noqa: F401 - a notebook then draws figures as pictures
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
