"""Numbers of a run, read from its folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo2ext.errors import UserError
from zo2ext.journal.journal import JOURNAL_FILE, read_journal
from zo2ext.runs.find_lr import RateCurve, recorded_curve
from zo2ext.runs.log import (
    ARGUMENTS_FILE,
    EVALUATIONS_FILE,
    STEPS_FILE,
    read_evaluations,
    read_steps,
)
from zo2ext.runs.timeline import TRACE_FILE, Span, load_trace

Points = list[tuple[int, float]]  # (step, value)


@dataclass
class RunData:
    """Numbers of a run.

    Attributes:
        settings: Content of arguments.json.
        columns: (step, value) pairs for each name in `zo2ext.runs.log.STEP_COLUMNS` from "loss" on.
        evaluations: (steps done, value) pairs, by name.
        done: Number of steps done.
        planned: Number of steps of the finished run; None if unknown.
        skipped, clipped: Number of steps that changed no weight, and that were shortened.
        curve: Result of the search for the learning rate; None without one.
        spans, title: Timeline of the recorded step; None and "" without a recording.
        notes: Problems with the files.
    """

    settings: dict[str, Any]
    columns: dict[str, Points]
    evaluations: dict[str, Points]
    done: int
    planned: int | None
    skipped: int
    clipped: int
    curve: RateCurve | None
    spans: list[Span] | None
    title: str
    notes: list[str]


def load_run(folder: Path) -> RunData:
    """Read the numbers of the run in `folder`.

    Raises:
        ValueError: The folder has no run, no step yet, or a file with other content.
        OSError: A file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"run is {str(folder)!r}, which is not a directory")
    if not (folder / STEPS_FILE).is_file():
        raise UserError(
            f"run is {str(folder)!r}, which is not the folder of a run: it has no {STEPS_FILE}, as "
            "zo2ext train and ZOTrainer write it"
        )
    table = read_steps(folder)
    if not table.rows:
        raise UserError(f"{folder / STEPS_FILE} has no step yet")
    tables = {STEPS_FILE: table}
    steps = [int(row[0]) for row in table.rows]
    columns = {
        name: list(zip(steps, table.numbers(name), strict=True)) for name in table.columns[1:]
    }
    skipped, clipped = (
        sum(value > 0 for _, value in columns.pop(name, [])) for name in ("skipped", "clipped")
    )
    evaluations: dict[str, Points] = {}
    if (folder / EVALUATIONS_FILE).is_file():
        tables[EVALUATIONS_FILE] = read_evaluations(folder)
        for step, name, value in tables[EVALUATIONS_FILE].rows:
            evaluations.setdefault(name, []).append((int(step), float(value)))
    path = folder / ARGUMENTS_FILE
    settings = _json(path) if path.is_file() else {}
    planned = settings.get("steps")
    journal = folder / JOURNAL_FILE
    curve = recorded_curve(read_journal(journal).header) if journal.is_file() else None
    trace = folder / TRACE_FILE
    spans, title = load_trace(trace) if trace.is_file() else (None, "")
    return RunData(
        settings=settings,
        columns=columns,
        # If a step was done twice, the last value replaces the first.
        evaluations={name: sorted(dict(points).items()) for name, points in evaluations.items()},
        done=steps[-1] + 1,
        planned=planned if isinstance(planned, int) and planned > 0 else None,
        skipped=skipped,
        clipped=clipped,
        curve=curve,
        spans=spans,
        title=title,
        notes=[
            f"the last line of {file} is incomplete and was dropped"
            for file, table in tables.items()
            if table.torn
        ],
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def mean_of_last(points: Points, share: float = 0.1) -> float:
    """Return the mean of the finite values in the last `share` of `points`; NaN without any."""
    last = points[-max(1, round(share * len(points))) :] if points else []
    finite = [value for _, value in last if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
