"""Imports go in one direction, and a slow one waits until it is needed.

Every `import` of the five modules and of gpt2_support is read, not run.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD = sys.stdlib_module_names | {"__future__"}
SLOW = {"requests", "tqdm", "matplotlib", "mpi4py"}
MODULES = ("gpt2", "encoder", "train", "utils", "evaluate")

# What each may import besides the standard library: at its top, and in its functions as well.
TOP = {
    "gpt2": {"gpt2_support", "numpy"},
    "encoder": {"gpt2_support", "numpy", "regex"},
    "train": {"gpt2_support", "numpy", "gpt2", "encoder"},
    "utils": {"gpt2_support"},
    "evaluate": {"gpt2_support", "gpt2", "encoder", "train"},
    "gpt2_support": {"gpt2_support", "numpy", "regex"},
}
LATER = {"gpt2": {"encoder"}}  # only its command line turns text into ids
TYPES = {"jaxtyping"}  # under `if TYPE_CHECKING`

FILES = [ROOT / f"{name}.py" for name in MODULES]
FILES += sorted((ROOT / "gpt2_support").rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node, place="top"):
    """Yield (place, name of the package) for each import beneath a node of a syntax tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((place, alias.name.split(".")[0]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield place, child.module.split(".")[0] if child.module else "."
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, "function")
        else:
            yield from imports(child, "types" if is_type_checking(child) else place)


def read_imports(path):
    """Return {place: the packages, other than the standard library's, that are imported there}."""
    packages = {"top": set(), "function": set(), "types": set()}
    for place, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        packages[place] |= {name} - STANDARD
    return packages


@each_file
def test_imports_go_in_one_direction(path):
    subject = path.relative_to(ROOT).parts[0].removesuffix(".py")
    packages = read_imports(path)
    top, later = TOP[subject], LATER.get(subject, set())
    assert packages["top"] <= top
    assert packages["function"] <= top | later | SLOW
    assert packages["types"] <= top | later | SLOW | TYPES


@pytest.mark.parametrize(
    ("modules", "others"),
    [
        ("gpt2", {"encoder", "train", "utils", "regex"}),
        ("gpt2, encoder, train, utils, evaluate", SLOW),
    ],
    ids=["gpt2", "all five"],
)
def test_import_loads_nothing_else(modules, others):
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not others & set(done.stdout.split())
