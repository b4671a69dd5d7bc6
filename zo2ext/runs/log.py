"""Log of a run, in CSV files that stay valid when the run is killed.

``steps.csv`` has one line per step, ``evaluations.csv`` one per measured value. Each line is
written in one call, so killing the process loses nothing; an incomplete last line, as a power
failure leaves it, is dropped when the file is read.
"""

from __future__ import annotations

import csv
import errno
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from zo2ext._files import write_atomically
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.update_rule import StepRecord
from zo2ext.errors import UserError
from zo2ext.runs.meter import Meter, process_nbytes

STEPS_FILE, EVALUATIONS_FILE = "steps.csv", "evaluations.csv"
ARGUMENTS_FILE = "arguments.json"  # the settings of the run
STEP_COLUMNS = (
    # Means over directions; of several, the root mean square of projected_grad. NaN: no such loss.
    *("step", "loss", "loss_plus", "loss_minus", "projected_grad"),
    *("lr", "seconds", "tokens_per_s"),
    *("uploaded_bytes", "offloaded_bytes"),  # since the last step or evaluation
    *("device_memory_bytes", "host_memory_bytes"),  # allocated at peak; resident now
    "skipped",  # 1 where the step changed no weight, mostly as its losses were not finite
    "clipped",  # 1 where the step was shortened; logs of before 0.2 lack it
)
EVALUATION_COLUMNS = ("step", "name", "value")  # steps done; what was measured


class RunLog:
    """Writes a run's log.

    Nothing is written before the first step: a run that does not get there leaves no files.

    Args:
        folder: Folder of the run; created with the first step.
        engine: Engine that makes the steps.
        meter: Meter that measures them.
        start: Number of steps that are kept from an earlier log; 0 starts a new log. Lines of
            later steps and evaluations are dropped. Lines of steps in the engine's journal are
            rebuilt from it; times and bytes, which a journal does not have, come from the earlier
            log, and are NaN if it lacks them.
        planned: Function that returns whether an earlier evaluation, by steps done and name,
            belongs to this run; others are dropped.

    Raises:
        ValueError: The files in the folder are not logs of a run.
        OSError: The files cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        engine: ZOEngine,
        meter: Meter,
        *,
        start: int = 0,
        planned: Callable[[int, str], bool] = lambda steps, name: True,
    ) -> None:
        self._folder, self._engine, self._meter = folder, engine, meter
        self._begun = start > 0
        self._early: list[list[object]] = []  # evaluations before the first step
        self._evaluated: dict[tuple[int, str], float] = {}
        if self._begun:
            self._continue_steps(start)
            self._continue_evaluations(start, planned)

    def step(self) -> None:
        """Log the last step of the engine, which `meter` has measured.

        Raises:
            OSError: The file cannot be written.
        """
        last, meter = self._engine.last, self._meter
        assert last is not None, "no step was done"
        assert meter.seconds > 0, "the step was not measured"
        self._begin()
        row: list[object] = [
            *_reproducible(last),
            last.lr,
            round(meter.seconds, 6),
            round(meter.tokens / meter.seconds, 2),
            meter.uploaded,
            meter.offloaded,
            meter.device_memory,
            process_nbytes(),
            int(last.skipped),
            int(last.clipped),
        ]
        _append(self._folder / STEPS_FILE, [row])

    def evaluations(self, steps: int, values: Mapping[str, float]) -> None:
        """Log the values of one evaluation, by name, in one write.

        Raises:
            ValueError: A name is not printable or not on one line.
            OSError: The file cannot be written.
        """
        for name in values:
            if not name.isprintable():
                raise UserError(f"name must be printable and on one line, got {name!r}")
        rows: list[list[object]] = [[steps, name, value] for name, value in values.items()]
        if self._begun:
            _append(self._folder / EVALUATIONS_FILE, rows)
        else:
            self._early += rows
        self._evaluated |= {(steps, name): value for name, value in values.items()}

    def evaluated(self, steps: int) -> dict[str, float]:
        """Return the logged values of the weights after `steps` steps, by name."""
        return {name: value for (at, name), value in self._evaluated.items() if at == steps}

    def _begin(self) -> None:
        if not self._begun:
            self._folder.mkdir(parents=True, exist_ok=True)
            # In this order: a file of steps implies the evaluations before them.
            _write(self._folder / EVALUATIONS_FILE, [EVALUATION_COLUMNS, *self._early])
            _write(self._folder / STEPS_FILE, [STEP_COLUMNS])
            self._begun = True

    def _continue_steps(self, start: int) -> None:
        path = self._folder / STEPS_FILE
        there = _read(path, STEP_COLUMNS).rows if path.exists() else []
        added = ["0"] * len(STEP_COLUMNS)
        lines: dict[int, Sequence[object]] = {int(row[0]): row + added[len(row) :] for row in there}
        journal = self._engine.journal
        for step in journal.recorded.steps if journal is not None else ():
            recorded = [*_reproducible(StepRecord.of(step, self._engine.config.eps)), step.lr]
            measured = lines.get(step.step, [math.nan] * len(STEP_COLUMNS))[len(recorded) : -2]
            lines[step.step] = [*recorded, *measured, int(step.skipped), int(step.clipped)]
        _write(path, [STEP_COLUMNS, *(lines[step] for step in sorted(lines) if step < start)])

    def _continue_evaluations(self, start: int, planned: Callable[[int, str], bool]) -> None:
        path = self._folder / EVALUATIONS_FILE
        rows = _read(path, EVALUATION_COLUMNS).rows if path.exists() else []
        for steps, name, value in rows:
            if int(steps) <= start and planned(int(steps), name):
                self._evaluated[int(steps), name] = float(value)
        kept = [(*key, value) for key, value in self._evaluated.items()]
        _write(path, [EVALUATION_COLUMNS, *kept])


def _reproducible(step: StepRecord) -> list[object]:
    """Return the columns that are equal on every machine: "step" to "projected_grad"."""
    minus = fmean(step.losses_minus) if step.losses_minus else math.nan
    return [step.step, step.loss, fmean(step.losses_plus), minus, step.projected_grad]


@dataclass(frozen=True)
class Table:
    """Lines of a log, as text.

    Attributes:
        columns: Names of the columns.
        rows: Lines, with one string per column; the first is an integer.
        torn: Whether the last line was incomplete and dropped.
    """

    columns: tuple[str, ...]
    rows: list[list[str]]
    torn: bool

    def numbers(self, column: str) -> list[float]:
        """Return the values of a column; NaN where none was measured."""
        place = self.columns.index(column)
        return [float(row[place]) for row in self.rows]


def read_steps(folder: Path) -> Table:
    """Return the logged steps of the run in `folder`. See `STEP_COLUMNS`.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: The file is not a log of steps.
    """
    return _read(folder / STEPS_FILE, STEP_COLUMNS)


def read_evaluations(folder: Path) -> Table:
    """Return the logged evaluations of the run in `folder`. Raises as `read_steps` does."""
    return _read(folder / EVALUATIONS_FILE, EVALUATION_COLUMNS)


def _read(path: Path, columns: tuple[str, ...]) -> Table:
    complete, _, tail = path.read_bytes().rpartition(b"\n")
    lines = complete.split(b"\n") if complete else []
    found = tuple(_cells(lines[0])) if lines else columns
    if found == columns[:-1] == STEP_COLUMNS[:-1]:
        columns = found
    if found != columns:
        raise UserError(
            f"{path} is not such a log: its first line must be {','.join(columns)}, "
            f"got {lines[0][:200].decode(errors='replace')}"
        )
    rows, torn = [], bool(tail)
    for number, line in enumerate(lines[1:], start=2):
        row = _cells(line)
        if _has_numbers(row, columns):
            rows.append(row)
        elif number == len(lines):  # zeros, if a block never reached the disk
            torn = True
        else:
            raise UserError(f"{path}, line {number} is broken: {line[:200]!r}")
    return Table(columns, rows, torn)


def _cells(line: bytes) -> list[str]:
    """Return the cells of a line of CSV; none if it is not such a line."""
    try:
        (row,) = csv.reader([line.decode()])
    except (ValueError, csv.Error):
        return []
    return row


def _has_numbers(row: list[str], columns: tuple[str, ...]) -> bool:
    try:
        int(row[0])
        [float(cell) for cell, name in zip(row, columns, strict=True) if name != "name"]
    except (ValueError, IndexError):
        return False
    return True


def _write(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write `rows` to `path`, unless the file has them already."""
    content = b"".join(_line(row) for row in rows)
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)


def _append(path: Path, rows: Iterable[list[object]]) -> None:
    lines = b"".join(_line(row) for row in rows)
    try:
        with path.open("ab", buffering=0) as file:
            written = file.write(lines)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    if written != len(lines):  # the next call would have raised this
        raise OSError(errno.ENOSPC, "cannot write: no space is left", str(path))


def _line(row: Iterable[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue().encode()
