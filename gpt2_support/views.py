"""Arrays that view one buffer: assigning to one writes into the buffer, or says why it cannot."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Iterator
    from typing import Any

    from numpy import ndarray


def assign(name: str, array: ndarray, value: Any) -> None:
    """Write a number, or an array of the same shape, into an array that views a buffer."""
    if value is array:  # `p.b += x` has already added in place
        return
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only, as loaded: params = params.copy() can be changed")
    if np.shape(value) not in ((), array.shape):
        raise ValueError(f"{name} has the shape {array.shape}, not {np.shape(value)}")
    array[...] = value


class Group:
    """Parameters that belong together. Assigning to one writes into the buffer that it views."""

    def __init__(self, **members: object) -> None:
        vars(self).update(members)

    def __setattr__(self, name: str, value: Any) -> None:
        array = getattr(self, name)
        if not isinstance(array, np.ndarray):
            raise AttributeError(f"{name} is not an array: assign to the arrays in it")
        assign(name, array, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} is a part of the model")

    def __repr__(self) -> str:
        members = (f"{name}: {getattr(x, 'shape', x)}" for name, x in vars(self).items())
        return f"{type(self).__name__}({', '.join(members)})"


class Views(MutableMapping):
    """Arrays by name. Assigning to a name writes into the buffer that its array views."""

    def __init__(self, arrays: dict[str, ndarray]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> ndarray:
        return self._arrays[name]

    def __setitem__(self, name: str, value: Any) -> None:
        assign(name, self._arrays[name], value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} is a part of the model")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
