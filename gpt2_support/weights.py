"""Convert a model of any format into any other, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support.files import atomic_write, sync
from gpt2_support.formats.huggingface import (
    HF_FILES,
    hf_config,
    hf_tokenizer,
    open_hf,
    write_safetensors,
)
from gpt2_support.formats.llmc import open_bin, write_model
from gpt2_support.formats.tensorflow import open_openai
from gpt2_support.formats.token_table import load_tokenizer, save_tokenizer
from gpt2_support.messages import info

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


def open_model(source):
    """Return (config, get, kind) of a model in any format that we read.

    Raises FileNotFoundError, or ValueError saying what was found and what was expected.
    """
    if source.is_file():
        return *open_bin(source), "a model file"
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    names = sorted(path.name for path in source.iterdir())
    if "model.bin" in names:
        return *open_bin(source / "model.bin"), "one of our models"
    if "hparams.json" in names or any(name.endswith(".index") for name in names):
        return *open_openai(source), "a checkpoint in OpenAI's layout"
    if any(name.startswith("model.safetensors") for name in names):
        return *open_hf(source), "a Hugging Face model"
    if "pytorch_model.bin" in names:
        raise ValueError(f"{source}: found pytorch_model.bin; save the model as safetensors first")
    raise ValueError(
        f"{source}: found {', '.join(names[:8]) or 'nothing'}; expected model.bin, OpenAI's "
        "hparams.json and model.ckpt.*, or Hugging Face's config.json and model.safetensors"
    )


def open_tokenizer(source, config):
    """Return (tokens, eot) that lie beside a model, or None, which is noted, as is a short table.

    Raises ValueError if the table is damaged or has more tokens than the model.
    """
    try:
        tokens, eot = load_tokenizer(source)
    except FileNotFoundError:
        info(f"{source}: no tokenizer there; converting the model alone")
        return None
    if len(tokens) > config.n_vocab:
        raise ValueError(f"{source}: {len(tokens)} tokens exceed the model's {config.n_vocab}")
    if len(tokens) < config.n_vocab:
        info(f"{source}: {len(tokens)} tokens, fewer than the model's {config.n_vocab}")
    return tokens, eot


def convert(source, target, to="bin"):
    """Convert a model to a folder of ours (`to="bin"`) or of Hugging Face's (`to="hf"`).

    `source` is a folder in OpenAI's layout, of Hugging Face's or of ours, or a model .bin file.
    Nothing in `target` is replaced before everything in `source` has been read and verified.
    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    source, target = Path(source), Path(target)
    folder = source.parent if source.is_file() else source
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target} is the source itself: give another folder as the target")
    if target.is_file() or target.suffix == ".bin":
        raise ValueError(f"{target} is the name of a file: give a folder as the target")
    config, get, kind = open_model(source)
    info(f"{source}: {kind}, {config}")
    tokenizer = open_tokenizer(folder, config)
    {"bin": save_model_folder, "hf": save_hf_folder}[to](target, config, get, tokenizer)
    info(f"{target}: written")


def refuse_leftovers(folder, written, others):
    """Raise ValueError if a folder has one of `others`, which would not belong to what is written.

    Whoever loaded the folder would read the new model with some old model's file.
    """
    for name in others:
        if name not in written and (folder / name).exists():
            raise ValueError(
                f"{folder / name} would be left from another model: remove it, or give a new folder"
            )


def save_model_folder(folder, config, get, tokenizer):
    """Write `tokenizer.bin` (unless it is None) and `model.bin`, whose rename comes last."""
    refuse_leftovers(folder, ["tokenizer.bin"] if tokenizer else [], ["tokenizer.bin"])
    with atomic_write(folder / "model.bin") as file:
        write_model(file, config, get)
        sync(file)  # the slow part is over: the two files change within a moment
        if tokenizer:
            save_tokenizer(folder / "tokenizer.bin", *tokenizer)


def save_hf_folder(folder, config, get, tokenizer):
    """Write a folder that transformers loads: config, tokenizer (unless it is None), tensors."""
    files = {"config.json": hf_config(config, tokenizer[1] if tokenizer else None)}
    if tokenizer:
        files |= hf_tokenizer(config, *tokenizer)
    refuse_leftovers(folder, files, HF_FILES)
    with atomic_write(folder / "model.safetensors") as file:
        write_safetensors(file, config, get)
        sync(file)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            with atomic_write(folder / name) as small:
                small.write(text.encode("utf-8"))
