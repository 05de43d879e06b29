"""What every program that is timed shares: it is told a job, does it in a process of its own, and
prints how long it took.

    python ours.py '{"work": "decode", "model": "124M", ...}'

The job is JSON; `work` names one of the program's functions, which prepares everything and returns
a `Task`. Imports and preparation are not timed. With "once" in the job the work is done once and
nothing is printed: then whoever started the process times it all.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

# How everyone trains: AdamW at a constant rate, weights decayed but not biases and gains.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, GRAD_CLIP = 1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0

# nanoGPT's settings for a laptop, shakespeare_char on a CPU: they are given to both sides.
RECIPE = {"lr": 1e-3, "min_lr": 1e-4, "warmup": 100, "beta2": 0.99}


@dataclass
class Task:
    """Something to time."""

    work: Callable  # does it once; may return the seconds that count, where not all of them do
    warm: Callable | None = None  # what is done first, untimed; by default the work itself
    check: Callable = list  # returns what came out, to compare with what it gave the others


def measure(task, seconds, is_cold=False):
    """Return the times of a task: one at least, and more until they sum to `seconds`.

    With `is_cold` the first time is the only one.
    """
    if is_cold:
        seconds = 0
    else:
        (task.warm or task.work)()
    times = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        counted = task.work()
        times.append(time.perf_counter() - start if counted is None else counted)
    return times


earlier_peak = 0  # before `begin_peak`


def begin_peak():
    """Measure the peak of memory anew: other processes were not there when this one had its own."""
    global earlier_peak
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        earlier_peak = read_status("self")["VmHWM:"]
        clear.write_text("5")


def peak_memory():
    """Return the most memory, in bytes, that this process and those that it has started have had.

    The arrays that they share count once. None where nobody counts it.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    status = read_status("self")
    unit = 1 if sys.platform == "darwin" else 1024
    own = status.get("VmHWM:") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = [read_status(child.pid) for child in active_children()]
    private = sum(each.get("VmHWM:", 0) - each.get("RssShmem:", 0) for each in children)
    return max(earlier_peak, own + private)


def read_status(pid):
    """Return {"VmHWM:": bytes, ...} of a process; nothing where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return {line.split()[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


def main(**works):
    """Do the job that the command line tells, with one of the functions {name: function}."""
    job = SimpleNamespace(**{"once": False, "is_cold": False, **json.loads(sys.argv[1])})
    job.folder = Path(job.folder)
    task = works[job.work](job)
    if job.once:
        task.work()
        return
    times, peak = measure(task, job.seconds, job.is_cold), peak_memory()
    print(json.dumps({"seconds": times, "peak_bytes": peak, "check": list(task.check())}))


def prompt_ids(n, n_vocab):
    """Return n ids, scattered over the vocabulary: the same prompt for everyone."""
    return [(i + 1) * 7919 % n_vocab for i in range(n)]


def random_batch(job, n_vocab):
    """Return tokens and targets, (B, T) each, for a training step: the same for everyone."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, n_vocab, (job.B, job.T + 1))
    return tokens[:, :-1], tokens[:, 1:]


def random_text_ids(job, n_vocab):
    """Return n_tokens ids, the same for everyone: those of a text would be no faster."""
    import numpy as np

    return np.random.default_rng(0).integers(0, n_vocab, job.n_tokens).astype(np.uint16)


def after_first(tokens, out):
    """Append tokens, as they come, to the list `out`; return the seconds from the first on."""
    for token in tokens:
        if not out:
            start = time.perf_counter()
        out.append(token)
    return time.perf_counter() - start
