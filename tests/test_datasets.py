"""Tests of gpt2_support/datasets.py; what needs a run is in test_train.py."""

import numpy as np
import pytest

from gpt2_support import datasets


def test_one_token_is_too_few_to_validate_with():
    datasets.check_validation(np.zeros(2, int))
    with pytest.raises(ValueError, match="1 tokens to validate with: give more text"):
        datasets.check_validation(np.zeros(1, int))


@pytest.mark.parametrize("size", [0, 1, 2**24 + 1])
def test_max_id_is_the_largest(size):
    tokens = np.zeros(size, np.uint16)
    tokens[-1:] = 9
    assert datasets.max_id(tokens) == (9 if size else 0)
