"""Text files of any size: reading them in chunks, and encoding them into a file of token ids."""

from __future__ import annotations

import codecs
import functools
import io
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpt2_support.formats import llmc
from gpt2_support.interrupts import signals_blocked
from gpt2_support.messages import BarStream, info
from gpt2_support.pretokens import LAST_CUT

CHUNK = 1 << 20  # characters read at a time

# What stands between two documents.
SEPARATORS = {
    "file": re.compile(r"(?!)"),  # nothing within a file
    "lines": re.compile(r"\r?\n"),
    "eot": re.compile(r"^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE),
}

Paths = Sequence[Path | str]
Texts = list[str | None]  # texts in order; None marks the start of a document
Ids = NDArray[np.uint16]
Report = Callable[[int], object]  # is called with the number of bytes read since the last call


@runtime_checkable
class Encoder(Protocol):
    """What this module needs of `encoder.Encoder`."""

    eot: int | None
    n_vocab: int

    def encode(self, text: str) -> list[int]: ...


# ----------------------------------------------------------------------------------------------
# Reading


def total_bytes(paths: Paths) -> int:
    """Return the size of all files together; raise ValueError for a folder, a pipe or a device."""
    for path in map(Path, paths):
        if path.exists() and not path.is_file():
            actual = "a folder" if path.is_dir() else "not a regular file"
            raise ValueError(f"{path}: is {actual}, expected a text file")
    return sum(os.path.getsize(path) for path in paths)


@functools.cache
def warn_unless_utf8(path: Path | str) -> None:
    """Report, once, that the beginning of a file is not text in UTF-8, with the share."""
    with open(path, "rb") as file:
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(file.read(CHUNK))
    share = (text.count("\ufffd") + text.count("\0")) / max(1, len(text))
    if share > 0.01:
        info(
            f"{path}: {share:.0%} of its characters are not valid UTF-8. If it is text in UTF-16 "
            "or Latin-1, convert it first"
        )


def ignore(n_bytes: int) -> None:
    """Report nothing."""


def text_start(path: Path | str) -> int:
    """Return where the text of a file begins, in bytes: after a byte order mark, if it has one."""
    with open(path, "rb") as file:
        return 3 if file.read(3) == codecs.BOM_UTF8 else 0


def read_chunks(
    path: Path | str, chunk_size: int = CHUNK, report: Report = ignore
) -> Iterator[str]:
    """Yield the text of a file in chunks that split into the same pre-tokens as the whole text.

    Invalid UTF-8 becomes U+FFFD, and line ends stay as they are. A byte order mark is no text.
    Memory is that of `chunk_size` characters, or of the longest stretch without a space.
    """
    text, n_reported = "", 0
    with open(path, "rb") as file:
        file.seek(text_start(path))
        reader = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
        while new := reader.read(max(chunk_size, len(text))):
            n_searched, text = len(text), text + new
            if cut := LAST_CUT.search(text, n_searched):
                yield text[: cut.start()]
                text = text[cut.start() :]
            report(file.tell() - n_reported)
            n_reported = file.tell()
    yield text


def read_texts(paths: Paths) -> Iterator[str]:
    """Yield the chunks of several files, and show a progress bar.

    Raises ValueError if there is no text.
    """
    from tqdm import tqdm

    is_empty = True
    with tqdm(
        total=total_bytes(paths), desc="read", unit="B", unit_scale=True, file=BarStream()
    ) as bar:
        for path in paths:
            warn_unless_utf8(path)
            for chunk in read_chunks(path, CHUNK, bar.update):
                is_empty = is_empty and not chunk
                yield chunk
    if is_empty:
        raise ValueError(f"no text in {', '.join(map(str, paths))}: nothing to learn from")


def read_documents(
    paths: Paths,
    docs: str,
    chunk_size: int = CHUNK,
    report: Report = ignore,
) -> Iterator[Texts]:
    """Yield lists of texts in which None marks the start of each document, a list for each chunk.

    `docs` is "file" if each file is a document, "lines" if each line is one (without its line end),
    "eot" if lines of only <|endoftext|> separate documents. Skips empty documents. A long document
    continues in the next list.
    """
    for path in paths:
        in_document = False
        for chunk in read_chunks(path, chunk_size, report):
            batch: Texts = []
            for i, text in enumerate(SEPARATORS[docs].split(chunk)):
                in_document = in_document and i == 0
                if text and not in_document:
                    batch.append(None)
                    in_document = True
                if text:
                    batch.append(text)
            yield batch


# ----------------------------------------------------------------------------------------------
# Encoding


def encode_batch(enc: Encoder, batch: Texts) -> Ids:
    """Return the ids of a list from `read_documents`, with `enc.eot` for None."""
    ids = chain.from_iterable([enc.eot] if text is None else enc.encode(text) for text in batch)
    return np.fromiter(ids, np.uint16)


worker_encoder: Encoder  # of a process that `start_worker` has prepared


def start_worker(enc: Encoder) -> None:
    """Prepare a process for `encode_in_worker`; Ctrl-C, blocked so far, is left to its parent."""
    global worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    worker_encoder = enc


def end_with_parent() -> None:
    """End this process as soon as its parent has ended: a parent that is killed cannot say so."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def encode_in_worker(batch: Texts) -> Ids:
    """Return the ids of a list from `read_documents`, in a prepared process."""
    return encode_batch(worker_encoder, batch)


def encode_batches(enc: Encoder, batches: Iterable[Texts], n_procs: int) -> Iterator[Ids]:
    """Yield the ids of each batch, in order, from `n_procs` processes."""
    if n_procs == 1:
        yield from (encode_batch(enc, batch) for batch in batches)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(
        n_procs, mp_context=get_context("spawn"), initializer=start_worker, initargs=(enc,)
    )
    try:
        pending: deque = deque()  # a few batches only, so that memory is bounded
        for batch in batches:
            with signals_blocked("SIGINT"):
                pending.append(pool.submit(encode_in_worker, batch))
            if len(pending) > 2 * n_procs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of the {n_procs} processes that encode has ended, killed perhaps because memory "
            "ran out: try again, with fewer processes (encoder.py encode --n_procs)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_files(
    enc: Encoder,
    paths: Paths,
    out: Path | str,
    docs: str = "eot",
    n_procs: int = 1,
    chunk_size: int = CHUNK,
    before_rename: Callable[[], object] = lambda: None,
) -> tuple[int, int, int]:
    """Encode text files to a tokens .bin file; return the numbers of tokens, documents and bytes.

    The id of <|endoftext|> stands before each document, as in llm.c's data. `docs` is as in
    `read_documents`. Large files are shared among up to `n_procs` processes. `before_rename` is
    called just before `out` is replaced; an error there leaves it as it was. Raises ValueError if
    `enc` has no end-of-text token, if its ids do not fit the file, or if there is no text, and
    OSError if a file cannot be read.
    """
    from tqdm import tqdm

    if enc.eot is None:
        raise ValueError("this tokenizer has no end-of-text token, to put before each document")
    n_bytes, n_docs = total_bytes(paths), 0
    for path in paths:
        warn_unless_utf8(path)

    def count_documents(batches: Iterable[Texts]) -> Iterator[Texts]:
        nonlocal n_docs
        for batch in batches:
            n_docs += batch.count(None)
            yield batch
        if n_docs == 0:
            raise ValueError(f"no text in {', '.join(map(str, paths))}: nothing to encode")

    with tqdm(total=n_bytes, desc="encode", unit="B", unit_scale=True, file=BarStream()) as bar:
        batches = count_documents(read_documents(paths, docs, chunk_size, bar.update))
        n_procs = min(n_procs, 1 + n_bytes // (8 * chunk_size))
        ids = encode_batches(enc, batches, n_procs)
        n_tokens = llmc.save_tokens(out, ids, enc.n_vocab, before_rename)
    return n_tokens, n_docs, n_bytes


def tokenizer_path(tokens: Path) -> Path:
    """Return where the tokenizer of a tokens .bin is kept: `stories.tokenizer.bin`, beside it."""
    return tokens.with_name(f"{tokens.name.removesuffix('.bin')}.tokenizer.bin")
