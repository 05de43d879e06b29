"""Text into token ids and back: byte-level byte-pair encoding (BPE), as in GPT-2.

Reading order: `SPLIT_PATTERN` splits a text into pre-tokens, `bpe` merges the bytes of a pre-token
into tokens, `Encoder` does both and turns ids back into text, `StreamDecoder` does so one id at a
time, and `train` learns a vocabulary from text. The command line is at the end.

    >>> enc = load("124M")
    >>> enc.encode("Hello, world!")
    [15496, 11, 995, 0]
    >>> enc.decode([15496, 11, 995, 0])
    'Hello, world!'

Sources: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019, section 2.2 (on bytes).
"""

from __future__ import annotations

import codecs
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import TypeAlias

import gpt2_support  # isort: skip (before NumPy: it configures its BLAS)  # noqa: F401

import numpy as np
import regex
from numpy.typing import NDArray

from gpt2_support import cli, corpus, encoder_cli, hub, messages
from gpt2_support.formats import token_table
from gpt2_support.formats.token_table import EOT_TEXT
from gpt2_support.pretokens import (
    WordCache,
    bpe_in_blocks,
    check_text,
    find_pretokens,
    find_words,
)

TokenIds: TypeAlias = int | np.integer | Sequence[int | np.integer] | NDArray[np.integer]
Pair: TypeAlias = tuple[int, int]  # the ids of two neighbours

# ----------------------------------------------------------------------------------------------
# Splitting: nothing is ever merged across two pre-tokens, so that "dog." and "dog!" share a token

# A pre-token is a run of letters, digits or other characters, after at most one space; or a
# contraction; or whitespace, without its last character if more text follows. The pattern is
# OpenAI's, with its alternatives in a faster order.
SPLIT_PATTERN = regex.compile(
    r" ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+| ?\p{N}+|\s+(?!\S)|\s+"
)

# ----------------------------------------------------------------------------------------------
# Merging: the bytes of a pre-token become tokens


def bpe(pretoken: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of the tokens into which a pre-token merges; `ranks` is {token: id}.

    Starts with single bytes and merges one pair of neighbours at a time: the one whose joined bytes
    are the token with the lowest id, the leftmost of equal pairs. Stops when no pair joins to a
    token. The ids have the order in which the tokens were learned. With he 256, th 257, the 258:

        t  h  e  m  e      "th" is 257 and "he" is 256, which is lower
        t  he    m  e      "the" is 258
        the      m  e      "them" and "me" are not tokens: these three are the result

    Sennrich et al. 2016, arXiv:1508.07909, section 3.2.
    """
    n = len(pretoken)
    end = [*range(1, n + 1), n + 1, n + 1]  # end[i]: end of the part at i; n + 1: none
    start = [*range(-1, n)]  # start[i]: start of the part that ends at i; -1: there is none
    heap = []  # (id, i, stop) for pairs that are tokens: the lowest id first, then the leftmost
    for i in range(n - 1):
        if (joined := pretoken[i : i + 2]) in ranks:
            heap.append((ranks[joined], i, i + 2))
    heapify(heap)  # with a heap, n bytes take O(n log n) steps
    while heap:
        _, i, stop = heappop(heap)
        middle = end[i]
        if end[middle] != stop:
            continue  # one of the two parts has been merged with another since
        end[i], end[middle], start[stop] = stop, n + 1, i
        left, right = start[i], end[stop]
        if left >= 0 and (joined := pretoken[left:stop]) in ranks:
            heappush(heap, (ranks[joined], left, stop))
        if right <= n and (joined := pretoken[i:right]) in ranks:
            heappush(heap, (ranks[joined], i, right))
    ids, i = [], 0
    while i < n:
        ids.append(ranks[pretoken[i : end[i]]])
        i = end[i]
    return ids


# ----------------------------------------------------------------------------------------------
# Encoding and decoding


class Encoder:
    """Turns text into token ids and back.

    `tokens` is the vocabulary, a list of bytes indexed by id; `eot` is the id of the end-of-text
    token, or None.
    """

    def __init__(self, tokens: Sequence[bytes], eot: int | None = None) -> None:
        self.tokens, self.eot, self.n_vocab = list(tokens), eot, len(tokens)
        # Bytes never merge into the end-of-text token, but it may be a single byte.
        self.ranks = {token: id for id, token in enumerate(tokens) if id != eot or len(token) == 1}
        self._word_ids = WordCache(self._split_and_merge)

    def __repr__(self) -> str:
        return f"Encoder(n_vocab={self.n_vocab}, eot={self.eot})"

    def __reduce__(self) -> tuple[type[Encoder], tuple[list[bytes], int | None]]:
        return type(self), (self.tokens, self.eot)  # a pickle holds the vocabulary alone

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of a text.

        `<|endoftext|>` in the text is ordinary text, unless `allow_special`: then it becomes the id
        `eot`. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD. Raises ValueError for what
        is not a str.
        """
        text = replace_surrogates(check_text(text))
        if allow_special and self.eot is not None:
            documents = text.split(self.tokens[self.eot].decode("utf-8", "surrogateescape"))
            ids = chain.from_iterable([self.eot, *self.encode(document)] for document in documents)
            return list(ids)[1:]
        # The same as _split_and_merge(text), but faster: see gpt2_support/pretokens.py.
        return list(chain.from_iterable(map(self._word_ids.__getitem__, find_words(text))))

    def _split_and_merge(self, text: str) -> Iterator[int]:
        """Yield the ids of the pre-tokens of a text, one after the other."""
        for pretoken in find_pretokens(SPLIT_PATTERN, text):
            utf8 = pretoken.encode()
            id = self.ranks.get(utf8)
            if id is None:
                yield from bpe_in_blocks(bpe, utf8, self.ranks, self.tokens)
            else:  # most pre-tokens are tokens
                yield id

    def decode_bytes(self, ids: TokenIds) -> bytes:
        """Return the bytes of ids: an int, a list, or an array (N,); ValueError if one is unknown.

        They can end inside a character, because a token can.
        """
        array = np.atleast_1d(np.asarray(ids))
        if array.size and (array.ndim > 1 or array.dtype.kind not in "iu"):
            raise ValueError(
                f"ids of type {array.dtype} and shape {array.shape} are not a list of ids"
            )
        for id in array.tolist():
            if not 0 <= id < self.n_vocab:
                raise ValueError(f"token id {id} is not in the vocabulary of {self.n_vocab} tokens")
        return b"".join([self.tokens[id] for id in array.tolist()])

    def decode(self, ids: TokenIds) -> str:
        """Return the text of ids, as `decode_bytes`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """Return a StreamDecoder, which decodes ids one at a time."""
        return StreamDecoder(self)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as llm.c's `tokenizer.bin`."""
        token_table.save_tokenizer(path, self.tokens, self.eot)


class StreamDecoder:
    """Decodes ids one at a time: `feed` each id, then `flush`; the texts join to `decode(ids)`.

    Holds back the bytes of an incomplete character until the ids that complete it.
    """

    def __init__(self, enc: Encoder) -> None:
        self._enc = enc
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int | np.integer) -> str:
        """Return the text that one more id completes, which may be empty."""
        return self._decoder.decode(self._enc.decode_bytes(id))

    def flush(self) -> str:
        """Return U+FFFD if the ids ended inside a character, otherwise nothing."""
        return self._decoder.decode(b"", final=True)


def replace_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: surrogates are joined in pairs, or become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load(name: str | Path, models_dir: str | Path = hub.MODELS_DIR) -> Encoder:
    """Return the Encoder of a model in `models_dir`, such as "124M", or of a path.

    The path is a folder or a token table in any format that `load_tokenizer` reads. What is not
    there yet is downloaded: of OpenAI's models the token table alone, of the Hugging Face hub's the
    model. Raises FileNotFoundError, or ValueError if the table is damaged.
    """
    return Encoder(*token_table.load_tokenizer(hub.find_tokenizer(name, models_dir)))


# ----------------------------------------------------------------------------------------------
# Learning a vocabulary


def train(texts: str | Iterable[str], n_vocab: int) -> Encoder:
    """Return an Encoder of `n_vocab` tokens, learned from a text or an iterable of texts.

    The vocabulary is the 256 bytes, in GPT-2's order, then the merges, the most frequent pair
    first, then <|endoftext|>, which separates documents in the texts. The order of the texts does
    not matter. Raises ValueError if n_vocab < 257, or if the texts have too few pairs to merge.
    Sennrich et al. 2016, arXiv:1508.07909, algorithm 1, on bytes.

        >>> train("banana bandana", 260).tokens[256:]
        [b'an', b'ban', b'ana', b'<|endoftext|>']

    because a + n occurs four times; then b + an and an + a twice, and b has the lower id.
    """
    if n_vocab < 257:
        raise ValueError(f"n_vocab = {n_vocab}: 256 bytes and {EOT_TEXT} are 257 tokens")
    tokens = [bytes([byte]) for byte in token_table.bytes_to_unicode()]
    learn_merges(count_pretokens([texts] if isinstance(texts, str) else texts), tokens, n_vocab - 1)
    return Encoder([*tokens, EOT_TEXT.encode()], eot=n_vocab - 1)


def count_pretokens(texts: Iterable[str]) -> Counter[str]:
    """Return how often each pre-token occurs in the texts, a Counter {pre-token: count}."""
    words: Counter[str] = Counter()
    for text in texts:
        for document in text.split(EOT_TEXT):
            words.update(find_words(document))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for pretoken in find_pretokens(SPLIT_PATTERN, word):
            counts[pretoken] += count
    return counts


def learn_merges(pretokens: Counter[str], tokens: list[bytes], n_tokens: int) -> None:
    """Append merges of the most frequent pairs to `tokens` until there are `n_tokens`.

    Of equally frequent pairs the one with the lowest ids comes first. A token has at most 255
    bytes, which is what a tokenizer.bin can hold. No token is made twice: between the same
    boundaries the same bytes always merge alike, so only one pair at a time joins to them.
    """
    from tqdm import tqdm

    pairs = PairCounts(pretokens, {token: id for id, token in enumerate(tokens)})
    for new in tqdm(range(len(tokens), n_tokens), "merges", unit="", file=messages.BarStream()):
        pair = pairs.pop_most_frequent()
        if pair is None:
            raise ValueError(
                f"nothing is left to merge after {new} tokens: give more text, "
                f"or n_vocab = {new + 1} at most"
            )
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for left, right in pairs.merge(pair, new):
            if len(tokens[left] + tokens[right]) < 256:
                pairs.push((left, right))


class PairCounts:
    """The pre-tokens as lists of ids, and how often each pair of neighbours occurs in them."""

    def __init__(self, pretokens: Counter[str], ranks: dict[bytes, int]) -> None:
        byte_ids = [ranks[bytes([byte])] for byte in range(256)]
        self.pretokens = [[byte_ids[byte] for byte in text.encode()] for text in pretokens]
        self.weights = list(pretokens.values())
        self.counts: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)  # indices of pre-tokens
        for i, weight in enumerate(self.weights):
            for pair in pairwise(self.pretokens[i]):
                self.counts[pair] += weight
                self.where[pair].add(i)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapify(self.heap)

    def merge(self, pair: Pair, new: int) -> set[Pair]:
        """Replace `pair` by the id `new` everywhere; return the pairs that contain `new`.

        Only the counts of pairs that overlap it change.
        """
        left, right = pair
        created: set[Pair] = set()
        for i in self.where.pop(pair):
            ids, at = self.pretokens[i], 0
            while at < len(ids) - 1:
                if ids[at] == left and ids[at + 1] == right:
                    ids[at : at + 2] = [new]
                    if at > 0:
                        before = ids[at - 1]
                        created.add(self.exchange(i, (before, left), (before, new)))
                    if at + 1 < len(ids):
                        after = ids[at + 1]
                        created.add(self.exchange(i, (right, after), (new, after)))
                at += 1
        return {pair for pair in created if self.counts[pair] > 0}

    def exchange(self, i: int, old: Pair, new: Pair) -> Pair:
        """Count `new` instead of `old` in pre-token number `i`; return `new`."""
        self.counts[old] -= self.weights[i]
        self.counts[new] += self.weights[i]
        self.where[new].add(i)
        return new

    def push(self, pair: Pair) -> None:
        """Make `pair` one that `pop_most_frequent` may return."""
        heappush(self.heap, (-self.counts[pair], pair))

    def pop_most_frequent(self) -> Pair | None:
        """Return the most frequent pair, or None if there is none.

        A count in the heap may be too high, because merges lower the counts of older pairs; it is
        never too low, because only pairs with a new id gain.
        """
        while self.heap:
            count, pair = heappop(self.heap)
            if -count == self.counts[pair]:
                return pair
            if self.counts[pair] > 0:
                self.push(pair)
        return None


# ----------------------------------------------------------------------------------------------
# The command line, whose flags are in gpt2_support/encoder_cli.py


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: `python encoder.py --help`."""
    args = encoder_cli.parse_args(argv)
    if args.command == "train":
        texts = encoder_cli.find_texts(args)
        train(corpus.read_texts(texts), args.n_vocab).save(args.out)
        n_bytes = corpus.total_bytes(texts)
        messages.info(f"learned {args.n_vocab} tokens from {n_bytes:,} bytes: {args.out}")
    elif args.command == "encode":
        texts, enc = encoder_cli.find_texts(args), load(args.tokenizer)
        encoder_cli.summarize(args.out, *encoder_cli.encode(enc, texts, args))
    else:
        encoder_cli.show_or_decode(load(args.tokenizer), args)


def command() -> None:
    """Run the installed command `gpt2-tokenize`."""
    cli.run(main)


if __name__ == "__main__":
    command()
