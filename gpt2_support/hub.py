"""Models by name: where they live, and fetching OpenAI's."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support import cli
from gpt2_support.files import file_hash, only_process, remove_if_empty
from gpt2_support.folders import BUNDLED_MODEL, MODELS_DIR, candidates
from gpt2_support.formats.llmc import load_params
from gpt2_support.formats.token_table import load_tokenizer
from gpt2_support.http import fetch
from gpt2_support.messages import info
from gpt2_support.weights import convert

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# Downloads. Every file goes to `<file>.part`, beside which `<file>.part.json` keeps what the
# server said of it, so that a later call can ask for the rest; it gets its own name when its
# length and checksums are right. All of it happens in `.download`, one process at a time.

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"


MODEL_NAMES = ("124M", "355M", "774M", "1558M")


MODEL_ALIASES = {
    "117M": "124M",
    "345M": "355M",
    "gpt2": "124M",
    "gpt2-medium": "355M",
    "gpt2-large": "774M",
    "gpt2-xl": "1558M",
}


OPENAI_FILES = (
    "encoder.json",
    "vocab.bpe",
    "hparams.json",
    "model.ckpt.index",
    "model.ckpt.data-00000-of-00001",
)


TOKENIZER_SHA256 = {  # the same for every size of model
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


SHA256_124M = {  # from a secondary source: a mismatch is told, and the tensors' CRC decides
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.data-00000-of-00001": (
        "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
    ),
}


def resolve_name(name):
    """Return OpenAI's name of a model, `124M` for `gpt2`; raises ValueError if it is not one."""
    if name not in MODEL_NAMES and name not in MODEL_ALIASES:
        known = ", ".join([*MODEL_NAMES, *MODEL_ALIASES])
        raise ValueError(f"unknown model {name!r}, expected one of {known}")
    return MODEL_ALIASES.get(name, name)


def download(name, models_dir=MODELS_DIR, base_url=None, keep=False, pause=time.sleep):
    """Fetch one of OpenAI's models into `models_dir`/<name> and convert it; return that folder.

    A finished model is left alone, an interrupted download goes on. `base_url` (or else
    GPT2_BASE_URL in the environment, or else OpenAI's) is where <name>/encoder.json and the other
    files lie; `keep` keeps them, in the folder `openai`; `pause(seconds)` waits before a retry.
    Raises ValueError for a bad name or file, ConnectionError if the server cannot be reached or
    keeps failing, and another OSError for what it refuses or the disk cannot take.
    """
    name = resolve_name(name)
    base_url = (base_url or os.environ.get("GPT2_BASE_URL") or OPENAI_URL).rstrip("/")
    folder = Path(models_dir) / name
    work = folder / ".download"
    lock = folder.with_name(f".{name}.lock")
    if find_problem(folder) is None and not work.exists() and not lock.exists():
        info(f"{folder}: already downloaded")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_process(lock), remove_if_empty(folder, work):
        problem = find_problem(folder)
        if problem is None:  # another process has done it, or one was stopped while cleaning up
            info(f"{folder}: already downloaded")
        else:
            if isinstance(problem, ValueError):
                info(f"{problem}; downloading the model again")
            fetch_all(f"{base_url}/{name}", work, SHA256_124M if name == "124M" else {}, pause)
            convert_download(work, folder)
            if keep:
                shutil.rmtree(folder / "openai", ignore_errors=True)
                os.replace(work, folder / "openai")
        shutil.rmtree(work, ignore_errors=True)
    return folder


def find_model(name: str | Path, models_dir: str | Path = MODELS_DIR) -> Path:
    """Return the path of a model: `name` itself if it is one, or a model of that name.

    Names are looked up in `models_dir`, in `models` of the current folder and among the bundled
    models. One of OpenAI's models that is not there is downloaded. Raises FileNotFoundError for
    any other name.
    """
    paths = [Path(name), *candidates(MODEL_ALIASES.get(str(name), name), models_dir)]
    for path in paths:
        if path.is_file() or (path / "model.bin").is_file():
            return path
    if name in MODEL_NAMES or name in MODEL_ALIASES:
        return download(name, models_dir)
    raise FileNotFoundError(
        f"no model {name}: expected a model file, or a folder with model.bin, at one of "
        f"{', '.join(map(str, paths))}, or one of {', '.join(MODEL_NAMES)} to download"
    )


def find_default_model(models_dir: str | Path = MODELS_DIR) -> Path:
    """Return the path of 124M or, where it cannot be downloaded, of the bundled model."""
    try:
        return find_model("124M", models_dir)
    except ConnectionError:
        path = find_model(BUNDLED_MODEL, models_dir)
        info(
            "GPT-2 is not here and its server cannot be reached: using the bundled model "
            f"`{BUNDLED_MODEL}`, which tells children's stories. For GPT-2 itself, on a network: "
            + cli.command("utils.py", "download", "124M")
        )
        return path


def find_problem(folder):
    """Return None if a folder's model and tokenizer load, else the error that says why not."""
    try:
        load_params(folder / "model.bin")
        load_tokenizer(folder / "tokenizer.bin")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return error
    return None


def fetch_all(url, folder, reported_sha256, pause):
    """Fetch OpenAI's files of one model into a folder; those that are there already are good."""
    reached = False
    for name in OPENAI_FILES:
        path = folder / name
        if not path.exists():
            fetch(f"{url}/{name}", path, TOKENIZER_SHA256.get(name), reached, pause)
            reached = True
        expected = reported_sha256.get(name)
        if expected and file_hash(path, "sha256").hexdigest() != expected:
            info(f"{name}: not the file known for this model (sha256); its contents will decide")


def convert_download(work, folder):
    """Convert a downloaded checkpoint; if it is damaged, remove what has to be fetched again."""
    try:
        convert(work, folder)
    except ValueError as error:
        for name in OPENAI_FILES:
            path = work / name
            if "data" not in name or getattr(error, "path", None) == path:
                path.unlink(missing_ok=True)
        raise ValueError(f"{error}; run this again to fetch the damaged file again") from None
