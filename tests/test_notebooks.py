"""Tests of notebooks/: each is committed with its outputs, and a thorough run executes it.

After you have edited a notebook, `python tests/test_notebooks.py notebooks/NAME.ipynb` runs it and
writes it back with its new outputs, and without metadata, which makes differences noisy.
"""

import ast
import base64
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.~:/])/(?:home|Users|root|tmp|usr|opt|var|mnt|work)\b|\b[A-Z]:\\"
)

pytestmark = pytest.mark.usefixtures("uncounted")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(path, folder):
    """Return a notebook with new outputs, run in a copy of the project: `folder`, which is empty.

    The copy has the modules, the notebooks and the bundled model only, so that the outputs do not
    depend on what else is there; the kernel is this Python.
    """
    import nbclient
    import nbformat

    for module in ROOT.glob("*.py"):
        shutil.copy(module, folder)
    shutil.copytree(ROOT / "gpt2_support", folder / "gpt2_support")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    shutil.copytree(ROOT / "models" / "stories", folder / "models" / "stories")
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    folders = {"JUPYTER_PATH": folder / "jupyter", "IPYTHONDIR": folder / "ipython"}
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": folder / "notebooks"}}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in folders.items()}):
        os.environ.pop("MPLBACKEND", None)  # or pictures would not become outputs
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources=where, coalesce_streams=True, record_timing=False
        )
        return client.execute()


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(cell):
    """Return the PNG files, bytes, among the outputs of a cell."""
    data = [output.get("data", {}) for output in cell["outputs"]]
    return [base64.b64decode(item["image/png"]) for item in data if "image/png" in item]


def output_types(notebook):
    """Return {cell id: the types of its outputs, such as "stdout" or ["image/png"]}."""
    types = {cell["id"]: [] for cell in code_cells(notebook)}
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            types[cell["id"]].append(output.get("name") or sorted(output.get("data", [])))
    return types


def to_text(notebook):
    """Return a notebook as nbformat writes it, a line for each line of source or output."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@pytest.mark.thorough
@each_notebook
def test_notebook_runs_from_start_to_end(path, tmp_path):
    for package in ("nbclient", "ipykernel", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (the extra `notebook` has it)")
    committed = json.loads(path.read_text(encoding="utf-8"))
    executed = execute(path, tmp_path)  # raises an error if a cell does
    assert output_types(executed) == output_types(committed), "run the notebook again"


@each_notebook
def test_notebook_uses_names_that_exist(path):
    """Finds what a change of names has broken, in no time."""
    modules = {name: importlib.import_module(name) for name in ("encoder", "gpt2", "train")}
    for cell in code_cells(json.loads(path.read_text(encoding="utf-8"))):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("gpt2_support"):
                exec(ast.unparse(node), {})  # an ImportError names what is missing
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                assert module is None or hasattr(module, node.attr), ast.unparse(node)


def test_every_notebook_is_found():
    assert "build_your_own_gpt" in [path.stem for path in NOTEBOOKS]


@each_notebook
def test_notebook_is_committed_with_all_outputs(path):
    cells = code_cells(json.loads(path.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = "".join(cell["source"])
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source
            assert output.get("name") != "stderr", f"{source}\n{output}"
        if "plt.show()" in source:
            assert pictures(cell), f"no picture from:\n{source}"
        if re.search(r"^print\(", source, re.MULTILINE):
            assert any(output.get("name") == "stdout" for output in cell["outputs"]), source


@each_notebook
def test_notebook_pictures_are_large_enough_to_read(path):
    cells = code_cells(json.loads(path.read_text(encoding="utf-8")))
    images = [picture for cell in cells for picture in pictures(cell)]
    assert images
    for picture in images:
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
        assert 400 <= width <= 1600 and 200 <= height <= 1600


@each_notebook
def test_notebook_holds_no_path_of_a_machine(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        texts = ["".join(cell["source"])]
        for output in cell.get("outputs", []):
            data = {
                mime: text for mime, text in output.get("data", {}).items() if "image" not in mime
            }
            texts.append("".join(output.get("text", [])) + json.dumps(data))
        for text in texts:
            assert not ABSOLUTE_PATH.search(text), text


@each_notebook
def test_notebook_has_nothing_that_makes_differences_noisy(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["metadata"] == METADATA
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert text == to_text(notebook)


def test_names_are_lower_case_sorted_and_different():
    names = (ROOT / "notebooks" / "names.txt").read_text(encoding="ascii").split("\n")
    assert names.pop() == ""  # after the last line end
    assert names == sorted(set(names)) and len(names) > 1000
    assert all(re.fullmatch("[a-z]{3,}", name) for name in names)


def rewrite(path):
    """Run a notebook and write it back, clean."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, Path(folder))
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rewrite(Path(name))
