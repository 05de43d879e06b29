"""The log of a training run: log.csv, a progress line, and loss.png."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_support.files import atomic_write, with_path
from gpt2_support.interrupts import never_fatal
from gpt2_support.messages import info, preview, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, TextIO

Row = dict[str, str]  # {column: text}, each text a number or empty

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "val_loss", "bits_per_byte")
HEADER = ",".join(COLUMNS)


class LogFile:
    """log.csv, one row a step. A resumed run drops the rows of the steps that it takes again.

    A row that cannot be written ends no run: then the file is written anew by the next `save`.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows = [row for row in read_or_set_aside(path) if int(row["step"]) <= step]
        self.save()

    def save(self) -> None:
        """Write all rows, atomically."""
        lines = [HEADER, *(",".join(row.values()) for row in self.rows)]
        with atomic_write(self.path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        self.is_intact = True

    def add(self, *values: float | None) -> None:
        """Append a row at once; None is an empty cell."""
        cells = ["" if x is None else str(x) if type(x) is int else f"{x:.6g}" for x in values]
        self.rows.append(dict(zip(COLUMNS, cells, strict=True)))
        if self.is_intact:
            self.is_intact = False
            with never_fatal("write a row of the log, which waits for the next checkpoint"):
                with with_path(self.path), open(self.path, "r+", encoding="utf-8") as file:
                    file.seek(0, os.SEEK_END)  # "r+" makes no new file, which would lack the rest
                    file.write(",".join(cells) + "\n")
                self.is_intact = True


class RunLog:
    """What a run reports: a progress line, log.csv, and loss.png when the block ends.

    With folder None it writes no files: for the ranks that do not report.
    """

    def __init__(self, folder: Path | None, step: int, n_steps: int) -> None:
        from tqdm import tqdm

        self.file = LogFile(folder / "log.csv", step) if folder else None
        self.bar = tqdm(total=n_steps, initial=step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()
        if self.file and self.file.rows:
            with never_fatal("draw loss.png"):
                plot_log(self.file.rows, self.file.path.with_name("loss.png"))
        elif self.file:  # a run that has come to no step leaves nothing
            with never_fatal("remove log.csv"):
                self.file.path.unlink(missing_ok=True)

    def settle(self, folder: Path) -> None:
        """Go on in a folder, where a checkpoint is now, with all rows."""
        if self.file:
            self.file.path = folder / "log.csv"
            if not self.file.is_intact:
                with never_fatal("write the log"):
                    self.file.save()

    def add(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens_per_second: float,
        val_loss: float | None = None,
        bits_per_byte: float | None = None,
    ) -> None:
        """Report a step."""
        figures = f"loss {loss:.3f} lr {lr:.1e} norm {grad_norm:.2f} {tokens_per_second:.0f} tok/s"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update()
        if self.file:
            self.file.add(step, loss, lr, grad_norm, tokens_per_second, val_loss, bits_per_byte)

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Print text, on standard error by default, above the progress line."""
        file = file or sys.stderr
        self.bar.write(printable(text, file), file=file)


def iterate_log(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a log.csv; none if there is no such file.

    Leaves out a last row that was cut short. Raises ValueError for any other line that is no row.
    """
    if not Path(path).exists():
        return
    text = Path(path).read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
    header, *lines = text.split("\n")[:-1] or [HEADER]
    if header != HEADER:
        raise ValueError(f"{path}: begins with {preview(header)}, not as a log of train.py")
    for line in lines:
        yield parse_row(path, line)


def read_or_set_aside(path: Path) -> list[Row]:
    """Return the rows of a log.csv; give a damaged one another name, and keep its first rows."""
    rows = []
    try:
        for row in iterate_log(path):
            rows.append(row)
    except (OSError, ValueError) as error:
        names = (path.with_name(f"log.damaged{i or ''}.csv") for i in itertools.count())
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        info(f"{error}: it is now {aside.name}; the new log keeps its first {len(rows)} rows")
    return rows


def parse_row(path: str | Path, line: str) -> Row:
    """Return a line of log.csv as {column: text}."""
    cells = line.split(",")
    try:
        int(cells[0])
        list(map(float, filter(None, cells)))
        return dict(zip(COLUMNS, cells, strict=True))
    except ValueError:
        raise ValueError(f"{path}: {preview(line)} is no row of a training log") from None


def plot_log(rows: list[Row], path: Path) -> None:
    """Draw training and validation loss over the steps to a PNG, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which takes longer to import
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training (a batch)"), ("val_loss", "validation")):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        style: dict[str, Any] = {"marker": "."}
        if name == "loss":
            style = {"linewidth": 0.8, "alpha": 0.6}
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=Path(path).parent.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
