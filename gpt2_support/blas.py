"""OpenBLAS: its kernels and threads, products and loops that use all cores, memory settings.

Importing this module chooses OpenBLAS's settings, so import it before NumPy where you can.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Callable
    from typing import Any

    from jaxtyping import Float
    from numpy import ndarray

# ----------------------------------------------------------------------------------------------
# Settings


def configure_openblas(cpuinfo: str | Path = "/proc/cpuinfo") -> None:
    """Set what OpenBLAS reads when NumPy loads it: kernels, and how long idle threads spin.

    The user's own settings stay. Idle threads spin for 2**20 cycles (0.4 ms) instead of 2**26,
    because they keep a core from other threads. Zen 5 gets the AVX-512 kernels: OpenBLAS 0.3.31
    does not know it and would use those for AVX2, at half the speed. An empty OPENBLAS_CORETYPE
    leaves the choice to OpenBLAS, which has made it where NumPy is imported already.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    if "OPENBLAS_CORETYPE" in os.environ or "numpy" in sys.modules:
        return
    with contextlib.suppress(OSError, ValueError), open(cpuinfo) as file:
        lines = (line.partition(":") for line in itertools.takewhile(str.strip, file))
        cpu = {name.strip(): value.strip() for name, _, value in lines}
        is_zen_5 = cpu.get("vendor_id") == "AuthenticAMD" and int(cpu.get("cpu family", 0)) >= 26
        needs = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
        if is_zen_5 and needs <= set(cpu.get("flags", "").split()):
            os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"


NUMPY_CAME_FIRST = "numpy" in sys.modules
configure_openblas()

import numpy as np  # noqa: E402


@functools.cache
def tune_malloc() -> None:
    """Keep freed memory in the process, where the C library is glibc.

    Returned memory comes back as fresh pages that the system must zero. That costs a tenth to a
    quarter of a training step, and a third of a first long prompt.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # from malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(arena_max, 1)  # one heap for all threads
        # Before glibc 2.35 the most is 32 MB, and a larger number changes nothing.
        mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, -1)  # never


def trim_memory() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# ----------------------------------------------------------------------------------------------
# OpenBLAS's own functions


@functools.cache
def openblas(function: str, is_internal: bool = False) -> Any:
    """Return a function of NumPy's OpenBLAS, such as "cblas_sgemm"; None for another BLAS.

    The names of its internal functions have no suffix.
    """
    names = [function] if is_internal else [f"scipy_{function}64_", f"{function}64_"]
    numpy = Path(np.__file__).parent
    for path in [*numpy.parent.glob("numpy.libs/*openblas*"), *numpy.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))
        for name in names:
            if hasattr(library, name):
                return getattr(library, name)
    return None


def get_threads() -> int:
    """Return how many threads a matrix product uses now; 1 if NumPy's BLAS does not tell."""
    get = openblas("openblas_get_num_threads")
    return get() if get else 1


def set_threads(n: int) -> None:
    """Give matrix products n threads, where NumPy's BLAS is OpenBLAS."""
    set_num_threads = openblas("openblas_set_num_threads")
    if set_num_threads:
        set_num_threads(n)


def restart_threads() -> None:
    """Let OpenBLAS read its settings again, and end its threads: the next product starts others.

    OpenBLAS itself ends them before each fork.
    """
    read, shutdown = (openblas(f, True) for f in ("openblas_read_env", "blas_thread_shutdown_"))
    if read and shutdown:
        n_threads = get_threads()
        read()
        shutdown()
        set_threads(n_threads)


if NUMPY_CAME_FIRST:
    restart_threads()


class _OneThread:
    """The context manager behind `one_thread`: the first to enter sets, the last to leave resets.

    Threads may enter it at the same time: the number of BLAS threads belongs to the whole process.
    """

    def __init__(self) -> None:
        self.lock, self.n_inside, self.before = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self.lock:
            if self.n_inside == 0:
                self.before = get_threads()
                set_threads(1)
            self.n_inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.n_inside -= 1
            if self.n_inside == 0:
                set_threads(self.before)


_one_thread = _OneThread()


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Give matrix products one thread within a `with` block."""
    return _one_thread


def kernels() -> str:
    """Return the name of the kernels that NumPy's OpenBLAS uses on this CPU, such as "Zen"."""
    corename = openblas("openblas_get_corename")
    if corename is None:
        return "unknown"
    corename.restype = ctypes.c_char_p
    return corename().decode()


def has_small_kernels() -> bool:
    """Tell whether NumPy's BLAS has kernels that read small matrices where they are.

    OpenBLAS's kernels for AVX-512 do. The others first copy every matrix into another order.
    """
    return kernels() in ("SkylakeX", "Cooperlake", "SapphireRapids")


# ----------------------------------------------------------------------------------------------
# Loops and products that use all cores

WORTH_A_THREAD = 1 << 21  # multiplications: fewer are done before another thread has woken up


def parallel_for(function: Callable[[slice], object], n: int, work: int) -> None:
    """Call function(part) for slices of range(n), in threads if `work` is large.

    `work` counts multiplications. There are at most as many threads as BLAS uses for a product,
    the calling one among them, and each has one BLAS thread. NumPy's treatment of floating-point
    errors is the caller's in all of them.
    """
    n_parts = max(1, min(get_threads(), n, work // WORTH_A_THREAD))
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    first, *others = map(slice, bounds, bounds[1:])
    if not others:
        function(first)
        return
    errors, callback = np.geterr(), np.geterrcall()

    def call(part: slice) -> None:
        with np.errstate(**errors, call=callback):  # type: ignore[arg-type]
            function(part)

    with one_thread():
        futures = [thread_pool().submit(call, part) for part in others]
        function(first)
        for future in futures:
            future.result()


@functools.cache
def thread_pool() -> ThreadPoolExecutor:
    """Return threads that wait for work; they start when they are needed first."""
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, "register_at_fork"):  # a forked process has no thread but the one that forked
    os.register_at_fork(after_in_child=thread_pool.cache_clear)

FEW_ROWS = 32
STACK = 1 << 18  # multiplications that OpenBLAS's small kernels do at once, in one thread


def matmul(a: Float[ndarray, "N I"], b: Float[ndarray, "I O"]) -> Float[ndarray, "N O"]:
    """Return a @ b, for 2 to 32 rows of `a` by small kernels where OpenBLAS has them.

    BLAS copies b into another order first, which takes longer than the product itself for few rows
    of `a`. The small kernels do not copy, so they get b a few columns at a time. b is the
    transpose of a contiguous matrix.
    """
    if not 1 < len(a) <= FEW_ROWS or not has_small_kernels():
        return a @ b
    w = b.T
    n = max(1, STACK // a.size)  # rows of w in a small product
    whole = len(w) // n * n
    columns, out = np.ascontiguousarray(a.T), np.empty((len(w), len(a)), a.dtype)
    stack, products = w[:whole].reshape(-1, n, w.shape[1]), out[:whole].reshape(-1, n, len(a))

    def multiply(part: slice) -> None:
        np.matmul(stack[part], columns, out=products[part])

    parallel_for(multiply, len(stack), work=w.size * len(a))
    np.matmul(w[whole:], columns, out=out[whole:])
    return np.ascontiguousarray(out.T)


REALS = {"f": ("s", ctypes.c_float), "d": ("d", ctypes.c_double)}  # by dtype: BLAS's names


def cblas(name: str, *arrays: ndarray) -> tuple[Any, type]:
    """Return OpenBLAS's function for arrays of one dtype, such as "gemm", and the type of a number.

    The function is None if there is none for them.
    """
    dtypes = {array.dtype.char for array in arrays}
    prefix, real = REALS.get(dtypes.pop(), ("", float))
    function = openblas(f"cblas_{prefix}{name}") if prefix and not dtypes else None
    if function is not None:
        function.restype = None
    return function, real


def gemm(out: Float[ndarray, "M O"], a: Float[ndarray, "M N"], b: Float[ndarray, "N O"]) -> bool:
    """Let OpenBLAS do out += a @ b, which NumPy cannot ask for; return False if it cannot.

    As in the gradient of a weight, `a` is the transpose of a contiguous matrix, or some rows of it.
    """
    n_rows, n_columns, n = *out.shape, len(b)
    function, real = cblas("gemm", out, a, b)
    is_transposed = a.strides[0] == a.itemsize and a.strides[1] >= n_rows * a.itemsize
    is_plain = out.flags.carray and is_transposed and b.flags.c_contiguous
    if function is None or not is_plain:
        return False
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    row_major, transposed, plain = 101, 112, 111  # from cblas.h
    function(
        *(row_major, transposed, plain, integer(n_rows), integer(n_columns), integer(n)),
        *(real(1), pointer(a.ctypes.data), integer(a.strides[1] // a.itemsize)),
        *(pointer(b.ctypes.data), integer(n_columns)),
        *(real(1), pointer(out.ctypes.data), integer(n_columns)),
    )
    return True


def axpby(
    a: float, x: Float[ndarray, " N"], b: float, y: Float[ndarray, " N"]
) -> Float[ndarray, " N"]:
    """y <- a x + b y, in place and in one pass where NumPy's BLAS is OpenBLAS; return y."""
    function, real = cblas("axpby", x, y)
    is_plain = x.flags.c_contiguous and y.flags.carray and x.size == y.size
    if function is None or not is_plain:
        y *= b
        y += a * x
        return y
    integer, pointer, one = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64(1)
    function(
        *(integer(x.size), real(a), pointer(x.ctypes.data), one),
        *(real(b), pointer(y.ctypes.data), one),
    )
    return y


def sum_last(x: Float[ndarray, "*N C"], *factors: Float[ndarray, "*N C"]) -> Float[ndarray, "*N 1"]:
    """Sum the product of arrays (..., C) over the last axis -> (..., 1), without the product array.

    einsum does it in one pass, and faster than `sum` does.
    """
    subscripts = ",".join(["...c"] * (1 + len(factors))) + "->..."
    return np.einsum(subscripts, x, *factors)[..., None]


def mean_last(
    x: Float[ndarray, "*N C"], *factors: Float[ndarray, "*N C"]
) -> Float[ndarray, "*N 1"]:
    """Average the product of arrays (..., C) over the last axis -> (..., 1)."""
    return sum_last(x, *factors) / x.shape[-1]


def max_last(x: Float[ndarray, "*N C"]) -> Float[ndarray, "*N 1"]:
    """Return the largest value along the last axis of (..., C) -> (..., 1).

    `max` is slow along short rows. Up to 32 values it works on a copy in columns instead; longer
    rows take argmax.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.shape[-1] <= 32:
        largest = np.ascontiguousarray(rows.T).max(0)
    else:
        largest = rows[np.arange(len(rows)), rows.argmax(-1)]
    return largest.reshape(*x.shape[:-1], 1)


def sum_rows(
    x: Float[ndarray, "N C"], factor: Float[ndarray, "N C"] | None = None
) -> Float[ndarray, " C"]:
    """Sum x (N, C), or x times a factor, over all rows -> (C,)."""
    if factor is None:
        return np.ones(len(x), x.dtype) @ x  # faster than `sum`, and more exact
    return np.einsum("nc,nc->c", x, factor)  # without the product array
