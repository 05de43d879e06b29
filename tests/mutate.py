"""Change one operator or constant at a time, and see whether a test notices.

    python tests/mutate.py --n 100 --seed 0

Mutants are made in the backward functions of gpt2.py and in what reads files in utils.py and
encoder.py: an operator is exchanged, a condition negated, a number changed, a statement left out.
Each runs in a copy of the repository, first against the tests that are nearest to the function,
then, if it survives, against all tests of the readers or of the model. Reports the survivors.
"""

import ast
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpt2_support import cli

ROOT = Path(cli.__file__).resolve().parent.parent
SECONDS = 600  # for all tests of a mutant; more is a hang, which is noticed

MODEL = [["test_gpt2.py", "-k", "not cli"], ["test_properties.py", "-k", "gradient or chunk"]]
FILES = [["test_utils.py", "-k", "not download"], ["test_encoder.py"], ["test_hostile.py"]]
GROUPS = [  # module, functions (a regular expression), the nearest tests, all tests
    (
        "gpt2.py",
        r".*_backward|head|cross_entropy|sum_rows|as_rows|token_losses|loss_and_grads",
        ["test_gpt2.py", "-k", "gradient or grads or loss or cross_entropy or backward"],
        MODEL,
    ),
    (
        "utils.py",
        r"read_header|check_size|load_params|read_model_header|bf16_.*|load_tokens|open_bin",
        ["test_utils.py", "-k", "model_file or tokens_file or convert_accepts"],
        FILES,
    ),
    (
        "utils.py",
        r"load_tokenizer|find_(tokenizer|eot|misplaced)|read_bin_tokenizer|token_bytes|parse_(json|merges|hugging_face)"
        r"|read_json.*|read_merges|check_(token_table|merges)|recover_merges",
        ["test_encoder.py", "-k", "token or table or merge or vocabulary or hugging or json"],
        FILES,
    ),
    (
        "utils.py",
        r"crc.*|masked_crc32c|read_(varints?|block|table|bundle|hparams)|block_entries|protobuf_.*"
        r"|bundle_entry|check_bundle_size|open_openai|find_index|check_tensors|read_tensor",
        ["test_utils.py", "-k", "crc or openai or table or block"],
        FILES,
    ),
    (
        "utils.py",
        r"hf_(name|shape|tensors)|read_safetensors|safetensors_entry|open_hf|read_hf_config",
        ["test_utils.py", "-k", "hf or safetensors"],
        FILES,
    ),
    (
        "encoder.py",
        r"bpe|load|decode|decode_bytes|feed|flush",
        ["test_encoder.py", "-k", "bpe or decode or load or stream"],
        [["test_encoder.py"], ["test_token_table.py"]],
    ),
    (
        "gpt2_support/corpus.py",
        r"read_.*|encode_.*",
        ["test_corpus.py"],
        [["test_corpus.py"], ["test_encoder.py"]],
    ),
]
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
    actual = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    actual = [function for function in actual if re.fullmatch(functions, function.name)]
    return [(function, node) for function in actual for node in walk(function)]


def make_mutants():
    """Return (group, place, description, source) of every mutant there is."""
    mutants = []
    for group in GROUPS:
        source = (ROOT / group[0]).read_text(encoding="utf-8")
        for at, (_, node) in enumerate(sites(ast.parse(source), group[1])):
            for which in range(len(list(changes(node)))):
                mutants.append((group, source, at, which))
    return mutants


def mutate(group, source, at, which):
    """Return the source of a mutant, and a line that says what was changed."""
    tree = ast.parse(source)
    function, node = sites(tree, group[1])[at]
    before = ast.unparse(function).split("\n")
    list(changes(node))[which]()
    ast.fix_missing_locations(tree)
    after = ast.unparse(function).split("\n")
    lines = [(a, b) for a, b in zip(before, after, strict=False) if a != b] or [("", "")]
    old, new = (" ".join(line.split()) for line in lines[0])
    return ast.unparse(tree), f"{group[0]} {function.name}:  {old}  ->  {new}"


def copy_repository(folder):
    """Copy what the tests need, and show them the reference data where there is some."""
    copy = folder / "copy"
    copy.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, copy)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=ignored)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    if (ROOT / "models" / "stories").exists():
        (copy / "models").symlink_to(ROOT / "models")
    return copy


def is_noticed(copy, tests):
    """Return whether a run of some tests fails, or does not end."""
    file, *selection = tests
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
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
    if status not in (0, 1, 2):
        raise ValueError(f"pytest ended with status {status}: {' '.join(command)}")
    return status != 0


def survives(copy, mutant):
    """Return whether no test notices a mutant, and its description."""
    group, source, *_ = mutant
    new, text = mutate(*mutant)
    (copy / group[0]).write_text(new, encoding="utf-8")
    try:
        return not any(is_noticed(copy, tests) for tests in [group[2], *group[3]]), text
    finally:
        (copy / group[0]).write_text(source, encoding="utf-8")


def main():
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=cli.positive_int, default=100, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--n_procs", type=cli.positive_int, default=os.cpu_count() or 1,
                        help="to try at a time")  # fmt: skip
    parser.add_argument("--functions", default=".*", help="only these: a regular expression")
    args = parser.parse_args()
    mutants = [m for m in make_mutants() if re.fullmatch(args.functions, function_of(m))]
    n_all = len(mutants)
    mutants = random.Random(args.seed).sample(mutants, min(args.n, n_all))
    print(f"{len(mutants)} of {n_all} mutants", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.n_procs) as pool:
        copies, lock, n_survivors = {}, threading.Lock(), 0
        copies = [copy_repository(Path(folder) / str(i)) for i in range(args.n_procs)]
        check_copy(copies[0])

        def try_one(mutant):
            with lock:
                copy = copies.pop()
            with contextlib.ExitStack() as stack:
                stack.callback(copies.append, copy)
                return survives(copy, mutant)

        for number, (survived, text) in enumerate(pool.map(try_one, mutants), 1):
            n_survivors += survived
            if survived:
                print(f"survived (number {number}): {text}", flush=True)
    n_killed = len(mutants) - n_survivors
    print(f"{n_killed} of {len(mutants)} noticed, {100 * n_killed / len(mutants):.1f} %")


def function_of(mutant):
    """Return the name of the function that a mutant is in."""
    group, source, at, _ = mutant
    return cached_sites(source, group[1])[at]


def cached_sites(source, functions, cache={}):  # noqa: B006
    """Return the names of the functions of all sites, which are many to parse each time."""
    key = (len(source), functions)
    if key not in cache:
        cache[key] = [function.name for function, _ in sites(ast.parse(source), functions)]
    return cache[key]


def check_copy(copy):
    """Raise ValueError unless the tests pass without any change."""
    for group in GROUPS:
        if is_noticed(copy, group[2]):
            raise ValueError(f"{' '.join(group[2])} fails without any change")


if __name__ == "__main__":
    cli.run(main)
