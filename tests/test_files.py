"""Atomic writes."""

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


def test_atomic_write_names_the_file_when_the_disk_is_full(tmp_path):
    full = pytest.raises(OSError, match=r"No space.*model\.bin")
    with full, files.atomic_write(tmp_path / "model.bin"):
        raise OSError(28, "No space left on device")
    assert contents(tmp_path) == {}
