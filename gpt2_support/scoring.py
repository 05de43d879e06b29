"""The log-likelihoods of texts that go on from a context: what multiple choice is decided by.

Several endings of one context read it once: its keys and values are copied for each of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpt2_support.checks import check_ids, to_lists
from gpt2_support.evaluation import check_finite, parallel_map

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from jaxtyping import Bool, Float, Integer
    from numpy import ndarray

    from gpt2_support.params import Params

TOKENS_PER_BATCH = 512  # read at a time: enough rows for fast products, few enough for the memory


class Request(NamedTuple):
    """Endings to score after the same context: ids, none of them empty."""

    context: list[int]
    endings: list[list[int]]


class Score(NamedTuple):
    """For each token of an ending: -log P(token | all before it), and if it is the likeliest."""

    nats: Float[ndarray, " N"]
    is_best: Bool[ndarray, " N"]


class Group(NamedTuple):
    """Rows of ids that begin with the same prefix, which they leave out.

    The last ids of a row, as many as its ending has, are targets. `places` are the places of their
    scores.
    """

    prefix: list[int]
    rows: list[list[int]]
    endings: list[list[int]]
    places: list[int]

    @property
    def extent(self) -> int:
        """The positions that the longest row takes; its last id is not read."""
        return len(self.prefix) + max(map(len, self.rows)) - 1


def score(gpt2: Any, params: Params, requests: Sequence[Request]) -> list[list[Score]]:
    """Return the Score of each ending of each request, with a progress bar.

    `gpt2` is the module of that name, which this package does not import. A context that is too
    long loses its beginning, as in lm-evaluation-harness. Raises ValueError for an empty ending or
    context, for an ending of more than n_ctx tokens, for ids outside the vocabulary, and for a
    model whose logits are not finite.
    """
    groups: list[Group] = []
    n_scores = 0
    requests = [check_request(params, request) for request in requests]
    for request in requests:
        groups += make_groups(request, n_scores, params.config.n_ctx)
        n_scores += len(request.endings)
    batches = list(make_batches(groups, params.config.n_ctx))
    scores: list[Any] = [None] * n_scores

    def work(i: int) -> tuple[None, int]:
        places = [place for group in batches[i] for place in group.places]
        for place, ending in zip(places, score_batch(gpt2, params, batches[i]), strict=True):
            scores[place] = ending
        return None, len(places)

    parallel_map(work, range(len(batches)), n_scores, "ending")
    in_order = iter(scores)
    return [[next(in_order) for _ in request.endings] for request in requests]


def check_request(params: Params, request: Request) -> Request:
    """Return a request whose ids, in lists or arrays, are lists; raise ValueError as `score`."""
    context, endings = map(to_lists, request)
    for ids in (context, *(endings or [[]])):
        if not ids:
            nothing = "an empty context or ending cannot be scored"
            raise ValueError(f"{nothing}: there is nothing to predict")
        if check_ids(params, ids).ndim > 1:
            raise ValueError("a context or an ending is a list of ids, found one of lists")
    return Request(context, endings)


def make_groups(request: Request, place: int, n_ctx: int) -> Iterator[Group]:
    """Yield one Group for all endings, or, where that saves nothing or is too long, one for each.

    `place` is that of the first score.
    """
    context, endings = request
    if max(map(len, endings)) > n_ctx:
        raise ValueError(f"an ending of {max(map(len, endings))} tokens exceeds n_ctx = {n_ctx}")
    rows = [[context[-1], *ending] for ending in endings]
    places = [*range(place, place + len(endings))]
    together = Group(context[:-1], rows, endings, places)
    if len(endings) > 1 and together.extent <= n_ctx:
        yield together
        return
    for ending, at in zip(endings, places, strict=True):
        yield Group([], [[*context, *ending][-n_ctx - 1 :]], [ending], [at])


def make_batches(groups: list[Group], n_ctx: int) -> Iterator[list[Group]]:
    """Yield groups to read at once, the longest first, so that little of a batch is padding."""
    batch: list[Group] = []
    for group in sorted(groups, key=lambda group: group.extent, reverse=True):
        longer = [*batch, group]
        n_prefix = max(len(group.prefix) for group in longer)
        n_rest = max(len(row) - 1 for group in longer for row in group.rows)
        n_read = len(longer) * n_prefix + sum(len(group.rows) for group in longer) * n_rest
        if batch and (n_read > TOKENS_PER_BATCH or n_prefix + n_rest > n_ctx):
            yield batch
            longer = [group]
        batch = longer
    if batch:
        yield batch


def score_batch(gpt2: Any, params: Params, batch: list[Group]) -> Iterable[Score]:
    """Return the Score of every ending of a batch."""
    rows = [row for group in batch for row in group.rows]
    endings = [ending for group in batch for ending in group.endings]
    tokens = pad([row[:-1] for row in rows])
    x = gpt2.transformer(params, tokens, read_prefixes(gpt2, params, batch, tokens.shape[1]))
    pairs = zip(rows, endings, strict=True)
    spans = [slice(len(row) - 1 - len(ending), len(row) - 1) for row, ending in pairs]
    x = np.concatenate([x[b, span] for b, span in enumerate(spans)])
    nats, is_best = compare(gpt2, x, params.wte, np.concatenate(endings))
    ends = np.cumsum([len(ending) for ending in endings])[:-1]
    return map(Score, np.split(nats, ends), np.split(is_best, ends))


def pad(rows: list[list[int]]) -> Integer[ndarray, "B T"]:
    """Return rows of ids as an array (B, T); none of them sees what fills the shorter ones."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded


def read_prefixes(gpt2: Any, params: Params, batch: list[Group], n_more: int) -> Any:
    """Read the prefix of each group; return a KVCache with a row for each of its rows, or None.

    It has room for n_more tokens. None if no group has a prefix.
    """
    lengths = [len(group.prefix) for group in batch]
    n_rows, T, dtype = [len(group.rows) for group in batch], max(lengths), params.flat.dtype
    if T == 0:
        return None
    once = gpt2.KVCache(replace(params.config, n_ctx=T), len(batch), dtype)
    gpt2.transformer(params, pad([group.prefix for group in batch]), once)
    kv = gpt2.KVCache(replace(params.config, n_ctx=T + n_more), sum(n_rows), dtype)
    for row, group in enumerate(np.repeat(range(len(batch)), n_rows)):
        kv.buffer[:, :, row, :, :T] = once.buffer[:, :, group]
    kv.length[...] = np.repeat(lengths, n_rows)  # what follows a short prefix is written over
    return kv


def compare(
    gpt2: Any,
    x: Float[ndarray, "N C"],
    wte: Float[ndarray, "V C"],
    targets: Integer[ndarray, " N"],
) -> tuple[Float[ndarray, " N"], Bool[ndarray, " N"]]:
    """Return -log P(target) (N,) and whether it is the likeliest id, from the output of ln_f.

    Raises ValueError if they are not finite: argmax takes NaN for the largest value.
    """
    nats, is_best = np.empty(len(x), x.dtype), np.empty(len(x), bool)
    for start in range(0, len(x), gpt2.LM_HEAD_ROWS):
        rows = slice(start, start + gpt2.LM_HEAD_ROWS)
        logits = x[rows] @ wte.T
        is_best[rows] = logits.argmax(-1) == targets[rows]
        nats[rows], _ = gpt2.cross_entropy(logits, targets[rows])
    check_finite(nats)
    return nats, is_best
