"""Text files: reading them in chunks, documents, and encoding them in several processes."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT
from hypothesis import example, given
from hypothesis import strategies as st
from texts import EOT, TEXT, awkward_text, examples, with_eot

import encoder
from gpt2_support import corpus
from gpt2_support.formats import llmc


@pytest.fixture(scope="module")
def enc():
    """A small tokenizer, learned from TEXT."""
    return encoder.train(TEXT, 400)


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


def encoded(enc, path, docs="eot", **kwargs):
    """Return the ids in the tokens file of a text file."""
    out = path.with_name("out.bin")
    n_tokens, n_docs, n_bytes = corpus.encode_files(enc, [path], out, docs, **kwargs)
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
def test_encode_files_knows_end_of_text_lines_by_any_line_end(enc, write, end):
    path = write(f"one\r\n{EOT}\r\ntwo\n{EOT}\nthree {EOT}\n{EOT}{end}")
    documents = ["one\r\n", "two\n", f"three {EOT}\n"]
    for chunk_size in (1, 7, 1000):
        assert encoded(enc, path, chunk_size=chunk_size) == with_eot(enc, documents)


def test_encode_files_by_line(enc, write):
    lines = [line for line in DOCUMENTS.replace("\r\n", "\n").split("\n") if line]
    assert encoded(enc, write(DOCUMENTS), "lines") == with_eot(enc, lines)


def test_encode_files_by_file(enc, write, tmp_path):
    assert encoded(enc, write(DOCUMENTS), "file") == with_eot(enc, [DOCUMENTS])
    paths = [write("one"), write("", "empty.txt"), write("two", "two.txt")]
    corpus.encode_files(enc, paths, tmp_path / "out.bin", "file")
    assert llmc.load_tokens(tmp_path / "out.bin")[0].tolist() == with_eot(enc, ["one", "two"])


def test_encode_files_end_a_document_in_every_mode(enc, write, tmp_path):
    paths = [write("one\n"), write(f"two\n{EOT}\nthree", "two.txt"), write("four", "four.txt")]
    corpus.encode_files(enc, paths, tmp_path / "out.bin")
    ids = llmc.load_tokens(tmp_path / "out.bin")[0].tolist()
    assert ids == with_eot(enc, ["one\n", "two\n", "three", "four"])


@given(awkward_text, st.integers(1, 12), st.sampled_from([*corpus.SEPARATORS]))
@example(DOCUMENTS + TEXT, 1, "eot")
@example(DOCUMENTS + TEXT, 13, "lines")
@example(DOCUMENTS + TEXT, 64, "file")
@example("\ufeff" + DOCUMENTS + TEXT, 1, "eot")
@examples(4)
def test_encode_files_gives_the_same_ids_in_any_chunks(
    tmp_path_factory, enc, text, chunk_size, docs
):
    path = tmp_path_factory.getbasetemp() / "awkward.txt"
    path.write_bytes(text.encode())
    text = text.removeprefix("\ufeff")  # a byte order mark
    assert "".join(corpus.read_chunks(path, chunk_size)) == text
    documents = [document for document in corpus.SEPARATORS[docs].split(text) if document]
    batches = corpus.read_documents([path], docs, chunk_size)
    ids = [id for batch in batches for id in corpus.encode_batch(enc, batch).tolist()]
    assert ids == with_eot(enc, documents)


def test_chunks_are_bounded_where_there_are_spaces(write):
    path = write("word " * 20_000)
    assert max(map(len, corpus.read_chunks(path, 1000))) < 1100


def test_encode_files_gives_the_same_ids_in_several_processes(enc, write):
    path = write((DOCUMENTS + TEXT) * 20)
    assert encoded(enc, path, n_procs=2, chunk_size=200) == encoded(enc, path)


class Ending(encoder.Encoder):
    """Ends its process, as if it were killed for want of memory."""

    def encode(self, text, allow_special=False):
        os._exit(9)


@pytest.mark.thorough
def test_worker_that_is_killed_is_an_error_of_one_line(enc, write, tmp_path):
    path, out = write("word " * 4000), tmp_path / "out.bin"
    with pytest.raises(ChildProcessError, match=r"ended.*memory.*--n_procs") as error:
        corpus.encode_files(Ending(enc.tokens, enc.eot), [path], out, n_procs=2, chunk_size=1000)
    assert isinstance(error.value, OSError)  # which cli.run prints as one line
    assert os.listdir(tmp_path) == ["text.txt"]


ENDLESS = """
import time
import encoder
from gpt2_support import corpus

class Endless(encoder.Encoder):
    def encode(self, text, allow_special=False):
        print("encoding", flush=True)
        time.sleep(600)

if __name__ == "__main__":
    enc = Endless([bytes([byte]) for byte in range(256)], eot=0)
    corpus.encode_files(enc, ["text.txt"], "out.bin", n_procs=2, chunk_size=1000)
"""


@pytest.mark.thorough
def test_workers_end_with_the_process_that_started_them(write, tmp_path, uncounted):
    write("word " * 4000)
    (tmp_path / "endless.py").write_text(ENDLESS, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "endless.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() + process.stdout.readline() == b"encoding\n" * 2
    process.kill()
    process.communicate(timeout=20)  # returns when no process has standard output open


INTERRUPTED = """
import os
import signal
import encoder
from gpt2_support import corpus

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    enc = encoder.Encoder([bytes([byte]) for byte in range(256)], eot=0)
    corpus.encode_files(enc, ["text.txt"], "out.bin", n_procs=2, chunk_size=1000)
    os.kill(os.getpid(), signal.SIGINT)  # here it is not blocked
else:  # a worker, which has only begun
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked")
def test_interrupt_is_left_to_the_parent_by_workers_that_have_only_begun(
    write, tmp_path, uncounted
):
    write("word " * 4000)
    (tmp_path / "program.py").write_text(INTERRUPTED, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert len(llmc.load_tokens(tmp_path / "out.bin")[0]) == 1 + 5 * 4000
    assert done.returncode == -signal.SIGINT and done.stderr.count(b"Traceback") == 1


def test_encode_files_takes_no_byte_order_mark_for_text(enc, write):
    """Not even for a separator's line; in the midst of a text it is an ordinary character."""
    path = write(f"\ufeff{EOT}\none\ufeff\n{EOT}\n\ufefftwo")
    assert encoded(enc, path) == with_eot(enc, ["one\ufeff\n", "\ufefftwo"])
    path = write("\ufeff" + (DOCUMENTS + TEXT) * 20)
    assert encoded(enc, path, n_procs=2, chunk_size=200) == encoded(enc, path)


def test_encode_files_replaces_invalid_utf8(enc, write):
    assert encoded(enc, write(b"a\xffb \xe2\x82 c\r\n")) == with_eot(enc, ["a\ufffdb \ufffd c\r\n"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_encode_files_refuses_what_is_no_file(enc, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, actual in ((tmp_path, "a folder"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(ValueError, match=f"{path}: is {actual}, expected a text file"):
            corpus.encode_files(enc, [path], tmp_path / "out.bin")


def test_encode_files_refuses_files_without_text(enc, write, tmp_path):
    (tmp_path / "out.bin").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"no text in .*text\.txt"):
        corpus.encode_files(enc, [write(f"{EOT}\n{EOT}\n")], tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == b"old"


def test_encode_files_refuses_tables_it_cannot_use(enc, write, tmp_path):
    path, out = write("text"), tmp_path / "out.bin"
    with pytest.raises(ValueError, match="no end-of-text token"):
        corpus.encode_files(encoder.Encoder(enc.tokens[:-1]), [path], out)
    longer = [bytes([i >> 8, i & 255, 0]) for i in range(65537 - 400)]
    with pytest.raises(ValueError, match=r"65537.*65536"):
        corpus.encode_files(encoder.Encoder([*enc.tokens, *longer], enc.eot), [path], out)
    assert not out.exists()


def test_reading_reports_every_byte(write):
    reported = []
    path = write("wörter " * 500)
    assert "".join(corpus.read_chunks(path, 100, reported.append)) == "wörter " * 500
    assert sum(reported) == corpus.total_bytes([path]) == 4000 and len(reported) > 1


def test_read_texts_trains_as_the_text_does(enc, write):
    paths = [write(TEXT), write(DOCUMENTS, "documents.txt")]
    learned = encoder.train(corpus.read_texts(paths), 300)
    assert learned.tokens == encoder.train([TEXT, DOCUMENTS], 300).tokens
