"""Annotations: the shapes and dtypes that the functions name are those they are called with."""

import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
from helpers import ROOT

import gpt2
import train

checked = pytest.mark.thorough  # the modules are imported with the checks in a thorough run only


def queries(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@checked
@pytest.mark.parametrize(
    "k, v, wrong",
    [
        ((2, 3, 5, 6), (2, 3, 5, 6), "'k'.*D=4"),
        ((2, 3, 5, 4), (2, 3, 7, 4), "'v'.*S=5"),
        ((2, 2, 5, 4), (2, 2, 5, 4), "'k'.*H=3"),
    ],
)
def test_wrong_dimension_is_named(k, v, wrong):
    with pytest.raises(
        jaxtyping.TypeCheckError, match=f"(?s)gpt2.scaled_dot_product_attention.*{wrong}"
    ):
        gpt2.scaled_dot_product_attention(
            queries(2, 3, 5, 4), queries(*k), queries(*v), np.arange(5)[None]
        )


@checked
def test_wrong_dtype_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"(?s)gpt2.gelu.*'x'"):
        gpt2.gelu(queries(2, 3, dtype=int))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"(?s)train.l2_norm.*'values'"):
        train.l2_norm(queries(3, dtype=int))


def test_checks_cost_nothing_without_the_tests():
    code = "import sys, train; print('jaxtyping' in sys.modules, train.gpt2.attention.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False gpt2\n", "")
