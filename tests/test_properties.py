"""Properties that hold for any model, text and number, not only for chosen ones."""

import itertools
import math
import struct
import sys
from types import SimpleNamespace

import numpy as np
import openai_files
import pytest
from helpers import ROOT, random_params, take_steps
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import encoder
import gpt2
import train
from gpt2_support import runlog, weights
from gpt2_support.formats import llmc
from gpt2_support.params import Config, Params

# Counting lines doubles the time, and other tests reach the same lines.
pytestmark = pytest.mark.no_cover
CLOSE = {"rtol": 0, "atol": 1e-10}  # float64, logits of size 1 to 100


@st.composite
def configs(draw, most_vocab=300, most_ctx=20):
    n_head = draw(st.integers(1, 4))
    return Config(
        n_vocab=draw(st.integers(1, most_vocab)),
        n_ctx=draw(st.integers(1, most_ctx)),
        n_embd=n_head * draw(st.integers(1, 5)),
        n_head=n_head,
        n_layer=draw(st.integers(1, 3)),
    )


def random_bits(config, seed=0):
    """Params of any 32 bits at all, so that infinities and every kind of NaN are among them."""
    rng, params = np.random.default_rng(seed), Params(config)
    for array in params.named.values():
        array.view("u4")[...] = rng.integers(2**32, size=array.shape, dtype=np.uint32)
    return params


# ----------------------------------------------------------------------------------------------
# Files


def llmc_file(params):
    """The bytes of a model as llm.c's train_gpt2.py writes them, version 3."""
    c, padding = params.config, -params.config.n_vocab % 128
    sizes = (c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd, c.n_vocab + padding)
    header = struct.pack("<256i", 20240326, 3, *sizes, *[0] * 248)
    blocks = [params.wte.tobytes(), bytes(4 * padding * c.n_embd), params.wpe.tobytes()]
    for path in ("ln_1.g", "ln_1.b", "attn.c_attn.w", "attn.c_attn.b", "attn.c_proj.w",
                 "attn.c_proj.b", "ln_2.g", "ln_2.b", "mlp.c_fc.w", "mlp.c_fc.b", "mlp.c_proj.w",
                 "mlp.c_proj.b"):  # fmt: skip
        for layer in params.h:
            for name in path.split("."):
                layer = getattr(layer, name)
            blocks.append(layer.tobytes())
    return header + b"".join(blocks) + params.ln_f.g.tobytes() + params.ln_f.b.tobytes()


@given(configs(), st.integers(0, 99))
def test_any_params_save_and_load_bit_for_bit(tmp_path, config, seed):
    params, path = random_bits(config, seed), tmp_path / "model.bin"
    llmc.save_params(path, params)
    assert path.read_bytes() == llmc_file(params)
    loaded = llmc.load_params(path)
    assert loaded.config == config and loaded.flat.tobytes() == params.flat.tobytes()
    llmc.save_params(tmp_path / "again.bin", loaded)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


@given(configs(), st.integers(0, 99), st.booleans())
def test_openai_to_ours_to_hugging_face_to_ours_is_exact(tmp_path, config, seed, from_hf):
    params, folders = random_bits(config, seed), [tmp_path / name for name in "abcd"]
    arrays = {
        name: array.T[None] if name.endswith("/w") else array
        for name, array in params.named.items()
    }
    openai_files.write_checkpoint(folders[0], config, arrays)
    for name in ("encoder.json", "vocab.bpe"):  # of another size than the model
        (folders[0] / name).unlink()
    for source, target, to in zip(folders, folders[1:], ("bin", "hf", "bin"), strict=False):
        weights.convert(source, target, to)
    for folder in (folders[1], folders[3]):
        assert (folder / "model.bin").read_bytes() == llmc_file(params)


@given(configs(), st.integers(0, 99), st.integers(0, 9))
def test_any_checkpoint_saves_and_loads_bit_for_bit(tmp_path, config, seed, step):
    run = train.TrainState(
        random_bits(config, seed), train.TrainConfig(seed=seed, lr=seed / 7), step
    )
    run.optimizer.m, run.optimizer.v = random_bits(config, 1).flat, random_bits(config, 2).flat
    train.save_checkpoint(tmp_path, run)
    loaded = train.load_checkpoint(tmp_path)
    assert (loaded.step, loaded.config, loaded.best_loss) == (step, run.config, math.inf)
    assert loaded.params.flat.tobytes() == run.params.flat.tobytes()
    assert loaded.optimizer.m.tobytes() == run.optimizer.m.tobytes()
    assert loaded.optimizer.v.tobytes() == run.optimizer.v.tobytes()


@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=5))
def test_any_tokens_save_and_load(tmp_path, chunks):
    n_tokens = llmc.save_tokens(tmp_path / "x.bin", chunks, 65536)
    tokens, n_vocab = llmc.load_tokens(tmp_path / "x.bin")
    assert tokens.tolist() == list(itertools.chain(*chunks))
    assert (n_tokens, n_vocab) == (len(tokens), 65536)


# ----------------------------------------------------------------------------------------------
# Text

any_text = st.text(st.characters() | st.sampled_from("aeth  \n'"), max_size=60)
with_surrogates = st.text(st.characters(categories=["Cs", "L", "Zs"]), max_size=30)


@given(st.text("abc de'é😀\n", min_size=10, max_size=200), st.integers(257, 290), any_text)
def test_any_text_comes_back_from_any_table(tmp_path, corpus, n_vocab, text):
    try:
        enc = encoder.train(corpus, n_vocab)
    except ValueError:
        assume(False)
    ids = enc.encode(text)
    assert enc.decode(ids) == text
    assert enc.decode_bytes(ids) == text.encode()
    stream = enc.stream()
    assert "".join([*map(stream.feed, ids), stream.flush()]) == text
    enc.save(tmp_path / "tokenizer.bin")
    assert encoder.load(tmp_path / "tokenizer.bin").encode(text) == ids


@settings(max_examples=2 * settings.default.max_examples)
@given(with_surrogates)
@example("\ud83d\ude00")  # two halves of one character
@example("a\udcffb")
def test_any_str_encodes_to_what_utf_8_can_hold_of_it(text):
    enc = encoder.Encoder([bytes([byte]) for byte in range(256)])
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert enc.decode(enc.encode(text)) == expected


@given(st.lists(any_text.filter(lambda text: "<|endoftext|>" not in text), min_size=1, max_size=4))
def test_any_documents_come_back_between_end_of_text(texts):
    enc = encoder.train("the cat and the hat", 262)
    ids = enc.encode("<|endoftext|>".join(texts), allow_special=True)
    assert ids.count(enc.eot) == len(texts) - 1
    documents = [[]]
    for id in ids:
        documents.append([]) if id == enc.eot else documents[-1].append(id)
    assert [enc.decode(document) for document in documents] == texts


# ----------------------------------------------------------------------------------------------
# The model


def draw_tokens(data, config, *shape):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    return rng.integers(config.n_vocab, size=shape)


@given(st.data(), configs(), st.integers(1, 3))
def test_any_chunks_through_the_cache_equal_the_whole(data, config, n_rows):
    params = random_params(config)
    T = data.draw(st.integers(1, config.n_ctx))
    tokens = draw_tokens(data, config, n_rows, T)
    cuts = sorted(data.draw(st.sets(st.integers(1, T)))) if T > 1 else []
    kv = gpt2.KVCache(config, n_rows, np.float64)
    parts = [part for part in np.split(tokens, cuts, axis=1) if part.size]
    logits = np.concatenate([gpt2.forward(params, part, kv) for part in parts], axis=1)
    np.testing.assert_allclose(logits, gpt2.forward(params, tokens), **CLOSE)


@given(st.data(), configs(), st.integers(1, 4))
def test_any_ragged_rows_equal_each_alone(data, config, n_rows):
    """Rows of the cache filled to any lengths go on together, in any steps, as they do alone."""
    params, kv = random_params(config), gpt2.KVCache(config, n_rows, np.float64)
    rows = [draw_tokens(data, config, config.n_ctx) for _ in range(n_rows)]
    for b, row in enumerate(rows):
        if n := data.draw(st.integers(0, config.n_ctx - 1)):
            gpt2.forward(params, row[:n], kv.row(b))
    while (room := config.n_ctx - kv.length.max()) > 0:
        starts, n = kv.length.copy(), data.draw(st.integers(1, int(room)))
        parts = [row[at : at + n] for row, at in zip(rows, starts, strict=True)]
        logits = gpt2.forward(params, np.array(parts), kv)
        for row, at, together in zip(rows, starts, logits, strict=True):
            alone = gpt2.forward(params, row[: at + n])[at:]
            np.testing.assert_allclose(together, alone, **CLOSE)


@given(st.data(), configs(most_ctx=10), st.integers(1, 4), st.integers(0, 25))
def test_any_batch_of_prompts_generates_what_each_does_alone(data, config, n_rows, n_tokens):
    params = random_params(config)
    lengths = st.integers(1, config.n_ctx)
    prompts = [draw_tokens(data, config, data.draw(lengths)).tolist() for _ in range(n_rows)]
    sampling = data.draw(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.7, 1.5]),
                "top_k": st.none() | st.integers(1, 20),
                "top_p": st.none() | st.sampled_from([0.1, 0.9, 1.0]),
                "repetition_penalty": st.sampled_from([1.0, 1.3]),
                "eot": st.none() | st.integers(0, config.n_vocab - 1),
            }
        )
    )
    steps = list(gpt2.generate(params, prompts, n_tokens, seed=5, **sampling))
    for b, prompt in enumerate(prompts):
        alone = list(gpt2.generate(params, prompt, n_tokens, seed=5 + b, **sampling))
        together = [ids[b] for ids in steps]
        assert together[: len(alone)] == alone
        assert set(together[len(alone) :]) <= {sampling["eot"]}
        assert all(0 <= id < config.n_vocab for id in together)


@given(st.data(), configs(), st.integers(1, 3), st.integers(1, 3))
def test_any_gradients_accumulate(data, config, n_batches, n_rows):
    params, total = random_params(config), None
    T = data.draw(st.integers(1, config.n_ctx))
    x = draw_tokens(data, config, n_batches * n_rows, T)
    y = draw_tokens(data, config, n_batches * n_rows, T)
    losses = []
    for rows in np.split(np.arange(len(x)), n_batches):
        loss, total = gpt2.loss_and_grads(params, x[rows], y[rows], total)
        losses.append(loss)
    whole_loss, whole = gpt2.loss_and_grads(params, x, y)
    assert math.isclose(np.mean(losses), whole_loss, rel_tol=1e-12, abs_tol=1e-12)
    np.testing.assert_allclose(total.flat / n_batches, whole.flat, **CLOSE)


@given(st.data(), configs(most_vocab=40, most_ctx=6))
def test_any_gradient_is_the_slope_of_the_loss(data, config):
    """Along a random direction through all the parameters at once."""
    params, T = random_params(config), data.draw(st.integers(1, config.n_ctx))
    x, y = (draw_tokens(data, config, 2, T) for _ in range(2))
    direction = random_params(config, seed=data.draw(st.integers(1, 99)))
    _, grads = gpt2.loss_and_grads(params, x, y)
    step, ends = 1e-5, []
    for sign in (1, -1):
        moved = Params(config, params.flat + sign * step * direction.flat)
        ends.append(gpt2.token_losses(moved, x, y).mean())
    slope, expected = (ends[0] - ends[1]) / (2 * step), grads.flat @ direction.flat
    assert math.isclose(slope, expected, rel_tol=1e-5, abs_tol=1e-6)


# ----------------------------------------------------------------------------------------------
# Sampling


class Fixed(np.random.Generator):
    """Draws one number for ever."""

    def __init__(self, number):
        super().__init__(np.random.PCG64(0))
        self.number = number

    def random(self):
        return self.number


def draws(logits, n=150, **sampling):
    """The ids that are drawn over numbers spread evenly: all of a probability above 1 / n."""
    numbers = [*(i / n for i in range(n)), 5e-324, math.nextafter(1, 0)]
    return [gpt2.sample(logits, Fixed(number), **sampling) for number in numbers]


def smallest_sufficient(probs, p):
    """The smallest set of ids with a probability of p together, of these the most probable one.

    By trying every set. What is equal by rounding goes to the lower ids.
    """
    for size in range(1, len(probs) + 1):
        sets = list(itertools.combinations(range(len(probs)), size))
        best = max(sets, key=lambda ids: (round(sum(probs[list(ids)]), 12), [-id for id in ids]))
        if sum(probs[list(best)]) >= p - 1e-12:
            return set(best)
    return set(range(len(probs)))


logits_of_few = st.lists(
    st.sampled_from([-1e4, -3.0, -1.0, 0.0, 0.5, 1.0, 2.5, 30.0]), min_size=1, max_size=7
).map(lambda values: np.array(values, np.float32))


@given(logits_of_few, st.floats(0.01, 1.0), st.sampled_from([0.5, 1.0, 2.0]))
def test_top_p_draws_from_the_smallest_sufficient_set(logits, top_p, temperature):
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    probs = weights / weights.sum()
    ordered = np.sort(probs)[::-1].cumsum()
    assume(np.abs(ordered - top_p).min() > 1e-9)  # on the edge either set would do
    kept = smallest_sufficient(probs, top_p)
    drawn = set(draws(logits, temperature=temperature, top_p=top_p))
    assert drawn <= kept
    assert drawn >= {id for id in kept if probs[id] / sum(probs[list(kept)]) > 0.01}


@given(logits_of_few, st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0]))
def test_top_k_draws_from_the_k_most_probable(logits, top_k, temperature):
    kept = sorted(range(len(logits)), key=lambda id: (-logits[id], id))[:top_k]
    assert set(draws(logits, temperature=temperature, top_k=top_k)) <= set(kept)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    st.sampled_from([1e-3, 0.7, 1.0, 50.0]),
    st.none() | st.integers(1, 40),
    st.none() | st.floats(1e-6, 1.0),
)
def test_no_id_of_probability_zero_is_ever_drawn(logits, temperature, top_k, top_p):
    logits = np.array(logits, np.float32)
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert all(math.exp(scaled[id]) > 0 for id in draws(logits, 20, **sampling))


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    st.sampled_from([1e-3, 0.7, 1.0, 50.0]),
    st.none() | st.floats(1e-6, 1.0),
)
def test_top_k_of_1_is_greedy(logits, temperature, top_p):
    logits = np.array(logits, np.float32)
    greedy = gpt2.sample(logits, Fixed(0.5))
    assert set(draws(logits, 20, temperature=temperature, top_k=1, top_p=top_p)) == {greedy}


# ----------------------------------------------------------------------------------------------
# Numbers that stay


def float64_arrays(value, seen):
    """Yield the float64 arrays and scalars in a value, however deep.

    But not pairs: those are the mean losses of the two batches of a step, from Python's floats.
    """
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype == np.float64 and value.shape != (2,):
            yield value
    elif isinstance(value, dict | list | tuple | SimpleNamespace | Params | gpt2.KVCache):
        if id(value) in seen:
            return
        seen.add(id(value))
        inner = value if isinstance(value, list | tuple) else None
        inner = value.values() if isinstance(value, dict) else inner
        for item in vars(value).values() if inner is None else inner:
            yield from float64_arrays(item, seen)


def callers(frame):
    """Return the names of a function and of those that called it."""
    names = set()
    while frame:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def float64_seen(function, ignored=None):
    """Call a function; return where, in our own modules, any local variable was float64.

    A function named `ignored`, and what that calls, may do as it likes.
    """
    rooms = (ROOT / "gpt2_support").glob("*.py")
    seen, files = set(), {gpt2.__file__, train.__file__, *map(str, rooms)}

    def look(frame, event, result):
        code = frame.f_code
        if event == "return" and code.co_filename in files and ignored not in callers(frame):
            for name, value in [*frame.f_locals.items(), ("what it returns", result)]:
                if any(True for _ in float64_arrays(value, set())):
                    seen.add((code.co_name, name))

    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen


def test_float64_is_nowhere_in_training_and_generation():
    """Every variable of every function: activations, gradients, optimizer state, temporaries."""
    config = Config(n_vocab=50, n_ctx=16, n_embd=12, n_head=3, n_layer=2)
    params = train.init_params(config)
    data = np.random.default_rng(0).integers(50, size=300).astype(np.uint16)
    run = train.TrainState(
        params, train.TrainConfig(steps=3, batch_size=2, seq_len=8, grad_accum=2)
    )
    prompts = [[1, 2, 3], [4]]

    def work():
        take_steps(run, train.DataLoader(data, run.config))
        train.l2_norm(params.flat)
        train.evaluate(params, data[:40], np.ones(50, int), 8)
        gpt2.forward(params, [1, 2, 3])
        list(gpt2.generate(params, prompts, 20, temperature=0.8, top_p=0.9, seed=0))
        list(gpt2.generate(params, prompts, 20, repetition_penalty=1.3))

    seen = float64_seen(work, ignored="sample")  # which computes probabilities in float64
    assert {function for function, _ in seen} <= {"all_gather"}, seen  # of the ranks' mean losses
    for array in (params.flat, run.optimizer.m, run.optimizer.v):
        assert array.dtype == np.float32


def test_float64_would_be_seen():
    def leak():
        gpt2.gelu(np.ones(3))

    assert ("gelu", "x") in float64_seen(leak)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_same_seed_gives_the_same_run_in_every_process(
    no_picture, tmp_path, call, run, monkeypatch, threads
):
    """Losses, parameters and samples, bit for bit, whatever Python's hash seed is."""
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. The dog sat on the log.\n" * 60, encoding="utf-8")

    def start(module, *args):
        return run(f"{module.__name__}.py", *args)

    monkeypatch.setenv("PYTHONHASHSEED", "1")  # for other processes; here it is another
    results = []
    for name, command in (("here", call), ("there", start)):
        out = tmp_path / name
        flags = ["--data", text, "--out", out, "--n_vocab", 265, "--n_layer", 2, "--n_embd", 32]
        flags += ["--n_ctx", 16, "--batch_size", 4, "--steps", 12, "--eval_every", 5]
        trained = command(train, *flags, "--threads", threads, "--seed", 3)
        rows = [(row["loss"], row["val_loss"]) for row in runlog.iterate_log(out / "log.csv")]
        flags = ["--model", out, "--n_samples", 2, "--temperature", 0.9, "--seed", 5]
        sampled = command(gpt2, "The", *flags)
        files = [(out / name).read_bytes() for name in ("model.bin", "best/model.bin")]
        results.append((trained.stdout, rows, sampled.stdout, files))
    assert results[0] == results[1]
    assert len(results[0][1]) == 12 and len(results[0][2]) > 20
