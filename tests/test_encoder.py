"""Token tables, encoding, decoding, learning, and text files, against plain reimplementations."""

import doctest
import json
import struct
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import encoder
from gpt2_support.formats import llmc, token_table

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
awkward_text = st.lists(st.sampled_from(AWKWARD), max_size=24).map("".join)


@pytest.fixture(scope="module")
def enc():
    """A small tokenizer, learned from TEXT."""
    return encoder.train(TEXT, 400)


def naive_merge(piece, ids):
    """The definition of BPE: merge the leftmost pair of lowest id, until there is none."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        found = [(ids[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not found:
            return [ids[part] for part in parts]
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def naive_encode(enc, text):
    ids = {token: id for id, token in enumerate(enc.tokens) if id != enc.eot}
    pieces = regex.findall(GPT2_PATTERN, text)
    return [id for piece in pieces for id in naive_merge(piece.encode(), ids)]


def naive_train(text, n_vocab):
    """Count all pairs anew for each merge; return the tokens and every piece's own parts."""
    tokens = [bytes([byte]) for byte in token_table.bytes_to_unicode()]
    pieces = Counter(p for part in text.split(EOT) for p in regex.findall(GPT2_PATTERN, part))
    words = {p: [tokens.index(bytes([byte])) for byte in p.encode()] for p in pieces}
    while len(tokens) < n_vocab - 1:
        counts = Counter()
        for piece, word in words.items():
            for pair in pairwise(word):
                if len(tokens[pair[0]] + tokens[pair[1]]) < 256:
                    counts[pair] += pieces[piece]
        if not counts:
            raise ValueError(f"after {len(tokens)}")
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words.values():
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return [*tokens, EOT.encode()], words


def tiktoken_encoding(tokens, eot):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "test",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: id for id, token in enumerate(tokens) if id != eot},
        special_tokens={EOT: eot},
    )


# ----------------------------------------------------------------------------------------------
# Splitting


@given(awkward_text)
@example("we'll 'llama' it's 'S don't'd ' 's")
@settings(max_examples=500)
def test_pieces_are_those_of_gpt2s_pattern(text):
    assert encoder.PIECES.findall(text) == regex.findall(GPT2_PATTERN, text)


@given(awkward_text)
@example("café naïve")
@example("!\x1c a\x1c b \x1c\x1c  c")
@example("a\u3000 b\xa0 \xa0c")
@settings(max_examples=1000)
def test_words_split_alone_as_in_the_text(text):
    words = encoder.WORDS.findall(text)
    assert "".join(words) == text
    assert [p for word in words for p in encoder.PIECES.findall(word)] == regex.findall(
        GPT2_PATTERN, text
    )


def test_words_know_every_space():
    everything = "".join(map(chr, range(0x110000)))
    assert encoder.re.findall(encoder.SPACE, everything) == regex.findall(r"\s", everything)
    assert encoder.re.findall(encoder.OTHER, everything) == regex.findall(r"\S", everything)


# ----------------------------------------------------------------------------------------------
# Encoding


@given(awkward_text)
@settings(max_examples=300)
def test_encode_equals_naive_bpe(enc, text):
    assert enc.encode(text) == naive_encode(enc, text)


@given(st.text("ab", max_size=60), st.text("ab", min_size=20, max_size=200), st.integers(1, 40))
@settings(max_examples=200)
def test_merge_equals_naive_bpe_on_repetitive_text(piece, corpus, n_merges):
    try:
        tokens = encoder.train(corpus, 257 + n_merges).tokens
    except ValueError:
        return
    ids = {token: id for id, token in enumerate(tokens)}
    assert encoder.merge(piece.encode(), ids) == naive_merge(piece.encode(), ids)


@given(st.sets(st.binary(min_size=2, max_size=5), max_size=40), st.binary(max_size=40))
def test_merge_equals_naive_bpe_for_any_table(longer, piece):
    tokens = [bytes([byte]) for byte in range(256)] + sorted(longer)
    ids = {token: id for id, token in enumerate(tokens)}
    assert encoder.merge(piece, ids) == naive_merge(piece, ids)


def test_merge_worked_example_of_the_docstring():
    ids = {bytes([b]): i for i, b in enumerate(token_table.bytes_to_unicode())}
    ids |= {b"he": 256, b"th": 257, b"the": 258}
    assert encoder.merge(b"theme", ids) == [258, 76, 68]


@given(awkward_text)
@example(TEXT)
@settings(max_examples=300)
def test_encode_equals_tiktoken(enc, text):
    assert enc.encode(text) == tiktoken_encoding(enc.tokens, enc.eot).encode_ordinary(text)


@given(st.text())
def test_decode_undoes_encode(enc, text):
    assert enc.decode(enc.encode(text)) == text
    assert enc.decode(enc.encode(text, allow_special=True)) == text


@pytest.mark.parametrize("character", ["a", "Z", "-", " ", "\n", "1", "é", "子", "😀", "ab", " x"])
def test_encode_long_pieces(enc, character):
    text = character * 100_000
    ids = enc.encode(text)
    assert enc.decode(ids) == text
    assert enc.encode(text[:300]) == naive_encode(enc, text[:300])


def test_encode_takes_end_of_text_as_text_unless_allowed(enc):
    text = f"a{EOT}{EOT} b{EOT}"
    ordinary, special = enc.encode(text), enc.encode(text, allow_special=True)
    assert enc.eot not in ordinary
    assert special == [*enc.encode("a"), enc.eot, enc.eot, *enc.encode(" b"), enc.eot]
    assert enc.encode(EOT, allow_special=True) == [enc.eot]
    assert enc.decode(ordinary) == enc.decode(special) == text


def test_encode_without_end_of_text_token(enc):
    plain = encoder.Encoder(enc.tokens[:-1])
    assert plain.eot is None and plain.n_vocab == 399
    assert plain.encode(f"a{EOT}b", allow_special=True) == enc.encode(f"a{EOT}b")


def test_encode_never_merges_to_end_of_text(enc):
    """Not even where the table could: here its bytes are those of an ordinary word."""
    tokens = [*enc.tokens[:-1], b"zq"]
    assert len(encoder.Encoder(tokens, eot=None).encode("zq")) == 1
    with_eot = encoder.Encoder(tokens, eot=len(tokens) - 1)
    assert with_eot.encode("zq") == with_eot.encode("z") + with_eot.encode("q")
    assert with_eot.encode("zq", allow_special=True) == [with_eot.eot]


def test_encode_with_a_byte_as_end_of_text(enc):
    newline = enc.tokens.index(b"\n")
    assert newline in encoder.Encoder(enc.tokens[:-1], eot=newline).encode("a\nb")


def test_encode_replaces_lone_surrogates(enc):
    assert enc.decode(enc.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert enc.encode("\ud83d\ude00") == enc.encode("😀")
    assert enc.encode(f"\ud800{EOT}", allow_special=True)[-1] == enc.eot


def test_encode_empty_text(enc):
    assert enc.encode("") == enc.encode("", allow_special=True) == []
    assert enc.decode([]) == ""


def test_encode_keeps_a_bounded_cache():
    calls = []
    cache = encoder.Cache(lambda text: calls.append(text) or len(text))
    assert [cache["ab"], cache["ab"], len(calls)] == [2, 2, 1]
    assert [cache["x" * 65], "x" * 65 in cache] == [65, False]
    for i in range(140_000):
        cache[str(i)]
        assert len(cache) <= 131_072
    assert cache["139999"] == 6 and len(calls) == 140_002


# ----------------------------------------------------------------------------------------------
# Decoding


def test_decode_accepts_lists_arrays_and_ints(enc):
    ids = enc.encode("the times")
    for same in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)):
        assert enc.decode(same) == "the times"
    assert enc.decode(ids[0]) == enc.decode(np.int64(ids[0])) == enc.decode(ids[:1])
    assert enc.decode(np.zeros(0, np.uint16)) == ""


@pytest.mark.parametrize("id", [-1, 400, 2**40])
def test_decode_refuses_ids_outside_the_vocabulary(enc, id):
    with pytest.raises(ValueError, match=f"{id} .* 400 tokens"):
        enc.decode([0, id])


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1, 2], [3, 4]], [2**70], None])
def test_decode_refuses_what_is_no_list_of_ids(enc, ids):
    with pytest.raises(ValueError, match="not a list of ids"):
        enc.decode(ids)


@given(st.lists(st.integers(0, 399)))
def test_decode_replaces_invalid_utf8(enc, ids):
    assert enc.decode(ids) == b"".join(enc.tokens[id] for id in ids).decode("utf-8", "replace")


@given(st.lists(st.integers(0, 399)))
@example([encoder.train("", 257).tokens.index(bytes([b])) for b in "😀é".encode()])
def test_stream_joins_to_decode(enc, ids):
    stream = enc.stream()
    parts = [stream.feed(id) for id in ids]
    assert "".join(parts) + stream.flush() == enc.decode(ids)
    assert stream.flush() == ""


def test_stream_holds_back_incomplete_characters(enc):
    stream = enc.stream()
    byte_ids = [enc.tokens.index(bytes([byte])) for byte in "é😀".encode()]
    assert [stream.feed(id) for id in byte_ids] == ["", "é", "", "", "", "😀"]
    assert stream.feed(byte_ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.feed(enc.tokens.index(b"a")) == "a"


# ----------------------------------------------------------------------------------------------
# Learning


def test_train_worked_example_of_the_docstring():
    case = doctest.DocTestFinder(recurse=False).find(encoder.train, globs=vars(encoder))
    assert doctest.DocTestRunner().run(case[0]) == (0, 1)


@given(awkward_text, st.integers(257, 300))
@example(TEXT, 300)
@example("aaaa aaa aaaaa bbb", 270)
@settings(max_examples=150, deadline=None)
def test_train_equals_naive_training(text, n_vocab):
    try:
        tokens, words = naive_train(text, n_vocab)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            encoder.train(text, n_vocab)
        return
    enc = encoder.train(text, n_vocab)
    assert enc.tokens == tokens and enc.eot == n_vocab - 1
    assert len(set(tokens)) == n_vocab
    for piece, ids in words.items():
        assert enc.encode(piece) == ids  # what it was learned from is encoded as it was learned


@given(st.lists(st.text("ab", min_size=1, max_size=30), min_size=1, max_size=5))
@settings(deadline=None)
def test_train_to_the_end_makes_every_piece_one_token(texts):
    text = " ".join(texts)
    with pytest.raises(ValueError, match="n_vocab = ") as error:
        encoder.train(text, 1000)
    n_vocab = int(regex.search(r"n_vocab = (\d+) at most", str(error.value))[1])
    enc = encoder.train(text, n_vocab)
    assert len(set(enc.tokens)) == n_vocab
    assert all(len(enc.encode(piece)) == 1 for piece in encoder.PIECES.findall(text))


def test_train_does_not_depend_on_order_or_parts():
    lines = [f"{line}\n" for line in TEXT.split("\n")]
    whole = encoder.train(lines, 350).tokens
    assert encoder.train(iter(lines[::-1]), 350).tokens == whole
    assert encoder.train([*lines[3:], *lines[:3]], 350).tokens == whole


def test_train_starts_with_gpt2s_bytes_and_ends_with_end_of_text(enc):
    assert enc.tokens[:3] == [b"!", b'"', b"#"] and enc.tokens[220] == b" "
    assert sorted(enc.tokens[:256]) == [bytes([byte]) for byte in range(256)]
    assert enc.tokens[enc.eot] == EOT.encode() and enc.eot == enc.n_vocab - 1 == 399


def test_train_learns_nothing_from_end_of_text():
    text = "one two\n" * 9
    with_eot = "".join(f"{line}\n{EOT}\n" for line in text.splitlines())
    tokens = encoder.train(with_eot, 262).tokens
    assert tokens == encoder.train(text, 262).tokens
    assert not any(b"|" in token or b"endo" in token for token in tokens[256:-1])


def test_train_makes_no_token_that_a_file_cannot_hold(tmp_path):
    """5000 dashes merge to 2, 4, ... 128, and 128 + 8 at the end; 128 + 128 is too long."""
    enc = encoder.train("-" * 5000, 265)
    assert enc.tokens == naive_train("-" * 5000, 265)[0]
    assert [len(token) for token in enc.tokens[256:-1]] == [2, 4, 8, 16, 32, 64, 128, 136]
    with pytest.raises(ValueError, match="n_vocab = 265 at most"):
        encoder.train("-" * 5000, 266)
    enc.save(tmp_path / "tokenizer.bin")


def test_train_without_enough_text_says_what_to_do():
    with pytest.raises(ValueError, match=r"after 258 tokens.*n_vocab = 259 at most"):
        encoder.train("abc", 300)
    assert encoder.train("abc", 259).tokens[256:] == [b"ab", b"abc", EOT.encode()]


def test_train_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="n_vocab = 256"):
        encoder.train(TEXT, 256)
    assert encoder.train("", 257).n_vocab == 257


# ----------------------------------------------------------------------------------------------
# Text files

DOCUMENTS = f"""{EOT}
Once upon a time,\r
  there   was {EOT} in  a line.
{EOT}
{EOT}
 \n\n  two\n \n\n{EOT} no\nno {EOT}
\x1c \x1c\x1c  !\x1c {EOT}\r
don't   we'll\n{EOT}
"""
SEPARATED = [
    f"Once upon a time,\r\n  there   was {EOT} in  a line.\n",
    f" \n\n  two\n \n\n{EOT} no\nno {EOT}\n\x1c \x1c\x1c  !\x1c {EOT}\r\ndon't   we'll\n",
]


def with_eot(enc, documents):
    return [id for text in documents for id in [enc.eot, *enc.encode(text)]]


def encoded(enc, path, docs="eot", **kwargs):
    out = path.with_name("out.bin")
    n_tokens, n_docs, n_bytes = encoder.encode_files(enc, [path], out, docs, **kwargs)
    ids, n_vocab = llmc.load_tokens(out)
    assert n_vocab == enc.n_vocab and n_tokens == len(ids) and n_bytes == path.stat().st_size
    assert ids.tolist().count(enc.eot) == n_docs
    return ids.tolist()


@pytest.fixture
def write(tmp_path):
    """`write(text)` is a new file that holds these characters, or bytes, exactly."""

    def text_file(text, name="text.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return text_file


def test_encode_files_puts_end_of_text_before_each_document(enc, write):
    assert encoded(enc, write(DOCUMENTS)) == with_eot(enc, SEPARATED)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_encode_files_know_end_of_text_lines_by_any_line_end(enc, write, end, chunk_size):
    path = write(f"one\r\n{EOT}\r\ntwo\n{EOT}\nthree {EOT}\n{EOT}{end}")
    documents = ["one\r\n", "two\n", f"three {EOT}\n"]
    assert encoded(enc, path, chunk_size=chunk_size) == with_eot(enc, documents)


def test_encode_files_by_line(enc, write):
    lines = [line for line in DOCUMENTS.replace("\r\n", "\n").split("\n") if line]
    assert encoded(enc, write(DOCUMENTS), "lines") == with_eot(enc, lines)


def test_encode_files_by_file(enc, write, tmp_path):
    assert encoded(enc, write(DOCUMENTS), "file") == with_eot(enc, [DOCUMENTS])
    paths = [write("one"), write("", "empty.txt"), write("two", "two.txt")]
    encoder.encode_files(enc, paths, tmp_path / "out.bin", "file")
    assert llmc.load_tokens(tmp_path / "out.bin")[0].tolist() == with_eot(enc, ["one", "two"])


def test_encode_files_end_a_document_in_every_mode(enc, write, tmp_path):
    paths = [write("one\n"), write(f"two\n{EOT}\nthree", "two.txt"), write("four", "four.txt")]
    encoder.encode_files(enc, paths, tmp_path / "out.bin")
    ids = llmc.load_tokens(tmp_path / "out.bin")[0].tolist()
    assert ids == with_eot(enc, ["one\n", "two\n", "three", "four"])


@pytest.mark.parametrize("docs", encoder.SEPARATORS)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8, 13, 21, 64])
def test_encode_files_in_any_chunks_is_the_same(enc, write, docs, chunk_size):
    path = write(DOCUMENTS + TEXT)
    assert encoded(enc, path, docs, chunk_size=chunk_size) == encoded(enc, path, docs)


@given(awkward_text, st.integers(1, 12), st.sampled_from([*encoder.SEPARATORS]))
@settings(max_examples=300, deadline=None)
def test_chunks_of_awkward_text_encode_as_the_whole(tmp_path_factory, enc, text, chunk_size, docs):
    path = tmp_path_factory.getbasetemp() / "awkward.txt"
    path.write_bytes(text.encode())
    assert "".join(encoder.read_chunks(path, chunk_size)) == text
    documents = [document for document in encoder.SEPARATORS[docs].split(text) if document]
    lists = encoder.read_documents([path], docs, chunk_size)
    ids = [id for items in lists for id in encoder.encode_items(enc, items).tolist()]
    assert ids == with_eot(enc, documents)


def test_chunks_are_bounded_where_there_are_spaces(write):
    path = write("word " * 20_000)
    assert max(map(len, encoder.read_chunks(path, 1000))) < 1100


def test_encode_files_in_several_processes_is_the_same(enc, write):
    path = write((DOCUMENTS + TEXT) * 20)
    assert encoded(enc, path, n_procs=2, chunk_size=200) == encoded(enc, path)


def test_encode_files_replaces_invalid_utf8(enc, write):
    assert encoded(enc, write(b"a\xffb \xe2\x82 c\r\n")) == with_eot(enc, ["a\ufffdb \ufffd c\r\n"])


def test_encode_files_refuses_files_without_text(enc, write, tmp_path):
    (tmp_path / "out.bin").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"no text in .*text\.txt"):
        encoder.encode_files(enc, [write(f"{EOT}\n{EOT}\n")], tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == b"old"


def test_encode_files_refuses_tables_it_cannot_use(enc, write, tmp_path):
    path, out = write("text"), tmp_path / "out.bin"
    with pytest.raises(ValueError, match="no end-of-text token"):
        encoder.encode_files(encoder.Encoder(enc.tokens[:-1]), [path], out)
    longer = [bytes([i >> 8, i & 255, 0]) for i in range(65537 - 400)]
    with pytest.raises(ValueError, match=r"65537.*65536"):
        encoder.encode_files(encoder.Encoder([*enc.tokens, *longer], enc.eot), [path], out)
    assert not out.exists()


# ----------------------------------------------------------------------------------------------
# Token tables


def save_json(
    folder, tokens, merges, names=("vocab.json", "merges.txt"), version="#version: 0.2\n"
):
    """Write a table as OpenAI and Hugging Face do; return the path of the vocabulary."""
    alphabet = token_table.bytes_to_unicode()
    texts = ["".join(alphabet[byte] for byte in token) for token in tokens]
    folder.mkdir(exist_ok=True)
    vocab = json.dumps({text: id for id, text in enumerate(texts)})
    (folder / names[0]).write_bytes(vocab.encode())
    lines = [" ".join("".join(alphabet[b] for b in part) for part in pair) for pair in merges]
    (folder / names[1]).write_bytes((version + "\n".join(lines) + "\n").encode())
    return folder / names[0]


def hugging_face(tokens, eot, merges, lists=False):
    """The content of a tokenizer.json."""
    alphabet = token_table.bytes_to_unicode()
    text = {token: "".join(alphabet[byte] for byte in token) for token in tokens}
    pairs = [[text[left], text[right]] for left, right in merges]
    added = [{"id": eot, "content": EOT, "special": True}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": added if eot is not None else [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"add_prefix_space": True},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": "",
            "vocab": {text[token]: id for id, token in enumerate(tokens)},
            "merges": pairs if lists else [" ".join(pair) for pair in pairs],
        },
    }


@pytest.fixture
def table(enc):
    return enc.tokens, enc.eot, token_table.recover_merges(enc.tokens, enc.eot)


def test_alphabet_is_gpt2s():
    alphabet = token_table.bytes_to_unicode()
    assert len(set(alphabet.values())) == len(alphabet) == 256
    assert alphabet[ord(" ")] == "Ġ" and alphabet[ord("\n")] == "Ċ" and alphabet[0] == "Ā"
    assert alphabet[0x7F] == "ġ" and alphabet[0xA0] == "ł" and alphabet[0xAD] == "Ń"
    assert all(alphabet[byte] == chr(byte) for byte in b"!a~\xa1\xff")


def test_recovered_merges_make_the_tokens(table):
    tokens, _, merges = table
    assert [left + right for left, right in merges] == tokens[256:-1]
    assert merges[:2] == [naive_first_pair(tokens, 256), naive_first_pair(tokens, 257)]


def naive_first_pair(tokens, id):
    lower = {token: i for i, token in enumerate(tokens[:id])}
    return tuple(tokens[i] for i in naive_merge(tokens[id], lower))


def test_save_and_load_tokenizer(enc, tmp_path):
    enc.save(tmp_path / "tokenizer.bin")
    again = encoder.load(tmp_path / "tokenizer.bin")
    assert (again.tokens, again.eot, again.n_vocab) == (enc.tokens, enc.eot, 400)
    encoder.Encoder(enc.tokens[:-1]).save(tmp_path / "tokenizer.bin")
    assert token_table.load_tokenizer(tmp_path) == (enc.tokens[:-1], None)


@pytest.mark.parametrize("has_eot", [True, False])
def test_tokenizer_bin_version_1_knows_end_of_text_by_name(enc, tmp_path, has_eot):
    tokens = enc.tokens if has_eot else enc.tokens[:-1]
    path = tmp_path / "old.bin"
    body = b"".join(bytes([len(token)]) + token for token in tokens)
    path.write_bytes(struct.pack("<256i", 20240328, 1, len(tokens), *[0] * 253) + body)
    assert token_table.load_tokenizer(path) == (tokens, 399 if has_eot else None)


def test_end_of_text_is_no_merge_even_if_its_parts_are_tokens(enc, tmp_path):
    first = encoder.Encoder([b"zq", *enc.tokens[:-1]], eot=0)
    first.save(tmp_path / "tokenizer.bin")
    assert token_table.load_tokenizer(tmp_path) == (first.tokens, 0)
    last = [*enc.tokens[:-1], b"zq"]
    assert token_table.recover_merges(last, None) == [
        *token_table.recover_merges(last, 399),
        (b"z", b"q"),
    ]


@pytest.mark.parametrize(
    "cut, added, count",
    [(-1, b"", 400), (-14, b"", 400), (None, b"\x02", 400), (None, b"\x01\xff", 400)]
    + [(None, b"", count) for count in (399, 401, -1, 2**31 - 1)],
)
def test_tokenizer_bin_of_another_size_is_refused(enc, tmp_path, cut, added, count):
    path = tmp_path / "tokenizer.bin"
    enc.save(path)
    content = bytearray(path.read_bytes()[:cut] + added)
    content[8:12] = struct.pack("<i", count)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"header counts {count} tokens, found (399|40)"):
        token_table.load_tokenizer(path)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("version", ["#version: 0.2\n", "", "#version: 0.2\r\n"])
def test_vocabulary_and_merges_load(table, tmp_path, names, version):
    path = save_json(tmp_path, table[0], table[2], names, version)
    if "\r" in version:
        merges = path.with_name(names[1])
        merges.write_bytes(merges.read_bytes().replace(b"\r", b"").replace(b"\n", b"\r\n"))
    assert token_table.load_tokenizer(path) == token_table.load_tokenizer(tmp_path) == table[:2]


@pytest.mark.parametrize("lists", [True, False])
def test_hugging_face_tokenizer_loads(table, tmp_path, lists):
    data = hugging_face(*table, lists)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert token_table.load_tokenizer(tmp_path) == table[:2]
    del data["model"]["type"], data["model"]["dropout"], data["post_processor"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert token_table.load_tokenizer(tmp_path / "tokenizer.json") == table[:2]


def test_hugging_face_special_tokens_may_come_first_and_be_many(enc, tmp_path):
    special = [EOT, "<s>", "<pad>", "two words", "日本"]
    tokens = [text.encode() for text in special] + enc.tokens[:-1]
    data = hugging_face(tokens[5:], None, token_table.recover_merges(enc.tokens, enc.eot))
    vocab = {text: id + 5 for text, id in data["model"]["vocab"].items()}
    data["model"]["vocab"] = vocab | {EOT: 0, "<s>": 1, "<pad>": 2, "two words": 3}
    data["added_tokens"] = [{"id": id, "content": text} for id, text in enumerate(special)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    loaded = encoder.load(tmp_path)
    assert (loaded.tokens, loaded.eot) == (tokens, 0)
    assert loaded.encode(TEXT) == [id + 5 for id in enc.encode(TEXT)]


def test_folder_prefers_tokenizer_bin_then_whole_pairs(enc, table, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(hugging_face(*table)), encoding="utf-8")
    save_json(tmp_path, table[0], table[2])
    (tmp_path / "merges.txt").unlink()
    assert token_table.find_tokenizer(tmp_path).name == "tokenizer.json"
    save_json(tmp_path, table[0], table[2], ("encoder.json", "vocab.bpe"))
    assert token_table.find_tokenizer(tmp_path).name == "encoder.json"
    save_json(tmp_path, table[0], table[2])
    assert token_table.find_tokenizer(tmp_path).name == "vocab.json"
    enc.save(tmp_path / "tokenizer.bin")
    assert token_table.find_tokenizer(tmp_path).name == "tokenizer.bin"


@pytest.mark.parametrize(
    "where, value",
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer.type", "Whitespace"),
        ("pre_tokenizer.add_prefix_space", True),
        ("pre_tokenizer.use_regex", False),
        ("post_processor.type", "TemplateProcessing"),
        ("model.type", "WordPiece"),
        ("model.dropout", 0.1),
        ("model.continuing_subword_prefix", "##"),
        ("model.end_of_word_suffix", "</w>"),
        ("model.ignore_merges", True),
        ("model.vocab", None),
        ("model.vocab", ["a"]),
        ("model.merges", None),
        ("model.merges", "a b"),
        ("model.merges", ["a"]),
        ("model.merges", ["a b c"]),
        ("model.merges", [["a", 1]]),
        ("model.merges", [7]),
        ("added_tokens", 7),
        ("added_tokens", [7]),
        ("added_tokens", [{"id": 1}]),
        ("added_tokens", [{"id": "x", "content": EOT}]),
        ("added_tokens", [{"id": 5, "content": 5}]),
        ("added_tokens", [{"id": 5, "content": []}]),
    ],
)
def test_hugging_face_tokenizer_of_another_kind_is_refused(table, tmp_path, where, value):
    data = hugging_face(*table)
    *folders, name = where.split(".")
    node = data
    for folder in folders:
        node = node[folder]
    node[name] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    named = {"merges": "merge", "added_tokens": "added_tokens|endoftext"}.get(name, name)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*({named})") as error:
        token_table.load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_ids_that_are_not_in_merge_order_are_refused(table, tmp_path):
    tokens, eot, merges = table
    swapped = [*tokens]
    first = next(i for i, token in enumerate(tokens[256:-1], 256) if len(token) > 2)
    swapped[256], swapped[first] = swapped[first], swapped[256]
    path = save_json(tmp_path, swapped, merges)
    with pytest.raises(ValueError, match=r"vocab\.json: .*order of the merges"):
        token_table.load_tokenizer(path)
    token_table.save_tokenizer(tmp_path / "tokenizer.bin", swapped, eot)
    with pytest.raises(ValueError, match=r"tokenizer\.bin: .*order of the merges"):
        token_table.load_tokenizer(tmp_path)


def test_merges_that_are_not_the_ids_are_refused(table, tmp_path):
    tokens, _, merges = table
    for wrong in (merges[:-1], merges[::-1], [*merges, merges[0]], [*merges, (b"q", b"z")]):
        with pytest.raises(ValueError, match=r"merge \d+ is .* would be"):
            token_table.load_tokenizer(save_json(tmp_path, tokens, wrong))


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda tokens: tokens[1:], "no token for byte 33"),
        (lambda tokens: [*tokens, tokens[300]], "is both token"),
        (lambda tokens: [*tokens, b""], "has 0 bytes"),
        (lambda tokens: tokens[:399], "end-of-text id 399"),
    ],
)
def test_incomplete_tables_are_refused(enc, tmp_path, change, problem):
    token_table.save_tokenizer(tmp_path / "tokenizer.bin", change(enc.tokens), 399)
    with pytest.raises(ValueError, match=rf"tokenizer\.bin: .*{problem}"):
        token_table.load_tokenizer(tmp_path)


@pytest.mark.parametrize("id", [5.0, True, "5", None, [5], -1, 4, 400, 10**30])
def test_vocabulary_with_bad_ids_is_refused(table, tmp_path, id):
    path = save_json(tmp_path, table[0], table[2])
    data = json.loads(path.read_text(encoding="utf-8"))
    data["&"] = id  # was 5
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json: token b'.*' has id"):
        token_table.load_tokenizer(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a b": 0}', b'{"\\ud800": 0}']
)
def test_json_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    for name in ("vocab.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            token_table.load_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff", b"a\n", b"a b c\n", b"\xc3\xa9 \xe4\xbd\xa0\n"])
def test_merges_that_are_no_pairs_are_refused(table, tmp_path, content):
    path = save_json(tmp_path, table[0], table[2])
    path.with_name("merges.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"merges\.txt|vocab\.json"):
        token_table.load_tokenizer(path)


def test_missing_tokenizers_are_named(table, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
        token_table.load_tokenizer(tmp_path / "nothing.bin")
    with pytest.raises(FileNotFoundError, match=r"no token table in this folder"):
        token_table.load_tokenizer(tmp_path)
    save_json(tmp_path, table[0], table[2])
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt: not found, and vocab\.json"):
        token_table.load_tokenizer(tmp_path / "vocab.json")
    with pytest.raises(FileNotFoundError, match="999M"):
        encoder.load("999M", models_dir=tmp_path)


def test_load_finds_models_by_name(enc, tmp_path):
    enc.save(tmp_path / "mine" / "tokenizer.bin")
    enc.save(tmp_path / "124M" / "tokenizer.bin")
    assert encoder.load("mine", models_dir=tmp_path).tokens == enc.tokens
    assert encoder.load("gpt2", models_dir=tmp_path).tokens == enc.tokens
    assert encoder.load(tmp_path / "mine").tokens == enc.tokens


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_tokenizer_bin_is_a_table_or_a_value_error(tmp_path_factory, enc, data):
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    token_table.save_tokenizer(path, enc.tokens, enc.eot)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([None, -1, -2, 0, 4, 1023, 1024, 1500]))]
    path.write_bytes(content + data.draw(st.sampled_from([b"", b"\0", b"\1a"])))
    try:
        tokens, eot = token_table.load_tokenizer(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        again = encoder.Encoder(tokens, eot)
        assert again.decode(again.encode(TEXT, allow_special=True)) == TEXT


# ----------------------------------------------------------------------------------------------
# The commands


def test_commands_train_and_encode(run, write, tmp_path):
    text, table, out = write(TEXT), tmp_path / "tokenizer.bin", tmp_path / "new" / "data.bin"
    done = run("encoder.py", "train", text, text, "--n_vocab", 300, "--out", table)
    assert (done.returncode, done.stdout) == (0, "")
    enc = encoder.load(table)
    assert enc.tokens == encoder.train([TEXT, TEXT], 300).tokens
    done = run("encoder.py", "encode", text, "--tokenizer", table, "--out", out, "--docs", "lines")
    assert (done.returncode, done.stdout) == (0, "")
    ids, n_vocab = llmc.load_tokens(out)
    lines = [line for line in TEXT.split("\n") if line]
    assert n_vocab == 300 and ids.tolist() == with_eot(enc, lines)
    summary = done.stderr.splitlines()[-1]
    assert f"{len(ids)} tokens in {len(lines)} documents" in summary and str(out) in summary


@pytest.mark.parametrize(
    "args, status, message",
    [
        (["train", "{text}", "--n_vocab", "256", "--out", "{out}"], 2, "256 is below 257"),
        (["train", "{text}", "--n_vocab", "many", "--out", "{out}"], 2, "'many'"),
        (["train", "{text}", "--n_vocab", "9999", "--out", "{out}"], 1, "n_vocab = "),
        (["train", "{no}", "--out", "{out}"], 1, "no.txt"),
        (["train"], 2, "TEXT"),
        ([], 2, "COMMAND"),
        (["encode", "{text}", "--tokenizer", "{table}"], 2, "--out"),
        (["encode", "{text}", "--out", "{out}", "--docs", "words"], 2, "'words'"),
        (["encode", "{text}", "--out", "{out}", "--n_procs", "0"], 2, "'0'"),
        (["encode", "{no}", "--tokenizer", "{table}", "--out", "{out}"], 1, "no.txt"),
        (["encode", "{text}", "--tokenizer", "{no}", "--out", "{out}"], 1, "no.txt"),
        (["encode", "{text}", "--tokenizer", "{text}", "--out", "{out}"], 1, "text.txt"),
        (["encode", "{empty}", "--tokenizer", "{table}", "--out", "{out}"], 1, "no text"),
    ],
)
def test_commands_report_errors_on_one_line(run, enc, write, tmp_path, args, status, message):
    names = {"text": write(TEXT), "empty": write("", "empty.txt"), "no": tmp_path / "no.txt"}
    names |= {"table": tmp_path / "tokenizer.bin", "out": tmp_path / "out.bin"}
    enc.save(names["table"])
    done = run("encoder.py", *[arg.format_map(names) for arg in args])
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not names["out"].exists()


# ----------------------------------------------------------------------------------------------
# GPT-2's own table


@pytest.fixture(scope="module")
def gpt2_path():
    from conftest import SHARED

    path = SHARED / "gpt2"
    if not path.exists():
        pytest.skip("reference data is absent")
    return path


@pytest.fixture(scope="module")
def gpt2(gpt2_path):
    return encoder.load(gpt2_path / "gpt2_tokenizer.bin")


def test_gpt2_table_is_the_same_in_every_format(gpt2, gpt2_path):
    assert encoder.load(gpt2_path).tokens == gpt2.tokens
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)
    assert gpt2.tokens[:256] == [bytes([byte]) for byte in token_table.bytes_to_unicode()]


def test_gpt2_merges_are_recovered_from_its_ids(gpt2, gpt2_path):
    lines = (gpt2_path / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [tuple(token_table.token_bytes("", part) for part in line.split()) for line in lines]
    assert len(merges) == 50000
    assert token_table.recover_merges(gpt2.tokens, gpt2.eot) == merges


def test_gpt2_ids_are_those_of_the_reference(gpt2, shared):
    for line in shared("golden/tokens.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        assert gpt2.encode(case["text"]) == case["ordinary"]
        assert gpt2.encode(case["text"], allow_special=True) == case["special"]
        assert gpt2.decode(case["ordinary"]) == gpt2.decode(case["special"]) == case["text"]


@pytest.mark.parametrize(
    "name", ["tinyshakespeare", "names", "tinystories_val", "tinystories_train"]
)
def test_gpt2_ids_of_whole_texts_are_tiktokens(gpt2, shared, name):
    text = shared(f"text/{name}.txt").read_bytes().decode()
    assert gpt2.encode(text) == tiktoken_encoding(gpt2.tokens, gpt2.eot).encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@given(st.one_of(awkward_text, st.text()))
@settings(max_examples=300, deadline=None)
def test_gpt2_ids_of_awkward_text_are_tiktokens(gpt2, gpt2_tiktoken, text):
    assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text)
    special = gpt2_tiktoken.encode(text, allowed_special="all")
    assert gpt2.encode(text, allow_special=True) == special


@pytest.fixture(scope="module")
def gpt2_tiktoken(gpt2):
    return tiktoken_encoding(gpt2.tokens, gpt2.eot)
