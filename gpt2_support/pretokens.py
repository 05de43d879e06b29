"""How splitting and merging are made fast, and their memory bounded.

Words are cut from the text, and each different word is split and merged once; a pre-token of any
length is merged in blocks.

`SPLIT_PATTERN` in encoder.py defines the pre-tokens. No pre-token goes on from a letter to a
non-letter, or from a non-space to a space, and the pattern never looks back. So a text can be cut
at these places, and its parts, split one by one, have the same pre-tokens as the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import regex

# A space as `regex` defines it: re's \s includes \x1c to \x1f, too.
SPACE, NON_SPACE = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"

# A word has the spaces before it. It ends after ASCII letters, or else before the next space.
# (Here `re` is twice as fast as `regex`, and a fifth faster with the most common words first.)
COMMON = r" ?[A-Za-z]+(?=[\x00-@\[-`{-\x7f])"  # they end before another ASCII character
WORD = re.compile(
    rf"{COMMON}|{SPACE}*(?:[A-Za-z]+(?:[^\s\x00-\x7f]{NON_SPACE}*)?|{NON_SPACE}+)|{SPACE}+"
)
find_words = WORD.findall  # find_words(text) is a list of str, which join to the text

# The last place to cut a text of which more will be read: before a space, but not after
# <|endoftext|>, because only what follows tells whether that is a line of its own.
LAST_CUT = regex.compile(r"(?r)(?<=\S)(?<!<\|endoftext\|>)\s")


def find_pretokens(pattern: regex.Pattern[str], text: str) -> Iterable[str]:
    """Return what a pattern matches, one by one if a list of all of it would be long."""
    if len(text) < 1000:
        return pattern.findall(text)  # faster
    return (match[0] for match in pattern.finditer(text))


BLOCK = 1 << 16  # bytes of a pre-token that are merged at a time, which takes 16 MB


def check_text(text: object) -> str:
    """Return a text, or raise ValueError that says what to do."""
    if isinstance(text, str):
        return text
    advice = ": text.decode('utf-8') is one" if isinstance(text, bytes | bytearray) else ""
    raise ValueError(f"text of type {type(text).__name__}, expected a str{advice}")


class WordCache(dict[str, Iterable[int]]):
    """Keeps the ids of words: `cache[word]` calls `encode(word)` only if the word is new.

    Words of over 64 characters are not kept. A cache of 131,072 words is emptied.
    """

    def __init__(self, encode: Callable[[str], Iterable[int]]) -> None:
        self.encode = encode

    def __missing__(self, word: str) -> Iterable[int]:
        if len(word) > 64:
            return self.encode(word)
        if len(self) >= 131072:  # a thread may have passed the test at the same time
            self.clear()
        ids = self[word] = tuple(self.encode(word))
        return ids


def bpe_in_blocks(
    bpe: Callable[[bytes, dict[bytes, int]], list[int]],
    pretoken: bytes,
    ranks: dict[bytes, int],
    tokens: Sequence[bytes],
    block: int | None = None,
) -> list[int]:
    """Return bpe(pretoken, ranks) in memory for a block of bytes, and the ids.

    Merges that never cross the boundary of two tokens are those that either side has alone. So the
    ids of two parts, one beginning inside the other, join where both have a token in common: no
    merge crosses its boundaries. Each block starts some tokens before the end of the last one, and
    further back if its first token is another than before.
    """
    block = block or BLOCK
    if len(pretoken) <= block:
        return bpe(pretoken, ranks)
    ids, end = bpe(pretoken[:block], ranks), block
    while end < len(pretoken):
        n_back = 8
        while True:
            n_back = min(n_back, len(ids))
            start = end - sum(len(tokens[id]) for id in ids[-n_back:])
            more = bpe(pretoken[start : end + block], ranks)
            if start == 0 or more[0] == ids[-n_back]:
                break
            n_back *= 8
        ids[-n_back:] = more
        end += block
    return ids
