"""Text into token ids and back: byte-level byte-pair encoding (BPE), as in GPT-2.

Reading order: the text is split into pieces (`PIECES`), the bytes of a piece are merged to tokens
(`merge`), and the `Encoder` does this for a token table.
"""

import codecs
import heapq
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex

import utils

# GPT-2's split. Nothing is ever merged across two pieces.
PIECES = regex.compile(r" ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+| ?\p{N}+|\s+(?!\S)|\s+")


def merge(piece, ids):
    """Return the ids of the tokens that the bytes of a piece merge to.

    While two neighbours join to a token, the pair with the lowest id is merged, the leftmost first.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    queue = []  # (id, i): parts[i] and the one after it join to token `id`
    for i, (left, right) in enumerate(pairwise(parts)):
        if left + right in ids:
            queue.append((ids[left + right], i))
    heapq.heapify(queue)
    while queue:
        id, i = heapq.heappop(queue)
        j = after[i]
        if j == len(parts) or ids.get(parts[i] + parts[j]) != id or not parts[i]:
            continue  # one of the two has been merged with another since
        parts[i], parts[j], after[i] = parts[i] + parts[j], b"", after[j]
        if after[i] < len(parts):
            before[after[i]] = i
        for k in (before[i], i):
            if k >= 0 and after[k] < len(parts) and parts[k] + parts[after[k]] in ids:
                heapq.heappush(queue, (ids[parts[k] + parts[after[k]]], k))
    return [ids[part] for part in parts if part]


class Cache(dict):
    """Piece to ids, worked out when first asked for."""

    def __init__(self, ids):
        self.ids = ids

    def __missing__(self, piece):
        data = piece.encode()
        found = (self.ids[data],) if data in self.ids else tuple(merge(data, self.ids))
        if len(piece) <= 64:
            if len(self) >= 1 << 16:
                self.clear()
            self[piece] = found
        return found


class Encoder:
    """Turns text into token ids and back, by a token table (a list of bytes indexed by id)."""

    def __init__(self, tokens, eot=None):
        self.tokens, self.eot, self.n_vocab = tokens, eot, len(tokens)
        ids = {token: id for id, token in enumerate(tokens) if id != eot or len(token) == 1}
        self._cache = Cache(ids)

    def encode(self, text, allow_special=False):
        """Return the ids of a text."""
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if allow_special and self.eot is not None:
            parts = [self.encode(part) for part in text.split(self.tokens[self.eot].decode())]
            return list(chain(*([*part, self.eot] for part in parts)))[:-1]
        return list(chain.from_iterable(map(self._cache.__getitem__, PIECES.findall(text))))

    def decode_bytes(self, ids):
        """Return the bytes of ids."""
        ids = np.atleast_1d(ids).tolist()
        for id in ids:
            if not 0 <= id < self.n_vocab:
                raise ValueError(f"token id {id} is outside the vocabulary of {self.n_vocab}")
        return b"".join([self.tokens[id] for id in ids])

    def decode(self, ids):
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self):
        """Return a StreamDecoder."""
        return StreamDecoder(self)

    def save(self, path):
        """Write the token table as a tokenizer.bin."""
        utils.save_tokenizer(path, self.tokens, self.eot)


class StreamDecoder:
    """Decodes ids one at a time, and holds back a character until all its bytes have come."""

    def __init__(self, encoder):
        self._encoder = encoder
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id):
        """Return the text that one more id completes, possibly none."""
        return self._decoder.decode(self._encoder.decode_bytes(id))

    def flush(self):
        """Return what is left at the end: U+FFFD for an incomplete character, or nothing."""
        return self._decoder.decode(b"", final=True)


def load(name, models_dir=utils.MODELS_DIR):
    """Return the Encoder of a model's name, or of a path to a folder or token table."""
    path = Path(name)
    path = path if path.exists() else Path(models_dir) / name
    return Encoder(*utils.load_tokenizer(path))
