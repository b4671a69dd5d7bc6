"""What a run measured, line by line, in files that a killed run leaves whole.

``steps.csv`` has a line a step, ``evaluations.csv`` one an evaluation. Each line is handed to the
system in one piece and at once, so that ending the process loses nothing; a line that a failing
machine cut short is dropped when the file is read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from zo2ext.engine import ZOEngine
from zo2ext.files import write_atomically
from zo2ext.meter import Meter, process_nbytes

STEPS_FILE, EVALUATIONS_FILE = "steps.csv", "evaluations.csv"
STEP_COLUMNS = (
    *("step", "loss", "loss_plus", "loss_minus", "projected_grad"),  # means over directions
    *("lr", "seconds", "tokens_per_s"),
    *("uploaded_bytes", "offloaded_bytes"),  # since the last step or evaluation
    *("device_memory_bytes", "host_memory_bytes"),  # allocated at peak; resident now
    "skipped",  # 1 where the step changed no weight, as its losses were not finite
)
EVALUATION_COLUMNS = ("step", "name", "value")  # steps done; what was measured


class RunLog:
    """Writes a run's log.

    Nothing is written before the first step: a run that does not get there leaves no files.

    Args:
        folder: Of the run; made with the first step.
        engine, meter: What to log of.
        start: Steps done when the run continues an earlier one. Lines of steps from there on, and
            of evaluations later than there, are dropped; 0 starts the log anew.

    Raises:
        ValueError: The files of the earlier run are no such logs.
    """

    def __init__(self, folder: Path, engine: ZOEngine, meter: Meter, *, start: int = 0) -> None:
        self._folder, self._engine, self._meter = folder, engine, meter
        self._begun = start > 0
        self._early: list[list[object]] = []  # evaluations before the first step
        self._traffic = (engine.traffic.uploaded, engine.traffic.offloaded)
        if self._begun:
            _cut(folder / STEPS_FILE, STEP_COLUMNS, start)
            _cut(folder / EVALUATIONS_FILE, EVALUATION_COLUMNS, start + 1)

    def step(self) -> None:
        """Log the step that was just done, which `meter` has measured."""
        last, meter, traffic = self._engine.last, self._meter, self._engine.traffic
        assert last is not None, "no step was done"
        assert meter.seconds > 0, "the step was not measured"
        self._begin()
        before, self._traffic = self._traffic, (traffic.uploaded, traffic.offloaded)
        row: list[object] = [
            last.step,
            last.loss,
            fmean(last.losses_plus),
            fmean(last.losses_minus),
            fmean(last.projected_grads),
            last.lr,
            round(meter.seconds, 6),
            round(meter.tokens / meter.seconds, 2),
            self._traffic[0] - before[0],
            self._traffic[1] - before[1],
            meter.device_memory,
            process_nbytes(),
            int(last.skipped),
        ]
        _append(self._folder / STEPS_FILE, row)

    def evaluation(self, steps: int, name: str, value: float) -> None:
        """Log an evaluation with the weights after `steps` steps. `name`: on one line."""
        if not name.isprintable():
            raise ValueError(f"name must be printable and on one line, got {name!r}")
        traffic = self._engine.traffic
        self._traffic = (traffic.uploaded, traffic.offloaded)  # what it moved is not the step's
        if self._begun:
            _append(self._folder / EVALUATIONS_FILE, [steps, name, value])
        else:
            self._early.append([steps, name, value])

    def _begin(self) -> None:
        if not self._begun:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / STEPS_FILE, _line(STEP_COLUMNS))
            lines = [_line(row) for row in (EVALUATION_COLUMNS, *self._early)]
            write_atomically(self._folder / EVALUATIONS_FILE, b"".join(lines))
            self._begun = True


@dataclass(frozen=True)
class Table:
    """Lines of a log, as text.

    Attributes:
        columns: Their names.
        rows: One string a column; the first is an integer.
        torn: Whether a last line was dropped because it was not whole.
    """

    columns: tuple[str, ...]
    rows: list[list[str]]
    torn: bool

    def numbers(self, column: str) -> list[float]:
        """A column of numbers; NaN where the log says so."""
        place = self.columns.index(column)
        return [float(row[place]) for row in self.rows]


def read_steps(folder: Path) -> Table:
    """The steps that a run in `folder` has logged. See `STEP_COLUMNS`.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is no such log.
    """
    return _read(folder / STEPS_FILE, STEP_COLUMNS)


def read_evaluations(folder: Path) -> Table:
    """The evaluations that a run in `folder` has logged. Raises as `read_steps` does."""
    return _read(folder / EVALUATIONS_FILE, EVALUATION_COLUMNS)


def _read(path: Path, columns: tuple[str, ...]) -> Table:
    content = path.read_bytes()
    whole, _, tail = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    rows, torn = [], bool(tail)
    for number, line in enumerate(lines, start=1):
        row = _parse(line, columns)
        if number == 1:
            if row != list(columns):
                raise ValueError(
                    f"{path} is no such log: its first line must be {','.join(columns)}, "
                    f"got {line[:200].decode(errors='replace')}"
                )
        elif row is not None and _is_data(row, columns):
            rows.append(row)
        elif number == len(lines):  # blocks of a file that never reached the disk read as zeros
            torn = True
        else:
            raise ValueError(f"{path}, line {number} is broken: {line[:200]!r}")
    return Table(columns, rows, torn)


def _parse(line: bytes, columns: tuple[str, ...]) -> list[str] | None:
    try:
        (row,) = csv.reader([line.decode()])
    except (ValueError, csv.Error):
        return None
    return row if len(row) == len(columns) else None


def _is_data(row: list[str], columns: tuple[str, ...]) -> bool:
    try:
        int(row[0])
        [float(cell) for cell, name in zip(row, columns, strict=True) if name != "name"]
    except ValueError:
        return False
    return True


def _cut(path: Path, columns: tuple[str, ...], end: int) -> None:
    """Drop the lines of `path` from step `end` on, and a torn one."""
    rows = [row for row in _read(path, columns).rows if int(row[0]) < end] if path.exists() else []
    write_atomically(path, b"".join(_line(row) for row in (columns, *rows)))


def _append(path: Path, row: list[object]) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(_line(row))


def _line(row: Iterable[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue().encode()
