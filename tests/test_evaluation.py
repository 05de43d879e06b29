"""Tests of evaluation: the windows, each target once, nats and bits, threads."""

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers import TEXT, TINY, random_params

import encoder
import gpt2
import train
from gpt2_support import blas, datasets, evaluation
from gpt2_support.params import Params


def uint16_tokens(n):
    return np.random.default_rng(0).integers(0, TINY.n_vocab, n).astype(np.uint16)


def make_windows(n, seq_len=8, stride=None):
    return evaluation.Windows(uint16_tokens(n), seq_len, stride, batch_size=1)


@pytest.mark.parametrize("n", [2, 5, 8, 9, 10, 17, 40])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_window_losses_count_each_token_once_in_its_first_window(n, stride, batch_size):
    params = Params(TINY, 20 * train.init_params(TINY).flat.astype(np.float64))
    tokens = uint16_tokens(n)
    windows = evaluation.Windows(tokens, 8, stride, batch_size)
    batches = [windows.batch(i) for i in range(len(windows))]
    losses = np.concatenate([gpt2.token_losses(params, x, y)[y != -1] for x, y in batches])
    expected = []
    for target in range(1, n):
        start = 0
        while target > start + 8:  # the first window that reaches it
            start += stride or 8
        logits = gpt2.forward(params, tokens[start:target])[-1]
        expected.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max())
        expected[-1] -= logits[tokens[target]]
    assert losses == pytest.approx(expected, rel=1e-9)


def test_evaluate_refuses_too_few_tokens():
    with pytest.raises(ValueError, match="evaluate on 1 tokens"):
        train.evaluate(train.init_params(TINY), uint16_tokens(1), np.ones(260, int), 8)


@pytest.mark.parametrize("id", [-1, -3, 260])
def test_evaluate_refuses_ids_outside_the_vocabulary(id):
    """-1 is a target that does not count, which evaluate would count as one without a loss."""
    tokens = np.array([5, 3, id])
    with pytest.raises(ValueError, match=f"token id {id} is outside the vocabulary of 260"):
        train.evaluate(random_params(TINY), tokens, np.ones(300, int), 8)


def test_evaluate_is_in_nats_a_token_and_bits_a_byte():
    enc = encoder.train(TEXT, 260)
    params = Params(TINY)  # all zeros: every token is as likely
    tokens = np.array([enc.eot, *enc.encode("one fish"), enc.eot, *enc.encode("two")], np.uint16)
    result = train.evaluate(params, tokens, datasets.token_lengths(enc), 4)
    assert result.n_tokens == len(tokens) - 1
    assert result.n_bytes == len(b"one fishtwo")  # end-of-text is no bytes
    assert result.loss == pytest.approx(math.log(260), rel=1e-6)
    bits = result.n_tokens * math.log2(260) / result.n_bytes
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert f"perplexity 260.00, {bits:.4f} bits per byte" in str(result)


def test_evaluate_without_end_of_text_counts_all_bytes():
    enc = encoder.Encoder(encoder.train(TEXT, 260).tokens[:-1])
    tokens = np.array(enc.encode("one fish two"), np.uint16)
    params = Params(replace(TINY, n_vocab=259))
    result = train.evaluate(params, tokens, datasets.token_lengths(enc), 4)
    assert result.n_bytes == len("one fish two") - len(enc.tokens[tokens[0]])


@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("n", [5, 8, 9, 30])
def test_evaluate_is_the_usual_perplexity_with_windows_one_token_shorter(n, stride):
    """That of Hugging Face's guide to perplexity: a label is the id itself, -100 does not count."""
    params, tokens, length = random_params(TINY), uint16_tokens(n), TINY.n_ctx
    nats, previous_end = [], 0
    for begin in range(0, n, stride):
        end = min(begin + length, n)
        ids = tokens[begin:end].astype(int)
        labels = ids.copy()
        labels[: -(end - previous_end)] = -100
        losses = gpt2.token_losses(params, ids[:-1], ids[1:])
        nats += losses[labels[1:] != -100].tolist()
        previous_end = end
        if end == n:
            break
    result = train.evaluate(params, tokens, np.ones(260, int), length - 1, stride)
    assert result.n_tokens == len(nats)
    assert result.nats == pytest.approx(sum(nats), rel=1e-15 * n)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_have_no_standard_error(value):
    assert math.isnan(evaluation.Evaluation(value, 3, 3, value).standard_error)
    with pytest.raises(ValueError, match="the logits are not finite"):
        evaluation.check_finite(value)


def test_evaluate_of_a_model_that_has_diverged_is_nan():
    """As train.py has to tell of it."""
    params = Params(TINY)
    params.wte[...] = np.nan
    result = train.evaluate(params, uint16_tokens(20), np.ones(260, int), 8)
    assert math.isnan(result.loss) and math.isnan(result.standard_error)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_windows_refuse_a_stride_that_leaves_out_tokens(stride):
    with pytest.raises(ValueError, match=f"the stride is {stride}, expected 1 to seq_len, 8"):
        make_windows(20, 8, stride)


@pytest.fixture
def two_cores():
    before = blas.get_threads()
    blas.set_threads(2)
    yield
    blas.set_threads(before)


def test_sum_losses_uses_two_threads_at_once(two_cores):
    both_inside = threading.Barrier(2, timeout=10)

    def losses(batch):
        both_inside.wait()  # breaks if one thread does all batches
        assert blas.get_threads() == 1
        return np.ones(batch[0].shape, np.float32) * (batch[1] != -1)

    assert evaluation.sum_losses(losses, make_windows(33)) == (32, 32)


def test_sums_of_losses_are_those_of_float64():
    nats = np.full(3, 1.1, np.float32)
    exact = float(nats[0])
    assert evaluation.sum_and_squares(nats) == (3 * exact, 3 * exact * exact)


def test_sum_losses_stops_at_an_error():
    started = []

    def losses(batch):
        started.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.sum_losses(losses, make_windows(8001))
    assert len(started) < 1000
