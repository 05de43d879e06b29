"""Files into named arrays and tables, and back: every format that GPT-2 is stored in.

Reading order: the parameters (`Config`, `layout`, `Params`), writing safely (`atomic_write`), our
own `.bin` files (llm.c's formats), token tables, then other people's checkpoints (TensorFlow,
safetensors), downloads, and the commands `download` and `convert`.

All formats are little-endian.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING


def configure_openblas(cpuinfo="/proc/cpuinfo"):
    """Set what OpenBLAS reads when NumPy loads it, unless the user has: its kernels, its patience.

    Threads that wait for work keep a core busy for 2**20 cycles, 0.4 ms, instead of 2**26: in that
    time other threads have use for it. And an AMD CPU that it may be too old to know gets AVX-512
    kernels: OpenBLAS 0.3.31 runs Zen 5 at half its speed, with AVX2. OPENBLAS_CORETYPE set to
    nothing leaves that choice to OpenBLAS.
    """
    if "numpy" in sys.modules:
        return
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    if "OPENBLAS_CORETYPE" in os.environ:
        return
    with contextlib.suppress(OSError), open(cpuinfo) as file:
        lines = (line.partition(":") for line in file.read(8192).splitlines())
        cpu = {name.strip(): value.strip() for name, _, value in lines}
        zen_5_or_later = cpu.get("vendor_id") == "AuthenticAMD" and int(cpu["cpu family"]) >= 26
        needs = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
        if zen_5_or_later and needs <= set(cpu.get("flags", "").split()):
            os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"


configure_openblas()

import numpy as np  # noqa: E402

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float, Float32, UInt16
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray

MODELS_DIR = Path(__file__).resolve().parent / "models"


@functools.cache
def openblas(function):
    """Return a function of NumPy's OpenBLAS, "get_num_threads" say; None for another BLAS."""
    numpy = Path(np.__file__).parent
    for path in [*numpy.parent.glob("numpy.libs/*openblas*"), *numpy.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))
        for name in (f"scipy_openblas_{function}64_", f"openblas_{function}64_"):
            if hasattr(library, name):
                return getattr(library, name)
    return None


def blas_threads():
    """Return the number of threads of a matrix product now; 1 if NumPy's BLAS does not tell."""
    get = openblas("get_num_threads")
    return get() if get else 1


def set_blas_threads(n):
    """Give a matrix product n threads, where NumPy's BLAS is OpenBLAS."""
    set_threads = openblas("set_num_threads")
    if set_threads:
        set_threads(n)


@contextlib.contextmanager
def one_blas_thread(then):
    """Give matrix products one thread within the block, and `then` threads after it."""
    set_blas_threads(1)
    try:
        yield
    finally:
        set_blas_threads(then)


def blas_kernels():
    """Return the name of the kernels that NumPy's OpenBLAS uses on this CPU, "SkylakeX" say."""
    corename = openblas("get_corename")
    if corename is None:
        return "unknown"
    corename.restype = ctypes.c_char_p
    return corename().decode()


def small_kernels():
    """Tell whether NumPy's BLAS has kernels for small matrices, which read them where they are.

    Those of OpenBLAS for AVX-512 do. The others copy a small matrix first, as they do a large one.
    """
    return blas_kernels() in ("SkylakeX", "Cooperlake", "SapphireRapids")


WORTH_A_THREAD = 1 << 21  # multiplications: fewer are done before it has woken up


def in_threads(function: Callable[[slice], object], n: int, work: int) -> None:
    """Call function(part) for slices of range(n), in threads if `work`, multiplications, is large.

    At most as many threads as BLAS has for a matrix product, this one among them, each with one
    BLAS thread: for products too small to share, and for what NumPy does on one core.
    """
    n_threads = blas_threads()
    n_parts = max(1, min(n_threads, n, work // WORTH_A_THREAD))
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    first, *others = map(slice, bounds, bounds[1:])
    if not others:
        function(first)
        return
    with one_blas_thread(then=n_threads):
        started = [thread_pool(len(others)).submit(function, part) for part in others]
        function(first)
        for part in started:
            part.result()


@functools.cache
def thread_pool(n):
    """Return n threads that wait for work."""
    return ThreadPoolExecutor(n)


if hasattr(os, "register_at_fork"):  # a forked process has no threads but the one that forked
    os.register_at_fork(after_in_child=thread_pool.cache_clear)


@functools.cache
def keep_freed_memory():
    """Let the memory that is freed be used again at once, where the C library is glibc.

    It would go back to the system otherwise, and come again as fresh pages that have to be zeroed:
    a tenth to a quarter of the time of a training step, a third of that of a first long prompt.
    """
    trim_threshold, mmap_threshold, arena_max, gigabyte = -1, -3, -8, 1 << 30  # from malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(arena_max, 1)  # one heap for all threads
        mallopt(mmap_threshold, gigabyte)
        mallopt(trim_threshold, -1)  # never


def shown(value, longest=80):
    """Return what a file or server sent as text for a message: short, and safe to print."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except RecursionError:  # JSON can be nested deeper than repr goes
        text = f"a nested {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


# ----------------------------------------------------------------------------------------------
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
                    f"{name} = {shown(value)} is not a positive whole number below 2**31"
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


# ----------------------------------------------------------------------------------------------
# Writing safely


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file for writing bytes; when the block ends well, rename it to `path`.

    A reader sees the old file or the whole new one, never a part, whenever the process dies: the
    bytes are on the disk before the rename. After an error the old file is untouched. What a
    process that died has left goes when the same file is written again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                try_lock(file)  # says that its writer lives
                yield file
                sync(file)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path):
    """Add a path to an OSError that has none: "No space left on device" should say where."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def remove_leftovers(path):
    """Remove the temporary files of `path` whose writers have died: nobody holds their locks."""
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            with open(old, "r+b") as file:
                is_free = try_lock(file, without_locks=False)
            if is_free:
                old.unlink()


def sync(file):
    """Return when everything written to the file so far is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def try_lock(file, without_locks=True):
    """Return whether the lock of an open file is ours now; `without_locks` where there are none."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network file systems
        return without_locks
    return True


# ----------------------------------------------------------------------------------------------
# The .bin files: llm.c's formats (https://github.com/karpathy/llm.c), each a header of 256 int32

HEADER_BYTES = 1024
MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC, TOKENS_MAGIC = 20240326, 20240327, 20240328, 20240520
MAGIC_MEANS = {
    MODEL_MAGIC: "model",
    STATE_MAGIC: "debug state",
    TOKENIZER_MAGIC: "tokenizer",
    TOKENS_MAGIC: "tokens",
}


def write_header(file, *values):
    """Write `values` (int32) as the header of a .bin file, the rest of it zeros."""
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    file.write(header.tobytes())


def read_header(path, magic, versions):
    """Return the header of a .bin file as a list of 256 ints.

    Raises ValueError, naming what was found, unless magic number and version are as wanted.
    """
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), "<u1")
    want = MAGIC_MEANS[magic]
    if len(header) < HEADER_BYTES:
        raise ValueError(
            f"{path}: {len(header)} bytes is too short for the header of a {want} file"
        )
    header = header.view("<i4").tolist()
    if header[0] != magic:
        found = MAGIC_MEANS.get(header[0])
        found = f"a {found} file" if found else f"magic number {header[0]}"
        raise ValueError(f"{path}: expected a {want} file (magic number {magic}), found {found}")
    if header[1] not in versions:
        raise ValueError(f"{path}: {want} file of version {header[1]}, can read only {versions}")
    return header


def check_size(path, expected, what):
    """Raise ValueError unless the file has exactly `expected` bytes."""
    found = os.path.getsize(path)
    if found != expected:
        raise ValueError(
            f"{path}: {found} bytes, but {what} takes {expected}: the file is incomplete, damaged, "
            "or from a program that uses this version number for another layout"
        )


def write_model_header(file, config):
    """Write the header of a model .bin file of version 3 (float32, padded vocabulary)."""
    c = config
    sizes = (c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd, c.n_vocab_padded)
    write_header(file, MODEL_MAGIC, 3, *sizes)


def write_model(file, config, get):
    """Write a model .bin file of version 3; `get(name)` returns a tensor when it is its turn.

    Raises ValueError for an array of another shape than `tensors` says.
    """
    write_model_header(file, config)
    for name, shape in tensors(config):
        write_array(file, get(name), shape)
        if name == "model/wte":
            file.write(bytes(4 * (config.n_vocab_padded - config.n_vocab) * config.n_embd))


def write_array(file, array, shape):
    """Write an array as float32, after checking its shape."""
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape}, expected {shape}")
    file.write(np.ascontiguousarray(array, "<f4").data)


def save_params(path: str | Path, params: Params) -> None:
    """Write a model .bin file exactly as llm.c's version 3 has it (float32), atomically."""
    with atomic_write(path) as file:
        write_model(file, params.config, params.named.__getitem__)


def load_params(path: str | Path) -> Params:
    """Return the Params of a model .bin file, or of the `model.bin` in a folder.

    A float32 file with a padded vocabulary (version 3) is memory-mapped: read-only, and loaded
    by the operating system as it is used. Version 1 (unpadded) and 5 (bf16) are copied to float32.
    Raises FileNotFoundError, or ValueError if header or file size are not those of a GPT-2.
    """
    path = Path(path)
    path = path / "model.bin" if path.is_dir() else path
    config, rows, dtype = read_model_header(path)
    values = np.memmap(path, dtype, "r", offset=HEADER_BYTES).view(np.ndarray)
    if dtype == np.uint16:
        values = bf16_to_float32(values)
    if rows == config.n_vocab_padded:
        return Params(config, values)
    params = Params(config)  # unpadded: leave a gap of zeros after the rows of wte
    params.flat[: rows * config.n_embd] = values[: rows * config.n_embd]
    params.flat[config.n_vocab_padded * config.n_embd :] = values[rows * config.n_embd :]
    return params


def read_model_header(path):
    """Return a model .bin file's Config, rows of wte, and dtype (uint16 for bf16), size checked.

    Raises as `load_params` does.
    """
    _, version, n_ctx, n_vocab, n_layer, n_head, n_embd, padded, *_ = read_header(
        path, MODEL_MAGIC, (1, 3, 5)
    )
    try:
        config = Config(n_vocab, n_ctx, n_embd, n_head, n_layer)
    except ValueError as error:
        raise ValueError(f"{path}: not the header of a GPT-2: {error}") from None
    rows = n_vocab if version == 1 else config.n_vocab_padded
    if version != 1 and padded != rows:
        raise ValueError(f"{path}: vocabulary padded to {padded}, expected {rows} for {n_vocab}")
    n_values = n_params(config) - (config.n_vocab_padded - rows) * n_embd
    dtype = np.dtype("<u2" if version == 5 else "<f4")
    what = f"version {version} of {config}"
    check_size(path, HEADER_BYTES + dtype.itemsize * n_values, what)
    return config, rows, dtype


def bf16_to_float32(values: UInt16[ndarray, " N"]) -> Float32[ndarray, " N"]:
    """Return float32 from the bits of bfloat16 (uint16), which are a float32's upper half."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def save_tokenizer(path: str | Path, tokens: Sequence[bytes], eot: int | None) -> None:
    """Write a token table, a list of bytes indexed by id, as a tokenizer .bin of version 2.

    `eot` is the id of the end-of-text token; None, for a table without one, is stored as -1.
    Raises ValueError for a token over 255 bytes.
    """
    longest = max(map(len, tokens))
    if longest > 255:
        raise ValueError(f"a token of {longest} bytes exceeds the 255 that {path} can hold")
    with atomic_write(path) as file:
        write_header(file, TOKENIZER_MAGIC, 2, len(tokens), -1 if eot is None else eot)
        file.write(b"".join(bytes([len(token)]) + token for token in tokens))


def load_tokens(path: str | Path) -> tuple[UInt16[ndarray, " N"], int]:
    """Memory-map a tokens .bin file; return its ids (N,) uint16, and n_vocab (0 if not recorded).

    Raises FileNotFoundError, or ValueError if it is not a tokens file of the right length.
    """
    _, _, n_tokens, n_vocab, *_ = read_header(path, TOKENS_MAGIC, (1,))
    if n_tokens < 0 or not 0 <= n_vocab <= 65536:
        raise ValueError(f"{path}: header claims {n_tokens} tokens of a vocabulary of {n_vocab}")
    check_size(path, HEADER_BYTES + 2 * n_tokens, f"a tokens file of {n_tokens} tokens")
    if n_tokens == 0:
        return np.zeros(0, np.uint16), n_vocab
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES).view(np.ndarray), n_vocab


def save_tokens(path, chunks, n_vocab):
    """Write a tokens .bin file, atomically, from an iterable of id arrays; return how many tokens.

    Raises ValueError if the ids do not fit uint16 or the count does not fit the header.
    """
    if n_vocab > 65536:
        raise ValueError(f"n_vocab = {n_vocab}: a tokens file holds 16-bit ids, 65536 at most")
    n_tokens = 0
    with atomic_write(path) as file:
        write_header(file)  # the count is known at the end
        for chunk in chunks:
            file.write(np.asarray(chunk, "<u2").tobytes())
            n_tokens += len(chunk)
        if n_tokens > 2**31 - 1:
            raise ValueError(f"{n_tokens} tokens exceed the 2**31 - 1 that a tokens file can count")
        file.seek(0)
        write_header(file, TOKENS_MAGIC, 1, n_tokens, n_vocab)
    return n_tokens


# ----------------------------------------------------------------------------------------------
# Token tables: the bytes of every token, indexed by id, where the id order is the merge order

EOT_TEXT = "<|endoftext|>"
TOKENIZER_FILES = (  # what load_tokenizer looks for in a folder, in order of preference
    ("tokenizer.bin",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("tokenizer.json",),
)


def load_tokenizer(path: str | Path) -> tuple[list[bytes], int | None]:
    """Return a token table (a list of bytes indexed by id) and its end-of-text id, or None.

    `path` is a `tokenizer.bin` of llm.c (version 1 or 2), a `tokenizer.json` of Hugging Face,
    OpenAI's `encoder.json` with `vocab.bpe` beside it, the same two as `vocab.json` and
    `merges.txt`, or a folder that holds any of these. Raises FileNotFoundError, or ValueError if
    the file is damaged or merging by lowest id would not give the ids that its author gets.
    """
    path = Path(path)
    path = find_tokenizer(path) if path.is_dir() else path
    if path.suffix != ".json":
        tokens, eot = read_bin_tokenizer(path)
        check_token_table(path, tokens, eot)
        return tokens, eot
    tokens, merges = read_json_tokenizer(path)
    eot = find_eot(tokens)
    check_token_table(path, tokens, eot)
    check_merges(path, merges, recover_merges(tokens, eot))
    return tokens, eot


def find_tokenizer(folder):
    """Return the path of the first of TOKENIZER_FILES in a folder, or raise FileNotFoundError."""
    for names in TOKENIZER_FILES:
        if all((folder / name).is_file() for name in names):
            return folder / names[0]
    wanted = ", ".join(" with ".join(names) for names in TOKENIZER_FILES)
    raise FileNotFoundError(f"{folder}: no token table in this folder (looked for {wanted})")


def find_eot(tokens):
    """Return the id of the token named <|endoftext|>, or None."""
    name = EOT_TEXT.encode()
    return tokens.index(name) if name in tokens else None


def read_bin_tokenizer(path):
    """Return tokens and end-of-text id of a tokenizer .bin; version 1 has no field for the id."""
    _, version, n_tokens, eot, *_ = read_header(path, TOKENIZER_MAGIC, (1, 2))
    data = path.read_bytes()
    tokens, end = [], HEADER_BYTES
    while end < len(data):
        start, end = end + 1, end + 1 + data[end]
        tokens.append(data[start:end])
    if len(tokens) != n_tokens or end != len(data):
        raise ValueError(
            f"{path}: header counts {n_tokens} tokens, found {len(tokens)}"
            f"{', the last cut short' if end > len(data) else ''}: the file is damaged"
        )
    if version == 1:
        return tokens, find_eot(tokens)
    return tokens, None if eot == -1 else eot


def bytes_to_unicode() -> dict[int, str]:
    """Return {byte: character}: the alphabet in which GPT-2's JSON writes the bytes of a token.

    The printable characters of Latin-1 stand for their own byte; the other 68 bytes, in order,
    are the characters from U+0100 on, so that a space is "Ġ" and a newline "Ċ". The dict is in
    the order of GPT-2's ids 0 to 255 ("!" is 0). Source: `encoder.py` of openai/gpt-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


UNICODE_TO_BYTE = {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(path, text):
    """Return the bytes of a token that a JSON file writes as `text`; " the" is "Ġthe" there."""
    try:
        return bytes([UNICODE_TO_BYTE[character] for character in text])
    except KeyError:
        raise ValueError(f"{path}: token {shown(text)} is not in GPT-2's byte alphabet") from None


def read_json(path):
    """Return the object (a dict) that a JSON file holds; any other content is a ValueError."""
    return parse_json(path, Path(path).read_bytes())


def parse_json(path, text):
    """Return the object (a dict) that `text`, bytes in the file `path`, holds; see `read_json`."""
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8: {error}") from None
    if type(data) is not dict:
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def read_json_tokenizer(path):
    """Return tokens and merges of a tokenizer.json, or of a vocabulary and the merges beside it."""
    data = read_json(path)
    if type(data.get("model")) is dict:
        vocab, merges, added = parse_hugging_face(path, data)
    else:
        vocab, merges, added = data, read_merges(path), {}
    ids = {token_bytes(path, text): id for text, id in vocab.items() if text not in added}
    ids |= {text.encode("utf-8", "replace"): id for text, id in added.items()}
    tokens = [None] * len(ids)
    for token, id in ids.items():
        if type(id) is not int or not 0 <= id < len(ids) or tokens[id] is not None:
            raise ValueError(
                f"{path}: token {token[:40]} has id {shown(id)}, but {len(ids)} tokens must "
                f"have the ids 0 to {len(ids) - 1}, each once"
            )
        tokens[id] = token
    return tokens, [tuple(token_bytes(path, part) for part in pair) for pair in merges]


def read_merges(vocab_path):
    """Return the merges, pairs of str, in the text file that belongs beside a vocabulary."""
    path = vocab_path.with_name(dict(TOKENIZER_FILES[1:3]).get(vocab_path.name, "merges.txt"))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found, and {vocab_path.name} needs it") from None
    except ValueError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from None
    first = 1 if lines[0].startswith("#version") else 0
    return parse_merges(path, [line for line in lines[first:] if line])


def parse_merges(path, merges):
    """Return pairs of str from merges written as "a b" or as ["a", "b"]."""
    if type(merges) is not list:
        raise ValueError(f"{path}: merges are a {type(merges).__name__}, expected a list")
    pairs = [merge.split(" ") if type(merge) is str else merge for merge in merges]
    for pair in pairs:
        if type(pair) is not list or [type(part) for part in pair] != [str, str]:
            raise ValueError(f"{path}: merge {shown(pair)} is not a pair of tokens")
    return pairs


def parse_hugging_face(path, data):
    """Return vocab {text: id}, merges, and added tokens {text: id} of a tokenizer.json's content.

    Raises ValueError for a setting under which Hugging Face would give other ids than GPT-2's way.
    """
    model, vocab = data["model"], data["model"].get("vocab")
    split = data.get("pre_tokenizer") if type(data.get("pre_tokenizer")) is dict else {}
    after = data.get("post_processor") if type(data.get("post_processor")) is dict else {}
    settings = {
        "model.type": (model.get("type", "BPE"), "BPE"),
        "normalizer": (data.get("normalizer"), None),
        "pre_tokenizer.type": (split.get("type"), "ByteLevel"),
        "pre_tokenizer.add_prefix_space": (split.get("add_prefix_space", False), False),
        "pre_tokenizer.use_regex": (split.get("use_regex", True), True),
        "post_processor.type": (after.get("type", "ByteLevel"), "ByteLevel"),
    }
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        settings[f"model.{name}"] = (model.get(name) or None, None)
    for name, (found, expected) in settings.items():
        if found != expected:
            raise ValueError(
                f"{path}: {name} is {shown(found)}, but GPT-2's tokenizer has {expected}: "
                "this is another kind of tokenizer"
            )
    added = data.get("added_tokens") or []
    try:
        added = {token["content"]: token["id"] for token in added}
        good = type(vocab) is dict and all(type(text) is str for text in added)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path}: model.vocab or added_tokens is missing or malformed")
    return vocab, parse_merges(path, model.get("merges")), added


def check_token_table(path, tokens, eot):
    """Raise ValueError unless a table can encode any text, by merging in the order of its ids."""
    ids = {token: id for id, token in enumerate(tokens)}
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise ValueError(f"{path}: no token for byte {missing[0]} ({len(missing)} of 256 missing)")
    for id, token in enumerate(tokens):
        if ids[token] != id:
            raise ValueError(f"{path}: {token[:40]} is both token {id} and token {ids[token]}")
        if not 0 < len(token) < 256:
            raise ValueError(f"{path}: token {id} has {len(token)} bytes, must have 1 to 255")
    if eot is not None and not 0 <= eot < len(tokens):
        raise ValueError(f"{path}: end-of-text id {eot} is not one of {len(tokens)} tokens")
    misplaced = find_misplaced(ids, eot)
    if misplaced is not None:
        raise ValueError(
            f"{path}: token {ids[misplaced]} {misplaced} comes before its parts: encoding "
            "merges in the order of the ids, and here that is not the order of the merges"
        )


def find_misplaced(ids, eot):
    """Return the first token of {token: id} that cannot be merged from two lower ids, or None.

    A token that no two others join to is not misplaced: it was added, and text never merges to it.
    """
    for token, id in ids.items():
        cuts = range(len(token) - 1, 0, -1)
        for cut in cuts:
            if ids.get(token[:cut], id) < id > ids.get(token[cut:], id):
                break
        else:
            joins = any(token[:cut] in ids and token[cut:] in ids for cut in cuts)
            if joins and id != eot:
                return token
    return None


def recover_merges(tokens, eot):
    """Return the list of merges, pairs of bytes, that a token table stands for, in order of id.

    The merge that made a token is what is left of its bytes when all earlier merges are done:
    with "h" "e" "t" "he" before it, "the" was made from "t" and "he". Skips added tokens.
    """
    ids = {token: id for id, token in enumerate(tokens)}
    merges = []
    for id, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        pairs = [ids.get(left + right, id) for left, right in itertools.pairwise(parts)]
        while len(parts) > 2 and (lowest := min(pairs)) < id:
            at = pairs.index(lowest)
            parts[at : at + 2] = [tokens[lowest]]
            del pairs[at]
            for i in range(max(at - 1, 0), min(at + 1, len(pairs))):
                pairs[i] = ids.get(parts[i] + parts[i + 1], id)
        if len(parts) == 2 and id != eot:
            merges.append(tuple(parts))
    return merges


def check_merges(path, merges, recovered):
    """Raise ValueError unless a file's merges are those that `recover_merges` gives."""
    if merges == recovered:
        return
    pairs = itertools.zip_longest(merges, recovered, fillvalue="nothing")
    at, (found, expected) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"{path}: merge {at} is {found}, but by the order of its ids it would be {expected}: "
        "encoding by the ids would differ, so this tokenizer cannot be used"
    )


# ----------------------------------------------------------------------------------------------
# Other people's checkpoints: what their readers share. A reader checks names, shapes and sizes,
# then gives a Config and a function `get(name) -> array` that reads one tensor, here (out, in),
# from the disk when it is asked for, so that a model of any size is converted in little memory.

FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class DamagedFile(ValueError):
    """A file that contradicts its own format, length or checksum; `path` says which."""

    def __init__(self, path, what):
        super().__init__(f"{path}: {what}")
        self.path = Path(path)


def check_tensors(path, wanted, found):
    """Raise ValueError, naming the tensor, unless `found` {name: entry} is what is wanted.

    `wanted` is an iterable of (name, shape); an entry has a `shape` and a `dtype`.
    """
    names = set()
    for name, shape in wanted:
        if name not in found:
            raise ValueError(f"{path}: tensor {name} is missing")
        entry = found[name]
        if entry.shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {entry.shape}, expected {shape}")
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name} has dtype {shown(entry.dtype)}, can read only "
                f"{', '.join(FLOATS)}"
            )
        names.add(name)
    extra = sorted(set(found) - names)
    if extra:
        raise ValueError(f"{path}: not a GPT-2 of this size: unexpected tensor {shown(extra[0])}")


def read_tensor(entry):
    """Return the array of an entry as it lies in its file, F32 as it is and the rest as float32."""
    dtype = np.dtype(FLOATS[entry.dtype])
    with open(entry.path, "rb") as file:
        values = np.fromfile(file, dtype, math.prod(entry.shape), offset=entry.offset)
    if values.size != math.prod(entry.shape):
        raise DamagedFile(entry.path, f"ends within the {entry.size} bytes at {entry.offset}")
    values = bf16_to_float32(values) if entry.dtype == "BF16" else values.astype("<f4", copy=False)
    return values.reshape(entry.shape)


# ----------------------------------------------------------------------------------------------
# CRC32C, which guards TensorFlow's files. A CRC is the remainder of the message, read as one long
# polynomial over GF(2), after division by P. Now x^290 + x^136 + x^113 + x^107 + x^32 + 1 is a
# multiple of P, and so are its square x^580 + x^272 + ... + 1 and every further square. Modulo P
# a leading part of the message may therefore be struck out and added (XOR) at five places further
# on: whole arrays at once. The 290 bytes that remain are looked up bit by bit in a table of x^i.

CRC_POLYNOMIAL = 0x82F63B78  # P, Castagnoli's; bit 31 is the coefficient of x^0
CRC_SPAN = 290
CRC_STEPS = tuple(CRC_SPAN - exponent for exponent in (136, 113, 107, 32, 0))


@functools.cache
def crc_table():
    """Return x^i modulo P for i = 8 CRC_SPAN - 1, ..., 1, 0 (uint32)."""
    powers = [1 << 31]
    while len(powers) < 8 * CRC_SPAN:
        last = powers[-1]
        powers.append(last >> 1 ^ (CRC_POLYNOMIAL if last & 1 else 0))
    return np.array(powers[::-1], "<u4")


def crc_remainder(message):
    """Return the message (uint8, overwritten) modulo P as four bytes."""
    while len(message) > CRC_SPAN:
        scale = 1 << ((len(message) - 1) // CRC_SPAN).bit_length() - 1
        n = min(len(message) - scale * CRC_SPAN, scale * CRC_STEPS[0])
        for step in CRC_STEPS:
            message[scale * step :][:n] ^= message[:n]
        message = message[n:]
    bits = np.unpackbits(message, bitorder="little").view(bool)
    terms = crc_table()[-len(bits) :][bits]
    return np.bitwise_xor.reduce(terms, keepdims=True).view(np.uint8)


def crc32c(data: Buffer) -> int:
    """Return the CRC32C (RFC 3720, appendix B.4) of bytes or a contiguous array, as an int."""
    data = np.frombuffer(data, np.uint8)
    register = np.full(4, 255, np.uint8)
    for start in range(0, len(data), 1 << 20):
        message = np.append(data[start : start + (1 << 20)], np.zeros(4, np.uint8))
        message[:4] ^= register
        register = crc_remainder(message)
    return int(register.view("<u4")[0]) ^ 0xFFFFFFFF


def masked_crc32c(data):
    """Return the CRC32C as LevelDB and TensorFlow store it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ----------------------------------------------------------------------------------------------
# TensorFlow checkpoints (V2 bundles): an index, which is a LevelDB table of protobuf messages
# (https://github.com/google/leveldb/blob/main/doc/table_format.md, TensorFlow's
# tensor_bundle.proto), and a data file with the bytes of the tensors

TABLE_MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_BYTES = 48
LONGEST_KEY = 256  # keeps the keys of a hostile file, each built from the last, in proportion


def read_varint(data, at):
    """Return the varint at data[at] (seven bits a byte, low ones first) and the position after."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError(f"the number at byte {at} does not end")


def read_varints(data, n):
    """Return the first n varints of data."""
    values, at = [], 0
    for _ in range(n):
        value, at = read_varint(data, at)
        values.append(value)
    return values


def read_block(data, offset, size):
    """Return the contents of a block of a LevelDB table, its CRC verified."""
    end = offset + size
    if end + 5 > len(data) - FOOTER_BYTES:
        raise ValueError(f"a block of {size} bytes at {offset} does not fit in {len(data)} bytes")
    kind, crc = data[end], int.from_bytes(data[end + 1 : end + 5], "little")
    if masked_crc32c(data[offset : end + 1]) != crc:
        raise ValueError(f"wrong CRC of the block at byte {offset}")
    if kind != 0:
        name = "snappy" if kind == 1 else f"method {kind}"
        raise ValueError(f"the block at byte {offset} is compressed ({name}), cannot be read here")
    return data[offset:end]


def block_entries(block):
    """Yield (key, value) of a block; a key is stored as what differs from the one before."""
    n_restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * n_restarts
    if end < 0:
        raise ValueError(f"a block of {len(block)} bytes cannot hold {n_restarts} restarts")
    key, at = b"", 0
    while at < end:
        n_shared, at = read_varint(block, at)
        n_new, at = read_varint(block, at)
        n_value, at = read_varint(block, at)
        middle, stop = at + n_new, at + n_new + n_value
        if n_shared > len(key) or n_shared + n_new > LONGEST_KEY or stop > end:
            raise ValueError("an entry of a block does not fit")
        key, value, at = key[:n_shared] + block[at:middle], block[middle:stop], stop
        yield key, value


def read_table(data):
    """Return {key: value} of a LevelDB table; raises ValueError if anything in it is wrong."""
    if len(data) < FOOTER_BYTES or data[-8:] != TABLE_MAGIC:
        raise ValueError(f"{len(data)} bytes that do not end as an index of TensorFlow's does")
    meta_offset, meta_size, *index = read_varints(data[-FOOTER_BYTES:], 4)
    read_block(data, meta_offset, meta_size)  # empty, but its CRC should be right
    entries, end, last = {}, 0, None
    for _, handle in block_entries(read_block(data, *index)):
        offset, size = read_varints(handle, 2)
        if offset < end:
            raise ValueError(f"the block at byte {offset} overlaps the one before")
        end = offset + size
        for key, value in block_entries(read_block(data, offset, size)):
            if last is not None and key <= last:
                raise ValueError(f"key {key!r} follows {last!r}, expected rising keys")
            entries[key] = value
            last = key
    return entries


def protobuf_fields(data):
    """Yield (field number, value) of a protobuf message: an int, or the bytes of anything else."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        kind, size = tag & 7, 0
        if kind == 0:
            value, at = read_varint(data, at)
        elif kind == 2:
            size, at = read_varint(data, at)
            value = data[at : at + size]
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = int.from_bytes(data[at : at + size], "little")
        else:
            raise ValueError(f"protobuf field of unknown kind {kind}")
        at += size
        if at > len(data):
            raise ValueError("a protobuf field does not fit its message")
        yield tag >> 3, value


def protobuf_message(data, defaults):
    """Return a copy of `defaults` {field number: value} with the values that the message holds."""
    message = dict(defaults)
    for number, value in protobuf_fields(data):
        if number in message:
            if type(value) is not type(defaults[number]):
                raise ValueError(f"protobuf field {number} is of the wrong kind")
            message[number] = value
    return message


def bundle_entry(data_path, message):
    """Return the entry (dtype, shape, offset, size, crc) of a BundleEntryProto."""
    fields = protobuf_message(message, {1: 0, 2: b"", 3: 0, 4: 0, 5: 0, 6: 0})
    dims = [dim for number, dim in protobuf_fields(fields[2]) if number == 2]
    if fields[3] or len(dims) > 8 or not all(isinstance(dim, bytes) for dim in dims):
        raise ValueError(f"an entry of {len(dims)} dimensions in shard {fields[3]}")
    return SimpleNamespace(
        path=data_path,
        dtype="F32" if fields[1] == 1 else f"{fields[1]} (TensorFlow's numbering; F32 is 1)",
        shape=tuple(protobuf_message(dim, {1: 0})[1] for dim in dims),
        offset=fields[4],
        size=fields[5],
        crc=fields[6],
    )


def read_bundle(index_path):
    """Return {name: entry} of a TensorFlow V2 bundle, whose data file has the size they need.

    Raises FileNotFoundError, or DamagedFile for the index or the data file.
    """
    data_path = index_path.with_name(f"{index_path.name[: -len('.index')]}.data-00000-of-00001")
    try:
        table = read_table(index_path.read_bytes())
        header = protobuf_message(table.pop(b"", b""), {1: 0, 2: 0})
        if header != {1: 1, 2: 0}:
            raise ValueError(
                f"a bundle of {header[1]} shards, endianness {header[2]}; can read only 1 and 0"
            )
        entries = {
            name.decode("utf-8"): bundle_entry(data_path, message)
            for name, message in table.items()
        }
    except ValueError as error:
        raise DamagedFile(index_path, error) from None
    check_bundle_size(index_path, data_path, entries)
    return entries


def check_bundle_size(index_path, data_path, entries):
    """Raise DamagedFile unless the tensors lie one after another and fill the data file."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < end:
            raise DamagedFile(index_path, f"tensor {shown(name)} overlaps the one before")
        if entry.dtype == "F32" and entry.size != 4 * math.prod(entry.shape):
            found = f"{entry.size} bytes for {entry.shape}"
            raise DamagedFile(index_path, f"tensor {shown(name)}: {found}")
        end = entry.offset + entry.size
    found = data_path.stat().st_size
    if found != end:
        raise DamagedFile(data_path, f"{found} bytes, but the index describes {end}")


def open_openai(folder):
    """Return (config, get) of a folder in OpenAI's layout: `hparams.json` and a bundle.

    A weight is (1, in, out) there. Raises FileNotFoundError, or ValueError that names the file
    and the tensor; `get` verifies the tensor's CRC.
    """
    config = read_hparams(folder / "hparams.json")
    index_path = find_index(folder)
    entries = read_bundle(index_path)
    is_linear = re.compile(r"model/h\d+/.*/w").fullmatch
    stored = ((n, (1, *shape[::-1]) if is_linear(n) else shape) for n, shape in tensors(config))
    check_tensors(index_path, stored, entries)

    def get(name):
        entry = entries[name]
        array = read_tensor(entry)
        if masked_crc32c(array) != entry.crc:
            raise DamagedFile(entry.path, f"wrong CRC of tensor {name}")
        return array[0].T if is_linear(name) else array

    return config, get


def read_hparams(path):
    """Return the Config in OpenAI's `hparams.json`; raises DamagedFile if it does not hold one."""
    hparams = read_json(path)
    names = [field.name for field in fields(Config)]
    missing = [name for name in names if name not in hparams]
    if missing:
        raise DamagedFile(path, f"{missing[0]} is missing")
    try:
        return Config(**{name: hparams[name] for name in names})
    except ValueError as error:
        raise DamagedFile(path, error) from None


def find_index(folder):
    """Return the path of `model.ckpt.index`, or of the only other index in the folder."""
    path = folder / "model.ckpt.index"
    others = sorted(folder.glob("*.index"))
    return others[0] if len(others) == 1 and not path.exists() else path


# ----------------------------------------------------------------------------------------------
# Hugging Face folders: `config.json`, and tensors in safetensors files
# (https://huggingface.co/docs/safetensors): a header length, a header in JSON, then raw bytes

HF_SETTINGS = {  # in `config.json`: what GPT-2 is, the first value being that of a missing key
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
HF_SHARD = re.compile(r"[\w-][\w.-]{,99}\.safetensors", re.ASCII)  # a file name, never a path
HF_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, not a parameter


def hf_name(name):
    """Return Hugging Face's name: model/h3/ln_1/g is h.3.ln_1.weight, model/wte is wte.weight."""
    path = re.sub(r"^model/h(\d+)/", r"model/h/\1/", name).split("/")[1:]
    leaf = {"w": "weight", "g": "weight", "b": "bias"}
    last = [leaf[path[-1]]] if path[-1] in leaf else [path[-1], "weight"]
    return ".".join(path[:-1] + last)


def hf_shape(name, shape):
    """Return the shape at Hugging Face: a linear layer's weight is (in, out) there."""
    return shape[::-1] if name.endswith("/w") else shape


def read_safetensors(path):
    """Return {name: entry} of a safetensors file.

    Raises FileNotFoundError, or DamagedFile unless the tensors fill the file, none over another.
    """
    n_bytes = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > n_bytes - 8:
            raise DamagedFile(path, f"a header of {n_header} bytes in a file of {n_bytes}")
        header = parse_json(path, file.read(n_header))
    header.pop("__metadata__", None)
    end = 8 + n_header
    entries = {name: safetensors_entry(path, name, info, end) for name, info in header.items()}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            found = f"begins at byte {entry.offset}, expected {end}"
            raise DamagedFile(path, f"tensor {shown(name)} {found}")
        end += entry.size
    if end != n_bytes:
        raise DamagedFile(path, f"{n_bytes} bytes, but its header describes {end}")
    return entries


def safetensors_entry(path, name, info, data_start):
    """Return the entry (dtype, shape, offset, size) that a safetensors header describes."""
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        dtype, shape, start, end = None, (), 0, 0
    numbers, what = (*shape, start, end), f"tensor {shown(name)}"
    if not isinstance(dtype, str) or len(shape) > 8 or not all(type(n) is int for n in numbers):
        raise DamagedFile(path, f"{what} has no proper dtype, shape and data_offsets")
    if not all(0 <= n < 2**63 for n in numbers) or end < start:
        raise DamagedFile(path, f"{what}: " + shown(f"shape {shape}, bytes {start} to {end}"))
    if dtype in FLOATS and end - start != math.prod(shape) * np.dtype(FLOATS[dtype]).itemsize:
        raise DamagedFile(path, f"{what}: {end - start} bytes for {shape} in {dtype}")
    return SimpleNamespace(
        path=path, dtype=dtype, shape=shape, offset=data_start + start, size=end - start
    )


def hf_tensors(folder):
    """Return {name: entry} of all safetensors files of a model, names without `transformer.`."""
    paths = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not paths[0].exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(shard, str) and HF_SHARD.fullmatch(shard) for shard in shards.values()
        ):
            raise DamagedFile(index, "no weight_map that names safetensors files beside it")
        paths = [folder / shard for shard in sorted(set(shards.values()))]
    entries = {}
    for path in paths:
        for name, entry in read_safetensors(path).items():
            short = name.removeprefix("transformer.")
            if short in entries:
                raise ValueError(f"{path}: tensor {shown(name)} is there twice")
            if not HF_BUFFER.fullmatch(short):
                entries[short] = entry
    return entries


def open_hf(folder):
    """Return (config, get) of a Hugging Face GPT-2; F16 and BF16 are read as float32.

    Raises FileNotFoundError, or ValueError if the config is not a GPT-2's or the tensors are not
    those it asks for.
    """
    config = read_hf_config(folder / "config.json")
    entries = hf_tensors(folder)
    head = entries.pop("lm_head.weight", None)
    wanted = ((hf_name(name), hf_shape(name, shape)) for name, shape in tensors(config))
    check_tensors(folder, wanted, entries)
    if head is not None:
        check_tensors(
            folder, [("lm_head.weight", entries["wte.weight"].shape)], {"lm_head.weight": head}
        )
        same = np.array_equal(*(read_tensor(e).view("<u4") for e in (head, entries["wte.weight"])))
        if not same:
            raise ValueError(f"{folder}: lm_head.weight differs from wte.weight: an untied head")

    def get(name):
        array = read_tensor(entries[hf_name(name)])
        return array.T if name.endswith("/w") else array

    return config, get


def read_hf_config(path):
    """Return the Config in a `config.json`; a missing key has the default of GPT2Config.

    Raises DamagedFile, or ValueError naming the first setting that GPT-2 does not have.
    `reorder_and_upcast_attn` is not among them: it only computes attention more precisely.
    """
    found = read_json(path)
    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    default = {
        field.name: found.get(names.get(field.name, field.name), field.default)
        for field in fields(Config)
    }
    try:
        config = Config(**default)
    except ValueError as error:
        raise DamagedFile(path, error) from None
    for name, values in {**HF_SETTINGS, "n_inner": (None, 4 * config.n_embd)}.items():
        value = found.get(name, values[0])
        if value not in values:
            expected = " or ".join(map(repr, values))
            found = shown(repr(value) if isinstance(value, str) else value)
            raise ValueError(f"{path}: {name} = {found}, GPT-2 as written here has {expected}")
    return config


def write_safetensors(file, config, get):
    """Write the tensors as Hugging Face's GPT2LMHeadModel saves them, in float32."""
    names = {f"transformer.{hf_name(name)}": (name, shape) for name, shape in tensors(config)}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, (name, shape) in sorted(names.items()):
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": hf_shape(name, shape), "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, (name, shape) in sorted(names.items()):
        array = get(name)
        write_array(file, array.T if name.endswith("/w") else array, hf_shape(name, shape))


# ----------------------------------------------------------------------------------------------
# Converting one format into another


def note(message):
    """Tell the user something, on standard error."""
    print(message, file=sys.stderr, flush=True)


def open_bin(path):
    """Return (config, get) of a model .bin file; raises as `load_params` does.

    Not by `load_params`: pages of a memory map, once read, count as memory in use.
    """
    config, rows, dtype = read_model_header(path)
    kind = "BF16" if dtype == np.uint16 else "F32"
    entries, end = {}, HEADER_BYTES
    for name, shape in tensors(config):
        size = dtype.itemsize * math.prod(shape)
        entries[name] = SimpleNamespace(path=path, dtype=kind, shape=shape, offset=end, size=size)
        end += size
        if name == "model/wte":
            end += dtype.itemsize * (rows - config.n_vocab) * config.n_embd
    return config, lambda name: read_tensor(entries[name])


def open_model(source):
    """Return (config, get, kind) of a model in any format that we read.

    Raises FileNotFoundError, or ValueError saying what was found and what was expected.
    """
    if source.is_file():
        return *open_bin(source), "a model file"
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    names = sorted(path.name for path in source.iterdir())
    if "model.bin" in names:
        return *open_bin(source / "model.bin"), "one of our models"
    if "hparams.json" in names or any(name.endswith(".index") for name in names):
        return *open_openai(source), "a checkpoint in OpenAI's layout"
    if any(name.startswith("model.safetensors") for name in names):
        return *open_hf(source), "a Hugging Face model"
    if "pytorch_model.bin" in names:
        raise ValueError(f"{source}: found pytorch_model.bin; save the model as safetensors first")
    raise ValueError(
        f"{source}: found {', '.join(names[:8]) or 'nothing'}; expected model.bin, OpenAI's "
        "hparams.json and model.ckpt.*, or Hugging Face's config.json and model.safetensors"
    )


def open_tokenizer(source, config):
    """Return (tokens, eot) that lie beside a model, or None, which is noted, as is a short table.

    Raises ValueError if the table is damaged or has more tokens than the model.
    """
    try:
        tokens, eot = load_tokenizer(source)
    except FileNotFoundError:
        note(f"{source}: no tokenizer there; converting the model alone")
        return None
    if len(tokens) > config.n_vocab:
        raise ValueError(f"{source}: {len(tokens)} tokens exceed the model's {config.n_vocab}")
    if len(tokens) < config.n_vocab:
        note(f"{source}: {len(tokens)} tokens, fewer than the model's {config.n_vocab}")
    return tokens, eot


def convert(source, target, to="bin"):
    """Convert a model to a folder of ours (`to="bin"`) or of Hugging Face's (`to="hf"`).

    `source` is a folder in OpenAI's layout, of Hugging Face's or of ours, or a model .bin file.
    Nothing in `target` is replaced before everything in `source` has been read and verified.
    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    source, target = Path(source), Path(target)
    folder = source.parent if source.is_file() else source
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target} is the source itself: give another folder as the target")
    if target.is_file() or target.suffix == ".bin":
        raise ValueError(f"{target} is the name of a file: give a folder as the target")
    config, get, kind = open_model(source)
    note(f"{source}: {kind}, {config}")
    tokenizer = open_tokenizer(folder, config)
    {"bin": save_model_folder, "hf": save_hf_folder}[to](target, config, get, tokenizer)
    note(f"{target}: written")


def refuse_leftovers(folder, written, others):
    """Raise ValueError if a folder has one of `others`, which would not belong to what is written.

    Whoever loaded the folder would read the new model with some old model's file.
    """
    for name in others:
        if name not in written and (folder / name).exists():
            raise ValueError(
                f"{folder / name} would be left from another model: remove it, or give a new folder"
            )


def save_model_folder(folder, config, get, tokenizer):
    """Write `tokenizer.bin` (unless it is None) and `model.bin`, whose rename comes last."""
    refuse_leftovers(folder, ["tokenizer.bin"] if tokenizer else [], ["tokenizer.bin"])
    with atomic_write(folder / "model.bin") as file:
        write_model(file, config, get)
        sync(file)  # the slow part is over: the two files change within a moment
        if tokenizer:
            save_tokenizer(folder / "tokenizer.bin", *tokenizer)


def save_hf_folder(folder, config, get, tokenizer):
    """Write a folder that transformers loads: config, tokenizer (unless it is None), tensors."""
    files = {"config.json": hf_config(config, tokenizer[1] if tokenizer else None)}
    if tokenizer:
        files |= hf_tokenizer(config, *tokenizer)
    refuse_leftovers(folder, files, HF_FILES)
    with atomic_write(folder / "model.safetensors") as file:
        write_safetensors(file, config, get)
        sync(file)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            with atomic_write(folder / name) as small:
                small.write(text.encode("utf-8"))


HF_FILES = (  # what transformers reads in a folder, beside config.json and model.safetensors
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def hf_config(config, eot):
    """Return the content of `config.json`: what transformers needs to know of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.n_vocab,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }


def hf_tokenizer(config, tokens, eot):
    """Return {name: content} of the files from which transformers makes a GPT-2 tokenizer."""
    letters = bytes_to_unicode()
    texts = ["".join(letters[byte] for byte in token) for token in tokens]
    merges = [
        " ".join("".join(letters[byte] for byte in part) for part in pair)
        for pair in recover_merges(tokens, eot)
    ]
    special = None if eot is None else texts[eot]
    return {
        "vocab.json": {text: id for id, text in enumerate(texts)},
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "model_max_length": config.n_ctx,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), special),
        },
    }


# ----------------------------------------------------------------------------------------------
# Downloads. Every file goes to `<file>.part`, beside which `<file>.part.json` keeps what the
# server said of it, so that a later call can ask for the rest; it gets its own name when its
# length and checksums are right. All of it happens in `.download`, one process at a time.

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
MODEL_NAMES = ("124M", "355M", "774M", "1558M")
MODEL_ALIASES = {
    "117M": "124M",
    "345M": "355M",
    "gpt2": "124M",
    "gpt2-medium": "355M",
    "gpt2-large": "774M",
    "gpt2-xl": "1558M",
}
OPENAI_FILES = (
    "encoder.json",
    "vocab.bpe",
    "hparams.json",
    "model.ckpt.index",
    "model.ckpt.data-00000-of-00001",
)
TOKENIZER_SHA256 = {  # the same for every size of model
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
SHA256_124M = {  # from a secondary source: a mismatch is told, and the tensors' CRC decides
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.data-00000-of-00001": (
        "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
    ),
}
TIMEOUTS = (5, 30)  # seconds to connect, and to wait for the next bytes
MOST_FAILURES = 5  # in a row, without a byte of progress
LONGEST_PAUSE = 60  # seconds, however long a busy server asks to wait
SIZE = "[0-9]{1,18}"  # in a header


def resolve_name(name):
    """Return OpenAI's name of a model, `124M` for `gpt2`; raises ValueError if it is not one."""
    if name not in MODEL_NAMES and name not in MODEL_ALIASES:
        known = ", ".join([*MODEL_NAMES, *MODEL_ALIASES])
        raise ValueError(f"unknown model {name!r}, expected one of {known}")
    return MODEL_ALIASES.get(name, name)


def download(name, models_dir=MODELS_DIR, base_url=None, keep=False, pause=time.sleep):
    """Fetch one of OpenAI's models into `models_dir`/<name> and convert it; return that folder.

    A finished model is left alone, an interrupted download goes on. `base_url` (or else
    GPT2_BASE_URL in the environment, or else OpenAI's) is where <name>/encoder.json and the other
    files lie; `keep` keeps them, in the folder `openai`; `pause(seconds)` waits before a retry.
    Raises ValueError for a bad name or file, ConnectionError if the server cannot be reached or
    keeps failing, and another OSError for what it refuses or the disk cannot take.
    """
    name = resolve_name(name)
    base_url = (base_url or os.environ.get("GPT2_BASE_URL") or OPENAI_URL).rstrip("/")
    folder = Path(models_dir) / name
    work = folder / ".download"
    lock = folder.with_name(f".{name}.lock")
    if find_problem(folder) is None and not work.exists() and not lock.exists():
        note(f"{folder}: already downloaded")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_process(lock), remove_if_empty(folder, work):
        problem = find_problem(folder)
        if problem is None:  # another process has done it, or one was stopped while cleaning up
            note(f"{folder}: already downloaded")
        else:
            if isinstance(problem, ValueError):
                note(f"{problem}; downloading the model again")
            fetch_all(f"{base_url}/{name}", work, SHA256_124M if name == "124M" else {}, pause)
            convert_download(work, folder)
            if keep:
                shutil.rmtree(folder / "openai", ignore_errors=True)
                os.replace(work, folder / "openai")
        shutil.rmtree(work, ignore_errors=True)
    return folder


def find_model(name, models_dir=MODELS_DIR):
    """Return the path of a model: `name` itself if it is one, or that model of `models_dir`.

    One of OpenAI's models that is not there yet is downloaded. Raises FileNotFoundError for any
    other name.
    """
    for path in (Path(name), Path(models_dir) / MODEL_ALIASES.get(str(name), name)):
        if path.is_file() or (path / "model.bin").is_file():
            return path
    if name in MODEL_NAMES or name in MODEL_ALIASES:
        return download(name, models_dir)
    raise FileNotFoundError(
        f"no model {name}: there is no such file, no model.bin in such a folder nor in "
        f"{Path(models_dir) / name}, and it is not one of {', '.join(MODEL_NAMES)} to download"
    )


def find_problem(folder):
    """Return None if a folder's model and tokenizer load, else the error that says why not."""
    try:
        load_params(folder / "model.bin")
        load_tokenizer(folder / "tokenizer.bin")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return error
    return None


@contextlib.contextmanager
def remove_if_empty(*folders):
    """Make folders, each in the one before; after an error remove those that are still empty."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in reversed(folders):
                folder.rmdir()
        raise


@contextlib.contextmanager
def only_process(path):
    """Hold the lock of a file, having waited for another process that holds it.

    The operating system frees the lock of a process that dies. The file is removed at the end:
    whoever still waits for it then locks a new one. Where files have no locks, two at once would
    fail their checksums, no worse.
    """
    file = open_locked(path)
    try:
        yield
    finally:
        if os.name == "nt":  # which removes no open file
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def open_locked(path):
    """Return the file of that path, made if need be, open and with its lock ours."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  (it stays open)
        if not try_lock(file):
            note(f"{path}: waiting for another download of this model to end")
            while not try_lock(file):
                time.sleep(0.2)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # whoever had the lock has removed the file


def fetch_all(url, folder, reported_sha256, pause):
    """Fetch OpenAI's files of one model into a folder; those that are there already are good."""
    reached = False
    for name in OPENAI_FILES:
        path = folder / name
        if not path.exists():
            fetch(f"{url}/{name}", path, TOKENIZER_SHA256.get(name), reached, pause)
            reached = True
        expected = reported_sha256.get(name)
        if expected and file_hash(path, "sha256").hexdigest() != expected:
            note(f"{name}: not the file known for this model (sha256); its contents will decide")


def convert_download(work, folder):
    """Convert a downloaded checkpoint; if it is damaged, remove what has to be fetched again."""
    try:
        convert(work, folder)
    except ValueError as error:
        for name in OPENAI_FILES:
            path = work / name
            if "data" not in name or getattr(error, "path", None) == path:
                path.unlink(missing_ok=True)
        raise ValueError(f"{error}; run this again to fetch the damaged file again") from None


def fetch(url, path, sha256=None, reached=False, pause=time.sleep):
    """Download `url` to `path`, going on with an earlier part and trying again after a failure.

    Gives up after MOST_FAILURES in a row that brought nothing, or after 2 if the server was never
    `reached`. Raises as `download` does.
    """
    import requests

    part = path.with_name(f"{path.name}.part")
    best, failures = size_of(part), 0
    while True:
        try:
            return fetch_once(url, path, part, sha256)
        except (requests.RequestException, ConnectionError, TimeoutError, DamagedFile) as error:
            problem = error
        reached = reached or not is_unreachable(problem)
        failures = 1 if size_of(part) > best else failures + 1
        best = max(best, size_of(part))
        reason = shown(str(root_cause(problem)).strip(), 400)
        if failures >= (MOST_FAILURES if reached else 2):
            if isinstance(problem, DamagedFile):
                raise ValueError(f"{url}: {reason}")
            raise ConnectionError(f"{url}: {reason}. {NETWORK_ADVICE}")
        seconds = max(2 ** (failures - 1), getattr(problem, "pause", 0))
        note(f"{path.name}: {reason}; trying again in {seconds} s")
        pause(seconds)


NETWORK_ADVICE = (
    "Run this again to go on from here; or check the network and HTTPS_PROXY, name a mirror with "
    "--base_url or GPT2_BASE_URL, or use a model that you have: python utils.py convert --help"
)


def is_unreachable(error):
    """Return whether an error means that no connection was made, not that one was lost."""
    return bool(error.args) and type(error.args[0]).__name__ == "MaxRetryError"


def root_cause(error):
    """Return the innermost of the exceptions that requests and urllib3 wrap into one another."""
    while True:
        inner = [
            x for x in (getattr(error, "reason", None), *error.args) if isinstance(x, Exception)
        ]
        if not inner:
            return error
        error = inner[0]


def size_of(path):
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def file_hash(path, kind):
    """Return the hash of a file's contents, `kind` being "md5" or "sha256"."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest


def fetch_once(url, path, part, sha256):
    """Make one attempt at `fetch`: the request (unless all is here), the checks, the rename."""
    import requests

    state = read_state(part)
    have = size_of(part) if state else 0
    if not have or have != state["size"]:
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        if have and state["validator"]:
            headers["If-Range"] = state["validator"]  # the rest only if the file is the same
        try:
            answer = requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS)
        except ValueError as error:
            reason = shown(str(error), 400)
            raise ValueError(f"{url}: not an address to download from: {reason}") from None
        with answer:
            check_answer(url, answer, part)
            state = begin_part(answer, part, have, state)
            receive(url, answer, part, state["size"])
    check_hashes(part, state["md5"], sha256)
    os.replace(part, path)
    state_path(part).unlink(missing_ok=True)


def state_path(part):
    """Return the path of the small file that says what a `.part` file is a part of."""
    return part.with_name(f"{part.name}.json")


def read_state(part):
    """Return what the server said of a file when its part was begun, None if that is not known.

    The keys: `size` in bytes, `md5` (base64), `validator` (for If-Range), each None if not said.
    """
    try:
        state = read_json(state_path(part))
    except (OSError, ValueError):
        return None
    kinds = {"size": int, "md5": str, "validator": str}
    good = set(state) == set(kinds) and all(
        state[name] is None or type(state[name]) is kind for name, kind in kinds.items()
    )
    return state if good else None


def check_answer(url, answer, part):
    """Raise ConnectionError for a failure that may pass, OSError or ValueError for another."""
    status = f"HTTP status {answer.status_code} {shown(answer.reason or '')}".strip()
    if answer.status_code == 416:
        part.unlink(missing_ok=True)
        raise ConnectionError(f"{status}: cannot go on, starting over")
    if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
        error = ConnectionError(status)
        error.pause = seconds_to_wait(answer.headers.get("Retry-After", ""))
        raise error
    if answer.status_code not in (200, 206):
        raise OSError(f"{url}: {status}")
    kind = answer.headers.get("Content-Type", "")
    if re.search(r"\b(html|xml)\b", kind.lower()):
        raise ValueError(f"{url}: the server sent a page ({shown(kind)}) instead of the file")
    encoding = answer.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise ValueError(f"{url}: the server sent the file encoded ({shown(encoding)})")


def seconds_to_wait(text):
    """Return the seconds that a Retry-After header asks for, LONGEST_PAUSE at most; 0 if none."""
    from email.utils import parsedate_to_datetime

    text = text.strip()
    if re.fullmatch("[0-9]{1,9}", text):
        seconds = int(text)
    else:
        try:
            seconds = math.ceil(parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError, IndexError, OverflowError, OSError):  # not a date
            return 0
    return min(max(seconds, 0), LONGEST_PAUSE)


def begin_part(answer, part, have, state):
    """Make `part` ready for the bytes of an answer to be appended; return the state of it."""
    if answer.status_code == 206:
        found = re.fullmatch(
            rf"bytes ({SIZE})-{SIZE}/({SIZE}|\*)", answer.headers.get("Content-Range", "").strip()
        )
        as_asked = found and have and int(found[1]) == have
        if not as_asked or found[2] not in ("*", str(state["size"] or "*")):
            part.unlink(missing_ok=True)
            raise ConnectionError("the server sent another part than asked for, starting over")
        return state
    part.unlink(missing_ok=True)
    length, etag = answer.headers.get("Content-Length", ""), answer.headers.get("ETag", "")
    state = {
        "size": int(length) if re.fullmatch(SIZE, length) else None,
        "md5": answer.headers.get("Content-MD5"),
        "validator": etag if etag.startswith('"') else answer.headers.get("Last-Modified"),
    }
    with atomic_write(state_path(part)) as file:
        file.write(json.dumps(state).encode("utf-8"))
    return state


def receive(url, answer, part, size):
    """Append the body of an answer to `part`, showing progress; raise unless `size` is reached."""
    from tqdm import tqdm

    have, units = size_of(part), {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with (
        naming(part),
        open(part, "ab") as file,
        tqdm(desc=part.stem, total=size, initial=have, file=sys.stderr, **units) as bar,
    ):
        for chunk in answer.iter_content(1 << 13):  # an unfinished chunk is lost: small ones
            if file.tell() == 0 and is_page(chunk):
                raise ValueError(f"{url}: the server sent a page instead of the file")
            file.write(chunk)
            bar.update(len(chunk))
        sync(file)
    if size is not None and size_of(part) != size:
        if size_of(part) > size:
            part.unlink()
        raise ConnectionError(f"{size_of(part)} of {size} bytes arrived")


def is_page(chunk):
    """Return whether bytes begin as a page of HTML or XML does."""
    start = chunk[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error", b"<!--"))


def check_hashes(part, md5, sha256):
    """Raise DamagedFile, having removed `part`, unless its hashes are as they should be."""
    if md5 and base64.b64encode(file_hash(part, "md5").digest()).decode() != md5.strip():
        part.unlink()
        raise DamagedFile(part, "what arrived has another MD5 than the server says")
    if sha256 and file_hash(part, "sha256").hexdigest() != sha256:
        part.unlink()
        raise DamagedFile(part, "what arrived has another SHA-256 than OpenAI's file")


# ----------------------------------------------------------------------------------------------
# Commands: what the four programs share


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with errors on one line (exit status 2) and a `--help` like a manual page.

    `examples` are command lines. Paragraphs of the texts are wrapped, indented lines left as they
    are; defaults are shown, but for nothing (None, False, "", []).
    """

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def __init__(self, prog):
            width = min(80, shutil.get_terminal_size().columns)
            super().__init__(prog, max_help_position=26, width=width)

        def _fill_text(self, text, width, indent):
            wrapper = textwrap.TextWrapper(width, indent, indent, break_on_hyphens=False)
            lines = text.splitlines()
            return "\n".join(x if x[:1] in ("", " ") else wrapper.fill(x) for x in lines)

        def _get_help_string(self, action):
            nothing = action.default is None or action.default is False
            nothing = nothing or action.default in ("", [])
            return action.help if nothing else super()._get_help_string(action)

        def _get_default_metavar_for_optional(self, action):
            return METAVARS.get(getattr(action.type, "__name__", None), "TEXT")

    def __init__(self, examples=(), **kwargs):
        parts = ["\n  ".join(["examples:", *examples]), EXIT_STATUS]
        kwargs["epilog"] = "\n\n".join(parts[not examples :])
        super().__init__(formatter_class=self.Formatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


# What stands for a flag's value in --help, by its type.
METAVARS = {"int": "N", "positive_int": "N", "natural": "N", "vocabulary_size": "N"}
METAVARS |= {"float": "X", "number": "X", "str": "NAME", "Path": "PATH"}
EXIT_STATUS = """exit status:
  0 all went well; 1 an error, told in a line on standard error; 2 a bad
  argument; 130 Ctrl-C"""


def positive_int(text):
    """Return the whole number of 1 or more that a flag was given, for argparse's `type=`."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")


def run(main):
    """Call a program's `main` and exit: 0, or 1 with the error on one line, 130 after Ctrl-C."""
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):  # None if closed
        stream.reconfigure(errors="replace")  # a console that lacks a character prints a "?"
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


# ----------------------------------------------------------------------------------------------
# The commands `download` and `convert`


def parse_args():
    """Return the arguments of `python utils.py`."""
    parser = ArgumentParser(
        description="Get GPT-2's weights, and convert them between formats. Each command has "
        "a --help of its own.",
        examples=[
            "python utils.py download 124M",
            "python utils.py convert path/to/gpt2 models/mine",
            "python utils.py convert --help",
        ],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_download(commands)
    add_convert(commands)
    return parser.parse_args()


def add_download(commands):
    """Describe the command `download`."""
    parser = commands.add_parser(
        "download",
        help="fetch one of OpenAI's models and convert it",
        description="Fetch one of OpenAI's models and convert it to models/<name>/model.bin and "
        "tokenizer.bin. A download that was interrupted goes on where it stopped; one that is "
        "done is left alone. Proxies are taken from HTTPS_PROXY and its relatives.",
        examples=[
            "python utils.py download 124M",
            "python utils.py download 355M --models_dir /data/models",
        ],
    )
    add = parser.add_argument
    add("name", choices=[*MODEL_NAMES, *MODEL_ALIASES], metavar="NAME", help=NAME_HELP)
    add("--models_dir", metavar="DIR", type=Path, default=MODELS_DIR, help="the folder of models")
    add(
        "--base_url",
        metavar="URL",
        default=os.environ.get("GPT2_BASE_URL") or OPENAI_URL,
        help="where NAME/encoder.json and the others lie; also set by GPT2_BASE_URL in the "
        "environment",
    )
    add("--keep", action="store_true", help="keep OpenAI's files, in models/<name>/openai")


NAME_HELP = f"{', '.join(MODEL_NAMES)}, or one of the aliases {', '.join(MODEL_ALIASES)}"


def add_convert(commands):
    """Describe the command `convert`."""
    parser = commands.add_parser(
        "convert",
        help="convert a model from or to another format",
        description="Convert a model, and the tokenizer beside it. SOURCE is a folder in OpenAI's "
        "layout (hparams.json, model.ckpt.*), in Hugging Face's (config.json, model.safetensors), "
        "one of our model folders, or a model .bin file. What TARGET holds is replaced only when "
        "the whole of SOURCE has been read and verified.",
        examples=[
            "python utils.py convert path/to/gpt2 models/mine",
            "python utils.py convert models/mine path/to/hf --to hf",
        ],
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="a folder, or a model .bin file")
    add("target", metavar="TARGET", type=Path, help="the folder to write")
    add(
        "--to",
        choices=["bin", "hf"],
        default="bin",
        help="what to write: our model.bin and tokenizer.bin, or what transformers loads",
    )


def main():
    args = parse_args()
    if args.command == "download":
        download(args.name, args.models_dir, args.base_url, args.keep)
    else:
        convert(args.source, args.target, args.to)


if __name__ == "__main__":
    run(main)
