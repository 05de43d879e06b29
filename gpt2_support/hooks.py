"""Hook points: where a caller sees and changes what the model computes, while it runs.

A layer calls `x = hook(name, x)` for each activation that has a name and goes on with what that
returns; its backward calls `dx = hook.backward(name, dx)` in reverse. NO_HOOK returns what it is
given. A Hooks edits activations, drops values, and records activations and their gradients.

The names: "embed", "ln_f" and "logits"; the residual stream after block 3 is "h3"; within the block
"h3.attn.q" and the others of INNER. "h3.attn.heads.5" is head 5 of those that have heads.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import itertools
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support.messages import preview

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable, Iterator, Mapping
    from typing import TypeAlias

    from numpy import ndarray
    from numpy.typing import ArrayLike

    from gpt2_support.masks import Dropout
    from gpt2_support.params import Config

    Value: TypeAlias = ArrayLike | float | int
    Edit: TypeAlias = Mapping[str, Value | Callable[[ndarray], Value]]
    Record: TypeAlias = dict[str, ndarray]

HEADED = ("attn.q", "attn.k", "attn.v", "attn.att", "attn.heads")
INNER = ("ln_1", *HEADED, "attn.out", "ln_2", "mlp.fc", "mlp.gelu", "mlp.out")
DROPPED = ("embed", "attn.att", "attn.out", "mlp.out")  # where Hugging Face's GPT-2 has dropout


class Hook:
    """A hook that changes nothing; the base of Hooks."""

    is_recording = False

    def __call__(self, name: str, x: ndarray) -> ndarray:
        """Return an activation that has just been computed, or another in its place."""
        return x

    def backward(self, name: str, dx: ndarray) -> ndarray:
        """Return the gradient of what `__call__` was given, from dx, that of what it returned."""
        return dx

    def within(self, block: str) -> Hook:
        """Return the hook for the names within a block."""
        return self

    def needs_whole(self, name: str) -> bool:
        """Whether the activation is needed in one array, not in tiles."""
        return False


NO_HOOK = Hook()
INFERENCE = Hook()  # NO_HOOK where no backward follows: activations need not be kept


class Hooks(Hook):
    """Hook points at which `edit` and `drop` change activations, and two dicts receive them.

    `edit` is {name or pattern: array or function}, `record` receives activations as the model goes
    on with them, `record_grads` the gradients with respect to those. What a caller gives and gets
    has no batch axis if `is_single`. Without `logits` there are none to edit. Raises ValueError for
    an unknown name.
    """

    def __init__(
        self,
        config: Config,
        is_single: bool = False,
        edit: Edit | None = None,
        record: Record | None = None,
        record_grads: Record | None = None,
        drop: Dropout | None = None,
        logits: bool = True,
    ) -> None:
        self._n_head, self._is_single, self._drop, self._block = config.n_head, is_single, drop, ""
        self._record, self._record_grads = record, record_grads
        self._edits = {} if edit is None else find_edits(edit, config, logits)
        self._masks: dict[str, ndarray] = {}
        self.is_recording = record is not None

    def __call__(self, name: str, x: ndarray) -> ndarray:
        path = self._block + name
        if path in self._edits:
            x = x.copy()
        for head, value in self._edits.get(path, ()):
            self._write(path, self._select(x, name, head), value)
        if self._drop is not None and name in DROPPED:
            self._masks[path] = self._drop.mask(*x.shape, dtype=x.dtype)
            x = x * self._masks[path]
        if self._record is not None:
            self._record[path] = self._single(x).copy()
        return x

    def backward(self, name: str, dx: ndarray) -> ndarray:
        path = self._block + name
        if self._record_grads is not None:
            self._record_grads[path] = self._single(dx).copy()
        if path in self._masks:
            dx = dx * self._masks.pop(path)
        if path in self._edits:
            dx = dx.copy()
        for head, value in reversed(self._edits.get(path, ())):
            backward = getattr(value, "backward", np.zeros_like)
            self._write(path, self._select(dx, name, head), backward)
        return dx

    def within(self, block: str) -> Hooks:
        inner = copy.copy(self)
        inner._block = f"{block}."
        return inner

    def needs_whole(self, name: str) -> bool:
        is_dropped = self._drop is not None and name in DROPPED
        return is_dropped or self._record_grads is not None or self._block + name in self._edits

    def _single(self, x: ndarray) -> ndarray:
        return x[0] if self._is_single else x

    def _select(self, x: ndarray, name: str, head: int | None) -> ndarray:
        """Return a view of one head, or of all."""
        if head is None:
            return x
        return (np.split(x, self._n_head, -1) if name == "attn.heads" else x.swapaxes(0, 1))[head]

    def _write(self, path: str, x: ndarray, value: ArrayLike | Callable) -> None:
        """Replace x by a value, or by what a function makes of it."""
        x = self._single(x)
        new = np.asarray(value(x.copy()) if callable(value) else value)
        try:
            is_number = np.can_cast(new.dtype, x.dtype, "same_kind")
            fits = is_number and np.broadcast_shapes(new.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            given = f"{new.dtype} {new.shape}" if new.dtype != object else str(new)
            raise ValueError(f"edit of {path}: {given} does not fit {x.dtype} {x.shape}")
        x[...] = new


def make(
    config: Config,
    is_single: bool,
    edit: Edit | None = None,
    record: Record | None = None,
    record_grads: Record | None = None,
    drop: Dropout | None = None,
    logits: bool = True,
) -> Hook:
    """Return Hooks, or NO_HOOK if there is nothing to edit, to record or to drop."""
    if edit is record is record_grads is drop is None:
        return NO_HOOK
    return Hooks(config, is_single, edit, record, record_grads, drop, logits)


class Add:
    """An edit that adds a vector, or any array: x -> x + value. The gradient passes unchanged."""

    def __init__(self, value: ArrayLike) -> None:
        self.value = np.asarray(value)

    def __call__(self, x: ndarray) -> ndarray:
        return x + self.value

    def backward(self, dx: ndarray) -> ndarray:
        """dx = dout."""
        return dx


class Scale:
    """An edit that multiplies by a number or an array: x -> x factor; 0 removes it."""

    def __init__(self, factor: ArrayLike) -> None:
        self.factor = np.asarray(factor)

    def __call__(self, x: ndarray) -> ndarray:
        return x * self.factor

    def backward(self, dx: ndarray) -> ndarray:
        """dx = dout factor."""
        return dx * self.factor


def activation_names(config: Config) -> Iterator[str]:
    """Yield the names of all activations, in the order in which they are computed."""
    yield "embed"
    for i in range(config.n_layer):
        yield from (f"h{i}.{name}" for name in INNER)
        yield f"h{i}"
    yield from ("ln_f", "logits")


def find_edits(edit: Edit, config: Config, logits: bool = True) -> dict[str, list]:
    """Return {name: [(head or None, value)]} for a caller's {name or pattern: value}.

    In a pattern `*` stands for anything but a dot. Raises ValueError if one matches nothing.
    """
    if not hasattr(edit, "items"):
        actual = preview(repr(edit))
        raise ValueError(f"edit must be a dict {{name: array or function}}, found {actual}")
    names: dict[str, tuple[str, int | None]] = {}
    names.update({name: (name, None) for name in activation_names(config)})
    for i, inner, head in itertools.product(range(config.n_layer), HEADED, range(config.n_head)):
        names[f"h{i}.{inner}.{head}"] = (f"h{i}.{inner}", head)
    if not logits:
        del names["logits"]
    edits: dict[str, list] = {}
    for pattern, value in edit.items():
        matches = [name for name in names if match(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(str(pattern), names, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "a record lists the names"
            raise ValueError(f"edit: no activation is called {preview(pattern)!r}: {hint}")
        for name in matches:
            path, part = names[name]
            edits.setdefault(path, []).append((part, value))
    return edits


def match(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern, part by part."""
    parts, patterns = name.split("."), str(pattern).split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
