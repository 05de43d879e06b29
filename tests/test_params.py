"""Config, the table of parameters, and the packed buffer."""

import copy
import pickle

import numpy as np
import pytest
from helpers import TINY, random_params

from gpt2_support.formats import llmc
from gpt2_support.params import Config, Params, n_params, named_shapes


def test_config_default_is_124m():
    config = Config()
    assert sum(np.prod(shape) for _, shape in named_shapes(config)) == 124439808
    assert llmc.HEADER_BYTES + 4 * n_params(config) == 497904640


@pytest.mark.parametrize(
    "values",
    [
        {"n_head": 5},
        {"n_layer": 0},
        {"n_ctx": 1.5},
        {"n_vocab": "x"},
        {"n_head": True},
        {"n_vocab": np.float64(300)},
        {"n_ctx": np.bool_(True)},
        {"n_embd": 2**31},
        {"n_ctx": None},
    ],
)
def test_config_refuses_bad_values(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Config(**values)


def test_params_views_cover_the_buffer_once():
    params = Params(TINY)
    for array in params.named.values():
        array += 1
    padding = (TINY.n_vocab_padded - TINY.n_vocab) * TINY.n_embd
    assert params.flat.sum() == len(params.flat) - padding
    assert set(params.flat) == {0, 1}


def test_params_attributes_are_the_named_arrays():
    params = random_params(TINY, np.float32)
    assert params.h[1].attn.c_attn.w is params.named["model/h1/attn/c_attn/w"]
    assert params.h[1].attn.c_attn.w.shape == (24, 8)
    assert params.ln_f.g is params.named["model/ln_f/g"]
    assert params.wte.shape == (260, 8)


def test_tensors_are_the_named_arrays_in_file_order():
    params = Params(TINY)
    shapes = dict(named_shapes(TINY))
    assert shapes == {name: array.shape for name, array in params.named.items()}
    starts = [params.named[name].__array_interface__["data"][0] for name in shapes]
    assert starts == sorted(starts)


def test_params_refuses_a_buffer_of_another_length():
    with pytest.raises(ValueError, match="needs"):
        Params(TINY, np.zeros(n_params(TINY) + 1, np.float32))


def assert_is_one(params, like):
    """The values of `like`, in a buffer that the named arrays view."""
    assert params.flat.tobytes() == like.flat.tobytes() and params.config == like.config
    params.flat[...] = np.arange(params.flat.size)
    assert params.wte is params.named["model/wte"]
    assert params.wte[0, 1] == 1 and params.ln_f.b[-1] == params.flat.size - 1


def test_params_of_a_model_too_large_for_any_memory_say_so():
    for n_layer in (1 << 24, (1 << 31) - 1):  # too many bytes for memory, and for an address
        config = Config(n_embd=1 << 20, n_head=16, n_layer=n_layer)
        with pytest.raises(MemoryError, match=f"n_layer={n_layer}.* needs [0-9,]+ values: "):
            Params(config)


@pytest.mark.parametrize(
    "duplicate",
    [Params.copy, copy.deepcopy, lambda params: pickle.loads(pickle.dumps(params))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_params_copies_are_whole_and_their_own(duplicate):
    original = random_params(TINY, np.float32)
    assert_is_one(duplicate(original), original)
    assert (original.flat == random_params(TINY, np.float32).flat).all()


def test_params_copies_of_a_mapped_file_can_be_changed(tmp_path):
    llmc.save_params(tmp_path / "model.bin", random_params(TINY, np.float32))
    mapped = llmc.load_params(tmp_path / "model.bin")
    for duplicate in (mapped.copy(), copy.deepcopy(mapped)):
        assert_is_one(duplicate, mapped)


def test_params_copied_together_with_their_buffer_stay_together():
    params = random_params(TINY)
    both = copy.deepcopy({"params": params, "flat": params.flat})
    assert both["params"].flat is both["flat"]
    assert copy.copy(params).flat is params.flat


def test_params_assignment_writes_into_the_buffer():
    params, values = Params(TINY), random_params(TINY)
    params.wte = values.wte
    params.h[1].attn.c_attn.w = values.h[1].attn.c_attn.w
    params.ln_f.g = 3
    params.named["model/wpe"] = values.wpe
    params.named.update({"model/ln_f/b": values.ln_f.b})
    assert params.wte is params.named["model/wte"] and (params.wte == np.float32(values.wte)).all()
    params.wte *= 2
    params.ln_f.b += 1
    saved = Params(TINY, params.flat.copy())
    for name in ("model/wte", "model/h1/attn/c_attn/w", "model/ln_f/g", "model/wpe"):
        assert saved.named[name].any(), name
    assert (saved.wte == 2 * np.float32(values.wte)).all() and (saved.ln_f.g == 3).all()
    assert (saved.ln_f.b == np.float32(values.ln_f.b) + 1).all()
    params.flat = 0.0 * params.flat
    assert not params.wte.any()


@pytest.mark.parametrize(
    "assign, message",
    [
        (lambda p: setattr(p, "wte", p.wte[0]), r"wte.*\(260, 8\), not \(8,\)"),  # no broadcasting
        (lambda p: p.named.__setitem__("model/wte", p.wte.T), r"model/wte.*\(8, 260\)"),
        (lambda p: setattr(p, "ln_f", p.h[0].ln_1), "ln_f.*assign to the arrays in it"),
        (lambda p: setattr(p, "h", []), "h.*assign to the arrays in it"),
        (lambda p: setattr(p, "config", TINY), "config.*assign to the arrays in it"),
        (lambda p: setattr(p, "new", 1), "new"),
        (lambda p: p.h.__setitem__(0, p.h[1]), "item assignment|__setitem__"),
        (lambda p: delattr(p, "wte"), "wte"),
        (lambda p: p.named.__setitem__("wte", 1), "wte"),
        (lambda p: p.named.pop("model/wte"), "model/wte"),
        (lambda p: p.named.clear(), "model/"),
    ],
)
def test_params_refuse_what_would_part_names_and_buffer(assign, message):
    params = random_params(TINY)
    with pytest.raises((AttributeError, ValueError, KeyError, TypeError), match=message):
        assign(params)
    assert_is_one(params, random_params(TINY))


def test_params_read_only_say_to_copy_first(tmp_path):
    llmc.save_params(tmp_path / "model.bin", Params(TINY))
    mapped = llmc.load_params(tmp_path / "model.bin")
    for assign in (
        lambda: setattr(mapped, "wte", 1),
        lambda: setattr(mapped.ln_f, "g", 1),
        lambda: mapped.named.update({"model/wpe": 1}),
    ):
        with pytest.raises(ValueError, match=r"read-only.*params\.copy\(\)"):
            assign()


def test_params_repr_is_short_and_tells_the_size():
    params = Params(TINY)
    assert repr(params) == f"Params({TINY}, 3,904 parameters, float32)"
    assert repr(params.ln_f) == "LayerNorm(g: (8,), b: (8,))"
    assert repr(params.h[0].mlp.c_fc) == "Linear(w: (32, 8), b: (32,))"
    assert len(repr(params.named)) < 100


def test_config_takes_any_whole_number_and_keeps_an_int():
    config = Config(n_vocab=np.int64(300), n_layer=np.uint8(2), n_embd=np.array(48))
    assert config == Config(300, n_layer=2, n_embd=48)
    assert {type(value) for value in vars(config).values()} == {int}
    assert hash(config) == hash(Config(300, n_layer=2, n_embd=48))
