"""Files into named arrays and tables, and back: every format that GPT-2 is stored in.

Reading order: the parameters (`Config`, `layout`, `Params`), writing safely (`atomic_write`), our
own `.bin` files (llm.c's formats), token tables, then other people's checkpoints (TensorFlow,
safetensors), downloads, and the commands `download` and `convert`.

All formats are little-endian.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

MODELS_DIR = Path(__file__).resolve().parent / "models"

# ----------------------------------------------------------------------------------------------
# The parameters: one packed buffer, and a named view of every array in it


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of a GPT-2, named as in OpenAI's `hparams.json`; the defaults are 124M.

    Raises ValueError if a value is not a positive whole number or n_head does not divide n_embd.
    """

    n_vocab: int = 50257
    n_ctx: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_layer: int = 12

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r} is not a positive whole number")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")

    @property
    def n_vocab_padded(self):
        """Rows of wte in the buffer: n_vocab rounded up to a multiple of 128, as in llm.c."""
        return -(-self.n_vocab // 128) * 128


def layout(config):
    """Return {name: shape} of every tensor in file order, the same parameter of all layers stacked.

    This is the one place that names the parameters of GPT-2. The order is llm.c's; a weight is
    (out, in), so that a linear layer is `x @ w.T + b`.
    """
    L, C = config.n_layer, config.n_embd
    return {
        "wte": (config.n_vocab_padded, C),
        "wpe": (config.n_ctx, C),
        "h/ln_1/g": (L, C),
        "h/ln_1/b": (L, C),
        "h/attn/c_attn/w": (L, 3 * C, C),
        "h/attn/c_attn/b": (L, 3 * C),
        "h/attn/c_proj/w": (L, C, C),
        "h/attn/c_proj/b": (L, C),
        "h/ln_2/g": (L, C),
        "h/ln_2/b": (L, C),
        "h/mlp/c_fc/w": (L, 4 * C, C),
        "h/mlp/c_fc/b": (L, 4 * C),
        "h/mlp/c_proj/w": (L, C, 4 * C),
        "h/mlp/c_proj/b": (L, C),
        "ln_f/g": (C,),
        "ln_f/b": (C,),
    }


def n_params(config):
    """Return the number of values in a packed buffer, the padding of wte included."""
    return sum(math.prod(shape) for shape in layout(config).values())


class Params:
    """The parameters of a model, or their gradients: a packed buffer and named views into it.

    `params.h[3].attn.c_attn.w` is the array that OpenAI's checkpoint calls
    `model/h3/attn/c_attn/w`, here (3C, C); `params.named` holds all of them under those names.
    `params.flat` is the buffer, in the order of `layout`: to update every parameter is to update
    `flat`. The rows of wte from n_vocab on are zero padding; `params.wte` (V, C) leaves them out.

    Params(config) is all zeros in float32; Params(config, flat) wraps a buffer, of any float dtype,
    without copying it. Raises ValueError if the buffer has another length than the config needs.
    """

    def __init__(self, config, flat=None):
        flat = np.zeros(n_params(config), np.float32) if flat is None else flat
        if flat.shape != (n_params(config),):
            raise ValueError(f"buffer of shape {flat.shape}, but {config} needs {n_params(config)}")
        self.config, self.flat, self.named = config, flat, {}
        end = 0
        for name, shape in layout(config).items():
            start, end = end, end + math.prod(shape)
            array = flat[start:end].reshape(shape)
            if name == "wte":
                array = array[: config.n_vocab]
            if name.startswith("h/"):
                for i in range(config.n_layer):
                    self.named[f"model/h{i}{name[1:]}"] = array[i]
            else:
                self.named[f"model/{name}"] = array
        self._add_attributes()

    def _add_attributes(self):
        """Make every named array an attribute: model/h3/ln_1/g becomes self.h[3].ln_1.g."""
        self.h = [SimpleNamespace() for _ in range(self.config.n_layer)]
        for name, array in self.named.items():
            _, *path, leaf = name.split("/")
            node = self
            for part in path:
                if node is self and part[0] == "h":
                    node = self.h[int(part[1:])]
                    continue
                if not hasattr(node, part):
                    setattr(node, part, SimpleNamespace())
                node = getattr(node, part)
            setattr(node, leaf, array)


# ----------------------------------------------------------------------------------------------
# Writing safely


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file for writing bytes; when the block ends well, rename it to `path`.

    A reader sees the old file or the whole new one, never a part, whenever the process dies: the
    bytes are on the disk before the rename. After an error the old file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------
# The .bin files: llm.c's formats (https://github.com/karpathy/llm.c), each a header of 256 int32

HEADER_BYTES = 1024
MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC, TOKENS_MAGIC = 20240326, 20240327, 20240328, 20240520
MAGIC_MEANS = {
    MODEL_MAGIC: "model",
    STATE_MAGIC: "debug state",
    TOKENIZER_MAGIC: "tokenizer",
    TOKENS_MAGIC: "tokens",
}


def write_header(file, *values):
    """Write `values` (int32) as the header of a .bin file, the rest of it zeros."""
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    file.write(header.tobytes())


def read_header(path, magic, versions):
    """Return the header of a .bin file as a list of 256 ints.

    Raises ValueError, naming what was found, unless magic number and version are as wanted.
    """
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), "<u1")
    want = MAGIC_MEANS[magic]
    if len(header) < HEADER_BYTES:
        raise ValueError(
            f"{path}: {len(header)} bytes is too short for the header of a {want} file"
        )
    header = header.view("<i4").tolist()
    if header[0] != magic:
        found = MAGIC_MEANS.get(header[0])
        found = f"a {found} file" if found else f"magic number {header[0]}"
        raise ValueError(f"{path}: expected a {want} file (magic number {magic}), found {found}")
    if header[1] not in versions:
        raise ValueError(f"{path}: {want} file of version {header[1]}, can read only {versions}")
    return header


def check_size(path, expected, what):
    """Raise ValueError unless the file has exactly `expected` bytes."""
    found = os.path.getsize(path)
    if found != expected:
        raise ValueError(
            f"{path}: {found} bytes, but {what} takes {expected}: the file is incomplete, damaged, "
            "or from a program that uses this version number for another layout"
        )


def write_model_header(file, config):
    """Write the header of a model .bin file of version 3 (float32, padded vocabulary)."""
    c = config
    sizes = (c.n_ctx, c.n_vocab, c.n_layer, c.n_head, c.n_embd, c.n_vocab_padded)
    write_header(file, MODEL_MAGIC, 3, *sizes)


def save_params(path, params):
    """Write a model .bin file exactly as llm.c's version 3 has it (float32), atomically."""
    with atomic_write(path) as file:
        write_model_header(file, params.config)
        file.write(np.ascontiguousarray(params.flat, "<f4").data)


def load_params(path):
    """Return the Params of a model .bin file, or of the `model.bin` in a folder.

    A float32 file with a padded vocabulary (version 3) is memory-mapped: read-only, and loaded
    by the operating system as it is used. Version 1 (unpadded) and 5 (bf16) are copied to float32.
    Raises FileNotFoundError, or ValueError if header or file size are not those of a GPT-2.
    """
    path = Path(path)
    path = path / "model.bin" if path.is_dir() else path
    _, version, n_ctx, n_vocab, n_layer, n_head, n_embd, padded, *_ = read_header(
        path, MODEL_MAGIC, (1, 3, 5)
    )
    try:
        config = Config(n_vocab, n_ctx, n_embd, n_head, n_layer)
    except ValueError as error:
        raise ValueError(f"{path}: not the header of a GPT-2: {error}") from None
    rows = n_vocab if version == 1 else config.n_vocab_padded
    if version != 1 and padded != rows:
        raise ValueError(f"{path}: vocabulary padded to {padded}, expected {rows} for {n_vocab}")
    n_values = n_params(config) - (config.n_vocab_padded - rows) * n_embd
    dtype = np.dtype("<u2" if version == 5 else "<f4")
    what = f"version {version} of {config}"
    check_size(path, HEADER_BYTES + dtype.itemsize * n_values, what)
    values = np.memmap(path, dtype, "r", offset=HEADER_BYTES).view(np.ndarray)
    if version == 5:
        values = bf16_to_float32(values)
    if rows == config.n_vocab_padded:
        return Params(config, values)
    params = Params(config)  # unpadded: leave a gap of zeros after the rows of wte
    params.flat[: rows * n_embd] = values[: rows * n_embd]
    params.flat[config.n_vocab_padded * n_embd :] = values[rows * n_embd :]
    return params


def bf16_to_float32(values):
    """Return float32 from the bits of bfloat16 (uint16), which are a float32's upper half."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def save_tokenizer(path, tokens, eot):
    """Write a token table, a list of bytes indexed by id, as a tokenizer .bin of version 2.

    `eot` is the id of the end-of-text token; None, for a table without one, is stored as -1.
    Raises ValueError for a token over 255 bytes.
    """
    longest = max(map(len, tokens))
    if longest > 255:
        raise ValueError(f"a token of {longest} bytes exceeds the 255 that {path} can hold")
    with atomic_write(path) as file:
        write_header(file, TOKENIZER_MAGIC, 2, len(tokens), -1 if eot is None else eot)
        file.write(b"".join(bytes([len(token)]) + token for token in tokens))


def load_tokens(path):
    """Memory-map a tokens .bin file; return its ids (N,) uint16, and n_vocab (0 if not recorded).

    Raises FileNotFoundError, or ValueError if it is not a tokens file of the right length.
    """
    _, _, n_tokens, n_vocab, *_ = read_header(path, TOKENS_MAGIC, (1,))
    if n_tokens < 0:
        raise ValueError(f"{path}: header claims {n_tokens} tokens")
    check_size(path, HEADER_BYTES + 2 * n_tokens, f"a tokens file of {n_tokens} tokens")
    if n_tokens == 0:
        return np.zeros(0, np.uint16), n_vocab
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES).view(np.ndarray), n_vocab


def save_tokens(path, chunks, n_vocab):
    """Write a tokens .bin file, atomically, from an iterable of id arrays; return how many tokens.

    Raises ValueError if the ids do not fit uint16 or the count does not fit the header.
    """
    if n_vocab > 65536:
        raise ValueError(f"n_vocab = {n_vocab}: a tokens file holds 16-bit ids, 65536 at most")
    n_tokens = 0
    with atomic_write(path) as file:
        write_header(file)  # the count is known at the end
        for chunk in chunks:
            file.write(np.asarray(chunk, "<u2").tobytes())
            n_tokens += len(chunk)
        if n_tokens > 2**31 - 1:
            raise ValueError(f"{n_tokens} tokens exceed the 2**31 - 1 that a tokens file can count")
        file.seek(0)
        write_header(file, TOKENS_MAGIC, 1, n_tokens, n_vocab)
    return n_tokens


# ----------------------------------------------------------------------------------------------
# Token tables: the bytes of every token, indexed by id, where the id order is the merge order

EOT_TEXT = "<|endoftext|>"
TOKENIZER_FILES = (  # what load_tokenizer looks for in a folder, in order of preference
    ("tokenizer.bin",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("tokenizer.json",),
)


def load_tokenizer(path):
    """Return a token table (a list of bytes indexed by id) and its end-of-text id, or None.

    `path` is a `tokenizer.bin` of llm.c (version 1 or 2), a `tokenizer.json` of Hugging Face,
    OpenAI's `encoder.json` with `vocab.bpe` beside it, the same two as `vocab.json` and
    `merges.txt`, or a folder that holds any of these. Raises FileNotFoundError, or ValueError if
    the file is damaged or merging by lowest id would not give the ids that its author gets.
    """
    path = Path(path)
    path = find_tokenizer(path) if path.is_dir() else path
    if path.suffix != ".json":
        tokens, eot = read_bin_tokenizer(path)
        check_token_table(path, tokens, eot)
        return tokens, eot
    tokens, merges = read_json_tokenizer(path)
    eot = find_eot(tokens)
    check_token_table(path, tokens, eot)
    check_merges(path, merges, recover_merges(tokens, eot))
    return tokens, eot


def find_tokenizer(folder):
    """Return the path of the first of TOKENIZER_FILES in a folder, or raise FileNotFoundError."""
    for names in TOKENIZER_FILES:
        if all((folder / name).is_file() for name in names):
            return folder / names[0]
    wanted = ", ".join(" with ".join(names) for names in TOKENIZER_FILES)
    raise FileNotFoundError(f"{folder}: no token table in this folder (looked for {wanted})")


def find_eot(tokens):
    """Return the id of the token named <|endoftext|>, or None."""
    name = EOT_TEXT.encode()
    return tokens.index(name) if name in tokens else None


def read_bin_tokenizer(path):
    """Return tokens and end-of-text id of a tokenizer .bin; version 1 has no field for the id."""
    _, version, n_tokens, eot, *_ = read_header(path, TOKENIZER_MAGIC, (1, 2))
    data = path.read_bytes()
    tokens, end = [], HEADER_BYTES
    while end < len(data):
        start, end = end + 1, end + 1 + data[end]
        tokens.append(data[start:end])
    if len(tokens) != n_tokens or end != len(data):
        raise ValueError(
            f"{path}: header counts {n_tokens} tokens, found {len(tokens)}"
            f"{', the last cut short' if end > len(data) else ''}: the file is damaged"
        )
    if version == 1:
        return tokens, find_eot(tokens)
    return tokens, None if eot == -1 else eot


def bytes_to_unicode():
    """Return {byte: character}: the alphabet in which GPT-2's JSON writes the bytes of a token.

    The printable characters of Latin-1 stand for their own byte; the other 68 bytes, in order,
    are the characters from U+0100 on, so that a space is "Ġ" and a newline "Ċ". The dict is in
    the order of GPT-2's ids 0 to 255 ("!" is 0). Source: `encoder.py` of openai/gpt-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


UNICODE_TO_BYTE = {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(path, text):
    """Return the bytes of a token that a JSON file writes as `text`; " the" is "Ġthe" there."""
    try:
        return bytes([UNICODE_TO_BYTE[character] for character in text])
    except KeyError:
        raise ValueError(f"{path}: token {text[:40]!r} is not in GPT-2's byte alphabet") from None


def read_json(path):
    """Return the object (a dict) that a JSON file holds; any other content is a ValueError."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file in UTF-8: {error}") from None
    if type(data) is not dict:
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def read_json_tokenizer(path):
    """Return tokens and merges of a tokenizer.json, or of a vocabulary and the merges beside it."""
    data = read_json(path)
    if type(data.get("model")) is dict:
        vocab, merges, added = parse_hugging_face(path, data)
    else:
        vocab, merges, added = data, read_merges(path), {}
    ids = {token_bytes(path, text): id for text, id in vocab.items() if text not in added}
    ids |= {text.encode("utf-8", "replace"): id for text, id in added.items()}
    tokens = [None] * len(ids)
    for token, id in ids.items():
        if type(id) is not int or not 0 <= id < len(ids) or tokens[id] is not None:
            raise ValueError(
                f"{path}: token {token[:40]} has id {id!s:.40}, but {len(ids)} tokens must "
                f"have the ids 0 to {len(ids) - 1}, each once"
            )
        tokens[id] = token
    return tokens, [tuple(token_bytes(path, part) for part in pair) for pair in merges]


def read_merges(vocab_path):
    """Return the merges, pairs of str, in the text file that belongs beside a vocabulary."""
    path = vocab_path.with_name(dict(TOKENIZER_FILES[1:3]).get(vocab_path.name, "merges.txt"))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found, and {vocab_path.name} needs it") from None
    except ValueError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from None
    first = 1 if lines[0].startswith("#version") else 0
    return parse_merges(path, [line for line in lines[first:] if line])


def parse_merges(path, merges):
    """Return pairs of str from merges written as "a b" or as ["a", "b"]."""
    if type(merges) is not list:
        raise ValueError(f"{path}: merges are a {type(merges).__name__}, expected a list")
    pairs = [merge.split(" ") if type(merge) is str else merge for merge in merges]
    for pair in pairs:
        if type(pair) is not list or [type(part) for part in pair] != [str, str]:
            raise ValueError(f"{path}: merge {pair!s:.80} is not a pair of tokens")
    return pairs


def parse_hugging_face(path, data):
    """Return vocab {text: id}, merges, and added tokens {text: id} of a tokenizer.json's content.

    Raises ValueError for a setting under which Hugging Face would give other ids than GPT-2's way.
    """
    model, vocab = data["model"], data["model"].get("vocab")
    split = data.get("pre_tokenizer") if type(data.get("pre_tokenizer")) is dict else {}
    after = data.get("post_processor") if type(data.get("post_processor")) is dict else {}
    settings = {
        "model.type": (model.get("type", "BPE"), "BPE"),
        "normalizer": (data.get("normalizer"), None),
        "pre_tokenizer.type": (split.get("type"), "ByteLevel"),
        "pre_tokenizer.add_prefix_space": (split.get("add_prefix_space", False), False),
        "pre_tokenizer.use_regex": (split.get("use_regex", True), True),
        "post_processor.type": (after.get("type", "ByteLevel"), "ByteLevel"),
    }
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        settings[f"model.{name}"] = (model.get(name) or None, None)
    for name, (found, expected) in settings.items():
        if found != expected:
            raise ValueError(
                f"{path}: {name} is {found!s:.40}, but GPT-2's tokenizer has {expected}: "
                "this is another kind of tokenizer"
            )
    added = data.get("added_tokens") or []
    try:
        added = {token["content"]: token["id"] for token in added}
        good = type(vocab) is dict and all(type(text) is str for text in added)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path}: model.vocab or added_tokens is missing or malformed")
    return vocab, parse_merges(path, model.get("merges")), added


def check_token_table(path, tokens, eot):
    """Raise ValueError unless a table can encode any text, by merging in the order of its ids."""
    ids = {token: id for id, token in enumerate(tokens)}
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise ValueError(f"{path}: no token for byte {missing[0]} ({len(missing)} of 256 missing)")
    for id, token in enumerate(tokens):
        if ids[token] != id:
            raise ValueError(f"{path}: {token[:40]} is both token {id} and token {ids[token]}")
        if not 0 < len(token) < 256:
            raise ValueError(f"{path}: token {id} has {len(token)} bytes, must have 1 to 255")
    if eot is not None and not 0 <= eot < len(tokens):
        raise ValueError(f"{path}: end-of-text id {eot} is not one of {len(tokens)} tokens")
    misplaced = find_misplaced(ids, eot)
    if misplaced is not None:
        raise ValueError(
            f"{path}: token {ids[misplaced]} {misplaced} comes before its parts: encoding "
            "merges in the order of the ids, and here that is not the order of the merges"
        )


def find_misplaced(ids, eot):
    """Return the first token of {token: id} that cannot be merged from two lower ids, or None.

    A token that no two others join to is not misplaced: it was added, and text never merges to it.
    """
    for token, id in ids.items():
        cuts = range(len(token) - 1, 0, -1)
        for cut in cuts:
            if ids.get(token[:cut], id) < id > ids.get(token[cut:], id):
                break
        else:
            joins = any(token[:cut] in ids and token[cut:] in ids for cut in cuts)
            if joins and id != eot:
                return token
    return None


def recover_merges(tokens, eot):
    """Return the list of merges, pairs of bytes, that a token table stands for, in order of id.

    The merge that made a token is what is left of its bytes when all earlier merges are done:
    with "h" "e" "t" "he" before it, "the" was made from "t" and "he". Skips added tokens.
    """
    ids = {token: id for id, token in enumerate(tokens)}
    merges = []
    for id, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ids.get(left + right, id) for left, right in itertools.pairwise(parts)]
            lowest = min(pairs)
            if lowest == id:
                break
            at = pairs.index(lowest)
            parts[at : at + 2] = [tokens[lowest]]
        if len(parts) == 2 and id != eot:
            merges.append(tuple(parts))
    return merges


def check_merges(path, merges, recovered):
    """Raise ValueError unless a file's merges are those that `recover_merges` gives."""
    if merges == recovered:
        return
    pairs = itertools.zip_longest(merges, recovered, fillvalue="nothing")
    at, (found, expected) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"{path}: merge {at} is {found}, but by the order of its ids it would be {expected}: "
        "encoding by the ids would differ, so this tokenizer cannot be used"
    )


# ----------------------------------------------------------------------------------------------
# Commands: what the four programs share


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with errors on one line (exit status 2) and defaults in `--help`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Call a program's `main` and exit: 0, or 1 with the error on one line, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that lacks a character prints a "?"
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")
