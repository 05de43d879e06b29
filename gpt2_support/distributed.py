"""Process groups: one process, or several under MPI, each training on its part of every batch."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2_support import blas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Any

    from numpy import ndarray


def usable_cores() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux, where a job may have a part of a machine
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


class ProcessGroup:
    """The processes that train together; this one is a group of one process.

    All processes call the same methods in the same order, as with torch.distributed.
    """

    rank, size = 0, 1
    n_ranks_here = 1  # on this machine
    n_cores = len(usable_cores())  # this process's part of the machine

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the other processes, too, after an error that they do not meet."""

    def shard(self, n: int) -> slice:
        """Return the slice of n values that belongs to this rank."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def all_reduce(self, array: ndarray) -> None:
        """Replace an array (n,) by the sum of all ranks' arrays, in place."""

    def all_gather(self, value: Any) -> list:
        """Return the values of all ranks, in the order of ranks."""
        return [value]

    def all_gather_into(self, array: ndarray, shard: slice) -> None:
        """Fill an array (n,), of which each rank has computed its shard, with all shards."""

    def broadcast_shards(self, shard: ndarray) -> Iterator[ndarray]:
        """Yield the shards of all ranks, one by one, on every rank."""
        yield shard

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Let rank 0 go through a block before the others do, even if it ends with an error."""
        if self.rank > 0:
            self.all_gather(None)
        try:
            yield
        finally:
            if self.rank == 0:
                self.all_gather(None)

    def check_same(self, **arrays: ndarray) -> None:
        """Raise ValueError if an array is not the same on all ranks."""
        if self.size == 1:
            return
        checksums = self.all_gather([zlib.crc32(array.data) for array in arrays.values()])
        for name, of_ranks in zip(arrays, zip(*checksums, strict=True), strict=True):
            if len(set(of_ranks)) > 1:
                raise ValueError(
                    f"the {name} that the ranks have read are not the same: {of_ranks}"
                )


class MPIProcessGroup(ProcessGroup):
    """The processes that mpiexec has started, on one machine or on many.

    A thread of its own calls MPI, so that the main thread hears Ctrl-C while it waits. Only rank 0
    prints. An error on any rank ends the whole job. Raises ImportError if mpi4py is missing or
    belongs to another MPI than mpiexec.
    """

    PATIENCE = 10  # seconds for all ranks to meet the same error
    BUCKET = 1 << 24  # values of one MPI call: counts have 32 bits, and buffers are as large

    def __init__(self, rank: int, size: int) -> None:
        if rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"{size} ranks need mpi4py: pip install mpi4py ({error})") from None
        self.mpi, self.comm, self.rank, self.size = MPI, MPI.COMM_WORLD, rank, size
        if self.comm.size != size:
            raise ImportError(
                f"mpiexec has started {size} ranks, but mpi4py finds {self.comm.size}: it uses the "
                f"MPI library of another mpiexec: {MPI.Get_library_version()[:30]}"
            )
        self.errors, self.thread = self.comm.Dup(), ThreadPoolExecutor(1)
        self._divide_cores()

    def _divide_cores(self) -> None:
        """Leave BLAS no more than this rank's part of the cores of its machine."""
        here, cores = self.comm.Split_type(self.mpi.COMM_TYPE_SHARED), usable_cores()
        n_together = len(set().union(*here.allgather(cores)))
        self.n_ranks_here = here.size
        self.n_cores = max(1, min(len(cores), n_together // here.size))
        blas.set_threads(min(blas.get_threads(), self.n_cores))

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        try:
            if error_type is not KeyboardInterrupt:
                self.thread.submit(self.errors.Barrier).result(self.PATIENCE)
                return  # all ranks have met an error: each ends as one process would
        except (TimeoutError, self.mpi.Exception):
            program, message = Path(sys.argv[0]).name, " ".join(str(error).split())
            line = f"{program}: error: rank {self.rank}: {message}"
            print(line, file=sys.__stderr__, flush=True)
            time.sleep(0.5)  # until mpiexec has passed it on
        self.comm.Abort(130 if error_type is KeyboardInterrupt else 1)

    def _call(self, function: Callable, *args: Any) -> Any:
        """Return function(*args), called in the thread of MPI."""
        try:
            return self.thread.submit(function, *args).result()
        except self.mpi.Exception as error:
            raise OSError(f"another rank cannot be reached: {error}") from None

    def all_reduce(self, array: ndarray) -> None:
        for start in range(0, array.size, self.BUCKET):
            bucket = array[start : start + self.BUCKET]
            self._call(self.comm.Allreduce, self.mpi.IN_PLACE, bucket)

    def all_gather(self, value: Any) -> list:
        return self._call(self.comm.allgather, value)

    def all_gather_into(self, array: ndarray, shard: slice) -> None:
        sizes = self.all_gather(shard.stop - shard.start)
        self._call(self.comm.Allgatherv, self.mpi.IN_PLACE, [array, sizes])

    def broadcast_shards(self, shard: ndarray) -> Iterator[ndarray]:
        for rank, size in enumerate(self.all_gather(shard.size)):
            theirs = shard if rank == self.rank else np.empty(size, shard.dtype)
            self._call(self.comm.Bcast, theirs, rank)
            yield theirs


LAUNCHERS = (  # the variables that Open MPI, MPICH and its kin, and Slurm set
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
)


def init_process_group() -> ProcessGroup:
    """Return the group that a launcher has made this process a member of, or this process alone."""
    for names in LAUNCHERS:
        rank, size = (int(os.environ.get(name, 0)) for name in names)
        if size > 1 and names[0] in os.environ:
            return MPIProcessGroup(rank, size)
    return ProcessGroup()
