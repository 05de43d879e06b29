"""Tests of gpt2_support/scoring.py, beside a whole forward for each ending, in float64."""

import threading

import numpy as np
import pytest
from helpers import TINY, random_params

import gpt2
from gpt2_support import blas, scoring
from gpt2_support.params import Config

CONFIG = Config(n_vocab=61, n_ctx=24, n_embd=12, n_head=3, n_layer=2)


def naive(params, context, ending):
    """Return -log P and is-best of each token of an ending, from one forward of its own."""
    ids = [*context, *ending][-params.config.n_ctx - 1 :]
    logits = gpt2.forward(params, ids[:-1])[-len(ending) :].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logits[np.arange(len(ending)), ending], logits.argmax(-1) == ending


def random_requests(n, n_endings, seed=0, longest=30):
    rng = np.random.default_rng(seed)

    def ids(high):
        return rng.integers(CONFIG.n_vocab, size=rng.integers(1, high)).tolist()

    return [scoring.Request(ids(longest), [ids(9) for _ in range(n_endings)]) for _ in range(n)]


def check(params, requests, **tolerance):
    scores = scoring.score(gpt2, params, requests)
    assert [len(endings) for endings in scores] == [len(r.endings) for r in requests]
    for request, endings in zip(requests, scores, strict=True):
        for ending, score in zip(request.endings, endings, strict=True):
            nats, is_best = naive(params, request.context, ending)
            np.testing.assert_allclose(score.nats, nats, **tolerance)
            assert (score.is_best == is_best).all()


@pytest.mark.parametrize("n_endings", [1, 2, 4])
def test_scores_are_those_of_a_whole_forward_for_each_ending(n_endings):
    """Contexts of a token, of many, and too long ones, which lose their beginning."""
    check(random_params(CONFIG), random_requests(25, n_endings), rtol=1e-10, atol=1e-11)


def test_scores_in_float32_are_within_1e_minus_4():
    check(random_params(CONFIG, np.float32), random_requests(12, 4), rtol=1e-5, atol=1e-5)


def test_requests_may_have_different_numbers_of_endings():
    requests = random_requests(5, 3) + random_requests(5, 1, seed=1) + random_requests(5, 2, seed=2)
    check(random_params(CONFIG), requests, rtol=1e-10, atol=1e-11)


def test_batches_of_one_group_give_the_same_scores(monkeypatch):
    params, requests = random_params(CONFIG), random_requests(20, 3)
    together = scoring.score(gpt2, params, requests)
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", 1)
    alone = scoring.score(gpt2, params, requests)
    for a, b in zip(together, alone, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_allclose(one.nats, other.nats, rtol=1e-10)


def test_logits_in_blocks_of_rows_give_the_same_scores(monkeypatch):
    monkeypatch.setattr(gpt2, "LM_HEAD_ROWS", 3)
    check(random_params(CONFIG), random_requests(9, 3), rtol=1e-10, atol=1e-11)


def test_context_of_several_endings_is_read_once(monkeypatch):
    read, transformer = [], gpt2.transformer

    def counting(params, tokens, kv=None):
        read.append(tokens.size)
        return transformer(params, tokens, kv)

    monkeypatch.setattr(gpt2, "transformer", counting)
    request = scoring.Request([1] * 15, [[2] * 4] * 4)
    scoring.score(gpt2, random_params(CONFIG), [request])
    assert sum(read) == 14 + 4 * 4


@pytest.mark.parametrize("n_endings", [1, 3])
def test_batches_have_at_most_the_positions_of_the_model(n_endings):
    groups, n_ctx = [], CONFIG.n_ctx
    for request in random_requests(200, n_endings):
        groups += scoring.make_groups(request, len(groups), n_ctx)
    batches = [*scoring.make_batches(groups, n_ctx)]
    assert sum(map(len, batches)) == len(groups) and len(batches) < len(groups) / 4
    for batch in batches:
        n_prefix = max(len(group.prefix) for group in batch)
        assert n_prefix + max(len(row) - 1 for group in batch for row in group.rows) <= n_ctx


@pytest.mark.parametrize(
    ("context", "endings", "message"),
    [
        ([], [[1]], "an empty context or ending"),
        ([1], [[1], []], "an empty context or ending"),
        ([1], [], "an empty context or ending"),
        ([1], [[1] * 25, [2]], "an ending of 25 tokens exceeds n_ctx = 24"),
        ([-3], [[1]], "token id -3 is outside the vocabulary of 61"),
        ([1], [[2], [-1]], "token id -1 is outside the vocabulary of 61"),
        ([1], [[2, 999]], "token id 999 is outside the vocabulary of 61"),
        ([1], [[2.0]], "tokens must be whole numbers"),
        ("text", [[2]], "tokens must be ids, found 'text'"),
        ([[1], [2]], [[2]], "a context or an ending is a list of ids, found one of lists"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(context, endings, message):
    with pytest.raises(ValueError, match=message):
        scoring.score(gpt2, random_params(CONFIG), [scoring.Request(context, endings)])


def test_requests_may_hold_arrays():
    params, requests = random_params(CONFIG), random_requests(6, 2)
    arrays = [
        scoring.Request(np.array(context, np.uint16), tuple(map(np.array, endings)))
        for context, endings in requests
    ]
    for a, b in zip(
        scoring.score(gpt2, params, requests), scoring.score(gpt2, params, arrays), strict=True
    ):
        assert [score.nats.tolist() for score in a] == [score.nats.tolist() for score in b]


def test_ending_of_n_ctx_tokens_is_scored():
    """Its first token is predicted from the last of the context."""
    request = scoring.Request([3, 4], [[5] * CONFIG.n_ctx, [6]])
    check(random_params(CONFIG), [request], rtol=1e-10, atol=1e-11)


def test_batches_are_shared_by_two_threads(monkeypatch):
    both_inside, before = threading.Barrier(2, timeout=10), blas.get_threads()
    score_batch = scoring.score_batch

    def waiting(*args):
        both_inside.wait()  # breaks if one thread does all batches
        return score_batch(*args)

    monkeypatch.setattr(scoring, "score_batch", waiting)
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", 1)
    blas.set_threads(2)
    try:
        scoring.score(gpt2, random_params(CONFIG), random_requests(4, 2))
    finally:
        blas.set_threads(before)


def test_no_requests_have_no_scores():
    assert scoring.score(gpt2, random_params(TINY), []) == []
