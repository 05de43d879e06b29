"""Tests of gpt2_support/files.py: atomic writes and locks; more of both in test_faults.py."""

import os

import pytest
from model_files import contents

from gpt2_support import files


def test_atomic_write_replaces_only_at_a_good_end(tmp_path):
    path = tmp_path / "folder" / "file"
    with files.atomic_write(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert contents(tmp_path / "folder") == {"file": b"old"}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_atomic_write_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    link, target = tmp_path / "link", tmp_path / "file"
    link.symlink_to("file")
    target.write_bytes(b"old")
    with files.atomic_write(link) as file:
        file.write(b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new" and target.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="files have no such permissions there")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_atomic_write_keeps_the_permissions_of_a_file(tmp_path, mode):
    path, new = tmp_path / "file", tmp_path / "new"
    path.write_bytes(b"old")
    path.chmod(mode)
    with files.atomic_write(path) as file:
        file.write(b"new")
        assert os.stat(file.name).st_mode & 0o777 == 0o600  # nobody else may read it meanwhile
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == mode
    before = os.umask(0o027)
    try:
        with files.atomic_write(new):
            pass
    finally:
        os.umask(before)
    assert new.stat().st_mode & 0o777 == 0o640


def test_atomic_write_names_the_file_when_the_disk_is_full(tmp_path):
    full = pytest.raises(OSError, match=r"No space.*model\.bin")
    with full, files.atomic_write(tmp_path / "model.bin"):
        raise OSError(28, "No space left on device")
    assert contents(tmp_path) == {}


def test_atomic_writes_of_one_file_at_once_are_each_whole(tmp_path):
    """As of two threads, or of two containers whose processes have the same id."""
    path = tmp_path / "file"
    with files.atomic_write(path) as first:
        first.write(b"first, ")
        with files.atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"to its end")
    assert contents(tmp_path) == {"file": b"first, to its end"}


@pytest.mark.parametrize("moment", ["before the lock", "during the lock", "before the rename"])
def test_atomic_write_survives_another_that_looks_for_leftovers(tmp_path, monkeypatch, moment):
    path, name = tmp_path / "file", "replace" if moment == "before the rename" else "try_lock"
    module = files.os if name == "replace" else files
    function, looks = getattr(module, name), []

    def look_first(*args, **kwargs):
        monkeypatch.setattr(module, name, function)
        (temporary,) = tmp_path.glob("*.tmp")
        if moment == "during the lock":
            looks.append(open(temporary, "r+b"))  # noqa: SIM115 (closed at the end)
            assert files.try_lock(looks[0])
            temporary.unlink()
        else:
            files.remove_leftovers(path)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, look_first)
    with files.atomic_write(path) as file:
        file.write(b"whole")
    assert contents(tmp_path) == {"file": b"whole"}
    for other in looks:
        other.close()


def test_hold_lock_without_waiting_says_who_holds_it(tmp_path):
    path = tmp_path / "lock"
    refused = pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .*, since 20")
    with files.hold_lock(path), refused, files.hold_lock(path, wait=False):
        pass
    with files.hold_lock(path, wait=False):
        pass
    assert contents(tmp_path) == {}


def test_hold_lock_removes_no_lock_of_another(tmp_path):
    """The folder was removed, and another process has made a lock in its place."""
    path = tmp_path / "lock"
    with files.hold_lock(path):
        path.unlink()
        path.write_bytes(b"of another")
    assert contents(tmp_path) == {"lock": b"of another"}
