"""The command line of utils.py: `download` and `convert`."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt2_support import datasets
from gpt2_support.cli import ArgumentParser, folder, path, run
from gpt2_support.formats.llmc import VERSIONS
from gpt2_support.hub import (
    MODEL_ALIASES,
    MODEL_NAMES,
    MODELS_DIR,
    OPENAI_URL,
    download,
    is_model,
    possible_paths,
    resolve_name,
)
from gpt2_support.messages import info
from gpt2_support.weights import convert

if TYPE_CHECKING:
    import argparse

    Commands = argparse._SubParsersAction[ArgumentParser]

DATA_SETS = datasets.DATA_SETS.keys() | datasets.TASKS.keys()
NAME_HELP = (
    f"{', '.join(MODEL_NAMES)}, one of the aliases {', '.join(MODEL_ALIASES)}, or a GPT-2 of the "
    "Hugging Face hub: distilgpt2, or owner/name[@revision]; or a data set: "
    f"{', '.join(datasets.DATA_SETS)}, or for evaluate.py {', '.join(datasets.TASKS)}"
)


def model_name(text: str) -> str:
    """Return the name of a model or data set to download, for argparse's `type=`."""
    try:
        return text if text in DATA_SETS else resolve_name(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, `sys.argv` by default."""
    parser = ArgumentParser(
        prog="utils.py",
        description="Get GPT-2's weights, and convert them between formats. Each command has "
        "a --help of its own.",
        examples=[
            "python utils.py download 124M",
            "python utils.py convert path/to/gpt2 models/mine",
            "python utils.py convert --help",
        ],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_download(commands)
    add_convert(commands)
    args = parser.parse_args(argv)
    if args.command == "download" and args.name in DATA_SETS:
        if args.models_dir != MODELS_DIR or args.base_url or args.keep:
            parser.error(
                f"{args.name}: a data set, and --models_dir, --base_url and --keep are for models; "
                "name the folder of data sets with GPT2_DATASETS_DIR in the environment"
            )
    elif args.command == "download" and args.base_url and args.name not in MODEL_NAMES:
        reason = "it is for OpenAI's models"
        parser.error(f"argument --base_url: it would do nothing, since {reason}")
    if args.command == "convert" and args.to == "hf" and args.dtype != "fp32":
        parser.error("argument --dtype: bf16 is for model.bin, and --to hf writes float32")
    return args


def add_download(commands: Commands) -> None:
    """Add the command `download` and its arguments."""
    parser = commands.add_parser(
        "download",
        help="fetch a model and convert it, or fetch a data set",
        description="Fetch one of OpenAI's models, or any GPT-2 of the Hugging Face hub that has "
        "safetensors, and convert it to models/<name>/model.bin and tokenizer.bin. A download that "
        "was interrupted goes on where it stopped; one that is done is left alone. Proxies are "
        "taken from HTTPS_PROXY and its relatives, a mirror of the hub from HF_ENDPOINT, a token "
        "for private and gated models from HF_TOKEN. A data set is a text, which goes to datasets/ "
        "or to the folder in the environment variable GPT2_DATASETS_DIR.",
        examples=[
            "python utils.py download 124M",
            "python utils.py download distilgpt2",
            "python utils.py download tinyshakespeare",
            "python utils.py download 355M --models_dir /data/models",
        ],
    )
    add = parser.add_argument
    add("name", type=model_name, metavar="NAME", help=NAME_HELP)
    add("--models_dir", metavar="DIR", type=folder, default=MODELS_DIR, help="the folder of models")
    add(
        "--base_url",
        metavar="URL",
        help="where OpenAI's NAME/encoder.json and the others lie (default: the environment "
        f"variable GPT2_BASE_URL, or {OPENAI_URL})",
    )
    add("--keep", action="store_true", help="keep the downloaded files in the model's folder")


def add_convert(commands: Commands) -> None:
    """Add the command `convert` and its arguments."""
    parser = commands.add_parser(
        "convert",
        help="convert a model from or to another format",
        description="Convert a model, and the tokenizer beside it. SOURCE is a folder in OpenAI's "
        "layout (hparams.json, model.ckpt.*), in Hugging Face's (config.json, model.safetensors), "
        "one of our model folders, a model .bin file, or a .safetensors file. What TARGET holds is "
        "replaced only when the whole of SOURCE has been read and verified.",
        examples=[
            "python utils.py convert path/to/gpt2 models/mine",
            "python utils.py convert models/mine path/to/hf --to hf",
            "python utils.py convert models/mine models/half --dtype bf16",
        ],
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        type=path,
        help="a folder, a model .bin or a .safetensors file, or the name of a model that is here",
    )
    add("target", metavar="TARGET", type=path, help="the folder to write")
    add(
        "--to",
        choices=["bin", "hf"],
        default="bin",
        help="what to write: our model.bin and tokenizer.bin, or what transformers loads",
    )
    add(
        "--dtype",
        choices=[*VERSIONS],
        default="fp32",
        help="numbers of model.bin: float32, or bfloat16 for a file of half the size",
    )
    add("--overwrite", action="store_true", help="replace a training run that is in TARGET")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: `python utils.py --help`."""
    args = parse_args(argv)
    if args.command == "download" and args.name in DATA_SETS:
        info(f"{datasets.download(args.name)}: downloaded")
    elif args.command == "download":
        path = download(args.name, args.models_dir, args.base_url, args.keep)
        if args.keep and not any((path / name).exists() for name in ("openai", "huggingface")):
            info("--keep: the downloaded files are no longer there")
    else:
        here = filter(is_model, possible_paths(args.source))  # `stories`, say, the bundled model
        source = next(here, args.source)
        convert(source, args.target, args.to, args.overwrite, args.dtype)


def command() -> None:
    """Run the installed command `gpt2-weights`."""
    run(main)
