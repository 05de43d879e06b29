"""Models converted from any format into any other, a tensor at a time.

Each reader in `formats` gives a Config and a function `get(name)`, which reads one tensor when it
is called; each writer calls it for the tensors in the order of its file. `load_params` reads a
model of any format into memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt2_support import run_folder
from gpt2_support.files import atomic_write, sync
from gpt2_support.formats import huggingface, llmc, tensorflow
from gpt2_support.formats.stored_tensor import GetTensor
from gpt2_support.formats.token_table import load_tokenizer, save_tokenizer
from gpt2_support.messages import info
from gpt2_support.params import Config, Params, zeros

Tokenizer = tuple[list[bytes], int | None]  # as load_tokenizer returns it
OpenModel = Callable[[Path], contextlib.AbstractContextManager[tuple[Config, GetTensor]]]
RUN_FILES = ("best", "state.npz", "log.csv", "loss.png")  # what train.py keeps beside a model
SAVE_ADVICE = "save it as safetensors, with save_pretrained(FOLDER) of transformers"


def load_params(path: str | Path) -> Params:
    """Return the Params, read-only, of a model in any format that we read.

    A model .bin file, or a folder that has one, is loaded by `llmc.load_params`. Others are
    converted in memory. Raises FileNotFoundError, or ValueError saying what is wrong with it.
    """
    reader, path, _ = find_reader(Path(path))
    if reader is llmc.open_model:
        return llmc.load_params(path)
    with reader(path) as (config, get):
        flat = zeros(config)
        for name, array in Params(config, flat).named.items():
            array[...] = get(name)
    flat.flags.writeable = False
    return Params(config, flat)


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "bin",
    overwrite: bool = False,
    dtype: str = "fp32",
) -> None:
    """Convert a model into a folder of ours (`to="bin"`) or of Hugging Face's (`to="hf"`).

    Ours has numbers of 32 bits, or of 16 with `dtype="bf16"`, rounded to the nearest.

    `source` is a folder in OpenAI's layout, of Hugging Face's or of ours, a model .bin file, or a
    .safetensors file beside its config.json. Nothing in `target` is replaced before all of `source`
    has been read and verified. A training run there is replaced only if `overwrite`. Raises
    FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    source, target = Path(source), Path(target)
    if to not in ("bin", "hf"):
        raise ValueError(f"to = {to!r}: expected bin or hf")
    if dtype not in llmc.VERSIONS or (to == "hf" and dtype != "fp32"):
        raise ValueError(f"dtype {dtype!r}: expected fp32, or bf16 for a model.bin")
    folder = source.parent if source.is_file() else source
    check_target(folder, target, overwrite)
    with run_folder.lock(target) if target.is_dir() else contextlib.nullcontext():
        check_target(folder, target, overwrite)  # again: a run may have ended there
        with open_model(source) as (config, get, description):
            info(f"{source}: {description}, {config}")
            tokenizer = open_tokenizer(folder, config)
            if to == "hf":
                save_hf_folder(target, config, get, tokenizer)
            else:
                save_model_folder(target, config, get, tokenizer, dtype)
        for path in find_run(target):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    info(f"{target}: written")


def find_run(folder: Path) -> list[Path]:
    """Return the paths of what train.py has left in a folder beside its model."""
    return [folder / name for name in RUN_FILES if os.path.lexists(folder / name)]


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise ValueError if a folder cannot be the target of a conversion from another one."""
    same = os.path.realpath(target) == os.path.realpath(source)
    if same or (target.exists() and source.exists() and os.path.samefile(source, target)):
        raise ValueError(f"{target} is the source itself: give another folder as the target")
    if target.suffix == ".bin" or (os.path.lexists(target) and not target.is_dir()):
        raise ValueError(f"{target} is the name of a file: give a folder as the target")
    run = find_run(target)
    if run and not overwrite:
        raise ValueError(
            f"{target}: a training run ({run[0].name}) would lose its model: give another folder, "
            "or --overwrite to replace the run"
        )
    if run and Path(os.path.realpath(target)) in Path(os.path.realpath(source)).parents:
        raise ValueError(f"{source} is in {target}, which would be replaced: give another folder")


@contextlib.contextmanager
def open_model(source: Path) -> Iterator[tuple[Config, GetTensor, str]]:
    """Give (config, get, description) of a model in any format that we read.

    Raises FileNotFoundError, or ValueError saying what is there and what was expected.
    """
    reader, path, description = find_reader(source)
    with reader(path) as (config, get):
        yield config, get, description


def find_reader(source: Path) -> tuple[OpenModel, Path, str]:
    """Return the function that opens a model, the path to give it, and what the model is."""
    if source.suffix == ".safetensors" and source.exists():
        return huggingface.open_model, source, "a Hugging Face model"
    if source.suffix in (".pt", ".pth", ".ckpt") or source.name == "pytorch_model.bin":
        nanogpt = ", or if it is nanoGPT's, with the program in docs/formats.md"
        raise ValueError(
            f"{source}: a file of PyTorch, which cannot be read: {SAVE_ADVICE}{nanogpt}"
        )
    if source.exists() and not source.is_dir():
        return llmc.open_model, source, "a model file"
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    names = sorted(path.name for path in source.iterdir())
    if "model.bin" in names:
        return llmc.open_model, source / "model.bin", "one of our models"
    if "hparams.json" in names or any(name.endswith(".index") for name in names):
        return tensorflow.open_model, source, "a checkpoint in OpenAI's layout"
    if any(name.startswith("model.safetensors") for name in names):
        return huggingface.open_model, source, "a Hugging Face model"
    if any(name.startswith("pytorch_model") for name in names):
        raise ValueError(f"{source}: found pytorch_model.bin, which cannot be read: {SAVE_ADVICE}")
    raise ValueError(
        f"{source}: found {', '.join(names[:8]) or 'nothing'}; expected model.bin, OpenAI's "
        "hparams.json and model.ckpt.*, or Hugging Face's config.json and model.safetensors"
    )


def open_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """Return (tokens, eot) of the tokenizer beside a model; None, with a message, if it has none.

    Raises ValueError if the table is damaged or has more tokens than the model.
    """
    try:
        tokens, eot = load_tokenizer(folder)
    except FileNotFoundError:
        info(f"{folder}: no tokenizer there; converting the model alone")
        return None
    if len(tokens) > config.n_vocab:
        raise ValueError(f"{folder}: {len(tokens)} tokens exceed the model's {config.n_vocab}")
    if len(tokens) < config.n_vocab:
        info(f"{folder}: {len(tokens)} tokens, fewer than the model's {config.n_vocab}")
    return tokens, eot


def save_model_folder(
    folder: Path,
    config: Config,
    get: GetTensor,
    tokenizer: Tokenizer | None,
    dtype: str = "fp32",
) -> None:
    """Write `model.bin` and, unless it is None, `tokenizer.bin`.

    The renames of the two files follow each other at once, when the slow part is over, and
    `model.bin` is renamed last.
    """
    check_leftovers(folder, ["tokenizer.bin"] if tokenizer else [], ["tokenizer.bin"])
    with atomic_write(folder / "model.bin") as file:
        llmc.write_model(file, config, get, dtype)
        sync(file)
        if tokenizer:
            save_tokenizer(folder / "tokenizer.bin", *tokenizer)


def save_hf_folder(
    folder: Path, config: Config, get: GetTensor, tokenizer: Tokenizer | None
) -> None:
    """Write a folder that transformers loads: config, tokenizer (unless it is None), tensors."""
    eot = tokenizer[1] if tokenizer else None
    files: dict[str, Any] = {"config.json": huggingface.config_json(config, eot)}
    if tokenizer:
        files |= huggingface.tokenizer_files(config, *tokenizer)
    check_leftovers(folder, files, (*huggingface.TOKENIZER_FILES, "model.bin", "tokenizer.bin"))
    with atomic_write(folder / "model.safetensors") as file:
        huggingface.write_safetensors(file, config, get)
        sync(file)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            with atomic_write(folder / name) as small:
                small.write(text.encode("utf-8"))


def check_leftovers(folder: Path, written: Iterable[str], others: Iterable[str]) -> None:
    """Raise ValueError if a folder has one of the `others` that is not going to be `written`.

    The new model would otherwise be read together with another model's tokenizer.
    """
    for name in others:
        if name not in written and (folder / name).exists():
            raise ValueError(
                f"{folder / name} would be left from another model: remove it, or give a new folder"
            )
