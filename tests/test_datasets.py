"""Tests of gpt2_support/datasets.py; what needs a run is in test_train.py."""

import os

import numpy as np
import pytest
from texts import TEXT, with_eot

import encoder
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
