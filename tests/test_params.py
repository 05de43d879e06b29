"""Config, the table of parameters, and the packed buffer."""

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
    "values", [{"n_head": 5}, {"n_layer": 0}, {"n_ctx": 1.5}, {"n_vocab": "x"}, {"n_head": True}]
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
