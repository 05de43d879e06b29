"""Tests of train.py on several ranks: the same numbers as one process, and no end is a hang.

Those that start ranks skip, with a reason, where there is no MPI to start them with.
"""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train
from gpt2_support.params import Config, Params, n_params

ROOT = Path(train.__file__).parent
TINY = Config(n_vocab=260, n_ctx=8, n_embd=8, n_head=2, n_layer=3)
TEXT = "one fish two fish red fish blue fish\nold fish new fish\n" * 60
FLAGS = (  # what a launcher may want: nothing, or as root and with fewer cores than ranks
    [],
    ["--oversubscribe"],
    ["--allow-run-as-root", "--oversubscribe"],
)


def launch(command, **kwargs):
    """Start a command in a process group of its own, its output in text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **kwargs.pop("env", {})}
    return subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=env, start_new_session=True, **pipes
    )


def finish(process, seconds=400):
    """Wait for a process; if it hangs, end its group and fail."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {seconds} s: {process.communicate()}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def launcher():
    """The words before `-n N` that start ranks here: mpiexec and the flags that it needs."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("there is no mpiexec: install openmpi or mpich")
    hello = "from mpi4py import MPI; print(f'size {MPI.COMM_WORLD.allreduce(1)}')"
    for flags in FLAGS:
        done = finish(launch([mpiexec, *flags, "-n", 4, sys.executable, "-c", hello]), 60)
        if done.returncode == 0 and done.stdout.count("size 4") == 4:
            return [mpiexec, *flags]
    pytest.skip(f"MPI does not start here: {' '.join((done.stdout + done.stderr).split())[-300:]}")


@pytest.fixture
def mpi(launcher):
    """`mpi(2, "train.py", ...)` runs a program on two ranks; with wait=False it only starts it."""

    def run(n, *args, wait=True, **kwargs):
        process = launch([*launcher, "-n", n, sys.executable, *args], **kwargs)
        return finish(process) if wait else process

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "fish.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def fish(text):
    """Arguments for a short run on a small text; `fish("--steps", 4)` adds to them."""
    tiny = "--n_vocab 260 --n_layer 2 --n_head 2 --n_embd 8 --n_ctx 8 --batch_size 12 --warmup 2"
    every = "--lr 0.01 --steps 6 --eval_every 2 --save_every 2 --sample_every 3"
    arguments = ["train.py", "--data", text, "--out", text.parent / "fish", *tiny.split()]
    return lambda *more: [*map(str, (*arguments, *every.split(), *more))]


def losses(out):
    rows = train.read_log(out / "log.csv")
    return [float(row[name]) for row in rows for name in ("loss", "val_loss") if row[name]]


def errors(done):
    """The lines of standard error in which train.py says why it ends."""
    return re.findall(r"^train\.py: error: .*", done.stderr, re.M)


# --- the parts of the work ----------------------------------------------------------------------


def settings(**kwargs):
    small = {"steps": 50, "batch_size": 12, "seq_len": 8, "warmup": 5, "lr": 0.01, "min_lr": 1e-3}
    return train.Settings(**small | kwargs)


def random_tokens(n):
    """Tokens of which the next depends on the last, so that there is something to learn."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 5, n).cumsum() % TINY.n_vocab).astype(np.uint16)


@pytest.mark.parametrize("n", [2, 3, 4, 12])
def test_windows_of_all_ranks_are_those_of_one(n):
    tokens = random_tokens(1000)
    whole = train.Windows(tokens, settings())
    ranks = [train.Windows(tokens, settings(ranks=n), rank) for rank in range(n)]
    for number in (0, 3, 40):
        x, y = whole.batch(number)
        parts = [data.batch(number) for data in ranks]
        for rank, (own_x, own_y) in enumerate(parts):
            np.testing.assert_array_equal(own_x, x[rank::n])
            np.testing.assert_array_equal(own_y, y[rank::n])
    assert sum(len(own_x) for own_x, _ in parts) == 12


@pytest.mark.parametrize("least", [1, 1000, 1500, 10**6])
def test_pieces_are_the_whole_gradient_and_whole_when_they_are_sent(least):
    early, late = train.pieces(TINY, 2, least)
    assert len(early) == {1: 3, 1000: 2, 1500: 2, 10**6: 0}[least]
    place = np.zeros(n_params(TINY), int)
    for part in [part for parts in (*early.values(), late) for part in parts]:
        place[part] += 1
    assert (place == 1).all()
    params = Params(TINY, np.zeros(n_params(TINY)))
    for layer, parts in early.items():
        for part in parts:
            params.flat[part] = layer
    for name, array in params.named.items():  # a layer's are sent when that layer is done, or later
        if "/h" in name:
            assert (array <= int(name.split("/")[1][1:])).all()
    assert train.pieces(TINY, 1, least) == ({}, [slice(0, params.flat.size)])


@pytest.mark.parametrize("n", [2, 3, 7, 1000])
@pytest.mark.parametrize("block", [5, 32768])
def test_adamw_in_parts_is_the_whole_bit_for_bit(monkeypatch, n, block):
    monkeypatch.setattr(train.AdamW, "BLOCK", block)
    config = replace(TINY, n_vocab=10, n_embd=2, n_layer=1)
    start = train.init_params(config)
    whole, parts = (Params(config, start.flat.copy()) for _ in range(2))
    ranks = train.Ranks()
    ranks.size, optimizers = n, []
    for ranks.rank in range(n):
        optimizers.append(train.AdamW(parts, ranks.part(parts.flat.size)))
    one = train.AdamW(whole)
    assert one.is_whole and not any(optimizer.is_whole for optimizer in optimizers)
    rng = np.random.default_rng(1)
    for step in (1, 2):
        grads = Params(config, rng.standard_normal(start.flat.size, np.float32))
        for optimizer, params in [(one, whole), *((each, parts) for each in optimizers)]:
            optimizer.step(params, grads, 0.01, step, settings(), 0.5)
    assert (whole.flat == parts.flat).all() and (whole.flat != start.flat).any()
    for name in ("m", "v"):
        joined = np.concatenate([getattr(optimizer, name) for optimizer in optimizers])
        assert (joined == getattr(one, name)).all()


def test_write_npz_writes_what_numpy_would():
    values = np.random.default_rng(0).standard_normal(1000, np.float32)
    ours, numpys = io.BytesIO(), io.BytesIO()
    train.write_npz(ours, "meta", {"a": [values], "b": np.split(values, 4)}, values)
    np.savez(numpys, meta=np.array("meta"), a=values, b=values)
    assert ours.getvalue() == numpys.getvalue()


# --- the same numbers ---------------------------------------------------------------------------

PARITY = """
import functools, json, sys
import numpy as np
import test_mpi, train
from gpt2_support.params import Params

def losses_of(ranks, shard, least, dtype="float32", **kwargs):
    train.pieces.__defaults__ = (least,)
    start = train.init_params(test_mpi.TINY)
    params = Params(start.config, start.flat.astype(dtype))
    part = ranks.part(params.flat.size)
    s = test_mpi.settings(ranks=ranks.size, **kwargs)
    run = train.Run(params, s, optimizer=train.AdamW(params, part if shard else None))
    if shard:
        assert run.optimizer.m.size == run.optimizer.v.size == part.stop - part.start
    data = train.Windows(test_mpi.random_tokens(3000), s, ranks.rank)
    team, losses = train.Team(params, s.threads, ranks), []
    assert bool(team.early) == (least < 2000 and ranks.size > 1)
    train.train(run, data, lambda loss, norm, lr: losses.append(loss), team=team)
    moments = [np.concatenate(list(ranks.collect(each))) if shard else each
               for each in (run.optimizer.m, run.optimizer.v)]
    sums = [[float(np.abs(array).sum()) for array in (params.flat, *moments)]]
    assert ranks.gather(sums) == [sums] * ranks.size  # all ranks have the same model
    return losses + sums[0]

def all_losses(ranks):
    return {
        "early": losses_of(ranks, False, 1500),
        "sharded": losses_of(ranks, True, 1500),
        "whole": losses_of(ranks, False, 1 << 23, steps=10),
        "exact": losses_of(ranks, True, 1, "float64", steps=10),
        "accumulated": losses_of(ranks, False, 1, "float64", batch_size=24, grad_accum=2,
                                 threads=2, steps=5),
    }

if __name__ == "__main__":
    with train.find_ranks() as ranks:
        print(json.dumps(all_losses(ranks)))
"""


def run_parity():
    """Return the losses of every case in this process, alone."""
    names = {"__name__": "parity"}
    exec(compile(PARITY, "parity", "exec"), names)
    defaults = train.pieces.__defaults__
    try:
        return names["all_losses"](train.Ranks())
    finally:
        train.pieces.__defaults__ = defaults


@pytest.fixture(scope="module")
def alone():
    return run_parity()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_ranks_have_the_losses_of_one_process(mpi, alone, tmp_path, n):
    program = tmp_path / "parity.py"
    program.write_text(PARITY)
    done = mpi(n, program, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # only rank 0's
    found = json.loads(line)
    assert found["sharded"] == found["early"]  # bit for bit
    assert all(abs(a - b) < 1e-5 for a, b in zip(found["whole"][:10], alone["whole"], strict=False))
    for case in ("early", "sharded"):
        ours, one = np.array(found[case][:50]), np.array(alone[case][:50])
        assert one[-5:].mean() < one[:5].mean() - 0.5  # it learns
        np.testing.assert_allclose(ours, one, rtol=0, atol=1e-5)
    for case in ("exact", "accumulated"):  # to rounding: losses, parameters, AdamW's state
        np.testing.assert_allclose(found[case], alone[case], rtol=1e-8)


def test_command_on_two_ranks_does_what_one_process_does(mpi, run, fish, text):
    one = run(*fish("--out", text.parent / "one"))
    two = mpi(2, *fish())
    sharded = mpi(2, *fish("--out", text.parent / "sharded", "--shard"))
    for done in (one, two, sharded):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") >= 2  # two samples
        assert done.stderr.count("validation loss") == 4  # three, and the lowest
    assert "in each of 2 ranks, threads: 1" in two.stderr
    assert losses(text.parent / "fish") == pytest.approx(losses(text.parent / "one"), abs=2e-5)
    files = {"model.bin", "tokenizer.bin", "state.npz", "log.csv", "best"}
    assert files <= set(os.listdir(text.parent / "fish"))
    for name in ("model.bin", "state.npz", "best/model.bin"):
        two, sharded = ((text.parent / out / name).read_bytes() for out in ("fish", "sharded"))
        assert two == sharded


@pytest.mark.parametrize(
    "first, then", [((2, "--shard"), (1,)), ((1,), (2, "--shard")), ((3,), (2,))]
)
def test_command_resumes_on_another_number_of_ranks(mpi, run, fish, text, first, then):
    def train_on(n, *args):
        done = run(*args) if n == 1 else mpi(n, *args)
        assert done.returncode == 0, done.stderr

    whole, out = text.parent / "whole", text.parent / "fish"
    assert run(*fish("--steps", 40, "--out", whole)).returncode == 0
    train_on(first[0], *fish("--steps", 20, "--decay_steps", 40), *first[1:])
    assert train.load_checkpoint(out).settings.ranks == first[0]
    train_on(then[0], "train.py", "--resume", "--out", out, "--steps", "40", *then[1:])
    assert len(losses(out)) == 60
    assert losses(out) == pytest.approx(losses(whole), abs=2e-5)
    run_ = train.load_checkpoint(out)
    assert (run_.step, run_.settings.ranks) == (40, then[0])
    moments = run_.optimizer.m, train.load_checkpoint(whole).optimizer.m
    np.testing.assert_allclose(*moments, rtol=0, atol=1e-5)


# --- ends ---------------------------------------------------------------------------------------

ERRORS = {
    "share": (3, ["--batch_size", "4"], 1, "3 ranks cannot share --batch_size 4 equally"),
    "windows": (4, ["--batch_size", "2"], 1, "4 ranks cannot share --batch_size 2 equally"),
    "threads": (2, ["--threads", "4"], 1, "--threads 4 does not divide --batch_size 12 / 2 ranks"),
    "short": (2, ["--batch_size", "5000"], 1, "is shorter than one batch of 5000 windows of 8"),
    "no file": (2, ["--data", "nowhere.txt"], 1, "nowhere.txt: no such file"),
    "flag": (2, ["--steps", "0"], 2, "argument --steps: '0' is not a whole number of 1 or more"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_errors_are_one_clear_line_of_rank_0(mpi, fish, case):
    n, arguments, status, message = ERRORS[case]
    start = time.monotonic()
    done = mpi(n, *fish(*arguments))
    assert done.returncode == status
    (line,) = errors(done)
    assert message in line and "rank 0" not in line
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < train.MPIRanks.PATIENCE + 20


def test_command_refuses_to_replace_a_model_unasked(mpi, fish, text):
    assert mpi(2, *fish()).returncode == 0
    before = (text.parent / "fish" / "model.bin").read_bytes()
    done = mpi(2, *fish("--seed", 1))
    assert done.returncode == 1
    assert ["there is a model already" in line for line in errors(done)] == [True]
    assert (text.parent / "fish" / "model.bin").read_bytes() == before
    assert mpi(2, *fish("--seed", 1, "--overwrite")).returncode == 0
    assert (text.parent / "fish" / "model.bin").read_bytes() != before


def test_command_refuses_ranks_that_read_other_data(launcher, fish, text):
    other = text.with_name("other.txt")
    other.write_text(TEXT.replace("blue", "pink"), encoding="utf-8")
    one, two = ([sys.executable, *fish("--data", path)] for path in (text, other))
    done = finish(launch([*launcher, "-n", 1, *one, ":", "-n", 1, *two]))
    assert done.returncode == 1
    assert ["the data that the ranks have read are not" in line for line in errors(done)] == [True]


def test_command_stops_on_all_ranks_when_it_diverges(mpi, fish, text):
    out = text.parent / "fish"
    assert mpi(2, *fish()).returncode == 0
    run_ = train.load_checkpoint(out)
    run_.params.flat[:100] = np.inf
    train.save_checkpoint(out, run_)
    before = (out / "state.npz").read_bytes(), (out / "model.bin").read_bytes()
    done = mpi(2, "train.py", "--resume", "--out", out, "--steps", 12)
    assert done.returncode == 1
    assert ["training has diverged: at step 7" in line for line in errors(done)] == [True]
    assert before == ((out / "state.npz").read_bytes(), (out / "model.bin").read_bytes())


LONG = ("--steps", 1_000_000, "--eval_every", 1_000_000, "--sample_every", 1_000_000)


def start_long(mpi, fish, out, *more):
    """Start a long run on two ranks; return it, when it has saved, and the process of each rank."""
    process = mpi(2, *fish(*LONG, "--save_every", 20, *more), wait=False)
    deadline = time.monotonic() + 120
    while not (out / "state.npz").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, [find_rank(out, rank) for rank in (0, 1)]


def find_rank(out, rank):
    """Return the process id of a rank that trains into `out`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it is over, or not ours
            continue
        names = (b"OMPI_COMM_WORLD_RANK=%d" % rank, b"PMI_RANK=%d" % rank)
        if str(out).encode() in words and any(name in variables for name in names):
            return int(path.name)
    pytest.skip("this MPI does not tell its ranks in their environment")


def is_running(pid):
    """Tell a process from one that has ended, though nobody may have asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_command_ends_when_a_rank_is_killed_and_its_checkpoint_resumes(mpi, run, fish, text, rank):
    out = text.parent / "fish"
    process, pids = start_long(mpi, fish, out, *["--shard"] * rank)
    os.kill(pids[rank], signal.SIGKILL)
    done = finish(process, 60)
    assert done.returncode != 0
    said = done.stdout + done.stderr  # by the launcher, or by the other rank
    assert "signal 9" in said or "another rank cannot be reached" in said
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "the other rank goes on"
        time.sleep(0.05)
    step = train.load_checkpoint(out).step
    assert step > 0 and step % 20 == 0
    assert run("train.py", "--resume", "--out", out, "--steps", step + 2).returncode == 0
    assert train.load_checkpoint(out).step == step + 2


@needs_proc
def test_command_saves_and_exits_when_one_rank_hears_ctrl_c(mpi, fish, text):
    out = text.parent / "fish"
    process, pids = start_long(mpi, fish, out, "--shard")
    os.kill(pids[1], signal.SIGINT)
    done = finish(process, 60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    step = train.load_checkpoint(out).step
    assert step == len(train.read_log(out / "log.csv")) >= 20
    (command,) = re.findall(f"saved at step {step}; go on with: (.*)", done.stderr)
    words = shlex.split(command)
    assert words[:4] == ["mpiexec", "-n", "2", "python"] and words[5:7] == ["--resume", "--out"]
    assert mpi(2, *words[4:], "--steps", step + 2).returncode == 0
    assert train.load_checkpoint(out).step == step + 2


FAIL = """
import sys, time, train
train.MPIRanks.PATIENCE = 1

def main():
    with train.find_ranks() as ranks:
        if ranks.rank == int(sys.argv[1]):
            raise MemoryError("no room on this machine")
        ranks.gather("waits for ever")

cli.run(main)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_the_job(mpi, tmp_path, rank):
    program = tmp_path / "fail.py"
    program.write_text(FAIL)
    done = finish(mpi(2, program, rank, wait=False, env={"PYTHONPATH": str(ROOT)}), 60)
    assert done.returncode != 0
    assert errors(done) == [f"train.py: error: rank {rank}: no room on this machine"]


# --- without MPI --------------------------------------------------------------------------------

FAKE = """
import types
MPI = types.SimpleNamespace(
    COMM_WORLD=types.SimpleNamespace(size=1), Get_library_version=lambda: "Other MPI 1.0"
)
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "module, message",
    [
        ("raise ImportError('no mpi4py')", "2 ranks need mpi4py: pip install mpi4py (no mpi4py)"),
        ("raise RuntimeError('no library')", "pip install mpi4py (no library)"),
        (
            FAKE,
            "started 2 ranks, but mpi4py finds 1: it uses the MPI library of another mpiexec: O",
        ),
    ],
)
def test_command_without_the_right_mpi4py_says_so_once(run, fish, tmp_path, rank, module, message):
    (tmp_path / "mpi4py.py").write_text(module)
    env = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(rank)}
    done = run(*fish(), env={**env, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert [message in line for line in errors(done)] == [True] * (rank == 0)


def test_one_process_does_not_import_mpi4py(run, fish, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise RuntimeError('imported')")
    one = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "1"}
    for variables in ({}, one):
        env = {**os.environ, **variables, "PYTHONPATH": str(tmp_path)}
        done = run(*fish("--overwrite", "--shard"), env=env)
        assert done.returncode == 0, done.stderr


# --- the note on scaling ------------------------------------------------------------------------


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return pytest.importorskip("scaling")


def test_scaling_model_is_its_formula(scaling):
    c = scaling.CONFIGS["124M"]
    n_bytes = 4 * n_params(c)
    assert n_bytes == 497_904_640 - 1024  # the file without its header
    seconds = scaling.step_time(c, 4, 8.0, 1e9)
    assert seconds == pytest.approx(8 / 4 + n_bytes * 2 * 3 / 4 / 1e9, rel=1e-12)
    assert scaling.step_time(c, 1, 8.0, 1e9, True) == 8.0  # nobody to send to
    hidden = seconds - scaling.step_time(c, 4, 8.0, 1e9, True)
    layers = 12 * 12 * 768 * 768  # the weights, which do not wait for the embeddings
    assert hidden == pytest.approx(layers * 4 * 2 * 3 / 4 / 1e9, rel=1e-6)
    slow = scaling.step_time(c, 4, 8.0, 1e8) - scaling.step_time(c, 4, 8.0, 1e8, True)
    assert slow == pytest.approx(2 / 3 * 8 / 4)  # no more than the backward pass is hidden


def test_scaling_predict_prints_tables(run, tmp_path):
    picture = tmp_path / "scaling.png"
    plot = ["--plot", picture] * (importlib.util.find_spec("matplotlib") is not None)
    done = run("benchmarks/scaling.py", "predict", "--gbits", 10, "--gflops", 1000, *plot)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == [f"| {n}" for n in (8, 16, 32, 64, 128, 256, 512)] * 2
    efficiencies = [int(re.search(r"(\d+)%", row[1])[1]) for row in rows[:7]]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[0] > 95 > 60 > efficiencies[-1]
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


def test_scaling_measures_steps_on_two_ranks(mpi):
    arguments = ["--model", "stories", "--batch_size", "2", "--seq_len", "16", "--steps", "2"]
    done = mpi(2, "benchmarks/scaling.py", "measure", *arguments, "--shard")
    assert done.returncode == 0, done.stderr
    titles, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    found = dict(zip(titles, row, strict=True))
    assert (found["ranks"], found["threads"], found["shard"]) == ("2", "1", "yes")
    step, gradient, summing = (float(found[name][:-2]) for name in ("step", "gradient", "sum"))
    assert gradient > 0 and 0 < summing < step
    assert int(found["tokens/s"]) > 0
