"""Models converted from any format into any other, a tensor at a time.

Each reader in `formats` gives a Config and a function `get(name)`, which reads one tensor when it
is called; each writer calls it for the tensors in the order of its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2_support.files import atomic_write, sync
from gpt2_support.formats import huggingface, llmc, tensorflow
from gpt2_support.formats.stored_tensor import GetTensor
from gpt2_support.formats.token_table import load_tokenizer, save_tokenizer
from gpt2_support.messages import info
from gpt2_support.params import Config

Tokenizer = tuple[list[bytes], int | None]  # as load_tokenizer returns it


def convert(source: str | Path, target: str | Path, to: str = "bin") -> None:
    """Convert a model into a folder of ours (`to="bin"`) or of Hugging Face's (`to="hf"`).

    `source` is a folder in OpenAI's layout, of Hugging Face's or of ours, or a model .bin file.
    Nothing in `target` is replaced before all of `source` has been read and verified. Raises
    FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    source, target = Path(source), Path(target)
    folder = source.parent if source.is_file() else source
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target} is the source itself: give another folder as the target")
    if target.is_file() or target.suffix == ".bin":
        raise ValueError(f"{target} is the name of a file: give a folder as the target")
    config, get, description = open_model(source)
    info(f"{source}: {description}, {config}")
    tokenizer = open_tokenizer(folder, config)
    save = {"bin": save_model_folder, "hf": save_hf_folder}[to]
    save(target, config, get, tokenizer)
    info(f"{target}: written")


def open_model(source: Path) -> tuple[Config, GetTensor, str]:
    """Return (config, get, description) of a model in any format that we read.

    Raises FileNotFoundError, or ValueError saying what is there and what was expected.
    """
    if source.is_file():
        return *llmc.open_model(source), "a model file"
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    names = sorted(path.name for path in source.iterdir())
    if "model.bin" in names:
        return *llmc.open_model(source / "model.bin"), "one of our models"
    if "hparams.json" in names or any(name.endswith(".index") for name in names):
        return *tensorflow.open_model(source), "a checkpoint in OpenAI's layout"
    if any(name.startswith("model.safetensors") for name in names):
        return *huggingface.open_model(source), "a Hugging Face model"
    if "pytorch_model.bin" in names:
        raise ValueError(f"{source}: found pytorch_model.bin; save the model as safetensors first")
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
    folder: Path, config: Config, get: GetTensor, tokenizer: Tokenizer | None
) -> None:
    """Write `model.bin` and, unless it is None, `tokenizer.bin`.

    The renames of the two files follow each other at once, when the slow part is over, and
    `model.bin` is renamed last.
    """
    check_leftovers(folder, ["tokenizer.bin"] if tokenizer else [], ["tokenizer.bin"])
    with atomic_write(folder / "model.bin") as file:
        llmc.write_model(file, config, get)
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
    check_leftovers(folder, files, huggingface.TOKENIZER_FILES)
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
