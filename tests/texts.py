"""Texts for the tests of the tokenizer, and byte-pair encoding as it is defined, slow and plain."""

from itertools import pairwise

import regex
from hypothesis import settings
from hypothesis import strategies as st

EOT = "<|endoftext|>"
TEXT = """It was the best of times, it was the worst of times; it wasn't only the winter's tale.
"We're here," she said, "and they'll be there at 10:45 on the 23rd -- don't you think so?"
    if x == 10:  # four spaces, then      many
\treturn [x ** 2 for x in range(1000)]

Zażółć gęślą jaźń. Das Mädchen läuft über die Straße. Être ou ne pas être: voilà la question.
子曰：學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？ Привет, мир! 😀😀👩‍👩‍👧‍👦 naïve café ½ ² Ⅷ
"""
# The original, from OpenAI's encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Characters of every kind that the pattern or the code tells apart.
AWKWARD = [*"aZ's'tlrev!<|>_-01 \n\t\r", "  ", "'ll", "\x1c", "\x1f", "\x85", "\xa0", "\u3000"]
AWKWARD += [*"é²Ⅷ你😀\u0301\ufeff\ufffd\u200b\u2028\0", "the", " the", EOT, f"\n{EOT}\n"]
# What is assigned by the Unicode of this Python: two programs that know later versions of Unicode,
# not the same one, split the rest differently.
assigned_text = st.text(st.characters(exclude_categories=["Cn", "Cs"]))
awkward_text = st.lists(st.sampled_from(AWKWARD), max_size=24).map("".join)


def examples(factor):
    """Settings for `factor` times as many examples as the run, quick or thorough, usually has."""
    return settings(max_examples=factor * settings.default.max_examples)


def naive_bpe(pretoken, ranks):
    """The definition of BPE: merge the leftmost pair of lowest id, until there is none."""
    parts = [pretoken[i : i + 1] for i in range(len(pretoken))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def naive_encode(enc, text):
    """Split a text by OpenAI's pattern and merge each pre-token by the definition."""
    ranks = {token: id for id, token in enumerate(enc.tokens) if id != enc.eot}
    pretokens = regex.findall(GPT2_PATTERN, text)
    return [id for pretoken in pretokens for id in naive_bpe(pretoken.encode(), ranks)]


def with_eot(enc, documents):
    """Return the ids of documents, each after the end-of-text token."""
    return [id for text in documents for id in [enc.eot, *enc.encode(text)]]
