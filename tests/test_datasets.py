"""Tests of gpt2_support/datasets.py; what needs a run is in test_train.py."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import openai_files
import pytest
from texts import TEXT, with_eot

import encoder
import evaluate
import train
import utils
from gpt2_support import corpus, datasets, folders
from gpt2_support.formats import llmc
from gpt2_support.http import Effort

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


# --- data sets by name --------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server of two data sets, the hashes of which are known."""
    contents = {"names": b"emma\nolivia\nava\n" * 400, "tinystories": TEXT.encode() * 20}
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai_files.serve(tmp_path / "site") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        for name, data in contents.items():
            (tmp_path / "site" / f"{name}.txt").write_bytes(data)
        digest = hashlib.sha256(contents["names"]).hexdigest()
        size = len(contents["names"])
        names = datasets.DATA_SETS["names"]._replace(
            url=f"{server.url}/names.txt", size=size, sha256=digest
        )
        monkeypatch.setitem(datasets.DATA_SETS, "names", names)
        monkeypatch.setitem(datasets.DATA_SETS, "tinystories", datasets.DataSet("/tinystories.txt"))
        server.contents = contents
        yield server


def downloaded(name):
    return folders.datasets_dir() / f"{name}.txt"


@pytest.mark.parametrize("name", ["names", "tinystories"])
def test_download_fetches_a_data_set_once_and_says_where_to(call, site, name):
    for _ in range(2):
        done = call(utils, "download", name)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == f"{downloaded(name)}: downloaded"
    assert downloaded(name).read_bytes() == site.contents[name]
    assert len(site.log) == 1
    assert os.listdir(downloaded(name).parent) == [f"{name}.txt"]


def test_download_says_beforehand_what_how_large_and_where(call, site):
    first = call(utils, "download", "names").stderr.splitlines()[0]
    size = f"{len(site.contents['names']):,} bytes"
    assert first == f"{downloaded('names')}: fetching {size} from {site.url}/names.txt"


@pytest.mark.parametrize("change", ["altered", "shorter", "longer"])
def test_download_refuses_what_is_not_the_data_set(site, tmp_path, change):
    data = site.contents["names"]
    changed = {"altered": b"E" + data[1:], "shorter": data[:-1], "longer": data + b"x"}[change]
    (tmp_path / "site" / "names.txt").write_bytes(changed)
    with pytest.raises((ValueError, OSError), match=r"names\.txt"):
        datasets.download("names", Effort(pause=lambda seconds: None))
    assert not downloaded("names").exists()


def test_download_without_a_network_says_where_to_put_the_text(call, monkeypatch):
    names = datasets.DataSet("http://127.0.0.1:1/names.txt", 10, "0" * 64)
    monkeypatch.setitem(datasets.DATA_SETS, "names", names)
    with pytest.raises(ConnectionError, match="Run this again") as error:
        datasets.download("names", Effort(pause=lambda seconds: None))
    assert str(error.value).endswith(f"put the text at {downloaded('names')}")


def test_download_of_a_data_set_refuses_the_flags_of_models(call, site):
    done = call(utils, "download", "names", "--models_dir", "elsewhere")
    assert done.returncode == 2 and "GPT2_DATASETS_DIR" in done.stderr.splitlines()[-1]


def test_train_fetches_a_data_set_at_first_use_and_resumes(no_picture, call, site, tmp_path):
    out = tmp_path / "run"
    flags = ("--n_vocab", 260, "--n_layer", 1, "--n_embd", 8, "--n_head", 2)
    flags += ("--n_ctx", 8, "--batch_size", 2, "--steps", 2, "--eval_tokens", 100, "--out", out)
    done = call(train, "--data", "names", "--val_data", "names", *flags)
    assert done.returncode == 0, done.stderr
    assert call(train, "--resume", "--out", out, "--steps", 3).returncode == 0
    config = train.load_checkpoint(out).config
    assert config.data == str(downloaded("names").resolve())
    assert config.docs == "lines"  # a name a line, without being told
    assert len(site.log) == 1


def test_encoder_separates_documents_as_the_data_set_does(call, site, enc, tmp_path):
    enc.save(tmp_path / "tokenizer.bin")
    flags = ("--tokenizer", tmp_path, "--out", tmp_path / "names.bin")
    assert "in 1,200 documents" in call(encoder, "encode", "names", *flags).stderr
    done = call(encoder, "encode", "names", *flags, "--docs", "file")
    assert "in 1 documents" in done.stderr
    done = call(encoder, "encode", "names", "tinystories", *flags)
    assert done.returncode == 2 and "--docs is needed" in done.stderr.splitlines()[-1]


def test_encoder_takes_the_name_of_a_data_set_or_of_its_file(call, site, enc, tmp_path):
    enc.save(tmp_path / "tokenizer.bin")
    flags = ("--tokenizer", tmp_path, "--out", tmp_path / "names.bin")
    for text in ("names", "names.txt"):
        assert call(encoder, "encode", text, *flags).returncode == 0
        (tmp_path / "names.bin").unlink()
    assert len(site.log) == 1


def test_folder_does_not_hide_a_data_set_but_a_file_does(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names").mkdir()
    assert datasets.find(Path("names")) == downloaded("names")
    (tmp_path / "names").rmdir()
    (tmp_path / "names").write_text("my own")
    assert datasets.find(Path("names")) == Path("names")


def test_tokens_that_are_not_there_are_an_error_with_the_commands_that_make_them(call):
    datasets.make_folder(folders.datasets_dir())
    (folders.datasets_dir() / "tinystories.bin").touch()  # only texts are looked for there
    done = call(train, "--data", "tinystories.bin")
    first, second = done.stderr.splitlines()[-1].split(": make it with: ")[-1].split(" and then: ")
    assert done.returncode == 1
    assert first.endswith(
        "tinystories.bin: no such file; make it with: python utils.py download tinystories"
    )
    assert second == "python encoder.py encode tinystories.txt --out tinystories.bin"
    done = call(train, "--data", "my/own.bin", "--docs", "lines")
    assert done.stderr.endswith(
        "make it with: python encoder.py encode my/own.txt --out my/own.bin\n"
    )
    done = call(train, "--data", "nonesuch.txt")
    assert "nonesuch.txt: no such file, nor a data set of that name (tinys" in done.stderr


def test_known_hashes_are_those_of_the_reference_texts(shared):
    for name in ("names", "tinyshakespeare"):
        data = shared(f"text/{name}.txt").read_bytes()
        _, size, sha256, _ = datasets.DATA_SETS[name]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)


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


def test_tokens_and_digest_of_a_text_are_without_its_byte_order_mark(enc, text, capsys):
    """Tokens that were encoded with it, and kept by the digest of the whole file, are not used."""
    expected = datasets.read_tokens(text, enc, "file").tolist()
    text.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert datasets.text_digest(text) == hashlib.sha256(TEXT.encode()).hexdigest()
    capsys.readouterr()
    assert datasets.read_tokens(text, enc, "file").tolist() == expected
    assert capsys.readouterr().err == ""


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


def test_cache_that_cannot_be_written_names_another_way_but_is_read(enc, text, monkeypatch):
    encoded = datasets.read_tokens(text, enc, "file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for another user than root
    assert (datasets.read_tokens(text, enc, "file") == encoded).all()
    with pytest.raises(OSError, match=r"cannot be written: name another folder with GPT2_DATASE"):
        datasets.read_tokens(text, enc, "lines")


def test_text_may_have_the_longest_name(enc, text):
    longest = text.rename(text.with_name("x" * 250 + ".txt"))
    assert datasets.read_tokens(longest, enc, "file").size > 0


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


def test_text_of_few_words_can_be_trained_on_as_bytes(no_picture, call, text):
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
        assert re.search(f"some.txt: {share} of its characters are not valid UTF-8", warnings[0])


def test_train_reports_a_text_that_is_not_utf8_once(call, text):
    text.write_bytes(png(20_000))
    done = call(train, "--data", text, "--out", text.parent / "run", "--seq_len", 999)
    assert done.stderr.count("not valid UTF-8") == 1


# --- tokens and their tokenizers ----------------------------------------------------------------


def test_encoded_tokens_are_trained_on_with_nothing_else_said(no_picture, call, text, tmp_path):
    """Two files in a folder, of different tokenizers, do not collide."""
    shape = ("--n_layer", 1, "--n_embd", 8, "--n_head", 2, "--n_ctx", 8, "--batch_size", 2)
    for n_vocab in (270, 300):
        table, out = tmp_path / f"{n_vocab}.table", tmp_path / f"{n_vocab}.bin"
        encoder.train(TEXT, n_vocab).save(table)
        done = call(encoder, "encode", text, "--tokenizer", table, "--out", out)
        assert f"{out}, and their tokenizer {tmp_path / str(n_vocab)}.tokenizer.bin" in done.stderr
    encoder.train(OTHER, 280).save(tmp_path / "tokenizer.bin")  # of neither
    for n_vocab in (270, 300):
        flags = ("--data", tmp_path / f"{n_vocab}.bin", "--out", tmp_path / f"run{n_vocab}")
        done = call(train, *flags, *shape, "--steps", 1, "--eval_tokens", 100)
        assert done.returncode == 0, done.stderr
        saved = encoder.load(tmp_path / f"run{n_vocab}").tokens
        assert saved == encoder.train(TEXT, n_vocab).tokens


def test_tokenizer_beside_tokens_is_their_own_or_the_folders(enc, tmp_path):
    tokens, own = tmp_path / "stories.bin", tmp_path / "stories.tokenizer.bin"
    with pytest.raises(ValueError, match=r"no stories\.tokenizer\.bin or tokenizer\.bin beside it"):
        datasets.tokenizer_beside(tokens)
    enc.save(tmp_path / "tokenizer.bin")
    assert datasets.tokenizer_beside(tokens) == tmp_path / "tokenizer.bin"
    enc.save(own)
    assert datasets.tokenizer_beside(tokens) == own


def test_tokens_of_another_tokenizer_are_refused(enc, text, tmp_path):
    """Of the same size, so that the ids do not tell."""
    tokens, other = tmp_path / "stories.bin", encoder.train(OTHER, 300)
    corpus.encode_files(enc, [text], tokens)
    enc.save(corpus.tokenizer_path(tokens))
    assert datasets.read_tokens(tokens, enc, "eot").size > 0
    with pytest.raises(ValueError, match=r"stories\.bin: was encoded with another tokenizer"):
        datasets.read_tokens(tokens, other, "eot")


def test_nanogpts_tokens_are_read_with_a_flag(no_picture, call, enc, tmp_path):
    ids = enc.encode(TEXT * 3)
    np.array(ids, "<u2").tofile(tmp_path / "train.bin")
    enc.save(tmp_path / "tokenizer.bin")
    assert datasets.read_tokens(tmp_path / "train.bin", enc, "file", raw=True).tolist() == ids
    flags = ("--data", tmp_path / "train.bin", "--out", tmp_path / "run", "--n_embd", 8)
    flags += ("--n_layer", 1, "--n_head", 2, "--n_ctx", 8, "--batch_size", 2, "--steps", 1)
    done = call(train, *flags)
    assert done.returncode == 1
    assert "with --raw it is read as one of nanoGPT's" in done.stderr.splitlines()[-1]
    assert call(train, *flags, "--raw").returncode == 0
    assert call(train, "--resume", "--out", tmp_path / "run", "--steps", 2).returncode == 0


def test_nanogpts_checkpoint_is_named_as_what_it_is(call, text, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"PK\3\4")
    done = call(train, "--init", tmp_path / "ckpt.pt", "--data", text, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "ckpt.pt: a file of PyTorch, which cannot be read" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("program", [train, evaluate])
def test_raw_tokens_are_read_whatever_their_name(no_picture, call, tmp_path, program):
    """A name that does not end in .bin used to be that of a text, which was encoded."""
    ids, data = encoder.load("stories").encode(TEXT * 9), tmp_path / "raw.u16"
    np.array(ids, "<u2").tofile(data)
    flags = ["--data", data, "--raw", "--seq_len", 8]
    flags += ["--init", "stories", "--eval_only"] if program is train else ["--model", "stories"]
    done = call(program, *flags)
    assert f"{len(ids) - 1} tokens" in done.stdout, done.stderr
    (tmp_path / "text").write_text(TEXT * 9)
    flags[1] = tmp_path / "text"
    done = call(program, *flags)
    assert done.returncode == 1 and done.stdout == ""
    assert "text: begins with text, --raw expects ids" in done.stderr.splitlines()[-1]


def test_raw_tokens_are_no_text_to_learn_a_vocabulary_from(call, enc, tmp_path):
    data, out = tmp_path / "raw.u16", tmp_path / "run"
    np.array(enc.encode(TEXT * 9), "<u2").tofile(data)
    done = call(train, "--data", data, "--raw", "--out", out)
    assert done.returncode == 1 and "give its --tokenizer" in done.stderr.splitlines()[-1]
    done = call(train, "--data", data, "--raw", "--out", out, "--n_vocab", 300)
    assert done.returncode == 2 and "a tokens file is encoded already" in done.stderr


def test_nanogpts_tokens_are_checked(enc, tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"train\.bin: 3 bytes, an odd number"):
        datasets.read_tokens(path, enc, "file", raw=True)
    np.array([1, 300], "<u2").tofile(path)
    with pytest.raises(ValueError, match="has the id 300, but the tokenizer has 300 tokens"):
        datasets.read_tokens(path, enc, "file", raw=True)
    llmc.save_tokens(path, [[1, 2]], 300)  # ours: the flag does no harm
    assert datasets.read_tokens(path, enc, "file", raw=True).tolist() == [1, 2]


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
