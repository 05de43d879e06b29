"""Models by name: finding them, and downloading OpenAI's.

A model is a folder such as `124M/`, with `model.bin` and `tokenizer.bin`. OpenAI's files are
downloaded to `124M/.download/` and converted when all of them are there; the lock `.124M.lock`
keeps other processes out meanwhile.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_support import cli
from gpt2_support.files import check_regular, file_hash, hold_lock, make_folders
from gpt2_support.folders import BUNDLED_MODEL, MODELS_DIR, candidates
from gpt2_support.formats.llmc import load_params
from gpt2_support.formats.token_table import load_tokenizer
from gpt2_support.http import Effort, fetch
from gpt2_support.messages import info
from gpt2_support.weights import convert

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DATA_FILE = "model.ckpt.data-00000-of-00001"
MAX_BYTES = {  # a server may not send more; for the data file, see DATA_BYTES
    "encoder.json": 1_042_301,
    "vocab.bpe": 456_318,
    "hparams.json": 10_000,
    "model.ckpt.index": 100_000,
}
OPENAI_FILES = (*MAX_BYTES, DATA_FILE)
DATA_BYTES = {  # of the data file of each model
    "124M": 497_759_232,
    "355M": 1_419_292_672,
    "774M": 3_096_120_320,
    "1558M": 6_230_444_800,
}
MODEL_NAMES = tuple(DATA_BYTES)
MODEL_ALIASES = {
    "117M": "124M",
    "345M": "355M",
    "gpt2": "124M",
    "gpt2-medium": "355M",
    "gpt2-large": "774M",
    "gpt2-xl": "1558M",
}
TOKENIZER_SHA256 = {  # the same for models of every size
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
SHA256_124M = {  # from a secondary source: a mismatch is reported, the tensors' CRCs decide
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    DATA_FILE: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}


def resolve_name(name: str) -> str:
    """Return OpenAI's name of a model, "124M" for "gpt2"; raise ValueError if it is not one."""
    if name not in MODEL_NAMES and name not in MODEL_ALIASES:
        known = ", ".join([*MODEL_NAMES, *MODEL_ALIASES])
        raise ValueError(f"unknown model {name!r}, expected one of {known}")
    return MODEL_ALIASES.get(name, name)


def find_model(name: str | Path, models_dir: str | Path = MODELS_DIR) -> Path:
    """Return the path of a model: `name` itself if it is one, or a model of that name.

    Names are looked up in `models_dir`, in `models` of the current folder and among the bundled
    models. One of OpenAI's models that is not there is downloaded. Raises FileNotFoundError for
    any other name.
    """
    if not isinstance(name, str | os.PathLike):
        actual = f"a {type(name).__name__}"
        raise ValueError(f'a model is given by its name, "124M" say, or its path, not by {actual}')
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


def download(
    name: str,
    models_dir: str | Path = MODELS_DIR,
    base_url: str | None = None,
    keep: bool = False,
    pause: Callable[[float], Any] = time.sleep,
) -> Path:
    """Download one of OpenAI's models, convert it, and return its folder, `models_dir`/<name>.

    A model that is already there is left alone, and an interrupted download is resumed. `base_url`
    is where <name>/encoder.json and the other files are; without it GPT2_BASE_URL of the
    environment, or OpenAI's server. `keep` keeps OpenAI's files, in <name>/openai. `pause(seconds)`
    waits before a retry. Raises ValueError for a bad name or file, ConnectionError if the server
    cannot be reached or keeps failing, and another OSError for what it refuses or for a full disk.
    """
    name = resolve_name(name)
    base_url = (base_url or os.environ.get("GPT2_BASE_URL") or OPENAI_URL).rstrip("/")
    folder = Path(models_dir) / name
    work, lock = folder / ".download", folder.with_name(f".{name}.lock")
    for path in filter(os.path.lexists, (lock, folder / "model.bin", folder / "tokenizer.bin")):
        check_regular(path)
    if find_problem(folder) is None and not work.exists() and not lock.exists():
        info(f"{folder}: already downloaded")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(lock), make_folders(folder, work):
        problem = find_problem(folder)
        if problem is None:  # another process downloaded it, or was killed while it cleaned up
            info(f"{folder}: already downloaded")
        else:
            if isinstance(problem, ValueError):
                info(f"{problem}; downloading the model again")
            fetch_all(f"{base_url}/{name}", work, name, Effort(pause))
            convert_download(work, folder)
            if keep:
                shutil.rmtree(folder / "openai", ignore_errors=True)
                os.replace(work, folder / "openai")
        shutil.rmtree(work, ignore_errors=True)
    return folder


def find_problem(folder: Path) -> Exception | None:
    """Return the error that loading a folder's model and tokenizer raises, or None."""
    try:
        load_params(folder / "model.bin")
        load_tokenizer(folder / "tokenizer.bin")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return error
    return None


def fetch_all(url: str, folder: Path, name: str, effort: Effort) -> None:
    """Download OpenAI's files of a model into a folder; a file that is there has been verified."""
    sizes = MAX_BYTES | {DATA_FILE: DATA_BYTES[name]}
    reported_sha256 = SHA256_124M if name == "124M" else {}
    for file_name in OPENAI_FILES:
        path = folder / file_name
        if not path.exists():
            sha256 = TOKENIZER_SHA256.get(file_name)
            fetch(f"{url}/{file_name}", path, sizes[file_name], sha256, effort=effort)
            effort = effort._replace(has_answered=True)
        expected = reported_sha256.get(file_name)
        if expected and file_hash(path, "sha256").hexdigest() != expected:
            unknown = "not the file known for this model (sha256)"
            info(f"{file_name}: {unknown}; its contents will decide")


def convert_download(work: Path, folder: Path) -> None:
    """Convert a downloaded checkpoint; if it is damaged, remove the files to download again."""
    try:
        convert(work, folder)
    except ValueError as error:
        for name in OPENAI_FILES:
            path = work / name
            if "data" not in name or getattr(error, "path", None) == path:
                path.unlink(missing_ok=True)
        raise ValueError(f"{error}; run this again to fetch the damaged file again") from None
