"""Tests of gpt2_support/distributed.py: ranks have the numbers of one process, and never hang.

Those that start ranks skip, with a reason, where there is no MPI to start them with.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, TEXT, TINY

import train
from gpt2_support import distributed, evaluation, run_folder, runlog
from gpt2_support.distributed import MPIProcessGroup, ProcessGroup
from gpt2_support.params import n_params

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


@pytest.mark.parametrize(
    "cores, expected",
    [([{0, 1, 2, 3}] * 4, 1), ([{0, 1, 2, 3}] * 2, 2), ([{5}, {7}], 1), ([{0, 1, 2}, {2, 3}], 2)],
    ids=["a part of a machine", "more cores than ranks", "bound", "overlapping"],
)
def test_ranks_share_the_cores_that_their_job_has(monkeypatch, cores, expected):
    used = []
    monkeypatch.setattr(distributed, "usable_cores", lambda: cores[0])
    monkeypatch.setattr(distributed.blas, "get_threads", lambda: 64)
    monkeypatch.setattr(distributed.blas, "set_threads", used.append)
    here = SimpleNamespace(size=len(cores), allgather=lambda _: cores)
    group = MPIProcessGroup.__new__(MPIProcessGroup)
    group.mpi = SimpleNamespace(COMM_TYPE_SHARED=0)
    group.comm = SimpleNamespace(Split_type=lambda kind: here)
    group._divide_cores()
    assert (group.n_cores, group.n_ranks_here, used) == (expected, len(cores), [expected])


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
def fish(text):
    """Arguments for a short run on a small text; `fish("--steps", 4)` adds to them."""
    tiny = "--n_vocab 260 --n_layer 2 --n_head 2 --n_embd 8 --n_ctx 8 --batch_size 12 --warmup 2"
    every = "--lr 0.01 --steps 6 --eval_every 2 --save_every 2 --sample_every 3"
    arguments = ["train.py", "--data", text, "--out", text.parent / "fish", *tiny.split()]
    return lambda *more: [*map(str, (*arguments, *every.split(), *more))]


def losses(out):
    rows = [*runlog.iterate_log(out / "log.csv")]
    return [float(row[name]) for row in rows for name in ("loss", "val_loss") if row[name]]


def errors(done):
    """The lines of standard error in which train.py says why it ends."""
    return re.findall(r"^train\.py: error: .*", done.stderr, re.M)


# --- the parts of the work ----------------------------------------------------------------------


def make_config(**kwargs):
    small = {"steps": 50, "batch_size": 12, "seq_len": 8, "warmup": 5, "lr": 0.01, "min_lr": 1e-3}
    return train.TrainConfig(**small | kwargs)


def learnable_tokens(n):
    """Tokens of which the next depends on the last, so that there is something to learn."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 5, n).cumsum() % TINY.n_vocab).astype(np.uint16)


@pytest.mark.parametrize("n", [2, 3, 4, 12])
def test_data_loaders_of_all_ranks_are_that_of_one(n):
    tokens = learnable_tokens(1000)
    whole = train.DataLoader(tokens, make_config())
    ranks = [train.DataLoader(tokens, make_config(ranks=n), rank) for rank in range(n)]
    for number in (0, 3, 40):
        x, y = whole.batch(number)
        parts = [loader.batch(number) for loader in ranks]
        for rank, (own_x, own_y) in enumerate(parts):
            np.testing.assert_array_equal(own_x, x[rank::n])
            np.testing.assert_array_equal(own_y, y[rank::n])
    assert sum(len(own_x) for own_x, _ in parts) == 12


def group_of(rank, size, gathered=None):
    """A ProcessGroup with another rank and size; `gathered` is what all_gather returns."""
    group = ProcessGroup()
    group.rank, group.size = rank, size
    if gathered is not None:
        group.all_gather = lambda value: gathered(value)
    return group


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 6, 1000])
def test_shards_are_all_values_once_and_about_equal(size, n):
    shards = [np.arange(n)[group_of(rank, size).shard(n)] for rank in range(size)]
    assert np.concatenate(shards).tolist() == list(range(n))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_check_same_names_what_differs():
    arrays = {"data": np.arange(5), "step": np.array(3)}
    group_of(0, 2, lambda value: [value, value]).check_same(**arrays)
    with pytest.raises(ValueError, match="the step that the ranks have read are not the same"):
        group_of(0, 2, lambda value: [value, [value[0], 0]]).check_same(**arrays)


@pytest.mark.parametrize("n_windows", [1, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_the_windows_of_an_evaluation(size, n_windows):
    windows = evaluation.Windows(np.arange(4 * n_windows + 1), 4, batch_size=1)
    seen, sums = [], []

    def losses(batch):
        seen.append(int(batch[0][0, 0]))
        return batch[0] / 3

    for rank in range(size):  # each tells the others its sums, and gets them from the last one
        group = group_of(rank, size, lambda mine: sums.append(mine) or sums)
        total = evaluation.sum_losses(losses, windows, group)
    assert sorted(seen) == list(range(0, 4 * n_windows, 4))
    assert total == evaluation.sum_losses(losses, windows)  # bit for bit


@pytest.mark.parametrize("rank, order", [(0, ["block", "meet"]), (1, ["meet", "block"])])
def test_rank_zero_goes_first_even_with_an_error(rank, order):
    events = []
    group = group_of(rank, 2, lambda value: events.append("meet"))
    with pytest.raises(ValueError, match="an error"), group.rank_zero_first():
        events.append("block")
        raise ValueError("an error")
    assert events == order


# --- the same numbers ---------------------------------------------------------------------------

PARITY = """
import json
import numpy as np
import gpt2, helpers, test_distributed, train
from gpt2_support.data_parallel import DataParallel
from gpt2_support.distributed import MPIProcessGroup, init_process_group
from gpt2_support.optimizers import make_optimizer
from gpt2_support.params import Params

def ignore_targets(batch):  # those divisible by 3, and whole rows: some ranks have none left
    tokens, targets = (array.astype(int) for array in batch)
    is_ignored = (targets % 3 == 0) | (tokens[:, :1] % 4 < 3)
    return tokens, np.where(is_ignored, -1, targets)

def losses_of(group, shard, bucket=1 << 24, dtype="float32", ignore=False, **kwargs):
    MPIProcessGroup.BUCKET = bucket
    start = train.init_params(helpers.TINY)
    params = Params(start.config, start.flat.astype(dtype))
    config = test_distributed.make_config(ranks=group.size, **kwargs)
    optimizer = make_optimizer(config.optimizer, params, group if shard else None)
    part = optimizer.shard
    state = train.TrainState(params, config, optimizer=optimizer)
    if shard:
        assert optimizer.m.size == optimizer.v.size == part.stop - part.start
    loader = train.DataLoader(test_distributed.learnable_tokens(3000), config, group.rank)
    workers, losses = DataParallel(gpt2.loss_and_grads, params, config.threads, group), []
    while state.step < config.steps:
        batches = loader.batches(state.step)
        batches = [ignore_targets(batch) if ignore else batch for batch in batches]
        losses.append(train.train_step(state, batches, workers)[0])
    moments = [np.concatenate(list(group.broadcast_shards(each))) if shard else each
               for each in (optimizer.m, optimizer.v)]
    sums = [[float(np.abs(array).sum()) for array in (params.flat, *moments)]]
    assert group.all_gather(sums) == [sums] * group.size  # all ranks have the same model
    return losses + sums[0]

def all_losses(group):
    return {
        "unsharded": losses_of(group, False, 1000),
        "sharded": losses_of(group, True, 1000),
        "one bucket": losses_of(group, False, steps=10),
        "exact": losses_of(group, True, 700, "float64", steps=10),
        "accumulated": losses_of(group, False, 700, "float64", batch_size=24, grad_accum=2,
                                 threads=2, steps=5),
        "ignored": losses_of(group, False, 700, "float64", ignore=True, grad_accum=2, steps=5),
        "muon": losses_of(group, False, dtype="float64", optimizer="muon", steps=5),
        "sharded muon": losses_of(group, True, dtype="float64", optimizer="muon", steps=5),
    }

if __name__ == "__main__":
    with init_process_group() as group:
        print(json.dumps(all_losses(group)))
"""


@pytest.fixture(scope="module")
def alone():
    """The losses of every case in this process, alone."""
    names, bucket = {"__name__": "parity"}, MPIProcessGroup.BUCKET
    exec(compile(PARITY, "parity", "exec"), names)
    try:
        return names["all_losses"](ProcessGroup())
    finally:
        MPIProcessGroup.BUCKET = bucket


THREE = pytest.param(3, marks=pytest.mark.thorough)
FOUR = pytest.param(4, marks=pytest.mark.thorough)


@pytest.mark.parametrize("n", [2, THREE, FOUR])
def test_ranks_have_the_losses_of_one_process(mpi, alone, tmp_path, n):
    program = tmp_path / "parity.py"
    program.write_text(PARITY)
    done = mpi(n, program, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # only rank 0's
    actual = json.loads(line)
    assert actual["sharded"] == actual["unsharded"]  # bit for bit
    assert actual["sharded muon"] == actual["muon"]
    pairs = zip(actual["one bucket"][:10], alone["one bucket"], strict=False)
    assert all(abs(a - b) < 1e-5 for a, b in pairs)
    for case in ("unsharded", "sharded"):
        ours, one = np.array(actual[case][:50]), np.array(alone[case][:50])
        assert one[-5:].mean() < one[:5].mean() - 0.5  # it learns
        np.testing.assert_allclose(ours, one, rtol=0, atol=1e-5)
    # To rounding: losses, parameters, the optimizer's state.
    for case in ("exact", "accumulated", "ignored", "muon"):
        np.testing.assert_allclose(actual[case], alone[case], rtol=1e-8)


def test_command_on_two_ranks_does_what_one_process_does(no_picture, mpi, call, fish, text):
    one = call(train, *fish("--out", text.parent / "one")[1:])
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


@pytest.mark.thorough
def test_command_chooses_by_the_time_on_two_ranks(no_picture, mpi, fish, text):
    out = text.parent / "timed"
    program = fish()[0]
    done = mpi(2, program, "--data", text, "--out", out, "--minutes", 1, "--n_ctx", 32)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--minutes 1: 2 layers of 32 channels") == 1  # rank 0 alone tells
    config = train.load_checkpoint(out).config
    assert config.batch_size >= 32  # more where a step takes no time
    assert config.batch_size % 2 == 0
    assert (config.seq_len, config.ranks) == (32, 2)


@pytest.mark.thorough
def test_eval_only_on_two_ranks_prints_what_one_process_prints(mpi, call, fish, text):
    assert call(train, *fish()[1:]).returncode == 0
    flags = ("--eval_only", "--init", text.parent / "fish", "--data", text)
    one, two = call(train, *flags), mpi(2, "train.py", *flags)
    assert two.returncode == 0, two.stderr
    assert "nats per token" in two.stdout
    assert two.stdout == one.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(
    "first, then", [((2, "--shard"), (1,)), ((1,), (2, "--shard")), ((3,), (2,))]
)
def test_command_resumes_on_another_number_of_ranks(mpi, run, uncounted, fish, text, first, then):
    def train_on(n, *args):
        done = run(*args) if n == 1 else mpi(n, *args)
        assert done.returncode == 0, done.stderr

    whole, out = text.parent / "whole", text.parent / "fish"
    assert run(*fish("--steps", 40, "--out", whole)).returncode == 0
    train_on(first[0], *fish("--steps", 20, "--decay_steps", 40), *first[1:])
    assert train.load_checkpoint(out).config.ranks == first[0]
    train_on(then[0], "train.py", "--resume", "--out", out, "--steps", "40", *then[1:])
    assert len(losses(out)) == 60
    assert losses(out) == pytest.approx(losses(whole), abs=2e-5)
    run_ = train.load_checkpoint(out)
    assert (run_.step, run_.config.ranks) == (40, then[0])
    moments = run_.optimizer.m, train.load_checkpoint(whole).optimizer.m
    np.testing.assert_allclose(*moments, rtol=0, atol=1e-5)


# --- ends ---------------------------------------------------------------------------------------

ERRORS = {
    "share": (3, ["--batch_size", "4"], 2, "3 ranks cannot share --batch_size 4 equally"),
    "windows": (4, ["--batch_size", "2"], 2, "4 ranks cannot share --batch_size 2 equally"),
    "threads": (2, ["--threads", "4"], 2, "--threads 4 does not divide --batch_size 12 / 2 ranks"),
    "short": (2, ["--batch_size", "5000"], 1, "is shorter than one batch of 5000 windows of 8"),
    "no file": (2, ["--data", "nowhere.txt"], 1, "nowhere.txt: no such file"),
    "flag": (2, ["--steps", "0"], 2, "argument --steps: '0' is not a whole number of 1 or more"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", ERRORS)
def test_command_errors_are_one_clear_line_of_rank_0(mpi, fish, case):
    n, arguments, status, message = ERRORS[case]
    start = time.monotonic()
    done = mpi(n, *fish(*arguments))
    assert done.returncode == status
    (line,) = errors(done)
    assert message in line and "rank 0" not in line
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < MPIProcessGroup.PATIENCE + 20


@pytest.mark.thorough
def test_command_refuses_to_replace_a_model_unasked(mpi, fish, text):
    assert mpi(2, *fish()).returncode == 0
    before = (text.parent / "fish" / "model.bin").read_bytes()
    done = mpi(2, *fish("--seed", 1))
    assert done.returncode == 1
    assert ["there is a model already" in line for line in errors(done)] == [True]
    assert (text.parent / "fish" / "model.bin").read_bytes() == before
    assert mpi(2, *fish("--seed", 1, "--overwrite")).returncode == 0
    assert (text.parent / "fish" / "model.bin").read_bytes() != before


@pytest.mark.thorough
def test_command_refuses_a_folder_in_which_another_run_writes(mpi, fish, text):
    out, start = text.parent / "fish", time.monotonic()
    with run_folder.hold(out, ProcessGroup()):
        done = mpi(2, *fish())
    assert done.returncode == 1
    assert ["another run is writing there" in line for line in errors(done)] == [True]
    assert time.monotonic() - start < MPIProcessGroup.PATIENCE + 20
    assert not list(out.iterdir())


@pytest.mark.thorough
def test_command_refuses_ranks_that_read_other_data(launcher, fish, text):
    other = text.with_name("other.txt")
    other.write_text(TEXT.replace("blue", "pink"), encoding="utf-8")
    one, two = ([sys.executable, *fish("--data", path)] for path in (text, other))
    done = finish(launch([*launcher, "-n", 1, *one, ":", "-n", 1, *two]))
    assert done.returncode == 1
    assert ["the data that the ranks have read are not" in line for line in errors(done)] == [True]


@pytest.mark.thorough
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


@pytest.mark.thorough
@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_command_ends_when_a_rank_is_killed_and_its_checkpoint_resumes(mpi, run, fish, text, rank):
    out = text.parent / "fish"
    process, pids = start_long(mpi, fish, out, *["--shard"] * rank)
    os.kill(pids[rank], signal.SIGKILL)
    done = finish(process, 60)
    assert done.returncode != 0
    said = done.stdout + done.stderr  # by the launcher, by the other rank, or by MPI itself
    ways = "signal 9", "another rank cannot be reached", "process_vm_readv failed"
    assert any(way in said for way in ways)
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "the other rank goes on"
        time.sleep(0.05)
    step = train.load_checkpoint(out).step
    assert step > 0 and step % 20 == 0
    assert run("train.py", "--resume", "--out", out, "--steps", step + 2).returncode == 0
    assert train.load_checkpoint(out).step == step + 2


@pytest.mark.thorough
@needs_proc
def test_command_saves_and_exits_when_one_rank_hears_ctrl_c(mpi, fish, text):
    out = text.parent / "fish"
    process, pids = start_long(mpi, fish, out, "--shard")
    os.kill(pids[1], signal.SIGINT)
    done = finish(process, 60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    step = train.load_checkpoint(out).step
    assert step == len([*runlog.iterate_log(out / "log.csv")]) >= 20
    (command,) = re.findall(f"saved at step {step}; go on with: (.*)", done.stderr)
    words = shlex.split(command)
    assert words[:4] == ["mpiexec", "-n", "2", "python"] and words[5:7] == ["--resume", "--out"]
    assert mpi(2, *words[4:], "--steps", step + 2).returncode == 0
    assert train.load_checkpoint(out).step == step + 2


FAIL = """
import sys
from gpt2_support import cli
from gpt2_support.distributed import MPIProcessGroup, init_process_group
MPIProcessGroup.PATIENCE = 1

def main():
    with init_process_group() as group:
        if group.rank == int(sys.argv[1]):
            raise MemoryError("no room on this machine")
        group.all_gather("waits for ever")

cli.run(main)
"""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_an_error_of_one_rank_ends_the_job(mpi, tmp_path, rank):
    program = tmp_path / "train.py"
    program.write_text(FAIL)
    done = finish(mpi(2, program, rank, wait=False, env={"PYTHONPATH": str(ROOT)}), 60)
    assert done.returncode != 0
    said = [line for line in errors(done) if "rank" in line]
    assert said == [f"train.py: error: rank {rank}: no room on this machine"]


# --- without MPI --------------------------------------------------------------------------------

FAKE = """
import types
MPI = types.SimpleNamespace(
    COMM_WORLD=types.SimpleNamespace(size=1), Get_library_version=lambda: "Other MPI 1.0"
)
"""
OTHER_MPI = "started 2 ranks, but mpi4py finds 1: it uses the MPI library of another mpiexec: O"


@pytest.mark.parametrize("launcher_variables", distributed.LAUNCHERS)
@pytest.mark.parametrize(
    "code, message",
    [
        ("raise ImportError('no mpi4py')", "2 ranks need mpi4py: pip install mpi4py (no mpi4py)"),
        ("raise RuntimeError('no library')", "pip install mpi4py (no library)"),
        (FAKE, OTHER_MPI),
    ],
)
def test_group_without_the_right_mpi4py_says_so(
    monkeypatch, tmp_path, launcher_variables, code, message
):
    (tmp_path / "mpi4py.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    for name, value in zip(launcher_variables, ("0", "2"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ImportError, match=re.escape(message)):
        distributed.init_process_group()


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_command_without_mpi4py_says_so_once(run, fish, tmp_path, rank):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py')")
    env = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(rank)}
    done = run(*fish(), env={**env, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert ["pip install mpi4py" in line for line in errors(done)] == [True] * (rank == 0)


@pytest.mark.parametrize(
    "variables", [{}, {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "1"}]
)
def test_one_process_does_not_import_mpi4py(monkeypatch, variables):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # an import is an error
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert type(distributed.init_process_group()) is ProcessGroup


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
    assert scaling.step_time(c, 1, 8.0, 1e9) == 8.0  # nobody to send to


def test_scaling_predict_prints_tables(scaling, capsys, tmp_path):
    picture = tmp_path / "scaling.png"
    plot = ["--plot", picture] * (importlib.util.find_spec("matplotlib") is not None)
    scaling.main(["predict", "--gbits", "10", "--gflops", "1000", *map(str, plot)])
    output = capsys.readouterr().out
    rows = [line.split(" | ") for line in output.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == [f"| {n}" for n in (8, 16, 32, 64, 128, 256, 512)] * 2
    efficiencies = [int(re.search(r"(\d+)%", row[1])[1]) for row in rows[:7]]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[0] > 95 > 60 > efficiencies[-1]
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_scaling_measures_steps_on_two_ranks(mpi):
    arguments = ["--model", "stories", "--batch_size", "2", "--seq_len", "16", "--steps", "2"]
    done = mpi(2, "benchmarks/scaling.py", "measure", *arguments, "--shard")
    assert done.returncode == 0, done.stderr
    titles, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    actual = dict(zip(titles, row, strict=True))
    assert (actual["ranks"], actual["threads"], actual["shard"]) == ("2", "1", "yes")
    step, gradient, summing = (float(actual[name][:-2]) for name in ("step", "gradient", "sum"))
    assert gradient > 0 and 0 < summing < step
    assert int(actual["tokens/s"]) > 0
