"""Tests of gpt2_support/checkpoint.py: state.npz. More damage is done to it in test_hostile.py."""

import io
import json
import zipfile

import numpy as np
import pytest
from helpers import TINY

import train
from gpt2_support import checkpoint

SETTINGS = [
    *("data", "val_data", "docs", "raw", "steps", "batch_size", "seq_len", "grad_accum", "order"),
    "lr",
    *("min_lr", "warmup", "decay_steps", "optimizer", "muon_lr", "momentum"),
    *("beta1", "beta2", "eps", "weight_decay", "dropout", "grad_clip"),
    *("seed", "ranks", "threads", "eval_every", "patience", "eval_tokens", "save_every"),
    *("sample_every", "prompt"),
]


def tiny_state(step=2):
    return train.TrainState(train.init_params(TINY), train.TrainConfig(warmup=0), step=step)


def test_write_npz_writes_what_numpy_would():
    values = np.random.default_rng(0).standard_normal(1000, np.float32)
    ours, numpys = io.BytesIO(), io.BytesIO()
    checkpoint.write_npz(ours, "meta", {"a": [values], "b": np.split(values, 4)}, 1000)
    np.savez(numpys, meta=np.array("meta"), a=values, b=values)
    assert ours.getvalue() == numpys.getvalue()


def test_checkpoint_of_float64_is_rounded_to_float32(tmp_path):
    params = train.init_params(TINY)
    params = type(params)(TINY, params.flat * np.float64(1 + 1e-12))
    train.save_checkpoint(tmp_path, train.TrainState(params))
    loaded = train.load_checkpoint(tmp_path).params.flat
    np.testing.assert_array_equal(loaded, params.flat.astype(np.float32))


def test_state_file_holds_what_every_version_reads(tmp_path):
    """The names in the file are a format: runs of older versions are resumed."""
    train.save_checkpoint(tmp_path, tiny_state())
    with zipfile.ZipFile(tmp_path / "state.npz") as archive:
        assert archive.namelist() == ["meta.npy", "params.npy", "m.npy", "v.npy"]
    meta = json.loads(str(np.load(tmp_path / "state.npz")["meta"]))
    assert list(meta) == ["step", "best_loss", "best_step", "data", "settings", "config"]
    assert list(meta["settings"]) == SETTINGS
    assert list(meta["config"]) == ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_load_state_refuses_damage(tmp_path, damage):
    train.save_checkpoint(tmp_path, tiny_state())
    path = tmp_path / "state.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    contents = {"cut": data[: len(data) // 2], "flip": data, "empty": b"", "text": b"hello there"}
    path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=r"state\.npz: not a whole checkpoint"):
        train.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("seed", -1),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("prompt", None),
        ("data", 5),
        ("no_such_setting", 1),
    ],
)
def test_make_settings_refuses_wrong_types_and_ranges(name, value):
    good = vars(train.TrainConfig())
    assert checkpoint.make_settings(train.TrainConfig, good) == train.TrainConfig()
    with pytest.raises((ValueError, TypeError), match=name):
        checkpoint.make_settings(train.TrainConfig, good | {name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 1.0},
        {"best_loss": "low"},
        {"best_loss": float("nan")},
        {"best_step": 1},
    ],
)
def test_check_progress_refuses_wrong_types_and_ranges(change):
    checkpoint.check_progress({"step": 0, "best_loss": float("inf")})
    with pytest.raises(ValueError, match=next(iter(change))):
        checkpoint.check_progress({"step": 0, "best_loss": 1.5} | change)


def test_load_state_without_memory_does_not_call_it_damaged(tmp_path):
    train.save_checkpoint(tmp_path, tiny_state())
    with pytest.raises(MemoryError, match="much"), checkpoint.load_state(tmp_path):
        raise MemoryError("too much")


def test_load_state_without_one_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        train.load_checkpoint(tmp_path)


def test_save_state_failing_keeps_the_old_one(tmp_path, monkeypatch):
    state = tiny_state()
    train.save_checkpoint(tmp_path, state)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(file, *arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_npz", full_disk)
    state.step = 3
    with pytest.raises(OSError, match="No space left"):
        train.save_checkpoint(tmp_path, state)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sharded_state_is_the_whole_one(tmp_path):
    """Every shard of the moments is loaded as saved, whoever asks for it."""
    state = tiny_state()
    state.optimizer.m[:] = np.arange(state.optimizer.m.size)
    train.save_checkpoint(tmp_path, state)
    group = train.ProcessGroup()
    group.size, shards = 3, []
    for group.rank in range(3):
        shards.append(train.load_checkpoint(tmp_path, group).optimizer)
    assert all(optimizer.is_sharded for optimizer in shards)
    assert (np.concatenate([optimizer.m for optimizer in shards]) == state.optimizer.m).all()
