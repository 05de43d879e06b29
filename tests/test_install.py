"""An installation is whole: as an editable one, a plain one and a wheel.

Each goes into a virtual environment of its own, which shares NumPy and the other dependencies with
the one that runs the tests, so nothing is downloaded. All are used in a folder that holds somebody
else's `utils.py`, `encoder.py`, `train.py`, `evaluate.py` and `names.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, TEXT
from task_items import write_items

from gpt2_support import __version__, cli

pytestmark = pytest.mark.thorough

LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "*.egg-info", "state.npz", "best"
)
BIN = "Scripts" if os.name == "nt" else "bin"
EXE = ".exe" if os.name == "nt" else ""


def check_run(*argv, **kwargs):
    """Run a program that has to succeed; return its CompletedProcess."""
    kwargs = {"text": True, "encoding": "utf-8", "timeout": 300, **kwargs}
    done = subprocess.run([*map(str, argv)], capture_output=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with more in its models/ than is committed."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    models = folder / "models"
    for model in [path for path in models.iterdir() if path.is_dir() and path.name != "stories"]:
        shutil.rmtree(model)
    for name in ("124M/model.bin", "stories/best/model.bin", "stories/state.npz"):
        (models / name).parent.mkdir(exist_ok=True)
        (models / name).write_text("not for others")
    return folder


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """What `python -m build` printed, and the wheel that it made from its source distribution."""
    out = tmp_path_factory.mktemp("dist")
    done = check_run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out
    )
    (wheel,) = out.glob("*.whl")
    return done.stdout + done.stderr, wheel


def test_build_has_nothing_to_complain_about(built):
    printed, _ = built
    lines = [line for line in printed.splitlines() if "byte-compiling is disabled" not in line]
    assert not [line for line in lines if "warn" in line.lower() or "deprecat" in line.lower()]


def test_wheel_holds_the_modules_the_package_and_the_bundled_model(built):
    _, wheel = built
    assert wheel.name == f"gpt2_numpy-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    info = f"gpt2_numpy-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {
        "encoder.py", "gpt2.py", "train.py", "gpt2_support", info
    }  # fmt: skip
    bundled = [name for name in names if "bundled" in name]
    expected = ["README.md", "model.bin", "tokenizer.bin"]
    assert sorted(bundled) == [f"gpt2_support/bundled/stories/{name}" for name in expected]
    packaged = {name for name in names if name.startswith("gpt2_support/")} - set(bundled)
    source = ROOT / "gpt2_support"
    files = {*source.rglob("*.py"), source / "py.typed"}
    assert packaged == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module", params=["editable", "plain", "wheel"])
def installation(request, checkout, built, tmp_path_factory):
    """(how it was installed, its virtual environment, a folder with somebody's modules)."""
    root = tmp_path_factory.mktemp(request.param)
    environment, folder = root / "venv", root / "folder"
    venv.create(environment, with_pip=False)
    python = environment / BIN / f"python{EXE}"
    site = check_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site.stdout.strip(), "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    source = {"editable": ["-e", checkout], "plain": [checkout], "wheel": [built[1]]}
    options = ["--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation"]
    check_run(
        sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check",
        *options, *source[request.param], cwd=root,
    )  # fmt: skip
    folder.mkdir()
    for name in ("utils", "encoder", "train", "evaluate", "names"):
        text = f"raise ImportError('this is somebody else\\'s {name}.py')\n"
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return request.param, environment, folder


@pytest.fixture
def user(installation, tmp_path, monkeypatch):
    """`user("gpt2", "--help")` runs a program of the environment in the folder, with a home."""
    _, environment, folder = installation
    for name in ("GPT2_MODELS_DIR", "PYTHONPATH", "XDG_CACHE_HOME", "COVERAGE_PROCESS_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONUTF8", "1")

    def run(program, *args, cwd=folder, **kwargs):
        return check_run(environment / BIN / f"{program}{EXE}", *args, cwd=cwd, **kwargs)

    return run


USE_GPT2 = textwrap.dedent(
    """
    import gpt2, numpy as np
    params = gpt2.load("stories")
    logits = gpt2.forward(params, [1, 2, 3])
    ids = list(gpt2.generate(params, [1, 2, 3], 4))
    loss, grads = gpt2.loss_and_grads(params, np.array([[1, 2, 3]]), np.array([[2, 3, 4]]))
    print(gpt2.__file__, logits.shape, len(ids), 0 < loss < 20, grads.flat.any(), sep="\\n")
    """
)


def test_gpt2_works_beside_other_modules_of_the_same_names(installation, user):
    _, environment, folder = installation
    file, *results = user("python", "-c", USE_GPT2).stdout.splitlines()
    assert results == ["(3, 4096)", "4", "True", "True"]
    assert Path(file).resolve().parent != folder
    if installation[0] != "editable":
        assert environment.resolve() in Path(file).resolve().parents


def test_names_that_an_installation_adds_are_four(user, tmp_path):
    code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    names = ("gpt2", "encoder", "train", "gpt2_support", "utils", "evaluate", "models", "tests")
    names += ("benchmarks",)
    done = user("python", "-c", code, *names, cwd=tmp_path)
    assert done.stdout.split() == ["gpt2", "encoder", "train", "gpt2_support"]


def test_downloads_go_to_the_checkout_or_to_the_cache(installation, user, checkout, tmp_path):
    code = "from gpt2_support import folders; print(folders.MODELS_DIR)"
    models_dir = Path(user("python", "-c", code).stdout.strip())
    if installation[0] == "editable":
        assert models_dir == checkout / "models"
    else:
        assert models_dir.is_relative_to(tmp_path / "home")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.values()))
def test_command_knows_its_name_and_version(user, command):
    assert user(command, "--version").stdout == f"{command} {__version__}\n"
    page = user(command, "--help").stdout
    assert page.startswith(f"usage: {command} ")
    assert f"\nexamples:\n  {command} " in page


def test_command_gpt2_tells_a_story(user):
    done = user("gpt2", "Once upon a time", "--model", "stories", "--n_tokens", 8)
    assert done.stdout == ", there was a little girl named Lily\n"
    assert done.stderr == ""


def test_command_gpt2_evaluate_measures_beside_other_modules(user, tmp_path):
    write_items(tmp_path, 5)
    flags = ("--model", "stories", "--data", "lambada.jsonl", "--json")
    done = user("gpt2-evaluate", *flags, cwd=tmp_path)
    assert json.loads(done.stdout)["n_items"] == 5
    assert "' upon'" in user("gpt2-evaluate", "Once upon", "--model", "stories").stdout


def test_commands_tokenize_train_and_convert(installation, user, checkout, tmp_path):
    """From a text to a model that gpt2 finds by its name, and to Hugging Face's format."""
    (tmp_path / "fish.txt").write_text(TEXT, encoding="utf-8")
    user("gpt2-tokenize", "train", "fish.txt", "--n_vocab", 270, cwd=tmp_path)
    user("gpt2-tokenize", "encode", "fish.txt", "--tokenizer", "tokenizer.bin",
         "--out", "fish.bin", cwd=tmp_path)  # fmt: skip
    shape = "--n_layer 1 --n_head 2 --n_embd 8 --n_ctx 16 --batch_size 4"
    done = user("gpt2-train", "--data", "fish.bin", "--steps", 4, *shape.split(), cwd=tmp_path)
    is_editable = installation[0] == "editable"
    model = (checkout if is_editable else tmp_path) / "models" / "fish"
    assert (model / "model.bin").is_file()
    assert not [*(tmp_path / "home").rglob("model.bin")]  # a cache is no place for one's own models
    advice = done.stderr.splitlines()[-1].split("To sample: ")[1]
    assert advice.startswith("gpt2 ")
    done = user("gpt2", "one", "--model", "fish", "--n_tokens", 3, cwd=tmp_path)
    assert len(done.stdout) > 1
    user("gpt2-weights", "convert", model, tmp_path / "hf", "--to", "hf", cwd=tmp_path)
    assert (tmp_path / "hf" / "model.safetensors").is_file()
