"""What the test files share: the reference data, where it is present, and a command runner."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


@pytest.fixture
def shared():
    """`shared("golden/grads.npz")` is the path of a reference file; skips the test without it."""

    def path(name):
        if not (SHARED / name).exists():
            pytest.skip(f"reference data {SHARED / name} is absent")
        return SHARED / name

    return path


@pytest.fixture
def run():
    """`run("gpt2.py", "--help")` runs a command of ours as a user does, from the repository."""

    def command(script, *args, **kwargs):
        argv = [sys.executable, str(ROOT / script), *map(str, args)]
        kwargs = {"capture_output": True, "text": True, "encoding": "utf-8", **kwargs}
        return subprocess.run(argv, cwd=ROOT, timeout=300, **kwargs)

    return command
