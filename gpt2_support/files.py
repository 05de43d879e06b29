"""Files that survive a crash, locks between processes, hashes, and JSON.

`atomic_write` writes a file whole or not at all. `hold_lock` keeps a second process out. A file
whose contents are wrong is a `DamagedFile`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from gpt2_support.messages import info

if TYPE_CHECKING:
    from collections.abc import Iterator


# Writing


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing bytes; when the block ends well, rename it to `path`.

    Other processes see the old file or the whole new file, even if this process is killed: the
    bytes are on the disk before the rename. An error leaves the old file as it was. The temporary
    file of a process that was killed is removed when the same path is written again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with with_path(path):
            with open(temporary, "wb") as file:
                try_lock(file)  # tells remove_leftovers that this process is alive
                yield file
                sync(file)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def with_path(path: str | Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def sync(file: IO[Any]) -> None:
    """Return when everything written to the file so far is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that no living process holds the lock of."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            with open(temporary, "r+b") as file:
                is_free = try_lock(file, without_locks=False)
            if is_free:
                temporary.unlink()


@contextlib.contextmanager
def make_folders(*folders: Path) -> Iterator[None]:
    """Make folders, each inside the one before; after an error remove those that are empty."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in reversed(folders):
                folder.rmdir()
        raise


# Locks


def try_lock(file: IO[Any], without_locks: bool = True) -> bool:
    """Try to lock an open file; return whether this process now holds the lock.

    Returns `without_locks` on a file system that has no locks.
    """
    try:
        if sys.platform == "win32":
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


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file during the block; wait first if another process holds it.

    The operating system frees the lock of a process that dies. The file is removed at the end, and
    a process that waited for it locks a new file. On a file system without locks two processes may
    run at once; the checksums of what they write then fail.
    """
    file = open_locked(path)
    try:
        yield
    finally:
        if sys.platform == "win32":  # Windows does not remove an open file
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def open_locked(path: Path) -> BinaryIO:
    """Open a file, made if it is absent, and lock it; wait while another process holds it."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
        if not try_lock(file):
            info(f"{path}: waiting for another download of this model to end")
            while not try_lock(file):
                time.sleep(0.2)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # the process that held the lock has removed the file


# Reading


class DamagedFile(ValueError):
    """A file that contradicts its own format, length or checksum; `path` says which file."""

    def __init__(self, path: str | Path, problem: object) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object (a dict) that a JSON file holds; raise ValueError for anything else."""
    return parse_json(path, Path(path).read_bytes())


def parse_json(path: str | Path, text: bytes) -> dict[str, Any]:
    """Return the object (a dict) in `text`, which is part of the file `path`; see `read_json`."""
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8: {error}") from None
    if type(data) is not dict:
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def file_hash(path: Path, algorithm: str) -> hashlib._Hash:
    """Return the hash object of a file's contents; `algorithm` is "md5" or "sha256"."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest
