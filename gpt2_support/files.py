"""Files that survive a crash: atomic writes, locks, hashes, JSON."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support.messages import info

if TYPE_CHECKING:
    from numpy import ndarray

    Buffer = bytes | bytearray | memoryview | ndarray


# Writing safely


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file for writing bytes; when the block ends well, rename it to `path`.

    A reader sees the old file or the whole new one, never a part, whenever the process dies: the
    bytes are on the disk before the rename. After an error the old file is untouched. What a
    process that died has left goes when the same file is written again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with with_path(path):
            with open(temporary, "wb") as file:
                try_lock(file)  # says that its writer lives
                yield file
                sync(file)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def with_path(path):
    """Add a path to an OSError that has none: "No space left on device" should say where."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def remove_leftovers(path):
    """Remove the temporary files of `path` whose writers have died: nobody holds their locks."""
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            with open(old, "r+b") as file:
                is_free = try_lock(file, without_locks=False)
            if is_free:
                old.unlink()


def sync(file):
    """Return when everything written to the file so far is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def try_lock(file, without_locks=True):
    """Return whether the lock of an open file is ours now; `without_locks` where there are none."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network file systems
        return without_locks
    return True


def read_json(path):
    """Return the object (a dict) that a JSON file holds; any other content is a ValueError."""
    return parse_json(path, Path(path).read_bytes())


def parse_json(path, text):
    """Return the object (a dict) that `text`, bytes in the file `path`, holds; see `read_json`."""
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8: {error}") from None
    if type(data) is not dict:
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


class DamagedFile(ValueError):
    """A file that contradicts its own format, length or checksum; `path` says which."""

    def __init__(self, path, what):
        super().__init__(f"{path}: {what}")
        self.path = Path(path)


@contextlib.contextmanager
def remove_if_empty(*folders):
    """Make folders, each in the one before; after an error remove those that are still empty."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in reversed(folders):
                folder.rmdir()
        raise


@contextlib.contextmanager
def only_process(path):
    """Hold the lock of a file, having waited for another process that holds it.

    The operating system frees the lock of a process that dies. The file is removed at the end:
    whoever still waits for it then locks a new one. Where files have no locks, two at once would
    fail their checksums, no worse.
    """
    file = open_locked(path)
    try:
        yield
    finally:
        if os.name == "nt":  # which removes no open file
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def open_locked(path):
    """Return the file of that path, made if need be, open and with its lock ours."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  (it stays open)
        if not try_lock(file):
            info(f"{path}: waiting for another download of this model to end")
            while not try_lock(file):
                time.sleep(0.2)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # whoever had the lock has removed the file


def size_of(path):
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def file_hash(path, kind):
    """Return the hash of a file's contents, `kind` being "md5" or "sha256"."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest
