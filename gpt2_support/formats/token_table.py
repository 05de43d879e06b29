"""Token tables: the bytes of every token, indexed by id, where the id order is the merge order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support.files import atomic_write, read_json
from gpt2_support.formats.llmc import HEADER_BYTES, TOKENIZER_MAGIC, read_header, write_header
from gpt2_support.messages import preview

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# Token tables: the bytes of every token, indexed by id, where the id order is the merge order

if TYPE_CHECKING:
    from collections.abc import Sequence

EOT_TEXT = "<|endoftext|>"


TOKENIZER_FILES = (  # what load_tokenizer looks for in a folder, in order of preference
    ("tokenizer.bin",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("tokenizer.json",),
)


def load_tokenizer(path: str | Path) -> tuple[list[bytes], int | None]:
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


def save_tokenizer(path: str | Path, tokens: Sequence[bytes], eot: int | None) -> None:
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


def token_bytes(path, text):
    """Return the bytes of a token that a JSON file writes as `text`; " the" is "Ġthe" there."""
    try:
        return bytes([UNICODE_TO_BYTE[character] for character in text])
    except KeyError:
        raise ValueError(f"{path}: token {preview(text)} is not in GPT-2's byte alphabet") from None


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
                f"{path}: token {token[:40]} has id {preview(id)}, but {len(ids)} tokens must "
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
            raise ValueError(f"{path}: merge {preview(pair)} is not a pair of tokens")
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
                f"{path}: {name} is {preview(found)}, but GPT-2's tokenizer has {expected}: "
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
        pairs = [ids.get(left + right, id) for left, right in itertools.pairwise(parts)]
        while len(parts) > 2 and (lowest := min(pairs)) < id:
            at = pairs.index(lowest)
            parts[at : at + 2] = [tokens[lowest]]
            del pairs[at]
            for i in range(max(at - 1, 0), min(at + 1, len(pairs))):
                pairs[i] = ids.get(parts[i] + parts[i + 1], id)
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
