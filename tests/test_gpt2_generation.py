"""gpt2.py: sampling and generation."""

import collections
import inspect
import itertools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from helpers import normal, only_thorough, random_params, random_tokens

import gpt2
from gpt2_support import checks
from gpt2_support.params import Config

pytestmark = [
    pytest.mark.filterwarnings("error"),  # an overflow or an invalid value is a failure
    pytest.mark.usefixtures("several_tiles"),
]


BAD_SAMPLING = [
    ({"temperature": -0.1}, r"temperature = -0.1 is not a finite number of 0 or more"),
    ({"temperature": math.inf}, r"temperature = inf"),
    ({"temperature": math.nan}, r"temperature = nan"),
    ({"top_k": 0}, r"top_k = 0 is not 1 or more"),
    ({"top_k": -3}, r"top_k = -3"),
    ({"top_p": 0.0}, r"top_p = 0.0 is not over 0 and at most 1"),
    ({"top_p": 1.01}, r"top_p = 1.01"),
    ({"top_p": math.nan}, r"top_p = nan"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty = 0.0 is not a number from 0.001 to 1000"),
    ({"repetition_penalty": 1e-46}, r"repetition_penalty = 1e-46 is not a number from"),
    ({"repetition_penalty": 1e39}, r"repetition_penalty = 1e\+39 is not a number from"),
    ({"repetition_penalty": -1.0}, r"repetition_penalty = -1.0"),
    ({"repetition_penalty": math.inf}, r"repetition_penalty = inf"),
    ({"repetition_penalty": math.nan}, r"repetition_penalty = nan"),
    ({"temperature": None}, r"temperature = None is not a finite number"),
    ({"temperature": "hot"}, r"temperature = hot is not a finite number"),
    ({"temperature": Decimal("sNaN")}, r"temperature = sNaN is not a finite number"),
    ({"temperature": Fraction(10**400)}, r"temperature = 1000\d* is not a finite number"),
    ({"temperature": Fraction(-1, 2)}, r"temperature = -1/2"),
    ({"top_k": 5.0}, r"top_k = 5.0 is not a whole number"),
    ({"top_k": True}, r"top_k = True is not a whole number"),
    ({"top_p": "most"}, r"top_p = most is not over 0"),
    ({"top_p": Decimal("1.5")}, r"top_p = 1.5 is not over 0"),
    ({"repetition_penalty": 1j}, r"repetition_penalty = 1j is not a number from"),
]


@pytest.mark.parametrize("sampling, message", BAD_SAMPLING)
def test_generate_refuses_sampling_parameters_when_called(sampling, message):
    with pytest.raises(ValueError, match=message):
        gpt2.generate(random_params(), [1], 1, **sampling)
    with pytest.raises(ValueError, match=message):
        if "repetition_penalty" in sampling:
            inspect.unwrap(gpt2.apply_repetition_penalty)(normal(5), [1], *sampling.values())
        else:
            inspect.unwrap(gpt2.next_token_probs)(normal(5), **{"temperature": 1.0} | sampling)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_tokens": 3.0}, "n_tokens = 3.0 is not a whole number"),
        ({"n_tokens": None}, "n_tokens = None is not a whole number"),
        ({"seed": -1}, "seed = -1 is negative"),
        ({"seed": 1.5}, "seed = 1.5 is not a whole number"),
        ({"n_vocab": 0}, "n_vocab = 0 is not 1 or more"),
        ({"n_vocab": -5}, "n_vocab = -5 is not 1 or more"),
        ({"n_vocab": 30.0}, "n_vocab = 30.0 is not a whole number"),
        ({"n_vocab": 62}, "n_vocab = 62 exceeds the model's, 61"),
        ({"eot": 61}, "eot = 61 is not an id of the vocabulary of 61"),
        ({"eot": 40, "n_vocab": 40}, "eot = 40 is not an id of the vocabulary of 40"),
        ({"eot": "first"}, "eot = 'first' is not an id"),
        ({"eot": 1.0}, "eot = 1.0 is not an id"),
    ],
)
def test_generate_refuses_other_numbers_when_called(options, message):
    with pytest.raises(ValueError, match=message):
        gpt2.generate(random_params(), [1], **{"n_tokens": 1} | options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_generate_tells_that_the_logits_are_not_finite(sampling, bad):
    params = random_params()
    params.wte[7] = bad
    ids = gpt2.generate(params, [1, 2], 3, **sampling)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="logits are not finite"):
        next(ids)


def test_next_token_probs_takes_logits_of_which_some_are_minus_infinity():
    logits = np.array([-math.inf, 1.0, 1.0, -math.inf])
    assert gpt2.next_token_probs(logits, 0.0)[0].tolist() == [1]
    assert gpt2.next_token_probs(logits, 1.0)[1].tolist() == [0, 0.5, 0.5, 0]
    with pytest.raises(ValueError, match="not finite"):
        gpt2.next_token_probs(np.full(3, -math.inf), 1.0)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([0] * 17, r"prompt of 17 tokens exceeds n_ctx = 16"),
        ([[1], [0] * 40], r"prompt of 40 tokens exceeds n_ctx = 16"),
        ([1, 61], r"token id 61 is outside the vocabulary of 61"),
        ([[1, 2], [-1]], r"token id -1 is outside the vocabulary of 61"),
        ([1.5], r"whole numbers"),
        (5, r"whole numbers.*found shape \(\)"),
        (None, r"whole numbers"),
        (b"Once", r"tokens must be ids, found b'Once'"),
        (bytearray(b"Once"), r"tokens must be ids"),
        ("Once", r"tokens must be ids, found 'Once'.*encode"),
        (["Once", "Twice"], r"tokens must be ids, found 'Once'"),
        (iter([b"Once"]), r"tokens must be ids"),
        ([[1], [[2]]], r"neither one list of ids nor a list of such lists"),
        ([[[1], [2]]], r"neither one list of ids nor a list of such lists"),
        (np.zeros((2, 1, 3), int), r"neither one list of ids nor a list of such lists"),
        (map(float, [1, 2]), r"whole numbers"),
        ([2**70], r"whole numbers"),
    ],
)
def test_generate_refuses_prompts_when_called(tokens, message):
    with pytest.raises(ValueError, match=message):
        gpt2.generate(random_params(), tokens, 1)


def test_generate_refuses_an_empty_prompt_without_end_of_text():
    with pytest.raises(ValueError, match="no end-of-text token to start from"):
        gpt2.generate(random_params(), [], 1, eot=None)


class FakeRng(np.random.Generator):
    """Gives the numbers it is told to, over and over."""

    def __init__(self, *numbers):
        super().__init__(np.random.PCG64())
        self.numbers, self.calls = numbers, 0

    def random(self):
        self.calls += 1
        return self.numbers[(self.calls - 1) % len(self.numbers)]


ALMOST_ONE = 1 - 2.0**-53  # the largest that Generator.random() can give


@pytest.fixture
def n_draws(thorough):
    """How often a test of frequencies draws."""
    return 4000 if thorough else 400


def frequencies(logits, n_draws, **sampling):
    """How often each id is drawn, over numbers spread evenly: within 1 / n_draws of its chance."""
    rng = FakeRng(*((i + 0.5) / n_draws for i in range(n_draws)))
    drawn = [gpt2.sample(logits, rng, **sampling) for _ in range(n_draws)]
    return np.bincount(drawn, minlength=len(logits)) / n_draws


def reference_probs(logits, temperature, top_k=None, top_p=None):
    """The probabilities that `sample` should draw from, one id at a time."""
    order = sorted(range(len(logits)), key=lambda id: (-logits[id], id))[:top_k]
    top = max(logits)
    weights = {id: math.exp((float(logits[id]) - top) / temperature) for id in order}
    total = sum(weights.values())
    if top_p is not None:
        kept, mass = {}, 0.0
        for id in order:
            if mass >= top_p * total * (1 - 1e-15):
                break
            kept[id] = weights[id]
            mass += weights[id]
        weights, total = kept, mass
    return np.array([weights.get(id, 0) / total for id in range(len(logits))])


def test_sample_at_temperature_0_is_argmax_and_draws_nothing():
    rng = FakeRng(0.5)
    logits = normal(61).astype(np.float32)
    actual = gpt2.sample(logits, rng, 0.0, top_k=5, top_p=0.5)
    assert actual == logits.argmax()
    assert type(actual) is int
    assert rng.calls == 0
    assert gpt2.sample(np.array([1.0, 7.0, 7.0]), rng) == 1  # of equal ones the first


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 2.0, "top_p": 0.05},
    {"temperature": 0.7, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_next_token_probs_gives_the_ids_kept_and_their_probabilities(sampling):
    logits = 2 * normal(12)
    expected = reference_probs(logits, **sampling)
    ids, probs = gpt2.next_token_probs(logits, **sampling)
    assert sorted(ids) == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(probs, expected[ids], rtol=1e-12, atol=0)
    assert abs(probs.sum() - 1) < 1e-12
    if "top_k" in sampling or "top_p" in sampling:
        assert (np.diff(probs) <= 0).all()
    np.testing.assert_array_equal(logits, 2 * normal(12))


def test_next_token_probs_at_temperature_0_is_argmax_alone():
    for sampling in ({}, {"top_k": 3}, {"top_p": 0.9}):
        ids, probs = gpt2.next_token_probs(np.array([1.0, 7.0, 7.0], np.float32), 0.0, **sampling)
        assert (ids.tolist(), probs.tolist()) == ([1], [1.0])


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, only_thorough(np.float64)])
def test_sample_frequencies_are_the_probabilities(sampling, dtype, n_draws):
    logits = (2 * normal(12)).astype(dtype)
    expected = reference_probs(logits, **sampling)
    actual = frequencies(logits, n_draws, **sampling)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1.01 / n_draws)
    assert not actual[expected == 0].any()


@pytest.mark.thorough
def test_sample_from_a_generator_fits_the_probabilities():
    logits, rng, n_draws = normal(10), np.random.default_rng(0), 20000
    expected = n_draws * reference_probs(logits, 0.8)
    drawn = [gpt2.sample(logits, rng, 0.8) for _ in range(n_draws)]
    chi_square = ((np.bincount(drawn, minlength=10) - expected) ** 2 / expected).sum()
    assert chi_square < 27.9  # 9 degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize("number", [0.0, 0.3, ALMOST_ONE])
def test_sample_with_top_k_1_is_argmax_even_of_equal_logits(number):
    logits = np.array([1.0, 3.0, 3.0, 2.0, 3.0], np.float32)
    assert gpt2.sample(logits, FakeRng(number), 1.0, top_k=1) == 1
    assert gpt2.sample(logits, FakeRng(number), 1.0, top_k=2) in (1, 2)
    assert gpt2.sample(logits, FakeRng(number), 1.0, top_p=1e-9) == 1


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (0.01, [3]),
        (0.5, [3]),
        (0.5001, [1, 3]),
        (0.75, [1, 3]),
        (0.76, [0, 1, 3]),
        (0.875, [0, 1, 3]),
        (0.99, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_sample_top_p_keeps_the_fewest_that_reach_it(top_p, kept, n_draws):
    logits = np.log([0.125, 0.25, 0.125, 0.5, 1e-300])  # 0 and 2 are equal: the first goes first
    actual = frequencies(logits, n_draws, temperature=1.0, top_p=top_p)
    assert np.flatnonzero(actual).tolist() == kept


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 1.0}, {"top_k": 4, "top_p": 0.9}])
@pytest.mark.parametrize("number", [0.0, 5e-324, 0.5, ALMOST_ONE])
def test_sample_never_gives_an_id_of_probability_zero(sampling, number):
    for logits in (
        [-1e4, 0.0, -1e4, 1.0, -1e4],  # zeros at both ends
        [0.0, -1e4, -1e4, -1e4, 0.0],
        [-2000.0, -1000.0, 0.0, -1000.0, -2000.0],
    ):
        id = gpt2.sample(np.array(logits, np.float32), FakeRng(number), 1.0, **sampling)
        assert logits[id] > -500


@pytest.mark.parametrize("number", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300, 5e-324])
def test_sample_at_a_tiny_temperature_is_argmax(temperature, number):
    logits = normal(61).astype(np.float32)
    assert gpt2.sample(logits, FakeRng(number), temperature) == logits.argmax()
    assert gpt2.sample(logits, FakeRng(number), temperature, 7, 0.9) == logits.argmax()


def test_sample_top_p_counts_the_last_probability_too(n_draws):
    actual = frequencies(np.zeros(4), n_draws, temperature=1.0, top_p=0.76)
    assert actual.tolist() == [0.25] * 4
    actual = frequencies(np.zeros(4), n_draws, temperature=1.0, top_k=2, top_p=0.51)
    assert actual.tolist() == [0.5, 0.5, 0, 0]
    assert gpt2.sample(np.arange(3.0), FakeRng(ALMOST_ONE), 1.0, top_k=1, top_p=0.5) == 2


def test_sample_at_a_huge_temperature_is_uniform(n_draws):
    actual = frequencies(1e4 * normal(8).astype(np.float32), n_draws, temperature=1e30)
    np.testing.assert_allclose(actual, 1 / 8, atol=1.01 / n_draws)


def test_sample_numbers_at_the_ends_give_the_first_and_the_last():
    logits = np.zeros(5, np.float32)
    assert gpt2.sample(logits, FakeRng(0.0), 1.0) == 0
    assert gpt2.sample(logits, FakeRng(ALMOST_ONE), 1.0) == 4
    assert gpt2.sample(logits, FakeRng(1.0), 1.0) == 4  # if rounding should ever make it 1
    big = np.zeros(50257, np.float32)
    assert gpt2.sample(big, FakeRng(ALMOST_ONE), 1.0) == 50256


def test_sample_leaves_the_logits_as_they_were():
    logits = normal(61)
    gpt2.sample(logits, FakeRng(0.5), 0.7, top_k=9, top_p=0.9)
    np.testing.assert_array_equal(logits, normal(61))


def test_repetition_penalty_makes_each_seen_id_less_probable_once():
    logits = np.array([2.0, -2.0, 0.0, 4.0], np.float32)
    actual = gpt2.apply_repetition_penalty(logits, [0, 1, 2, 0, 0], 2.0)
    np.testing.assert_array_equal(actual, np.array([1, -4, 0, 4], np.float32))
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(logits, [2, -2, 0, 4])


@pytest.mark.parametrize("penalty", [0.001, 1000])
def test_repetition_penalty_overflows_no_float32(penalty):
    logits = np.array([1e30, -1e30, 1], np.float32)
    assert np.isfinite(gpt2.apply_repetition_penalty(logits, [0, 1], penalty)).all()


def reference_generate(params, prompt, n_tokens, choose=np.argmax, eot=None):
    """What `generate` should give, without a cache: every step reads the whole window anew."""
    n_ctx = params.config.n_ctx
    window, history, out = list(prompt), list(prompt), []
    while len(out) < n_tokens:
        id = int(choose(gpt2.forward(params, window)[-1]))
        if id == eot:
            break
        out.append(id)
        history.append(id)
        window.append(id)
        if len(window) > n_ctx:
            window = window[-max(n_ctx // 2, 1) :]
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_generate_greedy_equals_argmax_of_repeated_forwards(dtype):
    params, prompt = random_params(dtype=dtype), [5, 9, 2]
    expected = reference_generate(params, prompt, 10)
    actual = list(gpt2.generate(params, prompt, 10, eot=None))
    assert actual == expected
    assert len(set(actual)) > 3  # not a model that always says the same
    assert {type(id) for id in actual} == {int}


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5])
def test_generate_gives_n_tokens(n_tokens):
    params = random_params()
    assert len(list(gpt2.generate(params, [1], n_tokens, eot=None))) == n_tokens
    actual = list(gpt2.generate(params, [[1], [2, 3]], n_tokens, eot=None))
    assert len(actual) == n_tokens
    assert all(len(ids) == 2 for ids in actual)


@pytest.fixture
def shapes_read(monkeypatch):
    """The shapes (B, T) of the tokens that the model reads, one after the other."""
    shapes, transformer = [], gpt2.transformer

    def recording(params, tokens, *args):
        shapes.append(tokens.shape)
        return transformer(params, tokens, *args)

    monkeypatch.setattr(gpt2, "transformer", recording)
    return shapes


def test_generate_is_lazy_and_reads_no_token_in_vain(shapes_read):
    ids = gpt2.generate(random_params(), [5, 9, 2], 4, eot=None)
    assert shapes_read == []
    next(ids)
    assert shapes_read == [(1, 3)]
    list(ids)
    assert shapes_read == [(1, 3), (1, 1), (1, 1), (1, 1)]


def test_generate_ends_before_end_of_text():
    params, prompt = random_params(), [5, 9, 2]
    free = reference_generate(params, prompt, 12)
    eot = free[6]
    first = free.index(eot)
    assert list(gpt2.generate(params, prompt, 12, eot=eot)) == free[:first]
    assert list(gpt2.generate(params, prompt, 12, eot=free[0])) == []


def test_generate_takes_the_last_id_for_end_of_text():
    params = random_params()
    params.wte[60] = 0
    params.ln_f.g[:] = 0
    params.ln_f.b[:] = 1
    params.wte[60] = 10  # now every next token is 60
    assert list(gpt2.generate(params, [1, 2], 5)) == []
    assert list(gpt2.generate(params, [1, 2], 5, eot=3)) == [60] * 5
    assert list(gpt2.generate(params, [60, 60], 2, eot=None)) == [60] * 2


def test_generate_goes_on_after_a_prompt_that_ends_with_end_of_text():
    params = random_params()
    expected = reference_generate(params, [4, 60], 5)
    assert 60 not in expected
    assert list(gpt2.generate(params, [4, 60], 5)) == expected


@pytest.mark.parametrize("eot", ["last", 7])
def test_generate_from_an_empty_prompt_starts_from_end_of_text(eot):
    params, start = random_params(), 60 if eot == "last" else eot
    expected = reference_generate(params, [start], 6, eot=start)
    assert list(gpt2.generate(params, [], 6, eot=eot)) == expected
    assert list(gpt2.generate(params, np.array([], int), 6, eot=eot)) == expected
    assert [ids for [ids] in gpt2.generate(params, [[]], 6, eot=eot)] == expected


PROMPTS = [[5, 9, 2], [1], [7] * 14, [], [], [5, 9, 2], list(range(16)), []]


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampled", "all options"],
)
def test_generate_of_a_batch_gives_what_each_prompt_gives_alone(sampling, thorough):
    params, n_tokens = random_params(), 40 if thorough else 20  # past n_ctx, each at its own time
    steps = list(gpt2.generate(params, PROMPTS, n_tokens, eot=60, **sampling))
    for b, prompt in enumerate(PROMPTS):
        own = dict(sampling)
        if "seed" in sampling:
            own["seed"] += b
        alone = list(gpt2.generate(params, prompt, n_tokens, eot=60, **own))
        row = [ids[b] for ids in steps]
        assert row[: len(alone)] == alone
        assert row[len(alone) :] == [60] * (len(row) - len(alone))


def test_generate_of_a_batch_ends_when_all_rows_have_ended():
    params = random_params()
    free = [reference_generate(params, prompt, 12) for prompt in ([5, 9, 2], [1])]
    eot = next(id for id in free[0] if id in free[1]) if set(free[0]) & set(free[1]) else free[0][2]
    alone = [list(gpt2.generate(params, prompt, 12, eot=eot)) for prompt in ([5, 9, 2], [1])]
    steps = list(gpt2.generate(params, [[5, 9, 2], [1]], 12, eot=eot))
    assert len(steps) == max(map(len, alone))


def test_generate_of_a_batch_repeats_end_of_text_for_a_row_that_began_with_it():
    params = random_params()
    free = [reference_generate(params, [token], 6) for token in range(9)]
    first = next(token for token in range(9) if free[token][0] != free[token][1])
    eot = free[first][0]  # alone the row would go on with another id after it
    second = next(token for token in range(9) if eot not in free[token])
    steps = list(gpt2.generate(params, [[first], [second]], 6, eot=eot))
    assert steps == [[eot, id] for id in free[second]]


def test_generate_reads_equal_prompts_once(shapes_read):
    prompts = [[5, 9, 2], [1, 1], [5, 9, 2], [5, 9, 2]]
    list(gpt2.generate(random_params(), prompts, 2, eot=None))
    assert shapes_read == [(1, 3), (1, 2), (4, 1)]


def test_generate_repeats_itself_for_a_seed_and_only_for_it():
    params = random_params()

    def ids(seed):
        return list(gpt2.generate(params, [5, 9], 12, temperature=1.0, seed=seed, eot=None))

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert ids(None) != ids(None)  # equal once in more than 1e10 runs


def test_generate_samples_of_a_batch_differ():
    steps = list(gpt2.generate(random_params(), [[5]] * 4, 12, temperature=1.0, seed=0, eot=None))
    assert len(set(zip(*steps, strict=True))) == 4


def test_generate_draws_as_sample_does_from_forwards():
    params, prompt, n_tokens = random_params(), [5, 9, 2], 30
    rng = np.random.default_rng(11)
    expected = reference_generate(
        params, prompt, n_tokens, lambda logits: gpt2.sample(logits, rng, 1.2, 30, 0.9)
    )
    actual = gpt2.generate(
        params, prompt, n_tokens, temperature=1.2, top_k=30, top_p=0.9, seed=11, eot=None
    )
    assert list(actual) == expected


def test_generate_penalises_the_whole_history():
    params, prompt = random_params(), [5, 9, 2]
    history, expected = list(prompt), []
    for _ in range(12):
        logits = gpt2.forward(params, history)[-1]
        for id in set(history):
            logits[id] = logits[id] / 2 if logits[id] > 0 else logits[id] * 2
        expected.append(int(logits.argmax()))
        history.append(expected[-1])
    actual = list(gpt2.generate(params, prompt, 12, repetition_penalty=2.0, eot=None))
    assert actual == expected
    assert actual != reference_generate(params, prompt, 12)


@pytest.mark.parametrize("n_ctx", [1, 2, only_thorough(3), only_thorough(4), 5, 16])
@pytest.mark.parametrize("n_prompt", [1, only_thorough(2), 15, 16])
def test_generate_past_n_ctx_goes_on_from_the_last_half_of_the_window(n_ctx, n_prompt):
    params = random_params(Config(61, n_ctx, 12, 3, 2))
    prompt = random_tokens(min(n_prompt, n_ctx)).tolist()
    expected = reference_generate(params, prompt, 45)
    assert list(gpt2.generate(params, prompt, 45, eot=None)) == expected


@pytest.mark.parametrize("n_tokens, room", [(1, 4), (5, 8), (13, 16), (14, 16), (10**6, 16)])
def test_generate_makes_a_cache_for_the_tokens_that_it_may_read(monkeypatch, n_tokens, room):
    rooms = []

    class Cache(gpt2.KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            rooms.append(self.buffer.shape[-2])

    monkeypatch.setattr(gpt2, "KVCache", Cache)
    params = random_params(Config(61, 16, 12, 3, 2))
    list(itertools.islice(gpt2.generate(params, [[5], [9, 2, 7]], n_tokens, eot=None), 20))
    assert rooms == [room]


def test_generate_takes_sampling_parameters_at_their_limits():
    params, prompt = random_params(), [5, 9, 2]
    greedy = reference_generate(params, prompt, 8)
    for limits in ({"top_k": 1}, {"top_p": 5e-324}, {"top_k": 1, "top_p": 1.0}):
        actual = gpt2.generate(params, prompt, 8, temperature=1.0, seed=0, eot=None, **limits)
        assert list(actual) == greedy
    assert list(gpt2.generate(params, prompt, 8, temperature=5e-324, eot=None)) == greedy


def test_decode_yields_ids_and_the_logits_that_they_are_drawn_from():
    params, prompts = random_params(), [[1, 2, 3], [7]]
    sampling = checks.Sampling(temperature=1.5, seed=3, repetition_penalty=1.4)
    steps = list(gpt2.decode(params, prompts, 9, sampling, n_vocab=50))
    options = sampling._asdict() | {"n_vocab": 50}
    assert [ids for ids, _ in steps] == list(gpt2.generate(params, prompts, 9, **options))
    texts = [list(prompt) for prompt in prompts]
    for ids, logits in steps:
        for text, id, row in zip(texts, ids, logits, strict=True):
            expected = gpt2.forward(params, text)[-1]
            expected = gpt2.apply_repetition_penalty(expected, text, 1.4)[:50]
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-10)
            text.append(id)


def test_decode_yields_the_end_of_text_and_ends():
    params = random_params()
    greedy = reference_generate(params, [1, 2], 6)
    eot = greedy[3]
    ids = [ids for ids, _ in gpt2.decode(params, [[1, 2]], 6, eot=eot)]
    assert ids == [[id] for id in greedy[: greedy.index(eot) + 1]]


def test_generate_leaves_the_prompts_as_they_were():
    params, one, several = random_params(), [5, 9, 2], [[5], [9, 2]]
    list(gpt2.generate(params, one, 5, eot=None))
    list(gpt2.generate(params, several, 5, eot=None))
    assert one == [5, 9, 2]
    assert several == [[5], [9, 2]]


def test_generate_takes_arrays_and_numpy_scalars():
    params = random_params(dtype=np.float32)
    expected = list(gpt2.generate(params, [5, 9], 5, 0.5, 20, 0.9, 3, 1.5, eot=None))
    numbers = (np.int64(5), np.float64(0.5), np.int64(20), np.float32(0.9), np.int64(3))
    for tokens in (np.array([5, 9]), np.array([5, 9], np.uint16), (5, 9), [np.int32(5), 9]):
        actual = gpt2.generate(params, tokens, *numbers, np.float64(1.5), eot=np.int64(-1))
        assert list(actual) == expected
    actual = gpt2.generate(params, np.array([[5, 9], [5, 9]]), *numbers, np.float64(1.5), eot=None)
    assert [ids[0] for ids in actual] == expected


def test_generate_takes_a_small_integer_that_cannot_hold_the_sum_of_lengths():
    params, prompt = random_params(Config(61, 300, 12, 3, 2)), list(range(60))
    expected = list(gpt2.generate(params, prompt, 100, eot=None))
    assert list(gpt2.generate(params, prompt, np.int8(100), eot=None)) == expected


class JaxLike:
    """An array of another library: it can be made one of NumPy's, and its items have no hash."""

    __hash__ = None

    def __init__(self, values):
        self.values = np.array(values)

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return JaxLike(self.values[i])


@pytest.mark.parametrize(
    "kind",
    [
        iter,
        lambda ids: map(int, ids),
        lambda ids: (id for id in ids),
        collections.deque,
        JaxLike,
        lambda ids: [JaxLike(id) for id in ids],
        lambda ids: np.array(ids, np.uint64),
        lambda ids: [np.uint64(id) for id in ids],
        lambda ids: [np.uint64(ids[0]), *ids[1:]],
    ],
)
def test_generate_takes_ids_of_any_kind(kind):
    """Past n_ctx, and with a penalty, which both look at what was written before."""
    params, prompts = random_params(), [[5, 9, 2], [5, 9, 2], [7]]
    options = {"n_tokens": 18, "repetition_penalty": 1.3, "eot": None}
    alone = list(gpt2.generate(params, prompts[0], **options))
    assert list(gpt2.generate(params, kind(prompts[0]), **options)) == alone
    expected = list(gpt2.generate(params, prompts, **options))
    assert list(gpt2.generate(params, map(kind, prompts), **options)) == expected


def test_generate_computes_in_the_dtype_of_the_parameters(monkeypatch):
    dtypes = set()
    sample = gpt2.sample

    def noting(logits, *args):
        dtypes.add(logits.dtype)
        return sample(logits, *args)

    monkeypatch.setattr(gpt2, "sample", noting)
    for dtype in (np.float32, np.float64):
        dtypes.clear()
        list(gpt2.generate(random_params(dtype=dtype), [5], 3, repetition_penalty=1.1, eot=None))
        assert dtypes == {np.dtype(dtype)}


def test_generate_refuses_a_mixture_and_a_negative_count():
    params = random_params(Config(20, 8, 4, 2, 1), np.float32)
    with pytest.raises(ValueError, match="neither one list of ids nor a list of such lists"):
        gpt2.generate(params, [[1], 2], 3)
    with pytest.raises(ValueError, match="n_tokens = -1 is negative"):
        gpt2.generate(params, [1], -1)


def test_generate_leaves_out_the_ids_that_the_tokenizer_has_not():
    params = random_params()
    options = {"temperature": 5.0, "seed": 0, "eot": None, "repetition_penalty": 1.5}
    assert max(gpt2.generate(params, [5], 80, **options)) > 30
    assert max(gpt2.generate(params, [5], 80, n_vocab=30, **options)) == 29
    assert max(gpt2.generate(params, [5, 60], 80, n_vocab=30, **options)) == 29


def test_generate_takes_the_last_id_that_n_vocab_leaves_for_end_of_text():
    params = random_params()
    greedy = reference_generate(params, [5, 9, 2], 12, lambda logits: logits[:50].argmax())
    n_vocab = max(greedy) + 1
    expected = greedy[: greedy.index(n_vocab - 1)]
    assert list(gpt2.generate(params, [5, 9, 2], 12, n_vocab=n_vocab)) == expected
    started = gpt2.generate(params, [], 5, n_vocab=n_vocab)
    assert list(started) == list(gpt2.generate(params, [n_vocab - 1], 5, n_vocab=n_vocab))
