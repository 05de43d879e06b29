"""OpenBLAS: kernels and threads; products and loops that use all cores; memory settings."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


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


def get_threads():
    """Return the number of threads of a matrix product now; 1 if NumPy's BLAS does not tell."""
    get = openblas("get_num_threads")
    return get() if get else 1


def set_threads(n):
    """Give a matrix product n threads, where NumPy's BLAS is OpenBLAS."""
    set_threads = openblas("set_num_threads")
    if set_threads:
        set_threads(n)


@contextlib.contextmanager
def one_thread(then):
    """Give matrix products one thread within the block, and `then` threads after it."""
    set_threads(1)
    try:
        yield
    finally:
        set_threads(then)


def kernels():
    """Return the name of the kernels that NumPy's OpenBLAS uses on this CPU, "SkylakeX" say."""
    corename = openblas("get_corename")
    if corename is None:
        return "unknown"
    corename.restype = ctypes.c_char_p
    return corename().decode()


def has_small_kernels():
    """Tell whether NumPy's BLAS has kernels for small matrices, which read them where they are.

    Those of OpenBLAS for AVX-512 do. The others copy a small matrix first, as they do a large one.
    """
    return kernels() in ("SkylakeX", "Cooperlake", "SapphireRapids")


WORTH_A_THREAD = 1 << 21  # multiplications: fewer are done before it has woken up


def parallel_for(function: Callable[[slice], object], n: int, work: int) -> None:
    """Call function(part) for slices of range(n), in threads if `work`, multiplications, is large.

    At most as many threads as BLAS has for a matrix product, this one among them, each with one
    BLAS thread: for products too small to share, and for what NumPy does on one core.
    """
    n_threads = get_threads()
    n_parts = max(1, min(n_threads, n, work // WORTH_A_THREAD))
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    first, *others = map(slice, bounds, bounds[1:])
    if not others:
        function(first)
        return
    with one_thread(then=n_threads):
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
def tune_malloc():
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
