"""Token tables: lists of the bytes of every token, in which the id order is the merge order.

In GPT-2 a lower id is an earlier merge, so the table alone defines the tokenizer: encoding merges
the adjacent pair whose joined bytes have the lowest id. `load_tokenizer` reads llm.c's
`tokenizer.bin`, OpenAI's `encoder.json` with `vocab.bpe`, and Hugging Face's `vocab.json` with
`merges.txt` or `tokenizer.json`, and refuses a table of which this is not true.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_support.files import atomic_write, open_file, read_json
from gpt2_support.formats.llmc import TOKENIZER_MAGIC, read_header, write_header
from gpt2_support.messages import preview

EOT_TEXT = "<|endoftext|>"
FILE_NAMES = (  # of the tables in a folder, in order of preference
    ("tokenizer.bin",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("tokenizer.json",),
)

Pair = tuple[bytes, bytes]


def load_tokenizer(path: str | Path) -> tuple[list[bytes], int | None]:
    """Return a token table (the bytes of each token, by id) and its end-of-text id, or None.

    `path` is a `tokenizer.bin` (version 1 or 2), a `tokenizer.json`, an `encoder.json` with
    `vocab.bpe` beside it, a `vocab.json` with `merges.txt` beside it, or a folder that holds any of
    these, or a .safetensors file in one. Raises FileNotFoundError, or ValueError if the file is
    damaged or if merging by lowest id would give other ids than the file's own tokenizer.
    """
    path = Path(path)
    path = path.parent if path.suffix == ".safetensors" else path
    path = find_tokenizer(path) if path.is_dir() else path
    if path.suffix != ".json":
        tokens, eot = read_bin(path)
        check_token_table(path, tokens, eot)
        return tokens, eot
    tokens, merges = read_json_table(path)
    eot = find_eot(tokens)
    check_token_table(path, tokens, eot)
    check_merges(path, merges, recover_merges(tokens, eot))
    return tokens, eot


def save_tokenizer(path: str | Path, tokens: Sequence[bytes], eot: int | None) -> None:
    """Write a token table as a tokenizer .bin of version 2, atomically.

    `tokens` are the bytes of each token, by id; `eot` is the id of the end-of-text token, or None.
    Raises ValueError for a token of more than 255 bytes.
    """
    longest = max(map(len, tokens))
    if longest > 255:
        raise ValueError(f"a token of {longest} bytes exceeds the 255 that {path} can hold")
    with atomic_write(path) as file:
        write_header(file, TOKENIZER_MAGIC, 2, len(tokens), -1 if eot is None else eot)
        file.write(b"".join(bytes([len(token)]) + token for token in tokens))


def find_tokenizer(folder: Path) -> Path:
    """Return the path of the first of FILE_NAMES in a folder, or raise FileNotFoundError."""
    for names in FILE_NAMES:
        if all((folder / name).is_file() for name in names):
            return folder / names[0]
    expected = ", ".join(" with ".join(names) for names in FILE_NAMES)
    raise FileNotFoundError(f"{folder}: no token table in this folder (looked for {expected})")


def find_eot(tokens: list[bytes]) -> int | None:
    """Return the id of the token <|endoftext|>, or None."""
    eot = EOT_TEXT.encode()
    return tokens.index(eot) if eot in tokens else None


# tokenizer.bin


def read_bin(path: Path) -> tuple[list[bytes], int | None]:
    """Return the tokens and the end-of-text id of a tokenizer .bin."""
    with open_file(path) as file:
        _, version, n_tokens, eot, *_ = read_header(file, TOKENIZER_MAGIC, (1, 2))
        data = file.read()
    tokens, end = [], 0
    while end < len(data):
        start, end = end + 1, end + 1 + data[end]
        tokens.append(data[start:end])
    if len(tokens) != n_tokens or end != len(data):
        raise ValueError(
            f"{path}: header counts {n_tokens} tokens, found {len(tokens)}"
            f"{', the last cut short' if end > len(data) else ''}: the file is damaged"
        )
    if version == 1:  # which does not store the id
        return tokens, find_eot(tokens)
    return tokens, None if eot == -1 else eot


# JSON


def bytes_to_unicode() -> dict[int, str]:
    """Return {byte: character}: the alphabet in which GPT-2's JSON writes the bytes of a token.

    The printable characters of Latin-1 stand for their own byte; the other 68 bytes, in order,
    are the characters from U+0100 on, so that a space is "Ġ" and a newline "Ċ". The dict is in
    the order of GPT-2's ids 0 to 255 ("!" is 0). Source: `encoder.py` of openai/gpt-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


UNICODE_TO_BYTE = {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(path: str | Path, text: str) -> bytes:
    """Return the bytes of a token that a JSON file writes as `text`: b" the" for "Ġthe"."""
    try:
        return bytes([UNICODE_TO_BYTE[character] for character in text])
    except KeyError:
        raise ValueError(f"{path}: token {preview(text)} is not in GPT-2's byte alphabet") from None


def read_json_table(path: Path) -> tuple[list[bytes], list[Pair]]:
    """Return the tokens and the merges of a tokenizer.json, or of a vocabulary and its merges."""
    data = read_json(path)
    if type(data.get("model")) is dict:
        check_settings(path, data)
        vocab, added = parse_vocab(path, data)
        merges = parse_merges(path, data["model"].get("merges"))
    else:
        vocab, added, merges = data, {}, read_merges(path)
    ids = {token_bytes(path, text): id for text, id in vocab.items() if text not in added}
    ids |= {text.encode("utf-8", "replace"): id for text, id in added.items()}
    tokens = sort_tokens(path, ids)
    return tokens, [(token_bytes(path, a), token_bytes(path, b)) for a, b in merges]


def sort_tokens(path: Path, ids: Mapping[bytes, Any]) -> list[bytes]:
    """Return the tokens of {token: id} in order of id; raise ValueError if the ids are not 0..n."""
    tokens: list[Any] = [None] * len(ids)
    for token, id in ids.items():
        if type(id) is not int or not 0 <= id < len(ids) or tokens[id] is not None:
            raise ValueError(
                f"{path}: token {token[:40]!r} has id {preview(id)}, but {len(ids)} tokens must "
                f"have the ids 0 to {len(ids) - 1}, each once"
            )
        tokens[id] = token
    return tokens


def read_merges(vocab_path: Path) -> list[list[str]]:
    """Return the merges, pairs of str, in the text file that belongs beside a vocabulary."""
    path = vocab_path.with_name("vocab.bpe" if vocab_path.name == "encoder.json" else "merges.txt")
    try:
        with open_file(path) as file:
            lines = file.read().decode("utf-8").replace("\r\n", "\n").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found, and {vocab_path.name} needs it") from None
    except ValueError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from None
    first = 1 if lines[0].startswith("#version") else 0
    return parse_merges(path, [line for line in lines[first:] if line])


def parse_merges(path: Path, merges: Any) -> list[list[str]]:
    """Return pairs of str from merges that are written as "a b" or as ["a", "b"]."""
    if type(merges) is not list:
        raise ValueError(f"{path}: merges are a {type(merges).__name__}, expected a list")
    pairs = [merge.split(" ") if type(merge) is str else merge for merge in merges]
    for pair in pairs:
        if type(pair) is not list or [type(part) for part in pair] != [str, str]:
            raise ValueError(f"{path}: merge {preview(pair)} is not a pair of tokens")
    return pairs


def check_settings(path: Path, data: dict[str, Any]) -> None:
    """Raise ValueError for a setting in a tokenizer.json that gives other ids than GPT-2's."""
    model = data["model"]
    split: Any = data.get("pre_tokenizer")
    split = split if type(split) is dict else {}
    after: Any = data.get("post_processor")
    after = after if type(after) is dict else {}
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
    for name, (actual, expected) in settings.items():
        if actual != expected:
            raise ValueError(
                f"{path}: {name} is {preview(actual)}, but GPT-2's tokenizer has {expected}: "
                "this is another kind of tokenizer"
            )


def parse_vocab(path: Path, data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the vocabulary and the added tokens of a tokenizer.json, both {text: id}."""
    vocab = data["model"].get("vocab")
    try:
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        good = type(vocab) is dict and all(type(text) is str for text in added)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path}: model.vocab or added_tokens is missing or malformed")
    return vocab, added


# The order of ids and merges


def check_token_table(path: Path, tokens: list[bytes], eot: int | None) -> None:
    """Raise ValueError unless a table can encode any text by merging in the order of its ids."""
    ranks = {token: id for id, token in enumerate(tokens)}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path}: no token for byte {missing[0]} ({len(missing)} of 256 missing)")
    for id, token in enumerate(tokens):
        if ranks[token] != id:
            raise ValueError(f"{path}: {token[:40]!r} is both token {id} and token {ranks[token]}")
        if not 0 < len(token) < 256:
            raise ValueError(f"{path}: token {id} has {len(token)} bytes, must have 1 to 255")
    if eot is not None and not 0 <= eot < len(tokens):
        raise ValueError(f"{path}: end-of-text id {eot} is not one of {len(tokens)} tokens")
    misplaced = find_misplaced(ranks, eot)
    if misplaced is not None:
        raise ValueError(
            f"{path}: token {ranks[misplaced]} {misplaced!r} comes before its parts: encoding "
            "merges in the order of the ids, and here that is not the order of the merges"
        )


def find_misplaced(ranks: Mapping[bytes, int], eot: int | None) -> bytes | None:
    """Return the first token of {token: id} that no two lower ids merge to, or None.

    A token that no two others join to is an added token, which text never merges to; it may have
    any id.
    """
    for token, id in ranks.items():
        cuts = range(len(token) - 1, 0, -1)
        for cut in cuts:
            if ranks.get(token[:cut], id) < id > ranks.get(token[cut:], id):
                break
        else:
            joins = any(token[:cut] in ranks and token[cut:] in ranks for cut in cuts)
            if joins and id != eot:
                return token
    return None


def recover_merges(tokens: list[bytes], eot: int | None) -> list[Pair]:
    """Return the merges, pairs of bytes, that a token table stands for, in order of id.

    A token's own merge is the pair that is left when all earlier merges have been applied to its
    bytes: with "h", "e", "t", "he" before it, "the" was merged from "t" and "he". Added tokens,
    for which more than two parts are left, have none.
    """
    ranks = {token: id for id, token in enumerate(tokens)}
    merges = []
    for id, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        pairs = [ranks.get(left + right, id) for left, right in itertools.pairwise(parts)]
        while len(parts) > 2 and (lowest := min(pairs)) < id:
            at = pairs.index(lowest)
            parts[at : at + 2] = [tokens[lowest]]
            del pairs[at]
            for i in range(max(at - 1, 0), min(at + 1, len(pairs))):
                pairs[i] = ranks.get(parts[i] + parts[i + 1], id)
        if len(parts) == 2 and id != eot:
            merges.append((parts[0], parts[1]))
    return merges


def check_merges(path: Path, merges: list[Pair], recovered: list[Pair]) -> None:
    """Raise ValueError unless a file's merges are those that `recover_merges` gives."""
    if merges == recovered:
        return
    pairs = itertools.zip_longest(merges, recovered, fillvalue="nothing")
    at, (actual, expected) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"{path}: merge {at} is {actual}, but by the order of its ids it would be {expected}: "
        "encoding by the ids would differ, so this tokenizer cannot be used"
    )
