"""Files that survive a crash, locks between processes, hashes, and JSON.

`atomic_write` writes a file whole or not at all. `hold_lock` keeps a second process out. A file
whose contents are wrong is a `DamagedFile`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from gpt2_support.messages import info, preview

if TYPE_CHECKING:
    from collections.abc import Iterator


# Writing


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing bytes; when the block ends well, rename it to `path`.

    Other processes see the old file or the whole new file, even if this process is killed: the
    bytes are on the disk before the rename. An error leaves the old file as it was. Of several that
    write one path at once, each writes a file of its own, and the last rename stays. The temporary
    file of a process that was killed is removed when the same path is written again. A symbolic
    link is replaced, not what it leads to. A file that is replaced keeps its permissions.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    file = open_temporary(path)
    try:
        with with_path(path), file:
            yield file
            sync(file)
            if sys.platform == "win32":  # which renames no open file
                file.close()
            with contextlib.suppress(OSError):  # nothing to replace, or no permissions there
                shutil.copymode(path, file.name)
            os.replace(file.name, path)  # still locked, so that nobody takes it for a leftover
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise


def open_temporary(path: Path) -> BinaryIO:
    """Create a file beside `path`, of a name that nobody else uses, and lock it."""
    while True:
        temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        if try_lock(file) and is_at(file, temporary):
            if path.exists():  # it may be for its owner's eyes only
                with contextlib.suppress(OSError):
                    temporary.chmod(0o600)
            return file
        file.close()  # before it was locked, another process took it for a leftover


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
    digits = 16 * "[0-9a-f]"  # as in `open_temporary`: no name that a user would choose
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.{digits}.tmp"):
        with contextlib.suppress(OSError), open(temporary, "r+b") as file:
            if try_lock(file, without_locks=False):
                if sys.platform == "win32":  # which removes no open file
                    file.close()
                temporary.unlink()


def is_at(file: IO[Any], path: Path) -> bool:
    """Tell whether an open file is the one that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:  # nothing is there any more
        return False


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

            file.seek(1 << 30)  # beyond the bytes, for nobody else may read one that is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network file systems
        return without_locks
    return True


@contextlib.contextmanager
def hold_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file during the block; if another process holds it, wait for that.

    Without `wait`, raises BlockingIOError that says which process. The operating system frees the
    lock of a process that dies. The file is removed at the end, and a process that waited for it
    locks a new file. On a file system without locks two processes may run at once.
    """
    file = open_locked(path, wait)
    try:
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(this_process().encode())
        yield
    finally:
        is_ours = is_at(file, path)  # it is not if somebody has removed the folder
        if sys.platform == "win32":  # which removes no open file
            file.close()
        if is_ours:
            with contextlib.suppress(OSError):
                path.unlink()
        file.close()


def open_locked(path: Path, wait: bool) -> IO[bytes]:
    """Open a file, made if it is absent, and lock it; see `hold_lock`."""
    while True:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (the caller closes it)
        if not try_lock(file):
            if not wait:
                file.close()
                raise BlockingIOError(errno.EAGAIN, lock_holder(path), str(path))
            info(f"{path}: waiting for another download to end")
            while not try_lock(file):
                time.sleep(0.2)
        if is_at(file, path):
            return file
        file.close()  # the process that held the lock has removed the file


def lock_holder(path: Path) -> str:
    """Return which process holds a lock, as it has written into the file."""
    with contextlib.suppress(OSError):
        return preview(path.read_text("utf-8", "replace")) or "a process that has just begun"
    return "a process that has just ended"


def this_process() -> str:
    """Return what to call this process in the messages of others."""
    import platform

    return f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M')}"


# Reading


class DamagedFile(ValueError):
    """A file that contradicts its own format, length or checksum; `path` says which file."""

    def __init__(self, path: str | Path, problem: object) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading bytes; raise OSError if it is a folder, a pipe or a device.

    A reader opens its file once. What replaces the file meanwhile is then not read.
    """
    check_regular(path)
    return open(path, "rb")


def check_regular(path: str | Path) -> None:
    """Raise OSError unless `path` is a regular file: to open a pipe would wait for its writer."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        actual = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(f"{path}: {actual}, expected a file")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object (a dict) that a JSON file holds; raise ValueError for anything else."""
    with open_file(path) as file:
        return parse_json(path, file.read())


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


def file_hash(path: Path, algorithm: str, start: int = 0) -> hashlib._Hash:
    """Return the hash object of a file's bytes from `start`; `algorithm` is "md5" or "sha256"."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open_file(path) as file:
        file.seek(start)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest
