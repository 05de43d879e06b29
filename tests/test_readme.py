"""README.md: every command in it runs, every quotation of the code is what the code says."""

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import numpy as np
import openai_files
import pytest
from helpers import ROOT
from model_files import write_hf
from task_items import write_items

import gpt2
from gpt2_support.cli import COMMANDS as COMMANDS_OF
from gpt2_support.params import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in ("docs", "tests", "benchmarks", "models/stories")
      for page in sorted((ROOT / folder).glob("*.md"))),
]  # fmt: skip
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
PROGRAMS = ("gpt2.py", "encoder.py", "train.py", "utils.py", "evaluate.py")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# The commands that an installation has: {"gpt2-train": "train:main"}.
SCRIPTS = dict(re.findall(r'^(gpt2[\w-]*) = "([\w.]+:\w+)"$', PYPROJECT, re.M))
SMALL = {  # what makes a training short: nothing but its length and its reports changes
    "train.py": "--steps 2 --batch_size 2 --seq_len 8 --eval_tokens 100 --sample_every 9",
    "gpt2.py": "--n_tokens 3",
}
OPENAI_SHA256 = {  # of files that are the same for every size of model
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
pytestmark = pytest.mark.usefixtures("uncounted")


def commands_of(text):
    """Yield the commands of ours in a text, each a list of words: ["gpt2.py", "Once", "--help"]."""
    for part in re.split(r"\n|&&", text):
        if re.match(r"\s*(\$ )?(\S*/)?(python3?|gpt2[\w-]*) ", part) and "..." not in part:
            words = shlex.split(part.replace("$ ", ""), comments=True)
            name = Path(words[0]).name
            if name in SCRIPTS and len(words) > 1:
                yield [name, *words[1:]]
            elif len(words) > 2 and words[1] in PROGRAMS:
                yield words[1:]


COMMANDS = [
    command
    for text in [text for language, text in BLOCKS if language != "python"]
    + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
    for command in commands_of(text)
]


def program_of(command):
    """Return which of the five modules a command is: "train.py" for gpt2-train."""
    return {name: program for program, name in COMMANDS_OF.items()}.get(command[0], command[0])


def make_text(n=3000, seed=0):
    """Return n made-up words, with an end of story now and then."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("aeioulnrst"))
    made = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(n)]
    lines = [" ".join(made[i : i + 8]) for i in range(0, n, 8)]
    return "\n".join(
        f"{line}.\n<|endoftext|>" if i % 9 == 0 else line for i, line in enumerate(lines)
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the modules, the package, the bundled model, the files that README assumes."""
    folder = tmp_path_factory.mktemp("clone")
    for program in PROGRAMS:
        shutil.copy(ROOT / program, folder)
    ignored = shutil.ignore_patterns("__pycache__", "best", "state.npz")
    for name in ("gpt2_support", "models/stories"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("stories.txt", "mystory.txt", "other_stories.txt"):
        (folder / name).write_text(make_text(), encoding="utf-8")
    (folder / "datasets").mkdir()
    for name in ("names", "tinyshakespeare"):  # which have been fetched: see test_datasets.py
        text = "\n".join(make_text().split())
        (folder / "datasets" / f"{name}.txt").write_text(text, encoding="utf-8")
    write_items(folder / "datasets", 5)  # of LAMBADA and of HellaSwag
    config = Config(openai_files.N_VOCAB, n_ctx=256, n_embd=8, n_head=2, n_layer=2)
    for path in ("path/to/openai_or_hf", "site/124M"):
        (folder / path).mkdir(parents=True)
        openai_files.write_checkpoint(folder / path, config)
    expect_small_files(folder)
    return folder


def expect_small_files(folder):
    """Let the tokenizer files of the server be the ones that the copied modules know."""
    sources = {path: path.read_text("utf-8") for path in folder.glob("gpt2_support/**/*.py")}
    for name, digest in OPENAI_SHA256.items():
        path = next(path for path in sources if digest in sources[path])
        small = openai_files.hashlib.sha256((folder / "site/124M" / name).read_bytes())
        sources[path] = sources[path].replace(digest, small.hexdigest())
        path.write_text(sources[path], encoding="utf-8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server as the Hugging Face hub, with a small distilgpt2."""
    folder = tmp_path_factory.mktemp("hub")
    write_hf(folder)
    openai_files.write_hf_tokenizer(folder)
    with hub_server.serve() as site:
        site.add("distilbert/distilgpt2", folder)
        yield site


@pytest.fixture(scope="module")
def run(clone, hub):
    """`run(["gpt2.py", "x"])` runs a command in the clone, with servers for what it downloads."""
    with openai_files.serve(clone / "site") as server:

        def command(words):
            start = [words[0]]
            if words[0] in SCRIPTS:  # as the script does that pip makes
                module, _, function = SCRIPTS[words[0]].partition(":")
                start = ["-c", f"import sys, {module}; sys.argv[0] = {words[0]!r}; "
                         f"sys.exit({module}.{function}())"]  # fmt: skip
            argv = [sys.executable, *start, *words[1:]]
            argv = [word.replace("http://127.0.0.1:8123", server.url) for word in argv]
            env = {**os.environ, "GPT2_BASE_URL": server.url, "NO_PROXY": "127.0.0.1"}
            env |= {"GPT2_DATASETS_DIR": str(clone / "datasets"), "HF_ENDPOINT": hub.url}
            pipes = {"capture_output": True, "text": True, "encoding": "utf-8"}
            return subprocess.run(argv, cwd=clone, env=env, timeout=120, **pipes)

        yield command


def test_readme_has_commands_for_each_program():
    assert len(COMMANDS) > 12
    assert {*map(program_of, COMMANDS)} == {*PROGRAMS}


def test_commands_of_the_readme_run(run, thorough, request):
    """In their order, since one uses what another wrote; in a quick run the first of a program."""
    if not thorough:
        request.getfixturevalue("no_picture")
    first = {program_of(command): command for command in reversed(COMMANDS)}
    for command in COMMANDS if thorough else first.values():
        short = "" if {"--help", "--eval_only"} & {*command} else SMALL.get(program_of(command), "")
        done = run([*command, *short.split()])
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def test_python_of_the_readme_runs(run, clone):
    blocks = [block for language, block in BLOCKS if language == "python"]
    programs = [block for block in blocks if block.startswith(("import", "from"))]
    assert programs
    for i, block in enumerate(programs):
        (clone / f"block{i}.py").write_text(block, encoding="utf-8")
        done = run([f"block{i}.py"])
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_functions_in_the_readme_are_those_of_the_code():
    source = inspect.getsource(gpt2)
    quoted = [block for language, block in BLOCKS if block.startswith("def ")]
    assert quoted
    for block in quoted:
        for node in ast.parse(block).body:
            assert ast.get_source_segment(block, node) in source


def test_lines_of_the_lessons_are_counted():
    counts = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    counts += re.findall(r"^\| `(params\.py)`.*\((\d+) lines;", README, re.M)
    assert [name for name, _ in counts] == ["gpt2.py", "encoder.py", "train.py", "params.py"]
    for name, n_lines in counts:
        path = ROOT / ("gpt2_support/params.py" if name == "params.py" else name)
        assert len(path.read_text(encoding="utf-8").splitlines()) == int(n_lines), name


def test_story_of_the_readme_is_what_the_bundled_model_writes(run):
    """Its beginning: another BLAS rounds otherwise, which may change a word in the end."""
    prompt, flags = re.search(
        r'^python3 .* gpt2\.py "(.*)" (--n_tokens .*) --stats$', README, re.M
    ).groups()
    story = re.search(rf"^> {prompt}(.{{60}})", README, re.M)
    done = run(["gpt2.py", prompt, "--model", "stories", *flags.split()])
    assert done.stdout.startswith(story[1])


def anchor(heading):
    """Return what GitHub makes of a heading for links to it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, name = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if name:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert name in map(anchor, headings), link
