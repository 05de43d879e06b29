"""The arrays in signatures: a name for each shape, for readers and checkers.

B batch, T tokens (one query each), S keys, C channels, H heads, D = C / H, V vocabulary, N rows. A
name that two arguments share has the same length in both; *N stands for any number of axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # nothing is imported when the program runs
    from collections import deque
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    from jaxtyping import Float, Integer
    from numpy import ndarray

    Prompt: TypeAlias = Sequence[int] | Integer[ndarray, " T"]
    Tokens: TypeAlias = Integer[ndarray, "B T"]
    Positions: TypeAlias = Integer[ndarray, "#B T"]

    Batch: TypeAlias = tuple[Tokens, Tokens]  # tokens, and the target of each
    Flat: TypeAlias = Float[ndarray, " N"]  # a packed buffer, or a part of one

    Stream: TypeAlias = Float[ndarray, "B T C"]  # the residual stream, or a branch
    Rows: TypeAlias = Float[ndarray, "N C"]
    AnyRows: TypeAlias = Float[ndarray, "*N C"]
    Logits: TypeAlias = Float[ndarray, " V"]

    Heads: TypeAlias = Float[ndarray, "B H T D"]  # queries, or what attention makes of them
    Keys: TypeAlias = Float[ndarray, "B H S D"]  # keys or values
    Scores: TypeAlias = Float[ndarray, "B H T S"]
    Weights: TypeAlias = tuple[Scores, Scores]  # of the softmax, and after the hook

    Caches: TypeAlias = deque[Any]  # an EmbedCache, BlockCaches, a LayerNormCache
    Parallel: TypeAlias = Callable[[Callable[[int, int], object]], list]  # see data_parallel.serial
