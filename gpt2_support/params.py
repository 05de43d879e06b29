"""The parameters of GPT-2: the table of their names and shapes, and one packed buffer of them."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support.messages import preview
from gpt2_support.views import Group, Views

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Iterator

    from jaxtyping import Float
    from numpy import ndarray


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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            n = whole_number(value)
            if n is None or not 1 <= n < 2**31:  # the .bin header has 32 bits
                value = repr(value) if isinstance(value, str) else value
                raise ValueError(
                    f"{name} = {preview(value)} is not a positive whole number below 2**31"
                )
            object.__setattr__(self, name, n)  # NumPy's numbers become ints
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")

    @property
    def n_vocab_padded(self) -> int:
        """Rows of wte in the buffer: n_vocab rounded up to a multiple of 128, as in llm.c."""
        return -(-self.n_vocab // 128) * 128


def whole_number(value: object) -> int | None:
    """Return a whole number of any type as an int; None for any other value, including a bool."""
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} in the order of the buffer, each parameter of all layers in one stack.

    The order is llm.c's. A weight is (out, in), so that a linear layer is `x @ w.T + b`.
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


def named_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every parameter in the order of the buffer, the layers taken apart.

    The names are OpenAI's, `model/h3/attn/c_attn/w`; wte is (V, C), without its padding.
    """
    for name, shape in parameter_shapes(config).items():
        if name == "wte":
            yield "model/wte", (config.n_vocab, config.n_embd)
        elif name.startswith("h/"):
            for i in range(config.n_layer):
                yield f"model/h{i}{name[1:]}", shape[1:]
        else:
            yield f"model/{name}", shape


def n_params(config: Config) -> int:
    """Return the number of values in a packed buffer, the padding of wte included."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


class LayerNorm(Group):
    """Gain and bias."""

    g: Float[ndarray, " C"]
    b: Float[ndarray, " C"]


class Linear(Group):
    """Weight and bias: x @ w.T + b."""

    w: Float[ndarray, "O I"]
    b: Float[ndarray, " O"]


class Attention(Group):
    """Queries, keys and values in one layer, and the projection of the heads."""

    c_attn: Linear
    c_proj: Linear


class MLP(Group):
    """The layers before and after the activation."""

    c_fc: Linear
    c_proj: Linear


class Block(Group):
    """A transformer block."""

    ln_1: LayerNorm
    attn: Attention
    ln_2: LayerNorm
    mlp: MLP


class Params(Group):
    """The parameters of a model, or their gradients: a packed buffer and named views into it.

    `params.h[3].attn.c_attn.w` is the array that OpenAI's checkpoint calls
    `model/h3/attn/c_attn/w`, here (3C, C); `params.named` holds all of them under those names.
    `params.flat` is the buffer, in the order of `parameter_shapes`: to update every parameter is to
    update `flat`. Its rows of wte from n_vocab on are zero; `params.wte` (V, C) leaves them out.

    Params(config) is all zeros in float32. Params(config, flat) wraps a buffer of any float dtype
    without copying it. Raises ValueError if it does not have the length that the config needs, and
    MemoryError if zeros do not fit.
    """

    config: Config
    flat: Float[ndarray, " N"]
    named: Views
    wte: Float[ndarray, "V C"]
    wpe: Float[ndarray, "n_ctx C"]
    h: tuple[Block, ...]
    ln_f: LayerNorm

    def __init__(self, config: Config, flat: Float[ndarray, " N"] | None = None) -> None:
        flat = zeros(config) if flat is None else flat
        if flat.shape != (n_params(config),):
            raise ValueError(f"buffer of shape {flat.shape}, but {config} needs {n_params(config)}")
        named = name_views(config, flat)

        def layer_norm(name: str) -> LayerNorm:
            return LayerNorm(g=named[f"model/{name}/g"], b=named[f"model/{name}/b"])

        def linear(name: str) -> Linear:
            return Linear(w=named[f"model/{name}/w"], b=named[f"model/{name}/b"])

        def block(h: str) -> Block:
            attn = Attention(c_attn=linear(f"{h}/attn/c_attn"), c_proj=linear(f"{h}/attn/c_proj"))
            mlp = MLP(c_fc=linear(f"{h}/mlp/c_fc"), c_proj=linear(f"{h}/mlp/c_proj"))
            ln_1, ln_2 = layer_norm(f"{h}/ln_1"), layer_norm(f"{h}/ln_2")
            return Block(ln_1=ln_1, attn=attn, ln_2=ln_2, mlp=mlp)

        super().__init__(
            config=config,
            flat=flat,
            named=named,
            wte=named["model/wte"],
            wpe=named["model/wpe"],
            h=tuple(block(f"h{i}") for i in range(config.n_layer)),
            ln_f=layer_norm("ln_f"),
        )

    def copy(self) -> Params:
        """Return a copy with a buffer of its own, which can be changed."""
        return Params(self.config, self.flat.copy())

    def zeros_like(self) -> Params:
        """Return zeros in the same layout and dtype, for gradients."""
        return Params(self.config, np.zeros_like(self.flat))

    def __reduce__(self) -> tuple[type[Params], tuple[Config, ndarray]]:
        return Params, (self.config, self.flat)  # so copies and pickles view their own buffer

    def __repr__(self) -> str:
        n = sum(array.size for array in self.named.values())
        return f"Params({self.config}, {n:,} parameters, {self.flat.dtype})"


def zeros(config: Config) -> Float[ndarray, " N"]:
    """Return a packed buffer of zeros in float32; raise MemoryError that names the config."""
    try:
        return np.zeros(n_params(config), np.float32)
    except (MemoryError, ValueError, OverflowError) as error:
        raise MemoryError(f"{config} needs {n_params(config):,} values: {error}") from None


def name_views(config: Config, flat: Float[ndarray, " N"]) -> Views:
    """Return views into a packed buffer by OpenAI's names."""
    named: dict[str, ndarray] = {}
    end = 0
    for name, shape in parameter_shapes(config).items():
        start, end = end, end + math.prod(shape)
        array = flat[start:end].reshape(shape)
        if name == "wte":
            array = array[: config.n_vocab]
        if name.startswith("h/"):
            named.update({f"model/h{i}{name[1:]}": array[i] for i in range(config.n_layer)})
        else:
            named[f"model/{name}"] = array
    return Views(named)
