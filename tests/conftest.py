"""What the test files share: checked types, the reference data, a command runner.

The modules are imported here, with every function that has annotations checking what it is given
and returns: dtypes, and that dimensions of one name agree, in every call of every test. Not so
constructors, which refuse bad values themselves, and utils.py, whose readers do.
"""

import subprocess
import sys
import typing
from pathlib import Path
from unittest import mock

import beartype.door  # (before the patch below, which is not for it)
import jaxtyping
import numpy.typing  # noqa: F401 (so too)
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


def check_types(function):
    """Return a function that checks its annotations when it is called."""
    return function if function.__name__ == "__init__" else beartype.beartype(function)


with (
    mock.patch.object(typing, "TYPE_CHECKING", True),  # the names of types are to be there
    jaxtyping.install_import_hook(["encoder", "gpt2", "train"], "conftest.check_types"),
):
    import train  # noqa: F401 (which imports the others)


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
def run():
    """`run("gpt2.py", "--help")` runs a command of ours as a user does, from the repository."""

    def command(script, *args, **kwargs):
        argv = [sys.executable, str(ROOT / script), *map(str, args)]
        kwargs = {"capture_output": True, "text": True, "encoding": "utf-8", **kwargs}
        return subprocess.run(argv, cwd=ROOT, timeout=300, **kwargs)

    return command
