"""Splitting, merging, encoding, decoding and learning, against plain reimplementations."""

import copy
import doctest
import inspect
import json
import os
import pickle
import random
import re
import tracemalloc
import unicodedata
from collections import Counter
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from texts import (
    EOT,
    GPT2_PATTERN,
    TEXT,
    assigned_text,
    awkward_text,
    examples,
    naive_bpe,
    naive_encode,
    with_eot,
)

import encoder
from gpt2_support import corpus, pretokens
from gpt2_support.formats import llmc, token_table


@pytest.fixture(scope="module")
def enc():
    """A small tokenizer, learned from TEXT."""
    return encoder.train(TEXT, 400)


def last_line(text):
    return text.splitlines()[-1]


def naive_train(text, n_vocab):
    """Count all pairs anew for each merge; return the tokens, and the ids of every pre-token."""
    tokens = [bytes([byte]) for byte in token_table.bytes_to_unicode()]
    counts = Counter(p for part in text.split(EOT) for p in regex.findall(GPT2_PATTERN, part))
    words = {p: [tokens.index(bytes([byte])) for byte in p.encode()] for p in counts}
    while len(tokens) < n_vocab - 1:
        pairs = Counter()
        for pretoken, word in words.items():
            for pair in pairwise(word):
                if len(tokens[pair[0]] + tokens[pair[1]]) < 256:
                    pairs[pair] += counts[pretoken]
        if not pairs:
            raise ValueError(f"after {len(tokens)}")
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
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
@examples(5)
def test_split_pattern_is_gpt2s(text):
    assert encoder.SPLIT_PATTERN.findall(text) == regex.findall(GPT2_PATTERN, text)


@given(awkward_text)
@example("café naïve")
@example("!\x1c a\x1c b \x1c\x1c  c")
@example("a\u3000 b\xa0 \xa0c")
@examples(10)
def test_words_split_alone_as_in_the_text(text):
    words = pretokens.find_words(text)
    assert "".join(words) == text
    alone = [pretoken for word in words for pretoken in encoder.SPLIT_PATTERN.findall(word)]
    assert alone == regex.findall(GPT2_PATTERN, text)


def test_words_know_every_space():
    everything = "".join(map(chr, range(0x110000)))
    spaces = regex.findall(r"\s", everything)
    assert re.findall(pretokens.SPACE, everything) == spaces
    assert re.sub(f"{pretokens.NON_SPACE}+", "", everything) == "".join(spaces)


def test_word_cache_is_emptied_though_two_threads_have_filled_it():
    cache = pretokens.WordCache(lambda word: (len(word),))
    for i in range(131_073):  # one more than a thread by itself would leave
        dict.__setitem__(cache, str(i), ())
    assert cache["new"] == (3,) and len(cache) == 1


def test_word_cache_is_bounded():
    calls = []
    cache = pretokens.WordCache(lambda word: calls.append(word) or (len(word),))
    assert [cache["ab"], cache["ab"], len(calls)] == [(2,), (2,), 1]
    assert [cache["x" * 65], "x" * 65 in cache] == [(65,), False]
    assert [cache["x" * 64], "x" * 64 in cache] == [(64,), True]
    for i in range(131_071):
        cache[str(i)]
    assert len(cache) == 1 and cache["131070"] == (6,) and len(calls) == 131_074


# ----------------------------------------------------------------------------------------------
# Encoding


@given(awkward_text)
@examples(3)
def test_encode_equals_naive_bpe(enc, text):
    assert enc.encode(text) == naive_encode(enc, text)


@given(st.text("ab", max_size=60), st.text("ab", min_size=20, max_size=200), st.integers(1, 40))
@examples(2)
def test_bpe_equals_naive_bpe_on_repetitive_text(pretoken, corpus, n_merges):
    try:
        tokens = encoder.train(corpus, 257 + n_merges).tokens
    except ValueError:
        return
    ranks = {token: id for id, token in enumerate(tokens)}
    assert encoder.bpe(pretoken.encode(), ranks) == naive_bpe(pretoken.encode(), ranks)


@given(st.sets(st.binary(min_size=2, max_size=5), max_size=40), st.binary(max_size=40))
def test_bpe_equals_naive_bpe_for_any_vocabulary(longer, pretoken):
    tokens = [bytes([byte]) for byte in range(256)] + sorted(longer)
    ranks = {token: id for id, token in enumerate(tokens)}
    assert encoder.bpe(pretoken, ranks) == naive_bpe(pretoken, ranks)


@given(
    st.sets(st.text("ab", min_size=2, max_size=6), max_size=20),
    st.text("ab", max_size=80),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
@examples(6)
def test_bpe_in_blocks_equals_naive_bpe_for_any_order_of_merges(longer, text, block, seed):
    tokens = [bytes([byte]) for byte in range(256)] + sorted(token.encode() for token in longer)
    random.Random(seed).shuffle(tokens)
    ranks = {token: id for id, token in enumerate(tokens)}
    expected = naive_bpe(text.encode(), ranks)
    assert pretokens.bpe_in_blocks(encoder.bpe, text.encode(), ranks, tokens, block) == expected


def test_bpe_in_blocks_goes_back_as_far_as_a_later_byte_reaches():
    """Each byte prefers the next one, and the last pair comes first: all depends on the end."""
    text = bytes(range(200))
    pairs = [text[i : i + 2] for i in range(198, -1, -1)]
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs]
    ranks = {token: id for id, token in enumerate(tokens)}
    for n in (99, 100, 199, 200):
        expected = naive_bpe(text[:n], ranks)
        for block in (1, 10, 31, 98, 150):
            ids = pretokens.bpe_in_blocks(encoder.bpe, text[:n], ranks, tokens, block)
            assert ids == expected


@pytest.mark.parametrize(
    "text",
    ["\0", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("ab", "é!", "子,")), "acgtgca"],
)
def test_encode_takes_little_memory_where_there_are_no_spaces(enc, monkeypatch, text):
    """92 bytes a byte, and more where there is something to merge, before it went by blocks."""
    text = text * (60_000 // len(text.encode()))
    expected = enc.encode(text)
    monkeypatch.setattr(pretokens, "BLOCK", 1000)
    tracemalloc.start()
    ids = enc.encode(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids == expected
    assert peak < 32 * 60_000


def test_bpe_worked_example_of_the_docstring():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"th": 257, b"the": 258}
    assert encoder.bpe(b"theme", ranks) == [258, ord("m"), ord("e")]


@given(awkward_text)
@example(TEXT)
@examples(3)
def test_encode_equals_tiktoken(enc, text):
    assert enc.encode(text) == tiktoken_encoding(enc.tokens, enc.eot).encode_ordinary(text)


@given(st.text())
def test_decode_undoes_encode(enc, text):
    assert enc.decode(enc.encode(text)) == text
    assert enc.decode(enc.encode(text, allow_special=True)) == text


@pytest.mark.parametrize(
    "character",
    ["a", " ", "é", *[pytest.param(x, marks=pytest.mark.thorough) for x in "Z-\n1子😀"]]
    + [pytest.param(x, marks=pytest.mark.thorough) for x in ("ab", " x")],
)
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


@pytest.mark.parametrize("text", [b"bytes", ["a", "list"], None, 5])
def test_encode_of_what_is_no_text_says_what_to_do(enc, text):
    unchecked = inspect.unwrap(encoder.Encoder.encode)  # a thorough run checks types before
    with pytest.raises(ValueError, match=f"text of type {type(text).__name__}.*expected a str"):
        unchecked(enc, text)
    if isinstance(text, bytes):
        with pytest.raises(ValueError, match=r"decode\('utf-8'"):
            unchecked(enc, text)


def test_encode_empty_text(enc):
    assert enc.encode("") == enc.encode("", allow_special=True) == []
    assert enc.decode([]) == ""


def test_encoder_shows_its_vocabulary_size_and_end_of_text(enc):
    assert repr(enc) == "Encoder(n_vocab=400, eot=399)"
    assert repr(encoder.Encoder([b"a"])) == "Encoder(n_vocab=1, eot=None)"


def test_pickled_encoder_is_its_vocabulary_alone(enc):
    before = len(pickle.dumps(enc))
    enc.encode(TEXT)  # fills the cache
    assert len(pickle.dumps(enc)) == before
    for same in (pickle.loads(pickle.dumps(enc)), copy.deepcopy(enc)):
        assert (same.tokens, same.eot) == (enc.tokens, enc.eot)
        assert same.encode(TEXT) == enc.encode(TEXT)


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
    unchecked = inspect.unwrap(encoder.Encoder.decode_bytes)  # a thorough run checks types before
    with pytest.raises(ValueError, match="not a list of ids"):
        unchecked(enc, ids)


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
@examples(2)
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
    for pretoken, ids in words.items():
        assert enc.encode(pretoken) == ids  # what it was learned from is encoded as it was learned


@given(st.lists(st.text("ab", min_size=1, max_size=30), min_size=1, max_size=5))
def test_train_to_the_end_makes_every_pretoken_one_token(texts):
    text = " ".join(texts)
    with pytest.raises(ValueError, match="n_vocab = ") as error:
        encoder.train(text, 1000)
    n_vocab = int(regex.search(r"n_vocab = (\d+) at most", str(error.value))[1])
    enc = encoder.train(text, n_vocab)
    assert len(set(enc.tokens)) == n_vocab
    assert all(len(enc.encode(pretoken)) == 1 for pretoken in encoder.SPLIT_PATTERN.findall(text))


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
# The commands


def test_commands_train_and_encode(call, tmp_path):
    text, table, out = (tmp_path / name for name in ("text.txt", "tokenizer.bin", "new/data.bin"))
    text.write_bytes(TEXT.encode())
    done = call(encoder, "train", text, text, "--n_vocab", 300, "--out", table)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"learned 300 tokens from {2 * len(TEXT.encode()):,} bytes: {table}" in done.stderr
    enc = encoder.load(table)
    assert enc.tokens == encoder.train([TEXT, TEXT], 300).tokens
    done = call(encoder, "encode", text, "--tokenizer", table, "--out", out, "--docs", "lines")
    assert (done.returncode, done.stdout) == (0, "")
    ids, n_vocab = llmc.load_tokens(out)
    lines = [line for line in TEXT.split("\n") if line]
    assert n_vocab == 300 and ids.tolist() == with_eot(enc, lines)
    summary = done.stderr.splitlines()[-1]
    assert f"{len(ids)} tokens in {len(lines)} documents" in summary and str(out) in summary


def test_command_encodes_large_files_in_several_processes(run, enc, tmp_path):
    """There Encoder is a class of `__main__`, which the other processes import anew."""
    line = f"{'x' * 59}\n"
    n_lines = 1 + 8 * corpus.CHUNK // len(line)
    (tmp_path / "text.txt").write_text(line * n_lines, encoding="ascii", newline="")
    enc.save(tmp_path / "tokenizer.bin")
    files = [tmp_path / "text.txt", "--tokenizer", tmp_path, "--out", tmp_path / "out.bin"]
    done = run("encoder.py", "encode", *files, "--docs", "lines", "--n_procs", 2)
    assert done.returncode == 0 and f"in {n_lines:,} documents" in done.stderr
    ids = llmc.load_tokens(tmp_path / "out.bin")[0].reshape(n_lines, -1)
    assert (ids == with_eot(enc, [line[:-1]])).all()


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
def test_commands_report_errors_on_one_line(call, enc, tmp_path, args, status, message):
    names = {name: tmp_path / f"{name}.txt" for name in ("text", "empty", "no")}
    names |= {"table": tmp_path / "tokenizer.bin", "out": tmp_path / "out.bin"}
    names["text"].write_bytes(TEXT.encode())
    names["empty"].touch()
    enc.save(names["table"])
    done = call(encoder, *[arg.format_map(names) for arg in args])
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not names["out"].exists()


@pytest.mark.parametrize("link", ["the same", "symlink", "hard link", "another spelling"])
@pytest.mark.parametrize("command", ["train", "encode"])
def test_commands_refuse_an_output_that_is_an_input(call, enc, tmp_path, command, link):
    text, out, table = (tmp_path / name for name in ("a.txt", "b.txt", "tokenizer.bin"))
    text.write_bytes(TEXT.encode())
    enc.save(table)
    if link == "symlink" and os.name == "nt":
        pytest.skip("symbolic links need a privilege on Windows")
    elif link == "symlink":
        out.symlink_to(text)
    elif link == "hard link":
        out.hardlink_to(text)
    else:
        (tmp_path / "folder").mkdir()
        out = tmp_path / "folder" / ".." / "a.txt" if link == "another spelling" else text
    flags = ["--tokenizer", table] if command == "encode" else ["--n_vocab", 300]
    done = call(encoder, command, text, *flags, "--out", out)
    assert done.returncode == 2
    assert f"--out {out} is {text}, which is read" in last_line(done.stderr)
    assert text.read_bytes() == out.read_bytes() == TEXT.encode()


def test_command_encode_refuses_to_write_over_its_tokenizer(call, enc, tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    table = tmp_path / "tokenizer.bin"
    enc.save(table)
    for place in (table, tmp_path):
        done = call(encoder, "encode", tmp_path / "text.txt", "--tokenizer", place, "--out", table)
        assert done.returncode == 2 and "is read" in last_line(done.stderr)
        assert encoder.load(table).tokens == enc.tokens


@pytest.mark.parametrize("n_renames", [0, 1])
def test_command_encode_that_fails_leaves_no_tokens_beside_another_tokenizer(
    call, enc, tmp_path, monkeypatch, n_renames
):
    """Both are of one size, so that the ids would not tell."""
    text, table, out = (tmp_path / name for name in ("text.txt", "new.bin", "data.bin"))
    text.write_bytes(TEXT.encode())
    other, beside = encoder.train(TEXT[::-1], enc.n_vocab), corpus.tokenizer_path(out)
    corpus.encode_files(other, [text], out)
    other.save(beside)
    enc.save(table)
    old, replace, renamed = out.read_bytes(), os.replace, []

    def fail_after(*paths):
        if len(renamed) == n_renames:
            raise OSError(28, "No space left on device")
        renamed.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_after)
    done = call(encoder, "encode", text, "--tokenizer", table, "--out", out)
    assert done.returncode == 1 and "No space left on device" in last_line(done.stderr)
    assert (out.read_bytes() == old) == (n_renames == 0) and not beside.exists()
    monkeypatch.setattr(os, "replace", replace)
    assert call(encoder, "encode", text, "--tokenizer", table, "--out", out).returncode == 0
    assert encoder.load(beside).tokens == enc.tokens


def test_command_encode_that_fails_keeps_its_own_tokenizer(call, enc, tmp_path, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "data.bin"
    text.write_bytes(TEXT.encode())
    enc.save(corpus.tokenizer_path(out))
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(28, "No space left")))
    done = call(encoder, "encode", text, "--tokenizer", corpus.tokenizer_path(out), "--out", out)
    assert done.returncode == 1
    assert encoder.load(corpus.tokenizer_path(out)).tokens == enc.tokens


def test_commands_refuse_an_output_that_is_no_file(call, tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    done = call(encoder, "train", tmp_path / "text.txt", "--n_vocab", 300, "--out", tmp_path)
    assert done.returncode == 2
    assert f"--out {tmp_path} is not a file that can be replaced" in last_line(done.stderr)


def test_command_shows_the_tokens_of_a_text_and_decode_is_the_way_back(call, enc, tmp_path):
    enc.save(tmp_path / "tokenizer.bin")
    text = "the times 日\n"
    for args, stdin in (([text], ""), (["-"], text + "\n"), (["the times", "日\n"], "")):
        done = call(encoder, "show", *args, "--tokenizer", tmp_path, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, "")
        ids = [int(line.split()[0]) for line in done.stdout.splitlines()]
        assert ids == enc.encode(text)
    assert done.stdout.startswith("    83  't'\n   257  'he'\n   318  ' times'\n")
    assert "'\\n'" in done.stdout and "b'\\xe6'" in done.stdout
    for same in (ids, [str(ids)], [", ".join(map(str, ids))]):
        done = call(encoder, "decode", *same, "--tokenizer", tmp_path)
        assert (done.returncode, done.stdout) == (0, f"{text}\n")
    done = call(encoder, "decode", "-", "--tokenizer", tmp_path, stdin=" ".join(map(str, ids)))
    assert done.stdout == f"{text}\n"


@pytest.mark.parametrize(
    ("ids", "status", "message"),
    [
        ("the", 2, "1 the is not a list of token ids"),
        ("400", 1, "400 is not in the vocabulary of 400"),
        ("1" * 5000, 2, "... is no token id"),
    ],
)
def test_command_decode_refuses_what_is_no_id(call, enc, tmp_path, ids, status, message):
    enc.save(tmp_path / "tokenizer.bin")
    done = call(encoder, "decode", "1", ids, "--tokenizer", tmp_path)
    assert done.returncode == status and message in last_line(done.stderr)


# ----------------------------------------------------------------------------------------------
# GPT-2's own table


@pytest.fixture(scope="module")
def gpt2():
    from conftest import SHARED

    path = SHARED / "gpt2" / "gpt2_tokenizer.bin"
    if not path.exists():
        pytest.skip("reference data is absent")
    return encoder.load(path)


def test_gpt2_ids_are_those_of_the_reference(gpt2, shared):
    for line in shared("golden/tokens.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        assert gpt2.encode(case["text"]) == case["ordinary"]
        assert gpt2.encode(case["text"], allow_special=True) == case["special"]
        assert gpt2.decode(case["ordinary"]) == gpt2.decode(case["special"]) == case["text"]


@pytest.mark.parametrize(
    "name",
    ["names", "tinystories_val"]
    + [
        pytest.param(name, marks=pytest.mark.thorough)
        for name in ("tinyshakespeare", "tinystories_train")
    ],
)
def test_gpt2_ids_of_whole_texts_are_tiktokens(gpt2, shared, name):
    text = shared(f"text/{name}.txt").read_bytes().decode()
    assert gpt2.encode(text) == tiktoken_encoding(gpt2.tokens, gpt2.eot).encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("step", [499, pytest.param(31, marks=pytest.mark.thorough)])
def test_gpt2_ids_of_assigned_characters_are_tiktokens(gpt2, gpt2_tiktoken, step):
    characters = map(chr, range(0, 0x110000, step))
    assigned = [x for x in characters if unicodedata.category(x) not in ("Cn", "Cs")]
    text = "".join(f"{x}'s a{x}1 {x} " for x in assigned)
    assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text)


@given(st.one_of(awkward_text, assigned_text))
@examples(3)
def test_gpt2_ids_of_awkward_text_are_tiktokens(gpt2, gpt2_tiktoken, text):
    assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text)
    special = gpt2_tiktoken.encode(text, allowed_special="all")
    assert gpt2.encode(text, allow_special=True) == special


@pytest.fixture(scope="module")
def gpt2_tiktoken(gpt2):
    return tiktoken_encoding(gpt2.tokens, gpt2.eot)
