"""Tests of gpt2_support/datasets.py; what needs a run is in test_train.py."""

import os
import re

import numpy as np
import pytest
from texts import TEXT, with_eot

import encoder
import train
from gpt2_support import corpus, datasets

OTHER = TEXT[::-1]  # of the same length


@pytest.fixture(scope="module")
def enc():
    """A small tokenizer, learned from TEXT."""
    return encoder.train(TEXT, 300)


@pytest.fixture
def text(tmp_path):
    """A text file in a folder of its own."""
    path = tmp_path / "texts" / "text.txt"
    path.parent.mkdir()
    path.write_bytes(TEXT.encode())
    return path


def replace(path, text, how):
    """Replace a text file: by an older file, or in place without a trace in size and time."""
    before = path.stat()
    if how == "moved":
        other = path.with_name("other.txt")
        other.write_bytes(text.encode())
        os.utime(other, (1, 1))
        os.replace(other, path)
    else:
        path.write_bytes(text.encode())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# --- caches of a text ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moved", "in place"])
def test_tokens_are_those_of_the_text_whatever_its_time(enc, text, how, capsys):
    assert datasets.read_tokens(text, enc, "file").tolist() == with_eot(enc, [TEXT])
    replace(text, OTHER, how)
    assert datasets.read_tokens(text, enc, "file").tolist() == with_eot(enc, [OTHER])
    capsys.readouterr()
    replace(text, TEXT, how)  # as before: nothing is encoded again
    assert datasets.read_tokens(text, enc, "file").tolist() == with_eot(enc, [TEXT])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["moved", "in place"])
def test_vocabulary_is_that_of_the_text_whatever_its_time(text, how):
    def learned(text):
        return encoder.load(datasets.learn_tokenizer(text, 300, encoder.train)).tokens

    assert learned(text) == encoder.train(TEXT, 300).tokens
    replace(text, OTHER, how)
    assert learned(text) == encoder.train(OTHER, 300).tokens


def test_text_that_changes_while_it_is_encoded_leaves_no_tokens(enc, text, monkeypatch):
    read_documents = corpus.read_documents

    def read_and_change(*args):
        for batch in read_documents(*args):
            replace(text, OTHER, "in place")
            yield batch

    monkeypatch.setattr(corpus, "read_documents", read_and_change)
    with pytest.raises(ValueError, match=r"text\.txt: the text changed while it was read"):
        datasets.read_tokens(text, enc, "file")
    assert not list(datasets.cache_dir().glob("*"))


def test_text_that_changes_while_it_is_learned_leaves_no_vocabulary(text):
    def train_and_change(texts, n_vocab):
        enc = encoder.train(texts, n_vocab)
        replace(text, OTHER, "in place")
        return enc

    with pytest.raises(ValueError, match=r"text\.txt: the text changed while it was read"):
        datasets.learn_tokenizer(text, 300, train_and_change)
    assert not list(datasets.cache_dir().glob("*"))


def test_tokens_are_those_of_the_tokenizer_and_the_documents(enc, text):
    cases = [(enc, "file"), (enc, "lines"), (encoder.train(OTHER, 300), "file")]
    cases.append((encoder.Encoder(enc.tokens, eot=5), "file"))
    for tokenizer, docs in cases * 2:
        documents = TEXT.split("\n") if docs == "lines" else [TEXT]
        expected = with_eot(tokenizer, filter(None, documents))
        assert datasets.read_tokens(text, tokenizer, docs).tolist() == expected


def test_nothing_is_written_beside_a_text(text):
    enc = encoder.load(datasets.learn_tokenizer(text, 300, encoder.train))
    datasets.read_tokens(text, enc, "file")
    assert os.listdir(text.parent) == ["text.txt"]
    assert len(os.listdir(datasets.cache_dir())) == 2


# --- texts that are none, or too small ----------------------------------------------------------


def test_data_that_is_a_folder_is_named_as_one(call, tmp_path):
    for flags in (["--data", tmp_path], ["--data", tmp_path, "--n_vocab", 300]):
        done = call(train, *flags, "--out", tmp_path / "run")
        assert done.returncode == 1
        assert f"{tmp_path}: is a folder, expected a text" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_data_that_can_be_read_once_only_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is not a regular file"):
        datasets.is_text(tmp_path / "pipe")


@pytest.mark.parametrize("contents", [b"", b"hello", TEXT.encode()])
def test_text_too_small_to_learn_from_says_so_and_advises_nothing_that_fails(call, text, contents):
    text.write_bytes(contents)
    done = call(train, "--data", text, "--out", text.parent / "run")
    problem = done.stderr.splitlines()[-1]
    expected = (
        f"{len(contents)} bytes of text are too few to learn 1024 tokens from: give more text"
        if contents
        else "no text in"
    )
    assert done.returncode == 1 and expected in problem and "--n_vocab" not in problem


def test_text_of_few_words_can_be_trained_on_as_bytes(call, text):
    text.write_bytes(TEXT.encode() * 30)
    flags = ("--data", text, "--out", text.parent / "run", "--n_layer", 1, "--n_embd", 8)
    done = call(train, *flags)
    assert "give more text, or --n_vocab 257" in done.stderr.splitlines()[-1]
    flags += ("--steps", 1, "--n_head", 1, "--seq_len", 64, "--eval_tokens", 100)
    assert call(train, *flags, "--n_vocab", 257).returncode == 0


def png(n_bytes):
    return b"\x89PNG\r\n\x1a\n" + np.random.default_rng(0).bytes(n_bytes - 8)


@pytest.mark.parametrize(
    ("contents", "share"),
    [
        (png(20_000), r"[3-7]\d%"),
        (TEXT.encode("utf-16"), "48%"),
        (TEXT.encode("utf-16-le"), "48%"),
        (("né " * 999).encode("latin-1"), "33%"),
        (TEXT.encode(), None),
        ("é你😀".encode() * 20_000, None),
        (b"", None),
    ],
)
def test_text_that_is_not_utf8_is_reported_with_the_share(call, enc, tmp_path, contents, share):
    path = tmp_path / "some.txt"
    path.write_bytes(contents)
    enc.save(tmp_path / "tokenizer.bin")
    flags = ("--tokenizer", tmp_path / "tokenizer.bin", "--out", tmp_path / "out.bin")
    warnings = [
        line
        for line in call(encoder, "encode", path, *flags).stderr.splitlines()
        if "UTF-8" in line
    ]
    assert len(warnings) == (share is not None)
    if share:
        assert re.search(f"some.txt: {share} of its characters are not text in UTF-8", warnings[0])


def test_train_reports_a_text_that_is_not_utf8_once(call, text):
    text.write_bytes(png(20_000))
    done = call(train, "--data", text, "--out", text.parent / "run", "--n_embd", 7)
    assert done.stderr.count("not text in UTF-8") == 1


# --- token ids ----------------------------------------------------------------------------------


def test_one_token_is_too_few_to_validate_with():
    datasets.check_validation(np.zeros(2, int))
    with pytest.raises(ValueError, match="1 tokens to validate with: give more text"):
        datasets.check_validation(np.zeros(1, int))


@pytest.mark.parametrize("size", [0, 1, 2**24 + 1])
def test_max_id_is_the_largest(size):
    tokens = np.zeros(size, np.uint16)
    tokens[-1:] = 9
    assert datasets.max_id(tokens) == (9 if size else 0)
