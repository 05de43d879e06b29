"""Kill our programs at random instants, and see that nothing is ever lost.

    python tests/faults.py --kills 200

Each job runs in a process of its own, which is killed (SIGKILL) at a random instant, looked at, and
started again, until it ends well. After every kill whatever has its final name must be whole: the
last good file, or the next one. In the end the result must be what an undisturbed run gives, bit
for bit. Prints a line for each job: how many kills there were, and how many came in the midst of
writing a file.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import openai_files

import train
from gpt2_support import cli, files, hub, runlog, weights
from gpt2_support.formats import crc32c, llmc, token_table
from gpt2_support.params import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Config(n_vocab=openai_files.N_VOCAB, n_ctx=1024, n_embd=128, n_head=4, n_layer=4)


def in_process(function, *args):
    """Start a function in a process of its own, that says nothing; return the process."""

    def quietly():
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        sys.modules["matplotlib"] = None  # slow to import
        function(*args)

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
        assert len(runlog.read_log(self.out / "log.csv")) >= run.step
        for path in self.out.rglob("model.bin"):
            assert llmc.load_params(path).config == run.params.config
        assert run.step == 1 or (self.out / "model.bin").exists(), "model.bin is gone"

    def result(self):
        """What must be equal in the end: all but the times of the steps and of the files."""
        run, files = train.load_checkpoint(self.out), read_files(self.out)
        arrays = (run.params.flat, run.optimizer.m, run.optimizer.v)
        rows = runlog.read_log(self.out / "log.csv")
        log = [(row["step"], row["loss"], row["lr"], row["val_loss"]) for row in rows]
        models = {name: data for name, data in files.items() if name.endswith(".bin")}
        kept = (run.step, run.best_loss, run.config, log, sorted(files), models)
        return kept, [array.tobytes() for array in arrays]

    def folder(self):
        return self.out


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
            assert hub.find_problem(self.models / "124M") is None

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


JOBS = {"train": Train, "download": Download, "convert": Convert, "convert to hf": convert_to_hf}


def run_whole(job):
    """Run a job to its end; return the seconds it took."""
    start = time.perf_counter()
    process = in_process(job.work)
    process.join()
    assert process.exitcode == 0, f"{type(job).__name__} failed with {process.exitcode}"
    return time.perf_counter() - start


def kill_often(job, n_kills, rng):
    """Kill a job n_kills times, see that nothing is lost, and that it comes to the same result.

    Returns how many kills came in the midst of a write, and how many times the job ended.
    """
    job.begin()
    seconds, expected = run_whole(job), job.result()
    n_midst = n_ends = n = 0
    job.begin()
    while n < n_kills:
        process = in_process(job.work)
        process.join(rng.uniform(0, 1.1 * seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            n += 1
            n_midst += bool(leftovers(job.folder()))
            job.check()
            assert len(leftovers(job.folder())) <= 3, "what kills leave is never removed"
        else:
            finish(job, process.exitcode, expected)
            n_ends += 1
            job.begin()
    finish(job, 0 if run_whole(job) else 1, expected)
    return n_midst, n_ends + 1


def finish(job, exitcode, expected):
    """See that a job ended well, with the expected result and nothing else."""
    assert exitcode == 0, f"{type(job).__name__} failed with {exitcode}"
    expected = job.expected() if hasattr(job, "expected") else expected
    actual = job.result()
    if actual != expected:
        names = [sorted(x) if isinstance(x, dict) else "" for x in (actual, expected)]
        raise AssertionError(f"another result than an undisturbed run's: {names}")
    assert not leftovers(job.folder())


def run_job(name, n_kills, rng, folder):
    """Do `kill_often` with a job of that name; return what it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    job = JOBS[name](folder)
    with job.serving() if hasattr(job, "serving") else contextlib.nullcontext():
        return kill_often(job, n_kills, rng)


def main():
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--kills", type=cli.positive_int, default=200, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args = parser.parse_args()
    rng, total = random.Random(args.seed), 0
    print(f"{'job':15}{'kills':>7}{'amid a write':>14}{'ended, equal':>14}{'lost':>6}{'s':>7}")
    for i, name in enumerate(JOBS):
        n_kills = len(range(i, args.kills, len(JOBS)))
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            n_midst, n_ends = run_job(name, n_kills, rng, Path(folder))
            seconds = time.perf_counter() - start
        print(f"{name:15}{n_kills:7}{n_midst:14}{n_ends:14}{0:6}{seconds:7.0f}", flush=True)
        total += n_kills
    print(f"{total} kills: the last good file was always there, and every job came to its result")


if __name__ == "__main__":
    cli.run(main)
