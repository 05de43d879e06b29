"""Checkpoints: the state of a training run, as plain arrays and settings, in a folder.

save_state(folder, meta, {"params": [flat], "m": [m], "v": [v]})
with load_state(folder) as (meta, arrays): ...
"""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, get_type_hints

import numpy as np

from gpt2_support.files import atomic_write, read_json, sync
from gpt2_support.formats import llmc
from gpt2_support.messages import info, preview

if TYPE_CHECKING:
    from typing import Any, TypeVar

    from numpy import ndarray

    from gpt2_support.params import Params

    Dataclass = TypeVar("Dataclass")

STATE = "state.npz"
BEST_LOSS = "val_loss.json"
MAY_BE_ZERO = ("warmup", "seed")  # the other whole numbers among the settings are 1 or more


def save_state(
    folder: str | Path, meta: dict, arrays: Mapping[str, Iterable[ndarray]], n: int
) -> None:
    """Write state.npz: `meta` as JSON, and arrays (n,), each given as consecutive shards.

    The file holds float32, whatever the arrays are. Shards are written one by one, so that they
    never need to be in memory all at once.
    """
    with atomic_write(Path(folder, STATE)) as file:
        write_npz(file, json.dumps(meta), arrays, n)


def write_npz(file: IO[bytes], meta: str, arrays: Mapping[str, Iterable[ndarray]], n: int) -> None:
    """Write what np.savez(file, meta=meta, **arrays) would, from the shards of the arrays (n,)."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (n,)}
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("meta.npy", "w", force_zip64=True) as member:
            np.save(member, np.array(meta))
        for name, shards in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for shard in shards:
                    member.write(np.ascontiguousarray(shard, "<f4").data)


@contextlib.contextmanager
def load_state(folder: str | Path) -> Iterator[tuple[dict, dict[str, ndarray]]]:
    """Give the `meta` and the arrays of a folder's state.npz: "params", "m", "v", float32 (n,).

    Any error within the block means that the file is damaged: it becomes a ValueError that says so.
    """
    path = Path(folder) / STATE
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file: there is no run to resume in {folder}")
    try:
        check_sizes(path)
        with np.load(path) as state:
            meta = json.loads(str(state["meta"]))
            arrays = {name: state[name] for name in ("params", "m", "v")}
        check_arrays(arrays)
        check_progress(meta)
        yield meta, arrays
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # of damaged files, zipfile and NumPy raise a dozen types
        reason = preview(str(error) or type(error).__name__)
        raise ValueError(f"{path}: not a whole checkpoint of train.py: {reason}") from None


def check_sizes(path: Path) -> None:
    """Raise an error if the arrays of an .npz would take more memory than the file has bytes."""
    left = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = max(info.file_size, abs(math.prod(shape)) * dtype.itemsize)
            left -= size
            if left < 0:
                raise ValueError(f"{info.filename} claims {size} bytes, more than are there")


def check_arrays(arrays: dict[str, ndarray]) -> None:
    """Raise ValueError unless all arrays are float32 and as long as the parameters."""
    for array in arrays.values():
        if array.dtype != np.float32 or array.shape != (arrays["params"].size,):
            raise ValueError(f"an array of {array.dtype} and shape {array.shape}")


def check_progress(meta: dict) -> None:
    """Raise ValueError unless the step and the best loss of a run are valid numbers."""
    step, best_loss = meta["step"], meta["best_loss"]
    best_step = meta.get("best_step", 0)  # which runs of older versions do not have, nor `data`
    if type(step) is not int or step < 0:
        raise ValueError(f"step = {step!r}")
    if type(best_step) is not int or not 0 <= best_step <= step:
        raise ValueError(f"best_step = {best_step!r}")
    if not isinstance(best_loss, int | float) or math.isnan(best_loss):
        raise ValueError(f"best_loss = {best_loss!r}")
    if not isinstance(meta.get("data"), dict | None):
        raise ValueError(f"data = {meta['data']!r}")


def make_settings(cls: type[Dataclass], values: dict) -> Dataclass:
    """Return cls(**values), a dataclass; raise ValueError for a value of a wrong type or range."""
    settings = cls(**values)
    for name, annotation in get_type_hints(cls).items():
        value = getattr(settings, name)
        low = 1 if annotation is int and name not in MAY_BE_ZERO else 0
        good = isinstance(value, annotation | int if annotation is float else annotation)
        if isinstance(value, int | float):
            good = (
                good and low <= value < math.inf and (type(value) is bool) == (annotation is bool)
            )
        if not good:
            raise ValueError(f"{name} = {value!r}")
    return settings


def fingerprint(**tokens: ndarray) -> dict[str, str]:
    """Return {name: a readable fingerprint of tokens (N,)}."""
    return {name: f"{len(ids)} tokens, checksum {checksum(ids)}" for name, ids in tokens.items()}


def checksum(array: ndarray) -> str:
    """Return the CRC32 of the bytes of an array."""
    return f"{zlib.crc32(np.ascontiguousarray(array).data):08x}"


def measured(val_tokens: ndarray, config: Any) -> dict[str, str]:
    """Return a fingerprint of what a validation with a train.TrainConfig measures."""
    facts = fingerprint(eval_tokens=val_tokens[: config.eval_tokens])
    facts["eval_tokens"] += f", in windows of {config.seq_len}"
    return facts


def check_data(folder: Path, before: Any, now: dict[str, str]) -> None:
    """Raise ValueError if a run's data are not those of `before`, None in older checkpoints."""
    for name in ("data", "val_data") if before else ():
        if before.get(name) != now[name]:
            raise ValueError(
                f"{folder}: --{name} has {now[name]}, but the run has been trained with "
                f"{preview(before.get(name))}: give the same, or --other_data to go on with these"
            )


VALIDATION = "val_data", "eval_tokens"  # the data for validation, and what is measured of them


def same_validation(before: Any, now: dict[str, str] | None) -> bool:
    """Tell whether two losses can be compared, by the facts about what each was measured on.

    A fact that either lacks, as those of older runs do, counts as the same.
    """
    before, now = before or {}, now or {}
    names = (name for name in VALIDATION if before.get(name) and name in now)
    return all(before[name] == now[name] for name in names)


# The best model, with its loss beside it: the checkpoint that a run goes on from may be older


def save_best(
    folder: Path, params: Params, val_loss: float, data: dict[str, str] | None = None
) -> None:
    """Write best/ of a run's folder: model.bin, and its validation loss on a run's `data`.

    The renames follow each other at once. After a kill between the two, the checksum tells that the
    loss, which comes first, is not that of the model.
    """
    with atomic_write(folder / "best" / "model.bin") as file:
        llmc.write_model(file, params.config, params.named.__getitem__)
        sync(file)
        with atomic_write(folder / "best" / BEST_LOSS) as small:
            facts = {
                "val_loss": val_loss,
                "parameters": checksum(params.flat.astype("<f4", copy=False)),
            }
            facts |= {name: data[name] for name in VALIDATION if data and name in data}
            small.write(json.dumps(facts).encode() + b"\n")


def best_loss(folder: Path, data: dict[str, str] | None = None) -> float:
    """Return the validation loss of the best model of a run's folder.

    Infinity if none is known, if it is that of another model, or if it was measured on other tokens
    than those of a run's `data`.
    """
    path = folder / "best" / BEST_LOSS
    if path.exists() and path.with_name("model.bin").exists():
        try:
            facts = read_json(path)
            flat = llmc.load_params(path.with_name("model.bin")).flat
            is_of_it = facts.get("parameters") in (None, checksum(flat))
            counts = is_of_it and same_validation(facts, data)
            loss = float(facts["val_loss"])
            return loss if counts and math.isfinite(loss) else math.inf
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            info(f"{path}: ignored: {preview(str(error))}")
    return math.inf
