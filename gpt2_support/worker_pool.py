"""Worker processes: they share memory with this one, and the work of a job.

Processes, not threads: Python runs one thread at a time between two operations of NumPy.
"""

from __future__ import annotations

import contextlib
import signal
from multiprocessing import get_context, util
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_support import blas
from gpt2_support.gradients import Turns
from gpt2_support.interrupts import no_interrupts

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from numpy import ndarray

    Work = Callable[[Any], Any]  # work(job) -> result

ALIGNMENT = 64  # bytes of a cache line
SPAWN = get_context("spawn")  # a fork has the locks of this process, not the threads that hold them


class SharedArray:
    """Memory of n values, at first zero, that workers share if they receive it as they start."""

    def __init__(self, n: int, dtype: np.dtype) -> None:
        self.n, self.dtype = n, dtype
        n_bytes = -(-n * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.memory = SPAWN.RawArray("b", n_bytes)

    def array(self) -> ndarray:
        return np.frombuffer(self.memory, self.dtype, self.n)


class WorkerPool:
    """n processes, this one among them, that each do a part of a job and add to one gradient.

    Every process makes its own function of a job, make_work(*args), once. Each has one BLAS thread.
    Workers leave signals to this process, and end with it. Raises ChildProcessError if one ends
    before it is ready.
    """

    def __init__(self, n: int, make_work: Callable[..., Work], *args: Any) -> None:
        self.n, self.work = n, make_work(*args)
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
                ours, theirs = SPAWN.Pipe()
                self.connections.append(ours)
                with no_interrupts(), theirs:
                    process = SPAWN.Process(
                        target=serve, args=(theirs, turns[i], make_work, args), daemon=True
                    )
                    process.start()
                self.processes.append(process)
            for turns_of_worker in turns[1:]:
                turns_of_worker.close()
            self._collect()
        except BaseException:
            self.stop()
            raise

    @property
    def is_running(self) -> bool:
        return self.stop.still_active()

    def run(self, jobs: list) -> list:
        """Return [work(job), ...] for n jobs, one for each process.

        Raises what `work` raises in any of them, and ChildProcessError if a worker has ended. Then
        the pool has stopped.
        """
        try:
            first = None
            try:
                for connection, job in zip(self.connections, jobs[1:], strict=True):
                    connection.send(job)
                with self.turns.taken():
                    first = self.work(jobs[0])
            except (EOFError, ConnectionError):  # a worker has ended
                self.turns.close()  # so that the others end, too
            return [first, *self._collect()]
        except BaseException:
            self.stop()
            raise

    def _collect(self) -> list:
        """Return what each worker sends; raise an error that is among it."""
        results = [receive(connection) for connection in self.connections]
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise next((e for e in errors if not isinstance(e, ChildProcessError)), errors[0])
        return results


def receive(connection: Connection) -> Any:
    """Return what a worker sends, or ChildProcessError if it has ended."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return ChildProcessError(
            "one of the processes that share a batch has ended, killed perhaps because memory ran "
            "out: try again, with a smaller --batch_size or --threads 1"
        )


def stop(processes: list[BaseProcess], connections: list[Connection], turns: Turns) -> None:
    """End the workers of a pool."""
    turns.close()
    for connection in connections:  # an idle worker ends by that
        connection.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def serve(
    connection: Connection, turns: Turns, make_work: Callable[..., Work], args: tuple
) -> None:
    """Do jobs as they come, in a worker, until its parent has ended or a job fails."""
    leave_signals()
    with blas.one_thread(), contextlib.suppress(EOFError, OSError):
        try:
            work = make_work(*args)
            connection.send(None)  # ready
            while True:
                job = connection.recv()
                with turns.taken():
                    result = work(job)
                connection.send(result)
        except (EOFError, OSError):  # another process has ended
            pass
        except BaseException as error:
            connection.send(error)


def leave_signals() -> None:
    """Ignore what a terminal or a scheduler sends to parent and workers alike."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
