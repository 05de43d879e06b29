"""Worker processes: they share the work and the memory of this one.

Processes, not threads: Python runs one thread at a time between two operations of NumPy.
"""

from __future__ import annotations

import contextlib
import os
import signal
from multiprocessing import current_process, get_context, heap, util
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_support import blas
from gpt2_support.gradients import ProcessEnded, Turns, other_end
from gpt2_support.interrupts import signals_blocked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from numpy import ndarray

    DoJob = Callable[[Any], Any]  # do_job(job) -> result

SPAWN = get_context("spawn")  # a fork has the locks of this process, not the threads that hold them
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # that a terminal or a scheduler sends to all processes
BLAS_THREADS = (  # what the BLAS of a worker reads when it is loaded
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)


class SharedArray:
    """Memory of n values, at first zero, that workers share if they receive it as they start."""

    def __init__(self, n: int, dtype: np.dtype) -> None:
        self.n, self.dtype = n, dtype
        n_bytes = n * dtype.itemsize
        if hasattr(os, "memfd_create"):  # Linux: /dev/shm may be too small, in a container
            fd = os.memfd_create("gpt2")
            util.Finalize(self, os.close, (fd,))
            os.ftruncate(fd, n_bytes)
            self.arena = heap.Arena(n_bytes, fd)
        else:
            self.arena = heap.Arena(n_bytes)

    def array(self) -> ndarray:
        return np.frombuffer(self.arena.buffer, self.dtype, self.n)


class WorkerPool:
    """n processes, this one among them, that each do a job and add to one gradient by turns.

    Every process makes its own do_job = make(*args), once. A worker has one BLAS thread, leaves
    signals to this process and ends with it. Raises ChildProcessError if one does not start.
    """

    def __init__(self, n: int, make: Callable[..., DoJob], *args: Any) -> None:
        self.n, self.do_job = n, make(*args)
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        ring = [SPAWN.Pipe(duplex=False) for _ in range(n)]  # the ends of what leads to process i
        turns = [Turns(i, ring[i][0], ring[(i + 1) % n][1]) for i in range(n)]
        self.turns = turns[0]
        self.stop = util.Finalize(  # also when nobody holds the pool, or the program ends
            self, stop, (self.processes, self.connections, self.turns), exitpriority=1
        )
        try:
            for i in range(1, n):
                self._start(turns[i], make, args)
            self._collect(
                "a process that is to share a batch did not start: the program has to be a file, "
                "its work under `if __name__ == '__main__':`, and what it trains has to be in "
                "modules; or let it use 1 process (--threads 1)"
            )
        except BaseException:
            self.stop()
            raise

    def _start(self, turns: Turns, make: Callable[..., DoJob], args: tuple) -> None:
        if current_process().daemon:
            raise ChildProcessError("a daemonic process cannot have others that share its batch")
        ours, theirs = SPAWN.Pipe()
        self.connections.append(ours)
        arguments = theirs, turns, make, args
        with signals_blocked(*SIGNALS), one_blas_thread(), theirs, contextlib.closing(turns):
            process = SPAWN.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def is_running(self) -> bool:
        return self.stop.still_active()

    def run(self, jobs: list) -> list:
        """Return [do_job(job), ...] for n jobs, one for each process.

        Raises what do_job raises in any of them, and ChildProcessError if a worker has ended. Then
        the pool has stopped.
        """
        try:
            first = None
            for connection, job in zip(self.connections, jobs[1:], strict=True):
                with contextlib.suppress(ConnectionError):  # a worker has ended: see below
                    connection.send(job)
            try:
                with self.turns.taken():
                    first = self.do_job(jobs[0])
            except ProcessEnded:
                self.turns.close()  # so that the others end, too
            results = self._collect(
                "one of the processes that share a batch has ended, killed perhaps because memory "
                "ran out (with a smaller --batch_size, or --threads 1, less is needed)"
            )
        except BaseException:
            self.stop()
            raise
        return [first, *results]

    def _collect(self, reason: str) -> list:
        """Return what each worker sends; raise an error that is among it, or for who has ended."""
        results, has_ended = [], False
        for connection, process in zip(self.connections, self.processes, strict=True):
            try:
                if connection not in wait([connection, process.sentinel]):
                    raise EOFError
                results.append(connection.recv())
            except (EOFError, OSError):
                has_ended = True
        for result in results:
            if isinstance(result, BaseException):
                raise result
        if has_ended:
            raise ChildProcessError(reason)
        return results


def stop(processes: list[BaseProcess], connections: list[Connection], turns: Turns) -> None:
    """End the workers of a pool."""
    turns.close()
    for connection in connections:  # an idle worker ends by that
        connection.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let processes that begin in the block load their BLAS with one thread."""
    before = {name: os.environ.get(name) for name in BLAS_THREADS}
    os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(connection: Connection, turns: Turns, make: Callable[..., DoJob], args: tuple) -> None:
    """Do jobs as they come, in a worker, until another process has ended or a job fails."""
    ignore_signals()
    with blas.one_thread():
        try:
            do_job = make(*args)
            send(connection, None)  # ready
            while True:
                with other_end():
                    job = connection.recv()
                with turns.taken():
                    result = do_job(job)
                send(connection, result)
        except ProcessEnded:
            pass
        except BaseException as error:
            with contextlib.suppress(ProcessEnded):
                send(connection, error)


def send(connection: Connection, result: Any) -> None:
    """Send a result, or an error, to the parent; raises ProcessEnded."""
    try:
        with other_end():
            connection.send(result)
    except ProcessEnded:
        raise
    except Exception as error:  # it cannot be pickled
        connection.send(RuntimeError(f"{result!r} cannot be sent: {error}"))
        raise ProcessEnded from None


def ignore_signals() -> None:
    """Leave to the parent what all processes receive."""
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
