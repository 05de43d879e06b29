"""Disturb our programs at random instants, and see that nothing is ever lost.

    python tests/faults.py --trials 300

Most jobs run in a process of their own, which is killed (SIGKILL) at a random instant, looked at,
and started again, until it ends well. After every kill whatever has its final name must be whole:
the last good file, or the next one. In the end the result must be what an undisturbed run gives,
bit for bit. In the other jobs two writers of one file run at once, or the output of a training run
fails. Prints a line for each job: how many trials there were, how many ended in the midst of
writing a file, and how many lost something.
"""

import argparse
import collections
import contextlib
import ctypes
import itertools
import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import openai_files

import train
from gpt2_support import cli, files, hub, run_folder, runlog, weights
from gpt2_support.distributed import ProcessGroup
from gpt2_support.formats import crc32c, llmc, token_table
from gpt2_support.params import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Config(n_vocab=openai_files.N_VOCAB, n_ctx=1024, n_embd=128, n_head=4, n_layer=4)


def in_process(function, *args):
    """Start a function in a process of its own, that says nothing; return the process."""

    def quietly():
        errors = os.fdopen(os.dup(2), "w")
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        sys.modules["matplotlib"] = None  # slow to import
        tqdm.tqdm.set_lock(threading.RLock())  # the usual one is shared: a kill would leave it held
        try:
            function(*args)
        except Exception:
            traceback.print_exc(file=errors)
            raise

    process = multiprocessing.get_context("fork").Process(target=quietly)
    process.start()
    return process


def write_checkpoint(folder, seed, config=CONFIG):
    """Write a checkpoint in OpenAI's layout, of 4 MB by default."""
    slow, openai_files.masked_crc = openai_files.masked_crc, fast_crc
    try:
        arrays = openai_files.random_arrays(config, seed)
        openai_files.write_checkpoint(folder, config, arrays)
    finally:
        openai_files.masked_crc = slow


def fast_crc(data):
    return crc32c.masked_crc32c(data).to_bytes(4, "little")


def read_files(folder):
    """Return {name: bytes} of all files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def leftovers(folder):
    """Return the files that a kill in the midst of writing has left."""
    return [path for path in folder.rglob("*") if path.suffix in (".tmp", ".part")]


class Train:
    """Training with a checkpoint after every step, resumed after every kill."""

    def __init__(self, folder):
        self.data, self.out, self.last_step = folder / "tokens.bin", folder / "out", 0
        rng = np.random.default_rng(0)
        llmc.save_tokens(self.data, [rng.integers(257, size=3000)], 257)
        tokens = [bytes([byte]) for byte in token_table.bytes_to_unicode()]
        token_table.save_tokenizer(folder / "tokenizer.bin", [*tokens, b"<|endoftext|>"], 256)

    def begin(self):
        shutil.rmtree(self.out, ignore_errors=True)
        self.last_step = 0

    def work(self):
        if (self.out / "state.npz").exists():
            return train.main(["--out", str(self.out), "--resume"])
        flags = (
            f"--data {self.data} --out {self.out} --overwrite --n_layer 3 --n_embd 128 --n_ctx 16 "
            "--batch_size 1 --steps 24 --seed 3 --save_every 1 --eval_every 5 --sample_every 1000"
        )
        return train.main(flags.split())

    def check(self):
        """The last checkpoint is there and loads, and is not older than the one before."""
        if not (self.out / "state.npz").exists():
            assert self.last_step == 0, "the checkpoint is gone"
            return
        run = train.load_checkpoint(self.out)
        assert run.step >= self.last_step, f"step {run.step} after step {self.last_step}"
        self.last_step = run.step
        assert len([*runlog.iterate_log(self.out / "log.csv")]) >= run.step
        for path in self.out.rglob("model.bin"):
            assert llmc.load_params(path).config == run.params.config
        assert run.step == 1 or (self.out / "model.bin").exists(), "model.bin is gone"

    def result(self):
        """What must be equal in the end: all but the times of the steps and of the files."""
        run, files = train.load_checkpoint(self.out), read_files(self.out)
        arrays = (run.params.flat, run.optimizer.m, run.optimizer.v)
        rows = [*runlog.iterate_log(self.out / "log.csv")]
        log = [(row["step"], row["loss"], row["lr"], row["val_loss"]) for row in rows]
        models = {name: data for name, data in files.items() if name.endswith(".bin")}
        kept = (run.step, run.best_loss, run.config, log, sorted(files), models)
        return kept, [array.tobytes() for array in arrays]

    def folder(self):
        return self.out


class Overwrite(Train):
    """A new run that replaces an older one, with another tokenizer, killed before or after that."""

    def __init__(self, folder):
        super().__init__(folder)
        self.old, self.new_seed = folder / "old", 3
        if not self.old.exists():
            in_process(train.main, self.flags(self.old, seed=5)).join()
            tokens, _ = token_table.load_tokenizer(self.old)
            for path in (self.old, self.old / "best"):
                token_table.save_tokenizer(
                    path / "tokenizer.bin", [*tokens[255::-1], tokens[256]], 256
                )
        self.good = read_files(self.old)

    def flags(self, out, seed):
        return (
            f"--data {self.data} --out {out} --overwrite --n_layer 2 --n_embd 128 --n_ctx 16 "
            f"--batch_size 1 --steps 4 --seed {seed} --save_every 1 --eval_every 2 --sample_every 9"
        ).split()

    def begin(self):
        super().begin()
        shutil.copytree(self.old, self.out)

    def is_new(self):
        return train.load_checkpoint(self.out).config.seed == self.new_seed

    def work(self):
        if self.is_new():
            return train.main(["--out", str(self.out), "--resume"])
        return train.main(self.flags(self.out, self.new_seed))

    def check(self):
        """The old run is there as it was, or the new one, with a checkpoint, alone."""
        with run_folder.hold(self.out, ProcessGroup()):  # as the next command does
            pass
        if self.is_new():
            assert (self.out / "tokenizer.bin").read_bytes() != self.good["tokenizer.bin"]
            assert (self.out / "best" / "tokenizer.bin").exists()
            best = self.out / "best" / "model.bin"
            assert not best.exists() or best.read_bytes() != self.good["best/model.bin"]
            super().check()
        else:
            assert self.last_step == 0, "the new run is gone"
            assert read_files(self.out) == self.good, "the old run is not as it was"


class Download:
    """A download from a slow server, and the conversion of what arrived."""

    def __init__(self, folder):
        self.site, self.models = folder / "site" / "124M", folder / "models"
        if not self.site.exists():
            write_checkpoint(self.site, seed=0)
        self.url = None

    @contextlib.contextmanager
    def serving(self):
        """Serve the model from another process, and expect its token files."""
        receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = in_process(self.serve, send)
        self.url, known = receive.recv(), dict(hub.TOKENIZER_SHA256)
        for name in known:
            digest = files.file_hash(self.site / name, "sha256").hexdigest()
            hub.TOKENIZER_SHA256[name] = digest
        try:
            yield
        finally:
            hub.TOKENIZER_SHA256.update(known)
            process.kill()
            process.join()

    def serve(self, send):
        with openai_files.serve(self.site.parent) as server:
            server.delay = 0.002
            send.send(server.url)
            time.sleep(1e6)

    def begin(self):
        shutil.rmtree(self.models, ignore_errors=True)

    def work(self):
        os.environ["NO_PROXY"] = "127.0.0.1"
        hub.download("124M", self.models, self.url)

    def check(self):
        """Every file with its own name is whole; the model, if it is there, loads."""
        work = self.models / "124M" / ".download"
        for name in hub.OPENAI_FILES:
            if (work / name).exists():
                assert (work / name).read_bytes() == (self.site / name).read_bytes(), name
        if (self.models / "124M" / "model.bin").exists():
            assert hub.find_problem(self.models / "124M", "124M") is None

    def result(self):
        return read_files(self.models)

    def folder(self):
        return self.models


class Convert:
    """A conversion over an older model, from each of two models in turn."""

    def __init__(self, folder, to="bin"):
        self.sources = [folder / "one", folder / "two"]
        self.target, self.to, self.goals = folder / f"converted_{to}", to, itertools.cycle((0, 1))
        for seed, source in enumerate(self.sources):
            if not source.exists():
                write_checkpoint(source, seed)
            weights.convert(source, folder / f"good_{to}_{seed}", to)
        self.good = [read_files(folder / f"good_{to}_{seed}") for seed in (0, 1)]
        shutil.copytree(folder / f"good_{to}_1", self.target)

    def begin(self):
        self.goal = next(self.goals)

    def work(self):
        weights.convert(self.sources[self.goal], self.target, self.to)

    def check(self):
        """The target is the old model or the new one, whole."""
        name = {"bin": "model.bin", "hf": "model.safetensors"}[self.to]
        actual = (self.target / name).read_bytes()
        assert actual in [good[name] for good in self.good], "neither the old nor the new model"
        with weights.open_model(self.target) as (config, _, _):
            assert weights.open_tokenizer(self.target, config) is not None

    def result(self):
        return read_files(self.target), self.goal

    def expected(self):
        return self.good[self.goal], self.goal

    def folder(self):
        return self.target


def convert_to_hf(folder):
    return Convert(folder, "hf")


class TwoThreads:
    """Two threads of a process that write one file, and in one of two trials a kill."""

    n_writes = 60

    def __init__(self, folder):
        self.path = folder / "written" / "file"
        self.contents = [bytes([65 + i]) * (300_000 + 7 * i) for i in (0, 1)]

    def write(self, i):
        for _ in range(self.n_writes):
            with files.atomic_write(self.path) as file:
                for start in range(0, len(self.contents[i]), 1 << 16):
                    file.write(self.contents[i][start : start + (1 << 16)])

    def begin(self):
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def start(self):
        """Return the process ids to kill, and the processes that must end well unless killed."""
        process = in_process(self.write_in_threads)
        return [process.pid], [process]

    def write_in_threads(self):
        failed = []
        threading.excepthook = failed.append
        threads = [threading.Thread(target=self.write, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed

    def trial(self, rng):
        """Do it once, and kill in one of two; return whether it came in the midst of a write."""
        pids, processes = self.start()
        end = time.monotonic() + rng.uniform(0, 0.3)
        kills = rng.random() < 0.5
        while any(process.is_alive() for process in processes):
            with contextlib.suppress(FileNotFoundError):
                assert self.path.read_bytes() in self.contents, "a damaged file"
            if kills and time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids.pop(0), signal.SIGKILL)
                kills = False
        n_failed = sum(process.exitcode != 0 for process in processes)
        assert n_failed <= (len(pids) < len(processes)), "a save failed"
        n_midst = len(leftovers(self.path.parent))
        with files.atomic_write(self.path) as file:
            file.write(self.contents[0])
        assert list(self.path.parent.iterdir()) == [self.path], "a leftover stays"
        return n_midst > 0


class TwoNamespaces(TwoThreads):
    """Two processes with the same id, each in a PID namespace, as in two containers on a volume."""

    def start(self):
        receivers, processes = [], []
        for i in (0, 1):
            receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
            processes.append(in_process(in_namespace, self.write, i, send))
            receivers.append(receive)
        return [receive.recv() for receive in receivers], processes


def in_namespace(function, i, send):
    """Call function(i) as the first process of a new PID namespace; send its id out there."""
    enter_namespace()
    pid = os.fork()
    if pid == 0:
        assert os.getpid() == 1
        function(i)
        os._exit(0)
    send.send(pid)
    os._exit(os.waitpid(pid, 0)[1] != 0)


def enter_namespace():
    """Put the children of this process into a new PID namespace, or raise OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000000):  # CLONE_NEWPID
        raise OSError(ctypes.get_errno(), "cannot make a PID namespace")


def has_namespaces():
    """Tell whether this system lets us make PID namespaces."""
    if sys.platform != "linux":
        return False
    process = in_process(enter_namespace)
    process.join()
    return process.exitcode == 0


class FailingOutput(Train):
    """Training whose output and error streams stop working, one after the other, at any instant."""

    def __init__(self, folder):
        super().__init__(folder)
        self.seconds = run_whole(self)
        self.whole = self.result()

    def trial(self, rng):
        """Do it once; return False: it is never cut short."""
        self.begin()
        ends = [os.pipe() for _ in range(2)]
        process = in_process(self.work_with_streams, ends)
        for _, write_end in ends:
            os.close(write_end)
        for read_end, _ in ends:
            close_after(read_end, rng.uniform(0, self.seconds))
        process.join()
        finish(self, process.exitcode, self.whole)
        return False

    def work_with_streams(self, ends):
        for read_end, _ in ends:
            os.close(read_end)
        sys.stdout, sys.stderr = (open(end, "w", encoding="utf-8") for _, end in ends)  # noqa: SIM115
        self.work()
        sys.stdout.flush()
        sys.stderr.flush()


def close_after(read_end, seconds):
    """Read a pipe for so many seconds, or to its end, and close it: writing to it then fails."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([read_end], [], [], left)[0] and not os.read(read_end, 1 << 16):
            break
    os.close(read_end)


JOBS = {
    "train": Train,
    "overwrite": Overwrite,
    "download": Download,
    "convert": Convert,
    "convert to hf": convert_to_hf,
    "two threads": TwoThreads,
    "two namespaces": TwoNamespaces,
    "failing output": FailingOutput,
}


def run_whole(job):
    """Run a job to its end; return the seconds it took."""
    start = time.perf_counter()
    process = in_process(job.work)
    process.join()
    assert process.exitcode == 0, f"{type(job).__name__} failed with {process.exitcode}"
    return time.perf_counter() - start


def kill_often(job, n_kills, rng, counts):
    """Kill a job n_kills times, see that nothing is lost, and that it comes to the same result.

    Adds to counts["amid a write"], the kills that came in the midst of one, to "ended" and "lost".
    """
    job.begin()
    seconds, expected = run_whole(job), job.result()
    n = 0
    job.begin()
    while n < n_kills:
        process = in_process(job.work)
        process.join(rng.uniform(0, 1.1 * seconds))
        is_over = process.exitcode is not None
        process.kill()
        process.join()
        n += not is_over
        with counting_losses(counts, job):
            if is_over:
                finish(job, process.exitcode, expected)
                counts["ended"] += 1
                job.begin()
            else:
                counts["amid a write"] += bool(leftovers(job.folder()))
                job.check()
                assert len(leftovers(job.folder())) <= 3, "what kills leave is never removed"
    with counting_losses(counts, job):
        finish(job, 0 if run_whole(job) else 1, expected)
        counts["ended"] += 1


@contextlib.contextmanager
def counting_losses(counts, job):
    """Count a failed assertion as a loss, show it, and let the job begin anew."""
    try:
        yield
    except AssertionError as error:
        counts["lost"] += 1
        print(f"{type(job).__name__}: {error}")
        job.begin()


def finish(job, exitcode, expected):
    """See that a job ended well, with the expected result and nothing else."""
    assert exitcode == 0, f"{type(job).__name__} failed with {exitcode}"
    expected = job.expected() if hasattr(job, "expected") else expected
    actual = job.result()
    if actual != expected:
        names = [sorted(x) if isinstance(x, dict) else "" for x in (actual, expected)]
        raise AssertionError(f"another result than an undisturbed run's: {names}")
    assert not leftovers(job.folder())


def run_job(name, n_trials, rng, folder):
    """Do `kill_often`, or so many trials, of a job by its name; return what was counted."""
    folder.mkdir(parents=True, exist_ok=True)
    job, counts = JOBS[name](folder), collections.Counter()
    if not hasattr(job, "trial"):
        with job.serving() if hasattr(job, "serving") else contextlib.nullcontext():
            kill_often(job, n_trials, rng, counts)
        return counts
    for _ in range(n_trials):
        with counting_losses(counts, job):
            counts["amid a write"] += job.trial(rng)
            counts["ended"] += 1
    return counts


def main():
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--trials", type=cli.positive_int, default=200, help="trials in all")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS], help="which")
    args = parser.parse_args()
    if "two namespaces" in args.jobs and not has_namespaces():
        print("no two namespaces: this system does not let us make any")
        args.jobs.remove("two namespaces")
    rng, lost = random.Random(args.seed), 0
    print(f"{'job':15}{'trials':>7}{'amid a write':>14}{'ended, equal':>14}{'lost':>6}{'s':>7}")
    for i, name in enumerate(args.jobs):
        n_trials = len(range(i, args.trials, len(args.jobs)))
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            counts = run_job(name, n_trials, rng, Path(folder))
        seconds = time.perf_counter() - start
        figures = f"{counts['amid a write']:14}{counts['ended']:14}{counts['lost']:6}{seconds:7.0f}"
        print(f"{name:15}{n_trials:7}{figures}", flush=True)
        lost += counts["lost"]
    print(f"lost: {lost} of {args.trials}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    cli.run(main)
