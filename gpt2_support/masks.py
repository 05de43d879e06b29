"""The masks of dropout. They depend only on a seed, so a resumed run draws the same ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import ndarray
    from numpy.typing import DTypeLike


class Dropout:
    """Draws one mask after the other, each of which drops values with probability p."""

    def __init__(self, p: float, seed: int | Sequence[int]) -> None:
        self.p, self.rng = p, np.random.default_rng(seed)

    def mask(self, *shape: int, dtype: DTypeLike) -> ndarray:
        """Return an array that is 0 with probability p, and otherwise 1 / (1 - p)."""
        is_kept = self.rng.random(shape, np.float32) >= self.p
        return is_kept.astype(dtype) * (1 / (1 - self.p))
