"""Text into token ids and back: byte-level byte-pair encoding (BPE), as GPT-2 does it.

Reading order: the text is split into pieces (`PIECES`), the bytes of a piece are merged to tokens
(`merge`), the `Encoder` does both for a token table, `StreamDecoder` goes back one id at a time,
`train` learns a token table from text, and `encode_files` turns text files into training data.

    >>> enc = load("124M")
    >>> enc.encode("Hello, world!")
    [15496, 11, 995, 0]
    >>> enc.decode([15496, 11, 995, 0])
    'Hello, world!'

Sources: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019, section 2.2 (on bytes).
"""

from __future__ import annotations

import argparse
import codecs
import os
import re
import signal
import sys
from collections import Counter, defaultdict, deque
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import gpt2_support  # isort: skip (before NumPy: it configures its BLAS)  # noqa: F401

import numpy as np
import regex

from gpt2_support import cli, hub
from gpt2_support.formats import llmc, token_table

if TYPE_CHECKING:  # for readers and checkers; nothing is imported when the program runs
    from collections.abc import Iterable
    from typing import Any

    Ids = Any  # one id, a list or an array (N,), checked where they come in

# ----------------------------------------------------------------------------------------------
# Splitting: nothing is ever merged across two pieces, so that "dog." and "dog!" share a token

# GPT-2's pieces: letters, punctuation or digits, each with a space before it, contractions, and
# whitespace, which leaves its last character to what follows (from OpenAI's encoder.py;
# Radford et al. 2019, 2.2). Here in the order that is fastest; only that contractions come before
# punctuation makes a difference.
PIECES = regex.compile(r" ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+| ?\p{N}+|\s+(?!\S)|\s+")

# No piece goes on from a letter to a non-letter or from a non-space to a space, and none depends on
# what is before it. So a text can be cut at these places and its parts be split alone: a word is
# split when first met, then looked up. Words end after ASCII letters, or before a space; SPACE is
# regex's \s, whereas re's has also \x1c to \x1f. (For this much, `re` is twice as fast as `regex`.)
SPACE, OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
WORDS = re.compile(rf"{SPACE}*(?:[A-Za-z]+(?:[^\s\x00-\x7f]{OTHER}*)?|{OTHER}+)|{SPACE}+")


# ----------------------------------------------------------------------------------------------
# Merging: the bytes of a piece into tokens


def merge(piece: bytes, ids: dict[bytes, int]) -> list[int]:
    """Return the ids of the tokens that the bytes of a piece merge to; `ids` is {token: id}.

    While two neighbours join to a token, the pair whose token has the lowest id is merged, of equal
    pairs the leftmost: the order in which the tokens were learned. With he 256, th 257, the 258:

        t  h  e  m  e      the neighbours th 257 and he 256 are tokens; he is lower
        t  he    m  e      t + he is the 258
        the      m  e      the + m and m + e are no tokens, so these three are the result

    A part is known by where it starts. The queue has every pair that is a token, and some whose
    parts were merged otherwise since, so that merging n bytes takes O(n log n) steps.
    Sennrich et al. 2016, arXiv:1508.07909, 3.2.
    """
    n = len(piece)
    start = list(range(-1, n))  # start[i]: where the part that ends at i starts
    end = [*range(1, n + 1), n + 1, n + 1]  # end[i]: where the part at i ends; n + 1 is no place
    queue = []  # (id, i, stop): the part at i and the one after it, up to stop, are token id
    for i in range(n - 1):
        if (joined := piece[i : i + 2]) in ids:
            queue.append((ids[joined], i, i + 2))
    heapify(queue)
    while queue:
        _, i, stop = heappop(queue)
        middle = end[i]
        if end[middle] != stop:
            continue
        end[i], end[middle], start[stop] = stop, n + 1, i
        left, right = start[i], end[stop]
        if left >= 0 and (joined := piece[left:stop]) in ids:
            heappush(queue, (ids[joined], left, stop))
        if right <= n and (joined := piece[i:right]) in ids:
            heappush(queue, (ids[joined], i, right))
    tokens, i = [], 0
    while i < n:
        tokens.append(ids[piece[i : end[i]]])
        i = end[i]
    return tokens


class Cache(dict):
    """Remembers what a function of a str returned; `cache[text]` calls it for a new text only.

    Bounded: texts of over 64 characters are not kept, and when 131,072 are, it begins anew.
    """

    def __init__(self, function):
        self.function = function

    def __missing__(self, text):
        result = self.function(text)
        if len(text) <= 64:
            if len(self) == 131072:
                self.clear()
            self[text] = result
        return result


class Encoder:
    """Turns text into token ids and back, given a token table as `load_tokenizer` returns it.

    `tokens` is a list of bytes indexed by id, `eot` the id of the end-of-text token, or None.
    """

    def __init__(self, tokens, eot=None):
        self.tokens, self.eot, self.n_vocab = list(tokens), eot, len(tokens)
        self._ids = {token: id for id, token in enumerate(tokens) if id != eot or len(token) == 1}
        self._words = Cache(self._encode_word)

    def _encode_word(self, word):
        """Return the ids, a tuple, of one of WORDS; most pieces are tokens as they are."""
        ids = []
        for piece in PIECES.findall(word):
            piece = piece.encode()
            id = self._ids.get(piece)
            ids += merge(piece, self._ids) if id is None else (id,)
        return tuple(ids)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids (a list) of a text.

        `<|endoftext|>` in the text is ordinary text, unless `allow_special`: then it is the id
        `eot`. A lone surrogate, which no UTF-8 can hold, counts as U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not allow_special or self.eot is None:
            return list(chain.from_iterable(map(self._words.__getitem__, WORDS.findall(text))))
        documents = text.split(self.tokens[self.eot].decode("utf-8", "surrogateescape"))
        ids = chain.from_iterable([self.eot, *self.encode(document)] for document in documents)
        return list(ids)[1:]

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the bytes of ids: an int, a list, or an array (N,); ValueError if one is unknown.

        They need not be whole characters: a token can end inside one.
        """
        ids = np.atleast_1d(ids)
        if ids.size and (ids.ndim > 1 or ids.dtype.kind not in "iu"):
            raise ValueError(f"ids of type {ids.dtype} and shape {ids.shape} are not a list of ids")
        for id in ids.tolist():
            if not 0 <= id < self.n_vocab:
                raise ValueError(f"token id {id} is not in the vocabulary of {self.n_vocab} tokens")
        return b"".join([self.tokens[id] for id in ids.tolist()])

    def decode(self, ids: Ids) -> str:
        """Return the text of ids, as `decode_bytes`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """Return a StreamDecoder, which decodes ids one at a time."""
        return StreamDecoder(self)

    def save(self, path: str | Path) -> None:
        """Write the token table as llm.c's `tokenizer.bin`."""
        token_table.save_tokenizer(path, self.tokens, self.eot)


class StreamDecoder:
    """Decodes ids as they come: `feed` each id, then `flush`; the texts join to `decode(ids)`.

    Bytes of an incomplete character are held back until the ids that complete it.
    """

    def __init__(self, encoder):
        self._encoder = encoder
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id):
        """Return the text, possibly none, that one more id completes."""
        return self._decoder.decode(self._encoder.decode_bytes(id))

    def flush(self):
        """Return what is left at the end: U+FFFD for an incomplete character, otherwise nothing."""
        return self._decoder.decode(b"", final=True)


def load(name: str | Path, models_dir: str | Path = hub.MODELS_DIR) -> Encoder:
    """Return the Encoder of a model in `models_dir`, such as "124M", or of a path.

    The path is a folder or a token table in any format that `load_tokenizer` reads. One of
    OpenAI's models that is not there yet is downloaded. Raises FileNotFoundError, or ValueError if
    the table is damaged.
    """
    if Path(name).exists():
        return Encoder(*token_table.load_tokenizer(name))
    folder = Path(models_dir) / hub.MODEL_ALIASES.get(str(name), name)
    folder = folder if folder.exists() else hub.find_model(name, models_dir)
    return Encoder(*token_table.load_tokenizer(folder))


# ----------------------------------------------------------------------------------------------
# Learning a token table


def train(texts: str | Iterable[str], n_vocab: int) -> Encoder:
    """Return an Encoder of `n_vocab` tokens, learned from a text or an iterable of texts.

    The table is 256 bytes, in GPT-2's order, then the merges, most frequent first, then
    <|endoftext|>, which in the texts separates documents. The texts decide the table, their order
    does not. Raises ValueError if n_vocab < 257, or if the texts have too few pairs to merge.
    Sennrich et al. 2016, arXiv:1508.07909, algorithm 1, on bytes.

        >>> train("banana bandana", 260).tokens[256:]
        [b'an', b'ban', b'ana', b'<|endoftext|>']

    because a + n is there four times; then b + an and an + a twice, and b has the lower id.
    """
    return train_on_pieces(count_pieces([texts] if isinstance(texts, str) else texts), n_vocab)


def train_on_pieces(pieces: dict[str, int], n_vocab: int) -> Encoder:
    """Return the Encoder that `train` learns, given {piece: count}."""
    if n_vocab < 257:
        raise ValueError(
            f"n_vocab = {n_vocab}: 256 bytes and {token_table.EOT_TEXT} are 257 tokens"
        )
    tokens = [bytes([byte]) for byte in token_table.bytes_to_unicode()]
    learn_merges(pieces, tokens, n_vocab - 1)
    return Encoder([*tokens, token_table.EOT_TEXT.encode()], eot=n_vocab - 1)


def count_pieces(texts: Iterable[str]) -> Counter[str]:
    """Return how often each piece occurs in the texts, a Counter {piece: count}."""
    words: Counter[str] = Counter()
    for text in texts:
        for document in text.split(token_table.EOT_TEXT):
            words.update(WORDS.findall(document))
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for piece in PIECES.findall(word):
            pieces[piece] += count
    return pieces


def learn_merges(pieces, tokens, n_tokens):
    """Append to `tokens` the merges of the most frequent pairs, until there are `n_tokens`.

    Of equally frequent pairs the one with the lowest ids is first. Tokens of over 255 bytes, which
    a tokenizer.bin cannot hold, are not made. No token is made twice: bytes that no token crosses
    into merge alike wherever they stand, so that at any time only one pair joins to the same bytes.
    """
    from tqdm import tqdm

    ids = {token: id for id, token in enumerate(tokens)}
    words = [[ids[bytes([byte])] for byte in piece.encode()] for piece in pieces]
    weights = list(pieces.values())
    counts, where = Counter(), defaultdict(set)  # {pair: frequency}, {pair: indices into words}
    for i in range(len(words)):
        count_pairs(words[i], weights[i], i, counts, where)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapify(queue)
    for new in tqdm(range(len(tokens), n_tokens), "merges", unit=""):
        pair = pop_most_frequent(queue, counts)
        if pair is None:
            raise ValueError(
                f"nothing is left to merge after {new} tokens: give more text, "
                f"or n_vocab = {new + 1} at most"
            )
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        affected = where.pop(pair)
        for i in affected:
            count_pairs(words[i], -weights[i], i, counts, where)
            words[i] = replace_pair(words[i], pair, new)
            count_pairs(words[i], weights[i], i, counts, where)
        for other in {pair for i in affected for pair in pairwise(words[i]) if new in pair}:
            if len(tokens[other[0]] + tokens[other[1]]) < 256:
                heappush(queue, (-counts[other], other))


def count_pairs(word, weight, i, counts, where):
    """Add `weight` to the counts of all pairs of neighbours in word number `i`, a list of ids."""
    for pair in pairwise(word):
        counts[pair] += weight
        where[pair].add(i)


def pop_most_frequent(queue, counts):
    """Return the most frequent pair of a queue of (-count, pair), or None if there is none.

    Counts in the queue may have fallen since; they never rise, as only pairs with a new id do.
    """
    while queue:
        count, pair = heappop(queue)
        if -count == counts[pair]:
            return pair
        if counts[pair] > 0:
            heappush(queue, (-counts[pair], pair))
    return None


def replace_pair(word, pair, new):
    """Return a list of ids with `pair`, wherever it stands, from the left, replaced by `new`."""
    merged = []
    for id in word:
        if merged and (merged[-1], id) == pair:
            merged[-1] = new
        else:
            merged.append(id)
    return merged


# ----------------------------------------------------------------------------------------------
# Text files of any size


CHUNK = 1 << 20  # characters read at a time

# The last place at which a text can be cut before more of it is known: see WORDS. Not after
# <|endoftext|>, of which only what follows tells whether it is a line of its own.
LAST_CUT = regex.compile(r"(?r)(?<=\S)(?<!<\|endoftext\|>)\s")

# What stands between two documents.
SEPARATORS = {
    "file": re.compile(r"(?!)"),  # nothing within a file
    "lines": re.compile(r"\r?\n"),
    "eot": re.compile(r"^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE),
}


def read_chunks(path, chunk_size=CHUNK, report=lambda n_bytes: None):
    """Yield the text of a file in parts that split into words as the whole would.

    Invalid UTF-8 becomes U+FFFD, line ends stay as they are. `report` is told of the bytes read.
    Memory is that of `chunk_size` characters, or of the longest stretch without a space.
    """
    text, n_bytes = "", 0
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        while new := file.read(max(chunk_size, len(text))):
            searched, text = len(text), text + new
            if cut := LAST_CUT.search(text, searched):
                yield text[: cut.start()]
                text = text[cut.start() :]
            report(file.buffer.tell() - n_bytes)
            n_bytes = file.buffer.tell()
    yield text


def read_documents(paths, docs, chunk_size=CHUNK, report=lambda n_bytes: None):
    """Yield lists of texts in which None, for <|endoftext|>, stands before each document.

    `docs` tells how files hold documents: each "file" is one; each of its "lines", without the line
    end; or "eot" lines of only <|endoftext|> are between them. Empty documents are left out. A long
    document goes on in the next list.
    """
    for path in paths:
        started = False
        for chunk in read_chunks(path, chunk_size, report):
            items = []
            for i, text in enumerate(SEPARATORS[docs].split(chunk)):
                started = started and i == 0
                if text and not started:
                    items.append(None)
                    started = True
                if text:
                    items.append(text)
            yield items


def encode_items(enc, items):
    """Return the ids of a list from `read_documents`, a uint16 array."""
    ids = chain.from_iterable([enc.eot] if text is None else enc.encode(text) for text in items)
    return np.fromiter(ids, np.uint16)


def start_worker(tokens, eot):
    """Prepare a process to run `encode_in_worker`; its parent alone answers Ctrl-C."""
    global worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker_encoder = Encoder(tokens, eot)


def encode_in_worker(items):
    """Return `encode_items` in a process that `start_worker` prepared."""
    return encode_items(worker_encoder, items)


def encode_all(enc, lists, n_procs):
    """Yield `encode_items` of every list, in order, computed in `n_procs` processes."""
    if n_procs == 1:
        yield from (encode_items(enc, items) for items in lists)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    start = {"initializer": start_worker, "initargs": (enc.tokens, enc.eot)}
    with ProcessPoolExecutor(n_procs, mp_context=get_context("spawn"), **start) as pool:
        ahead = deque()  # so many lists, and no more, are in memory
        for items in lists:
            ahead.append(pool.submit(encode_in_worker, items))
            if len(ahead) > 2 * n_procs:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def encode_files(enc, paths, out, docs="eot", n_procs=1, chunk_size=CHUNK):
    """Encode text files to a tokens .bin file; return the numbers of tokens, documents and bytes.

    The id of <|endoftext|> stands before each document, as in llm.c's data; `docs` is as in
    `read_documents`. Up to `n_procs` processes share files of many chunks. Raises ValueError if
    the table has no end-of-text token, the ids do not fit the file or there is no text, OSError if
    a file cannot be read.
    """
    from tqdm import tqdm

    if enc.eot is None:
        raise ValueError("this tokenizer has no end-of-text token, to put before each document")
    n_bytes, n_docs = sum(os.path.getsize(path) for path in paths), 0

    def counted(lists):
        nonlocal n_docs
        for items in lists:
            n_docs += items.count(None)
            yield items
        if n_docs == 0:
            raise ValueError(f"no text in {', '.join(map(str, paths))}: nothing to encode")

    with tqdm(total=n_bytes, desc="encode", unit="B", unit_scale=True) as bar:
        lists = counted(read_documents(paths, docs, chunk_size, bar.update))
        arrays = encode_all(enc, lists, min(n_procs, 1 + n_bytes // (8 * chunk_size)))
        n_tokens = llmc.save_tokens(out, arrays, enc.n_vocab)
    return n_tokens, n_docs, n_bytes


def train_files(paths, n_vocab):
    """Return the Encoder that `train` learns from text files."""
    from tqdm import tqdm

    n_bytes = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=n_bytes, desc="read", unit="B", unit_scale=True) as bar:
        chunks = chain.from_iterable(read_chunks(path, CHUNK, bar.update) for path in paths)
        pieces = count_pieces(chunks)
    return train_on_pieces(pieces, n_vocab)


# ----------------------------------------------------------------------------------------------
# The commands `train` and `encode`


def vocabulary_size(text):
    """Return the n_vocab that a flag was given, for argparse's `type=`."""
    n_vocab = cli.positive_int(text)
    if n_vocab < 257:
        raise argparse.ArgumentTypeError(
            f"{n_vocab} is below 257, all bytes and {token_table.EOT_TEXT}"
        )
    return n_vocab


def parse_args(argv=None):
    """Return the arguments of `python encoder.py`."""
    parser = cli.ArgumentParser(
        prog="encoder.py",
        description="Learn a tokenizer from text, and encode text to token ids for training. Each "
        "command has a --help of its own.",
        examples=[
            "python encoder.py train stories.txt --out tokenizer.bin",
            "python encoder.py encode stories.txt --tokenizer 124M --out stories.bin",
            "python encoder.py encode --help",
        ],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = commands.add_parser(
        "train",
        help="learn a tokenizer from text",
        description="Learn a byte-level BPE tokenizer, with GPT-2's way of splitting text. Its "
        "tokens are the 256 bytes, the most frequent merges, and <|endoftext|>, which in the text "
        "separates documents. All the text's different words are held in memory.",
        examples=[
            "python encoder.py train stories.txt --out tokenizer.bin",
            "python encoder.py train part1.txt part2.txt --n_vocab 8192 --out 8192.bin",
        ],
    )
    sub.add_argument("texts", metavar="TEXT", nargs="+", type=Path, help="a text file (UTF-8)")
    sub.add_argument("--n_vocab", type=vocabulary_size, default=1024, help="how many tokens")
    sub.add_argument("--out", type=Path, default="tokenizer.bin", help="the file to write")
    sub = commands.add_parser(
        "encode",
        help="encode text to token ids",
        description="Encode text files, of any size, to one file of token ids, each document after "
        "the id of <|endoftext|>. It is llm.c's format, which train.py reads.",
        examples=[
            "python encoder.py encode stories.txt --out stories.bin",
            "python encoder.py encode names.txt --tokenizer names/tokenizer.bin \\",
            "    --docs lines --out names.bin",
        ],
    )
    sub.add_argument("texts", metavar="TEXT", nargs="+", type=Path, help="a text file (UTF-8)")
    sub.add_argument(
        "--tokenizer",
        type=str,
        default="124M",
        help="a tokenizer.bin, tokenizer.json or encoder.json, a folder with one, or the name of "
        "a model in models/",
    )
    sub.add_argument("--out", type=Path, required=True, help="the file to write (required)")
    sub.add_argument(
        "--docs",
        choices=SEPARATORS,
        default="eot",
        help="what a document is: a whole file, a line (without its line end), or what lies "
        "between lines of only <|endoftext|>",
    )
    sub.add_argument(
        "--n_procs", type=cli.positive_int, default=os.cpu_count() or 1, help="processes to use"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command line: `python encoder.py --help`."""
    args = parse_args(argv)
    n_bytes = sum(os.path.getsize(path) for path in args.texts)
    if args.command == "train":
        train_files(args.texts, args.n_vocab).save(args.out)
        print(f"learned {args.n_vocab} tokens from {n_bytes:,} bytes: {args.out}", file=sys.stderr)
    else:
        enc = load(args.tokenizer)
        n_tokens, n_docs, n_bytes = encode_files(enc, args.texts, args.out, args.docs, args.n_procs)
        print(
            f"{n_tokens:,} tokens in {n_docs:,} documents, {n_bytes / n_tokens:.2f} bytes a token: "
            f"{args.out}",
            file=sys.stderr,
        )


def command():
    """Run the installed command `gpt2-tokenize`."""
    cli.run(main)


if __name__ == "__main__":
    command()
