"""What the test files share: quick and thorough runs, the reference data, commands.

`pytest` is the quick run. `pytest --thorough` is everything: also the tests marked `thorough`, more
examples of each property, and calls checked against annotations, but the many that repeat. Both
use all cores, where pytest-xdist is installed; `-n 0` or the name of a test file keeps to one.
"""

import collections
import functools
import inspect
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import typing
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import hypothesis
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

import gpt2_support.blas  # noqa: F401, E402 (before NumPy, which then loads OpenBLAS as users have it)

if not os.environ.get("GPT2_TEST_NETWORK"):  # nothing is fetched from the hub itself
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"
    os.environ.pop("HF_TOKEN", None)

EVERY_RUN = {
    "deadline": None,  # other processes share the cores
    "derandomize": True,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,  # files of tmp_path are written anew
        hypothesis.HealthCheck.too_slow,
    ],
}
hypothesis.settings.register_profile("quick", max_examples=15, **EVERY_RUN)
hypothesis.settings.register_profile("thorough", max_examples=100, **EVERY_RUN)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run everything, types checked")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Without file names, as with `-n auto --dist worksteal`."""
    if hasattr(config, "workerinput"):  # this is a worker: it must not start workers
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if getattr(config.option, "cov_source", None):  # pytest-cov has chosen by now: -n goes with it
        return
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = "auto"
        config.option.dist = "worksteal"


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: runs with --thorough only")
    thorough = config.getoption("--thorough")
    hypothesis.settings.load_profile("thorough" if thorough else "quick")
    if thorough:
        import_checked()


def pytest_runtest_setup(item):
    n_calls.clear()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--thorough"):
        return
    slow = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


def import_checked():
    """Import the modules so that a call of an annotated function checks arguments and result.

    Checks dtypes, and that dimensions of one name agree. Leaves out constructors, and the rooms
    that name no shapes: those refuse bad values themselves, which is what tests give them.
    """
    import beartype.door  # noqa: F401
    import jaxtyping
    import numpy.typing  # noqa: F401 (libraries do not expect the patch: they come before it)
    import requests  # noqa: F401

    for name in [name for name in sys.modules if name.split(".")[0] == "gpt2_support"]:
        del sys.modules[name]
    with (
        mock.patch.object(typing, "TYPE_CHECKING", True),  # the names of types are to be there
        jaxtyping.install_import_hook(checked_modules(), "beartype.beartype"),
    ):
        jaxtyping.jaxtyped = check_most(jaxtyping.jaxtyped)
        import train  # noqa: F401 (which imports the others)


n_calls = collections.Counter()  # of a function with arguments of some shapes, in this test
REFUSE_BAD_VALUES = ("__init__", "generate", "decode")  # with ValueError, which tests ask for


def check_most(jaxtyped):
    """Return the decorator that the hook puts on functions and classes, for most of them.

    A function within a function is made anew whenever the outer one is called, and its checks are
    compiled anew, which takes milliseconds: only the first ten of each are checked.
    """
    made = collections.Counter()

    def is_checked(function):
        name = getattr(function, "__name__", "")
        if "<locals>" in getattr(function, "__qualname__", ""):
            made[function.__code__] += 1
        is_old = made[getattr(function, "__code__", None)] > 10
        is_refusing = name in REFUSE_BAD_VALUES or name.startswith("check_")
        return not (inspect.isclass(function) or is_old or is_refusing)

    def decorator(*, typechecker):
        decorate = jaxtyped(typechecker=typechecker)

        def decorate_most(function):
            return check_some(function, decorate(function)) if is_checked(function) else function

        return decorate_most

    return decorator


def check_some(function, checked):
    """Return a function that checks some of its calls: a check takes longer than a small layer.

    In each test these are the first three with arguments of the same shapes, then every hundredth.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        same = (function, *[getattr(value, "shape", None) for value in args])
        n_calls[same] += 1
        is_due = n_calls[same] <= 3 or n_calls[same] % 100 == 0
        return (checked if is_due else function)(*args, **kwargs)

    return call


def checked_modules():
    """Return the names of the three modules, and of the rooms whose annotations name dimensions."""
    rooms = (ROOT / "gpt2_support").glob("*.py")
    named = [room.stem for room in rooms if '[ndarray, "' in room.read_text(encoding="utf-8")]
    return ["encoder", "gpt2", "train", *(f"gpt2_support.{name}" for name in named)]


@pytest.fixture(scope="session")
def datasets_dirs(tmp_path_factory):
    """Yields paths of folders that are not there yet, without end."""
    base = tmp_path_factory.mktemp("datasets")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def datasets_dir(datasets_dirs, monkeypatch):
    """Each test has a folder of its own for data sets and the tokens of texts."""
    monkeypatch.setenv("GPT2_DATASETS_DIR", str(next(datasets_dirs)))


@pytest.fixture
def thorough(request):
    """True in a thorough run: for tests whose amount of work depends on it."""
    return request.config.getoption("--thorough")


@pytest.fixture
def shared():
    """`shared("golden/grads.npz")` is the path of a reference file; skips the test without it."""

    def path(name):
        if not (SHARED / name).exists():
            pytest.skip(f"reference data {SHARED / name} is absent")
        return SHARED / name

    return path


@pytest.fixture
def uncounted(monkeypatch):
    """Leave the processes of a test, which run copies of the modules, out of the coverage."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def run(uncounted):
    """`run("gpt2.py", "--help")` runs a command of ours as a user does, from the repository."""

    def command(script, *args, **kwargs):
        argv = [sys.executable, str(ROOT / script), *map(str, args)]
        kwargs = {"capture_output": True, "text": True, "encoding": "utf-8", **kwargs}
        return subprocess.run(argv, cwd=ROOT, timeout=300, **kwargs)

    return command


@pytest.fixture
def call(capsys, monkeypatch):
    """`call(gpt2, "--help")` is `run("gpt2.py", "--help")` in this process: 50 times as fast.

    The folder is the repository, or `cwd=`; `stdin=` is a str. What was printed before is thrown
    away.
    """
    from helpers import run_in_process

    def command(module, *args, stdin="", cwd=ROOT):
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        done = run_in_process(module, args, stdin)
        out, err = capsys.readouterr()
        done.stdout, done.stderr = out, err + done.stderr
        return done

    return command


@pytest.fixture
def text(tmp_path):
    """A small text file."""
    from helpers import TEXT

    path = tmp_path / "fish.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path):
    """The folder that `fish` writes."""
    return tmp_path / "fish"


@pytest.fixture
def fish(text, out):
    """Arguments for a short run on a small text; `fish("--steps", 4)` adds to them.

    A model from scratch is small, and has a small vocabulary unless another is given.
    """
    every = "--steps 6 --eval_every 2 --save_every 2 --sample_every 3 --batch_size 2 --warmup 2"

    def arguments(*more):
        flags = ["--data", text, "--out", out, *every.split()]
        if "--init" not in more:
            flags += ["--n_layer", 1, "--n_head", 2, "--n_embd", 8, "--n_ctx", 8]
        if not {"--init", "--tokenizer", "--data"} & set(more):
            flags += ["--n_vocab", 260]
        return [str(argument) for argument in (*flags, *more)]

    return arguments


@pytest.fixture(scope="module")
def several_tiles():
    """Cut the short sequences of a file's tests, too, into several tiles and blocks of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2_support.tiles.QUERIES", 2)
        patch.setattr("gpt2_support.tiles.BLOCK", 150)
        yield


@pytest.fixture
def no_picture(monkeypatch, tmp_path_factory):
    """Draw no loss.png, here and in programs, which takes longer than the training of tests."""
    monkeypatch.setattr("gpt2_support.runlog.plot_log", lambda rows, path: None)
    folder = tmp_path_factory.mktemp("none")
    (folder / "matplotlib.py").write_text("raise ImportError('not in this test')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def trained(no_picture, call, fish, out):
    """The folder of a run that has ended."""
    import train

    done = call(train, *fish())
    assert done.returncode == 0, done.stderr
    return out


class ThreadAsProcess:
    """A thread that does what a worker process would, with the same pipes."""

    def __init__(self, target, args, daemon):
        connection, turns, *rest = args
        self.pipes = [self.duplicate(p) for p in (connection, turns.before, turns.after)]
        turns = type(turns)(turns.process, *self.pipes[1:])
        self.sentinel, end = multiprocessing.Pipe(duplex=False)
        work = functools.partial(target, self.pipes[0], turns, *rest)
        self.pipes.append(end)
        self.thread = threading.Thread(target=self.run, args=(work,), daemon=daemon)

    @staticmethod
    def duplicate(pipe):
        return type(pipe)(os.dup(pipe.fileno()), pipe.readable, pipe.writable)

    def run(self, work):
        work()
        for pipe in self.pipes:
            pipe.close()

    def start(self):
        self.thread.start()

    def kill(self):
        pass

    def join(self):
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def workers_in_threads(monkeypatch):
    """Worker processes are threads of this one: they start at once, and see its patches."""
    from gpt2_support import worker_pool

    spawn = SimpleNamespace(Process=ThreadAsProcess, Pipe=multiprocessing.Pipe)
    monkeypatch.setattr(worker_pool, "SPAWN", spawn)
    monkeypatch.setattr(worker_pool, "ignore_signals", lambda: None)
