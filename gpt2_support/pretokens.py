"""How splitting is made fast: words are cut from the text, and each different word is split once.

`SPLIT_PATTERN` in encoder.py defines the pre-tokens. No pre-token goes on from a letter to a
non-letter, or from a non-space to a space, and the pattern never looks back. So a text can be cut
at these places, and its parts, split one by one, have the same pre-tokens as the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import regex

# A space as `regex` defines it: re's \s includes \x1c to \x1f, too.
SPACE, NON_SPACE = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"

# A word has the spaces before it. It ends after ASCII letters, or else before the next space.
# (Here `re` is twice as fast as `regex`.)
WORD = re.compile(rf"{SPACE}*(?:[A-Za-z]+(?:[^\s\x00-\x7f]{NON_SPACE}*)?|{NON_SPACE}+)|{SPACE}+")
find_words = WORD.findall  # find_words(text) is a list of str, which join to the text

# The last place to cut a text of which more will be read: before a space, but not after
# <|endoftext|>, because only what follows tells whether that is a line of its own.
LAST_CUT = regex.compile(r"(?r)(?<=\S)(?<!<\|endoftext\|>)\s")


class WordCache(dict[str, tuple[int, ...]]):
    """Keeps the ids of words: `cache[word]` calls `encode(word)` only if the word is new.

    Words of over 64 characters are not kept. A cache of 131,072 words is emptied.
    """

    def __init__(self, encode: Callable[[str], tuple[int, ...]]) -> None:
        self.encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self.encode(word)
        if len(word) <= 64:
            if len(self) == 131072:
                self.clear()
            self[word] = ids
        return ids
