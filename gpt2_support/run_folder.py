"""The folder of a training run: one run at a time, whose first checkpoint replaces an older run.

with hold(folder, group):                              # no other run writes there
    with RunFolder(folder, enc.save, is_new=True) as run:
        save_checkpoint(run.current, state)
        run.settle()                                   # replaces an older run, if there is one
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_support import folders
from gpt2_support.files import hold_lock, make_folders, size_of
from gpt2_support.formats.token_table import load_tokenizer
from gpt2_support.interrupts import never_fatal
from gpt2_support.messages import info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy import ndarray

    from gpt2_support.distributed import ProcessGroup

MODELS = (  # what a new run neither replaces nor hides unless asked
    *("model.bin", "state.npz", "best/model.bin"),
    *("model.safetensors", "model.safetensors.index.json", "hparams.json"),
)
MAY_BE_ABSENT = ("best/model.bin", "best/val_loss.json", "loss.png")  # at the first checkpoint
LOCK = ".lock"
UNFINISHED = ".new"  # the files of a run that is to replace another, before its first checkpoint
READY = ".ready"  # the same with a whole checkpoint: they only have to be moved


@contextlib.contextmanager
def hold(folder: Path, group: ProcessGroup) -> Iterator[None]:
    """Keep other runs out of a folder during the block; all ranks call this, and rank 0 does it.

    A folder that is made for this and stays empty is removed after an error. Raises ValueError that
    says which process trains there.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if group.rank == 0:
            try:
                stack.enter_context(lock(folder))
            except (OSError, ValueError) as error:
                problem = error
        problem = group.all_gather(problem)[0]
        if problem:
            raise problem
        yield


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Do what `hold` does, for one process; tidy up after a run there that was killed."""
    missing = [path for path in (*reversed(folder.parents), folder) if not path.exists()]
    with make_folders(*missing), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(folder / LOCK, wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another run is writing there, {error.strerror}: wait until it ends, or "
                "give another folder"
            ) from None
        if (folder / UNFINISHED).exists():
            info(f"{folder}: removing the files of a run that ended before its first checkpoint")
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        move_ready_files(folder)
        yield


def has_model(folder: Path) -> bool:
    """Return whether a folder has a model, of a run or not; a log alone does not count."""
    return any((folder / name).exists() for name in MODELS)


def check_unused(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if a folder has a model already, which may not be replaced."""
    is_bundled = os.path.realpath(folder) == os.path.realpath(folders.bundled_model())
    if is_bundled and has_model(folder):
        raise ValueError(f"{folder}: the bundled model is there: give another --out")
    if not overwrite and has_model(folder):
        resume = "--resume goes on with it, " if (folder / "state.npz").exists() else ""
        raise ValueError(
            f"{folder}: there is a model already: {resume}--overwrite replaces it, and another "
            "--out leaves it alone"
        )


def check_tokenizer(folder: Path, tokenizer: tuple[list[bytes], int | None]) -> None:
    """Raise ValueError if a folder has another tokenizer than a new run's, (tokens, eot)."""
    path = folder / "tokenizer.bin"
    if path.exists() and load_tokenizer(path) != tokenizer:
        raise ValueError(
            f"{path}: another tokenizer than this run's: --tokenizer {path} uses it, --overwrite "
            "replaces it, and another --out leaves it alone"
        )


class RunFolder:
    """Where a run writes now: `current`, and from its first checkpoint on `path`.

    A new run that is to replace another writes into a folder of its own, inside `path`, until its
    first checkpoint is whole: if it comes to none, the old run is as it was. `save_tokenizer`
    writes the run's tokenizer to a path; it is None on the ranks that write nothing.
    """

    def __init__(
        self, path: Path, save_tokenizer: Callable[[Path], object] | None, is_new: bool
    ) -> None:
        self.path = self.current = path
        self.save_tokenizer, self.is_new = save_tokenizer, is_new
        if is_new and save_tokenizer:
            is_used = has_model(path) or any(file.exists() for file in self.tokenizers())
            self.current = path / UNFINISHED if is_used else path
            self.add_tokenizers(replace=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self.current != self.path:
            shutil.rmtree(self.current, ignore_errors=True)
        elif self.is_new and self.save_tokenizer and not has_model(self.path):  # no checkpoint
            for file in self.tokenizers():
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the best model of some step
                (self.path / "best").rmdir()

    def tokenizers(self) -> list[Path]:
        """Return the paths of the tokenizers beside the last model and the best."""
        return [folder / "tokenizer.bin" for folder in (self.current, self.current / "best")]

    def add_tokenizers(self, replace: bool = False) -> None:
        """Write the tokenizer beside both models; unless `replace`, only where it is missing."""
        for file in self.tokenizers():
            if self.save_tokenizer and (replace or not file.exists()):
                self.save_tokenizer(file)

    def settle(self) -> Path:
        """Let a checkpoint replace the run that was there, if it is the first; return `path`."""
        self.add_tokenizers()  # they are missing if somebody has removed the folder
        if self.current != self.path:
            for name in MAY_BE_ABSENT:
                if not (self.current / name).exists():
                    (self.current / name).touch()  # an empty file removes the one of the old run
            os.replace(self.current, self.path / READY)
            self.current = self.path
            move_ready_files(self.path)
        return self.path


def move_ready_files(folder: Path) -> None:
    """Move the files of a first checkpoint into their places; a kill before the end is no loss.

    Every command that may write to the folder calls this first.
    """
    ready = folder / READY
    for path in sorted(ready.rglob("*")):
        target = folder / path.relative_to(ready)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif size_of(path) == 0:
            target.unlink(missing_ok=True)
            path.unlink()
        else:
            os.replace(path, target)
    shutil.rmtree(ready, ignore_errors=True)


class Diverged(ValueError):
    """The loss or the gradient is not finite: a checkpoint of this state would be of no use."""


def check_finite(values: ndarray | float, step: int) -> None:
    """Raise Diverged if the update of a step has made values infinite or NaN."""
    if not np.isfinite(values).all():
        raise Diverged(
            f"training has diverged: after step {step} the parameters or the validation loss are "
            "not finite. Checkpoints are as they were; try a lower --lr"
        )


@contextlib.contextmanager
def saved_on_error(save: Callable[[], object], state: Any) -> Iterator[None]:
    """After an error in the block, other than divergence, try to save before it goes on its way.

    Not before the first step of a train.TrainState, in the midst of an update, or where ranks share
    the moments: the others, which may have met no error, would have to take part.
    """
    try:
        yield
    except Diverged:
        raise
    except Exception:
        if state.step > 0 and state.is_consistent and not state.optimizer.is_sharded:
            with never_fatal("save after an error"):
                save()
        raise
