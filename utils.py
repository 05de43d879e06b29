"""The door to GPT-2's weights: load, save, find, download, convert.

    params = load_params(find_model("124M"))
    save_params("copy/model.bin", params)
    convert("path/to/hugging_face_folder", "models/mine")

This module only names what the rooms of `gpt2_support` do, and is their command line.
"""

from gpt2_support.cli import run
from gpt2_support.formats.llmc import (
    load_params,
    load_tokens,
    save_params,
    save_tokens,
)
from gpt2_support.formats.token_table import load_tokenizer, save_tokenizer
from gpt2_support.hub import MODELS_DIR, download, find_model
from gpt2_support.params import Config, Params
from gpt2_support.weights import convert
from gpt2_support.weights_cli import main

__all__ = [
    "MODELS_DIR",
    "Config",
    "Params",
    "convert",
    "download",
    "find_model",
    "load_params",
    "load_tokenizer",
    "load_tokens",
    "save_params",
    "save_tokenizer",
    "save_tokens",
]

if __name__ == "__main__":
    run(main)
