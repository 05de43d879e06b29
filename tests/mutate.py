"""Change one operator or constant at a time, and see whether a test notices.

    python tests/mutate.py --n 100 --seed 0
    python tests/mutate.py --rooms huggingface --functions open_model

Mutants are made in the backward functions of gpt2.py, in the readers of every format and in the
tokenizer: an operator is exchanged, a condition negated, a number changed, a statement left out.
Each runs in a copy of the repository, first against the tests of its room, then, if it survives,
against those of all formats or of the model. Reports the survivors. The tests are those of a quick
run, or with --thorough all.
"""

import ast
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpt2_support import cli

ROOT = Path(cli.__file__).resolve().parent.parent
SECONDS = 600  # for all tests of a mutant; more is a hang, which is noticed

MODEL = (["test_gpt2.py"], ["test_properties.py", "-k", "gradient or chunk"])
FORMATS = (["test_weights.py"], ["test_properties.py", "-k", "exact or bit"], ["test_hostile.py"])
ROOMS = {  # module: functions (a regular expression), tests besides those of the room's own file
    "gpt2.py": (r".*_backward|.*loss.*|cross_entropy|as_rows|.*_rows", MODEL),
    "gpt2_support/tiles.py": (".*", MODEL),
    "encoder.py": (".*", (["test_corpus.py"],)),
    "gpt2_support/corpus.py": (".*", (["test_encoder.py"],)),
    "gpt2_support/weights.py": (".*", FORMATS[1:]),
    **{
        f"gpt2_support/formats/{name}.py": (".*", FORMATS)
        for name in (
            "crc32c", "huggingface", "llmc", "stored_tensor", "tensorflow", "token_table"
        )
    },
}  # fmt: skip
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node):
    """Yield functions that each change a node of the syntax tree in one way, in place."""

    def put(name, value):
        return lambda: setattr(node, name, value)

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        yield put("op", SWAPS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in SWAPS:
                new = [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]]
                yield put("ops", new)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield put("test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert):
        yield put("op", ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield put("value", node.value + 1 if type(node.value) is int else node.value * 1.1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield put("value", not node.value)
    for name in ("body", "orelse"):  # leave a statement out
        block = getattr(node, name, None)
        for i, statement in enumerate(block if isinstance(block, list) else ()):
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if isinstance(statement, ast.Expr | ast.AugAssign | ast.Raise) and not text:
                yield put(name, [*block[:i], ast.Pass(), *block[i + 1 :]])


def walk(node):
    """Yield the nodes of a function, but not those within messages."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from walk(child)


def sites(tree, functions):
    """Return (function, node) of everything to change in the functions of a module."""
    defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    chosen = [function for function in defined if re.fullmatch(functions, function.name)]
    return [(function, node) for function in chosen for node in walk(function)]


def make_mutants(room, functions):
    """Return (room, place, number) of every mutant of a room."""
    tree = ast.parse((ROOT / room).read_text(encoding="utf-8"))
    return [
        (room, place, number)
        for place, (function, node) in enumerate(sites(tree, ROOMS[room][0]))
        for number in range(len(list(changes(node))))
        if re.fullmatch(functions, function.name)
    ]


def mutate(room, place, number):
    """Return the source of a mutant, and a line that says what was changed."""
    tree = ast.parse((ROOT / room).read_text(encoding="utf-8"))
    function, node = sites(tree, ROOMS[room][0])[place]
    before = ast.unparse(function).split("\n")
    list(changes(node))[number]()
    ast.fix_missing_locations(tree)
    after = ast.unparse(function).split("\n")
    lines = [(a, b) for a, b in zip(before, after, strict=False) if a != b] or [("", "")]
    old, new = (" ".join(line.split()) for line in lines[0])
    return ast.unparse(tree), f"{room} {function.name}:  {old}  ->  {new}"


def copy_repository(folder):
    """Copy what the tests need, and show them the reference data where there is some."""
    copy = folder / "copy"
    copy.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        shutil.copy(path, copy)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("gpt2_support", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    if (ROOT / "models" / "stories").exists():
        (copy / "models").symlink_to(ROOT / "models")
    return copy


def tests_of(room):
    """Return the runs of tests for a room, those of its own file first."""
    own, further = f"test_{Path(room).stem}.py", ROOMS[room][1]
    is_further = own in {file for file, *_ in further}
    return [[own]] * ((ROOT / "tests" / own).exists() and not is_further) + [*further]


def is_noticed(copy, tests, thorough):
    """Return whether a run of some tests fails, or does not end."""
    file, *selection = tests
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    argv += ["--thorough"] * thorough
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*argv, str(copy / "tests" / file), *selection]
    with subprocess.Popen(
        command, cwd=copy, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    if status not in (0, 1, 2, 4, 5):  # 4: conftest.py cannot be imported; 5: none is selected
        raise ValueError(f"pytest ended with status {status}: {' '.join(command)}")
    return status not in (0, 5)


def survives(copy, mutant, thorough):
    """Return whether no test notices a mutant, and its description."""
    room, *_ = mutant
    source, text = mutate(*mutant)
    (copy / room).write_text(source, encoding="utf-8")
    try:
        return not any(is_noticed(copy, tests, thorough) for tests in tests_of(room)), text
    finally:
        shutil.copy(ROOT / room, copy / room)


def check_copy(copy, rooms, thorough):
    """Raise ValueError unless the tests pass without any change."""
    for tests in {tuple(tests) for room in rooms for tests in tests_of(room)}:
        if is_noticed(copy, tests, thorough):
            raise ValueError(f"{' '.join(tests)} fails without any change")


def parse_args():
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--n", type=cli.positive_int, default=100, help="mutants to try")
    add("--seed", type=int, default=0, help="which ones")
    add("--n_procs", type=cli.positive_int, default=os.cpu_count() or 1, help="to try at a time")
    add("--rooms", default=".*", help="only in these: a regular expression")
    add("--functions", default=".*", help="only in these: a regular expression")
    add("--thorough", action="store_true", help="run the thorough tests")
    return parser.parse_args()


def main():
    args = parse_args()
    rooms = [room for room in ROOMS if re.fullmatch(args.rooms, Path(room).stem)]
    mutants = [mutant for room in rooms for mutant in make_mutants(room, args.functions)]
    n_all = len(mutants)
    mutants = random.Random(args.seed).sample(mutants, min(args.n, n_all))
    print(f"{len(mutants)} of {n_all} mutants", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.n_procs) as pool:
        copies = queue.SimpleQueue()
        for i in range(args.n_procs):
            copies.put(copy_repository(Path(folder) / str(i)))
        check_copy(Path(folder) / "0" / "copy", rooms, args.thorough)

        def try_one(mutant):
            copy = copies.get()
            try:
                return survives(copy, mutant, args.thorough)
            finally:
                copies.put(copy)

        n_survivors = 0
        for number, (survived, text) in enumerate(pool.map(try_one, mutants), 1):
            n_survivors += survived
            if survived:
                print(f"survived (number {number}): {text}", flush=True)
    n_noticed = len(mutants) - n_survivors
    print(f"{n_noticed} of {len(mutants)} noticed, {100 * n_noticed / len(mutants):.1f} %")


if __name__ == "__main__":
    cli.run(main)
