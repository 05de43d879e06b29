"""README.md: every command in it runs, every quotation of the code is what the code says."""

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import openai_files
import pytest
from conftest import ROOT

import encoder
import gpt2
import train
import utils
from gpt2_support import files, hub
from gpt2_support.params import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMAND = re.compile(r"(?:\$ )?python ((?:gpt2|encoder|train|utils)\.py [^#\n]*)")
COMMANDS = [
    match.strip()
    for text in [block for language, block in BLOCKS if not language]
    + re.findall(r"`(python [^`]*)`", README)
    for line in text.splitlines()
    for match in COMMAND.findall(line)
]
pytestmark = pytest.mark.usefixtures("uncounted")
SMALL = {  # what makes a training short: nothing but its length and its reports changes
    "train.py": "--steps 2 --batch_size 2 --seq_len 8 --eval_tokens 100 --sample_every 9",
    "gpt2.py": "--n_tokens 3",
}


def words(n=3000, seed=0):
    """Text of n made-up words, with an end of story now and then."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("aeioulnrst"))
    made = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(n)]
    lines = [" ".join(made[i : i + 8]) for i in range(0, n, 8)]
    return "\n".join(
        f"{line}.\n<|endoftext|>" if i % 9 == 0 else line for i, line in enumerate(lines)
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the four modules, the bundled model, the files that the README assumes."""
    folder = tmp_path_factory.mktemp("clone")
    for module in (encoder, gpt2, train):
        shutil.copy(module.__file__, folder)
    shutil.copytree(
        ROOT / "models" / "stories",
        folder / "models" / "stories",
        ignore=shutil.ignore_patterns("best", "state.npz"),
    )
    for name in ("stories.txt", "mystory.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(words(), encoding="utf-8")
    (folder / "names.txt").write_text("\n".join(words(900).split()), encoding="utf-8")
    config = Config(openai_files.N_VOCAB, n_ctx=128, n_embd=8, n_head=2, n_layer=2)
    for path in ("path/to/openai_or_hf", "site/124M"):
        (folder / path).mkdir(parents=True)
        openai_files.write_checkpoint(folder / path, config)
    source = inspect.getsource(utils)
    for name, digest in hub.TOKENIZER_SHA256.items():  # let the small files be the known ones
        small = files.file_hash(folder / "site/124M" / name, "sha256").hexdigest()
        assert digest in source
        source = source.replace(digest, small)
    (folder / "utils.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(clone):
    """`run("gpt2.py x")` runs a command in the clone, with a server for OpenAI's."""
    with openai_files.serve(clone / "site") as server:

        def command(line):
            line = line.replace("http://127.0.0.1:8123", server.url)
            env = {**os.environ, "GPT2_BASE_URL": server.url, "NO_PROXY": "127.0.0.1"}
            program, *args = shlex.split(line)
            return subprocess.run(
                [sys.executable, program, *args],
                cwd=clone,
                env=env,
                timeout=120,
                capture_output=True,
                text=True,
                encoding="utf-8",
            )

        yield command


def test_readme_has_commands_for_each_program():
    assert len(COMMANDS) > 12
    for program in ("gpt2.py", "encoder.py", "train.py", "utils.py"):
        assert any(command.startswith(program) for command in COMMANDS)


def test_every_command_of_the_readme_runs(run):
    """In the order in which they stand, since one uses what another wrote."""
    for command in COMMANDS:
        program = command.split()[0]
        extra = "" if {"--help", "--eval_only"} & {*command.split()} else SMALL.get(program, "")
        done = run(f"{command} {extra}")
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def test_python_of_the_readme_runs(run, clone):
    blocks = [block for language, block in BLOCKS if language == "python"]
    programs = [block for block in blocks if block.startswith("import")]
    assert programs
    for i, block in enumerate(programs):
        (clone / f"block{i}.py").write_text(block, encoding="utf-8")
        done = run(f"block{i}.py")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_functions_in_the_readme_are_those_of_the_code():
    source = inspect.getsource(gpt2)
    quoted = [block for language, block in BLOCKS if block.startswith("def ")]
    assert quoted
    for block in quoted:
        for node in ast.parse(block).body:
            assert ast.get_source_segment(block, node) in source


def test_story_of_the_readme_is_what_the_bundled_model_writes(run):
    """Its beginning: another BLAS rounds otherwise, which may change a word in the end."""
    story = re.search(r"what it printed:\n\n> (.{80})", README)
    done = run('gpt2.py "Once upon a time" --model stories --n_tokens 60')
    assert done.stdout.startswith(story[1][len("Once upon a time") :])


def test_links_of_the_readme_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if not link.startswith("http"):
            path, _, _ = link.partition("#")
            assert (ROOT / path).exists(), link
    headings = re.findall(r"^#+ (.+)$", README, re.M)
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings]
