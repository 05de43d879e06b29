"""The door to GPT-2's weights: find, load, save, download and convert them.

    from utils import convert, download, find_model, load_params, save_params

    path = find_model("124M")                 # a folder of models/; downloaded on first use
    params = load_params(path)                # Params: params.wte, params.h[3].attn.c_attn.w, ...
    save_params("copy/model.bin", params)     # in llm.c's format
    convert("path/to/gpt2", "models/mine")    # from Hugging Face's, OpenAI's or llm.c's files
    convert("models/mine", "path/to/hf", to="hf")

Parameters. `Params` is one packed buffer with a named view of every array, `Config` its
hyper-parameters. `load_params` reads a model of any format, `save_params` writes a model .bin file.

Models. `find_model` returns the path of a model by name or path, `download` fetches one of OpenAI's
models or a GPT-2 of the Hugging Face hub, `convert` turns a model of any format into a folder of
ours or of Hugging Face's. `MODELS_DIR` is the folder in which models are found by name.

Tokens. `load_tokenizer` returns the bytes of every token and the end-of-text id, from llm.c's,
OpenAI's or Hugging Face's files; `save_tokenizer` writes them as llm.c does. `load_tokens` reads a
file of token ids, `save_tokens` writes one.

The modules of `gpt2_support` define all of these. The command line is `python utils.py --help`.
"""

from gpt2_support.cli import run
from gpt2_support.formats.llmc import load_tokens, save_params, save_tokens
from gpt2_support.formats.token_table import load_tokenizer, save_tokenizer
from gpt2_support.hub import MODELS_DIR, download, find_model
from gpt2_support.params import Config, Params
from gpt2_support.weights import convert, load_params
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
    "main",
    "save_params",
    "save_tokenizer",
    "save_tokens",
]

if __name__ == "__main__":
    run(main)
