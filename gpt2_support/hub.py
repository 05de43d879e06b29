"""Models by name: finding them, and downloading them from OpenAI or from the Hugging Face hub.

A model is a folder such as `124M/` or `owner/name/`, with `model.bin` and `tokenizer.bin`. The
original files are downloaded to `124M/.download/` and converted when all of them are there; the
lock `.124M.lock` keeps other processes out meanwhile.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_support import cli, huggingface_hub
from gpt2_support.files import DamagedFile, check_regular, file_hash, hold_lock, make_folders
from gpt2_support.folders import BUNDLED_MODEL, MODELS_DIR, bundled_model, candidates
from gpt2_support.formats import token_table
from gpt2_support.formats.llmc import load_params
from gpt2_support.formats.token_table import load_tokenizer, save_tokenizer
from gpt2_support.http import NETWORK_ADVICE, BadAnswer, Effort, RefusedRequest, fetch, public
from gpt2_support.messages import info, preview
from gpt2_support.weights import convert, find_reader, find_run

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
COMMUNITY = {  # where the Hugging Face hub has the same weights
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
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
    """Return the name under which a model is kept: OpenAI's, "124M" for "gpt2", or the hub's.

    Raises ValueError if there can be no such model to download.
    """
    name = MODEL_ALIASES.get(name, name)
    if name not in MODEL_NAMES and not huggingface_hub.is_repository(name):
        known = ", ".join([*MODEL_NAMES, *MODEL_ALIASES])
        raise ValueError(
            f"unknown model {preview(name)!r}, expected one of {known}, or distilgpt2 or another "
            "owner/name[@revision] of the Hugging Face hub"
        )
    return name


def find_model(
    name: str | Path, models_dir: str | Path = MODELS_DIR, hurried: bool = False
) -> Path:
    """Return the path of a model: `name` itself if it is one, or a model of that name.

    The path is a model file or a folder in a layout that `load_params` reads. Names are looked up
    in `models_dir`, in `models` of the current folder and among the bundled models. One of OpenAI's
    or of the Hugging Face hub's that is not there is downloaded; `hurried`, at the first attempt or
    not at all. Raises FileNotFoundError for any other name.
    """
    if not isinstance(name, str | os.PathLike):
        actual = f"a {type(name).__name__}"
        raise ValueError(f'a model is given by its name, "124M" say, or its path, not by {actual}')
    paths = possible_paths(name, models_dir)
    for path in paths:
        if is_model(path):
            find_reader(path)  # says what is wrong with a file that cannot be read
            return path
    if can_be_downloaded(str(name), Path(models_dir)):
        return download(str(name), models_dir, hurried=hurried)
    raise FileNotFoundError(
        f"no model {name}: expected a model file, or a folder with model.bin, "
        f"{places(paths)}{problem_with(Path(name))}"
    )


def possible_paths(name: str | Path, models_dir: str | Path = MODELS_DIR) -> list[Path]:
    """Return `name` itself and the paths of models of that name, as they are tried."""
    return [Path(name), *candidates(MODEL_ALIASES.get(str(name), name), models_dir)]


def places(paths: list[Path]) -> str:
    """Return where something was looked for and from where it can be had, for a message."""
    return (
        f"at one of {', '.join(map(str, paths))}, or one of {', '.join(MODEL_NAMES)}, "
        "or owner/name of the Hugging Face hub, to download"
    )


def find_tokenizer(name: str | Path, models_dir: str | Path = MODELS_DIR) -> Path:
    """Return a path with a token table: `name` itself, or the folder of a model of that name.

    What is not there is downloaded: of OpenAI's models the table alone, of the others the model.
    A folder without a table is returned if it holds a model, or if there is nothing to download.
    """
    paths, name = possible_paths(name, models_dir), MODEL_ALIASES.get(str(name), str(name))
    for path in paths:
        # A model that lacks its table does not take that of another one; OpenAI's have the same.
        lacks_it = is_model(path) and (path == paths[0] or name not in MODEL_NAMES)
        if path.is_file() or has_tokenizer(path) or lacks_it:
            return path
    if name in MODEL_NAMES:
        return download_tokenizer(name, Path(models_dir))
    try:
        return find_model(name, models_dir)
    except FileNotFoundError:
        folder = next(filter(Path.is_dir, paths), None)
        if folder is not None:
            return folder
        raise FileNotFoundError(
            f"no tokenizer {name}: expected a tokenizer.bin, tokenizer.json or encoder.json, or a "
            f"folder with one, {places(paths)}"
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a token table."""
    try:
        token_table.find_tokenizer(folder)
    except OSError:
        return False
    return True


def is_model(path: Path) -> bool:
    """Return whether a path is a file, or a folder in one of the layouts that we read."""
    try:
        find_reader(path)
    except (ValueError, OSError):
        return path.is_file()
    return path.exists()


def can_be_downloaded(name: str, models_dir: Path) -> bool:
    """Tell the name of a model on a server from a path that does not exist.

    A name such as runs/mine is a path if there is a folder runs, other than that of `models_dir`.
    """
    if name in MODEL_NAMES or name in MODEL_ALIASES:
        return True
    owner = Path(name).parent
    is_path = str(owner) != "." and owner.exists()
    is_path = is_path and os.path.realpath(owner) != os.path.realpath(models_dir / owner)
    return huggingface_hub.is_repository(name) and not is_path


def problem_with(path: Path) -> str:
    """Return what is wrong with a folder that is not a model, for a message."""
    try:
        find_reader(path)
    except ValueError as error:
        return f"; {error}"
    except OSError:
        pass
    return ""


def find_model_or_default(name: str | None, models_dir: str | Path = MODELS_DIR) -> Path:
    """Return what `find_model` finds or, where no name is given, `find_default_model`."""
    return find_default_model(models_dir) if name is None else find_model(name, models_dir)


def find_default_model(models_dir: str | Path = MODELS_DIR) -> Path:
    """Return the path of 124M or, where it cannot be downloaded at once, of the bundled model."""
    try:
        return find_model("124M", models_dir, hurried=True)
    except (OSError, ValueError) as error:
        path = bundled_model()
        told = ConnectionError, RefusedRequest, BadAnswer  # which `fetch_model` has printed
        if not isinstance(error, told):
            info(str(error))
        info(
            "GPT-2 is not here and cannot be downloaded now: using the bundled model "
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
    hurried: bool = False,
) -> Path:
    """Download a model, convert it, and return its folder, `models_dir`/<name>.

    OpenAI's four models come from OpenAI's server or, if that fails, from the Hugging Face hub, as
    do all others. A model that is already there is left alone, and an interrupted download is
    resumed. `base_url` is where OpenAI's <name>/encoder.json and the other files are; by default
    the environment variable GPT2_BASE_URL, or OpenAI's server. `keep` keeps the downloaded files in
    <name>/openai or <name>/huggingface. `pause(seconds)` waits before a retry. `hurried` gives up
    at the first failure if nothing has arrived. Raises ValueError for a bad name or file,
    ConnectionError if the server cannot be reached or keeps failing, and another OSError for what
    it refuses or for a full disk.
    """
    name, models_dir = resolve_name(name), Path(models_dir)
    folder, lock = models_dir / name, models_dir / f".{name.replace('/', '--')}.lock"
    work = folder / ".download"
    for path in filter(os.path.lexists, (lock, folder / "model.bin", folder / "tokenizer.bin")):
        check_regular(path)
    if find_problem(folder, name) is None and not work.exists() and not lock.exists():
        info(f"{folder}: already downloaded")
        return folder
    run = find_run(folder)
    if run:
        raise ValueError(
            f"{folder}: holds a training run ({run[0].name}), not the model {name}: "
            "move it, or give another folder of models"
        )
    models_dir.mkdir(parents=True, exist_ok=True)
    owner = [folder.parent] if "/" in name else []
    with hold_lock(lock), make_folders(*owner, folder, work):
        problem = find_problem(folder, name)
        if problem is None:  # another process downloaded it, or was killed while it cleaned up
            info(f"{folder}: already downloaded")
        else:
            if isinstance(problem, ValueError):
                info(f"{problem}; downloading the model again")
            source = fetch_model(name, work, base_url, Effort(pause, hurried))
            convert_download(source, folder)
            if keep:
                kept = folder / ("openai" if source == work else "huggingface")
                shutil.rmtree(kept, ignore_errors=True)
                os.replace(source, kept)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def download_tokenizer(name: str, models_dir: Path) -> Path:
    """Download the token table of one of OpenAI's models, not the weights; return its folder."""
    folder = models_dir / name
    work = folder / ".tokenizer"
    models_dir.mkdir(parents=True, exist_ok=True)
    with hold_lock(models_dir / f".{name}.lock"), make_folders(folder, work):
        if not has_tokenizer(folder):  # another process may have downloaded it
            source = fetch_model(name, work, None, Effort(), only_tokenizer=True)
            save_tokenizer(folder / "tokenizer.bin", *load_tokenizer(source))
        shutil.rmtree(work)
    return folder


def find_problem(folder: Path, name: str) -> Exception | None:
    """Return the error that loading a folder's model and tokenizer raises, or None.

    A model of the hub may have no tokenizer.
    """
    try:
        load_params(folder / "model.bin")
        if name in MODEL_NAMES or (folder / "tokenizer.bin").exists():
            load_tokenizer(folder / "tokenizer.bin")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return error
    return None


def fetch_model(
    name: str, work: Path, base_url: str | None, effort: Effort, only_tokenizer: bool = False
) -> Path:
    """Download the files of a model to a folder, `work` or one in it, and return that one."""
    try:
        if name not in MODEL_NAMES:
            return huggingface_hub.fetch_model(name, work, work.parent, effort)
        base_url = (base_url or os.environ.get("GPT2_BASE_URL") or OPENAI_URL).rstrip("/")
        try:
            fetch_all(f"{base_url}/{name}", work, name, effort, only_tokenizer)
            return work
        except (ConnectionError, RefusedRequest, BadAnswer) as error:
            failure = error
        repository, target = COMMUNITY[name], work.parent
        info(f"{failure}. The Hugging Face hub has the same model: {repository}")
        try:
            return huggingface_hub.fetch_model(repository, work, target, effort, only_tokenizer)
        except (OSError, ValueError) as error:
            info(str(error))
        raise failure
    except ConnectionError as error:
        raise ConnectionError(f"{error}{NETWORK_ADVICE}") from None


def fetch_all(
    url: str, folder: Path, name: str, effort: Effort, only_tokenizer: bool = False
) -> None:
    """Download OpenAI's files of a model into a folder; a file that is there has been verified."""
    sizes = MAX_BYTES | {DATA_FILE: DATA_BYTES[name]}
    file_names = tuple(TOKENIZER_SHA256) if only_tokenizer else OPENAI_FILES
    for path in filter(Path.exists, (folder / file_name for file_name in file_names)):
        check_regular(path)
    reported_sha256 = SHA256_124M if name == "124M" else {}
    large = TOKENIZER_SHA256 if only_tokenizer else [DATA_FILE]  # whose sizes are known
    missing = [sizes[file_name] for file_name in large if not (folder / file_name).exists()]
    if missing:
        size = f"{sum(missing) / 1e6:,.1f} MB"
        info(f"{name}: downloading {size} from {public(url)} to {folder.parent}")
    for file_name in file_names:
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
    """Convert a downloaded checkpoint; if that fails, remove the files to download again."""
    try:
        convert(work, folder)
    except ValueError as error:
        for name in OPENAI_FILES:
            path = work / name
            if "data" not in name or getattr(error, "path", None) == path:
                path.unlink(missing_ok=True)
        weights = list(work.glob("*.safetensors"))
        for path in weights:
            path.unlink()
        if weights and not isinstance(error, DamagedFile):  # whole, but not the tensors of a GPT-2
            raise
        raise ValueError(f"{error}; run this again to fetch the damaged file again") from None
