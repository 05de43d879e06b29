"""The parameters of GPT-2: the table of their names and shapes, and one packed buffer of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support.messages import preview

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# The parameters: one packed buffer, and a named view of every array in it


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of a GPT-2, named as in OpenAI's `hparams.json`; the defaults are 124M.

    Raises ValueError if a value is not a positive int below 2**31 or n_head does not divide n_embd.
    """

    n_vocab: int = 50257
    n_ctx: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_layer: int = 12

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not int or not 1 <= value < 2**31:  # the .bin header has 32 bits
                value = repr(value) if isinstance(value, str) else value
                raise ValueError(
                    f"{name} = {preview(value)} is not a positive whole number below 2**31"
                )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")

    @property
    def n_vocab_padded(self):
        """Rows of wte in the buffer: n_vocab rounded up to a multiple of 128, as in llm.c."""
        return -(-self.n_vocab // 128) * 128


def layout(config: Config) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of every tensor in file order, the same parameter of all layers stacked.

    This is the one place that names the parameters of GPT-2. The order is llm.c's; a weight is
    (out, in), so that a linear layer is `x @ w.T + b`.
    """
    L, C = config.n_layer, config.n_embd
    return {
        "wte": (config.n_vocab_padded, C),
        "wpe": (config.n_ctx, C),
        "h/ln_1/g": (L, C),
        "h/ln_1/b": (L, C),
        "h/attn/c_attn/w": (L, 3 * C, C),
        "h/attn/c_attn/b": (L, 3 * C),
        "h/attn/c_proj/w": (L, C, C),
        "h/attn/c_proj/b": (L, C),
        "h/ln_2/g": (L, C),
        "h/ln_2/b": (L, C),
        "h/mlp/c_fc/w": (L, 4 * C, C),
        "h/mlp/c_fc/b": (L, 4 * C),
        "h/mlp/c_proj/w": (L, C, 4 * C),
        "h/mlp/c_proj/b": (L, C),
        "ln_f/g": (C,),
        "ln_f/b": (C,),
    }


def tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every tensor in file order: `layout` with its layers taken apart.

    The names are OpenAI's, `model/h3/attn/c_attn/w`; wte is (V, C), without its padding.
    """
    for name, shape in layout(config).items():
        if name == "wte":
            yield "model/wte", (config.n_vocab, config.n_embd)
        elif name.startswith("h/"):
            for i in range(config.n_layer):
                yield f"model/h{i}{name[1:]}", shape[1:]
        else:
            yield f"model/{name}", shape


def n_params(config: Config) -> int:
    """Return the number of values in a packed buffer, the padding of wte included."""
    return sum(math.prod(shape) for shape in layout(config).values())


class Params:
    """The parameters of a model, or their gradients: a packed buffer and named views into it.

    `params.h[3].attn.c_attn.w` is the array that OpenAI's checkpoint calls
    `model/h3/attn/c_attn/w`, here (3C, C); `params.named` holds all of them under those names.
    `params.flat` is the buffer, in the order of `layout`: to update every parameter is to update
    `flat`. The rows of wte from n_vocab on are zero padding; `params.wte` (V, C) leaves them out.

    Params(config) is all zeros in float32; Params(config, flat) wraps a buffer, of any float dtype,
    without copying it. Raises ValueError if the buffer has another length than the config needs.
    """

    config: Config
    flat: Float[ndarray, " N"]
    named: dict[str, ndarray]
    wte: Float[ndarray, "V C"]
    wpe: Float[ndarray, "n_ctx C"]
    h: list[SimpleNamespace]
    ln_f: SimpleNamespace

    def __init__(self, config: Config, flat: Float[ndarray, " N"] | None = None) -> None:
        flat = np.zeros(n_params(config), np.float32) if flat is None else flat
        if flat.shape != (n_params(config),):
            raise ValueError(f"buffer of shape {flat.shape}, but {config} needs {n_params(config)}")
        self.config, self.flat, self.named = config, flat, {}
        end = 0
        for name, shape in layout(config).items():
            start, end = end, end + math.prod(shape)
            array = flat[start:end].reshape(shape)
            if name == "wte":
                array = array[: config.n_vocab]
            if name.startswith("h/"):
                for i in range(config.n_layer):
                    self.named[f"model/h{i}{name[1:]}"] = array[i]
            else:
                self.named[f"model/{name}"] = array
        self._add_attributes()

    def _add_attributes(self):
        """Make every named array an attribute: model/h3/ln_1/g becomes self.h[3].ln_1.g."""
        self.h = [SimpleNamespace() for _ in range(self.config.n_layer)]
        for name, array in self.named.items():
            _, *path, leaf = name.split("/")
            node = self
            for part in path:
                if node is self and part[0] == "h":
                    node = self.h[int(part[1:])]
                    continue
                if not hasattr(node, part):
                    setattr(node, part, SimpleNamespace())
                node = getattr(node, part)
            setattr(node, leaf, array)
