"""The numbers of a run, read from its folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo2ext.errors import UserError
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
    """A run's numbers.

    Attributes:
        settings: Of the run, as they were found.
        columns: Steps and values, by the names of `zo2ext.run_log.STEP_COLUMNS`; those that were
            not logged are absent.
        evaluations: Steps done and values, by name.
        done, planned: Steps that the run has made, and was to make; None if unknown.
        skipped: Steps that changed no weight.
        spans, title: Of the step whose timeline was recorded; None and "" where none was.
        notes: What was found wrong with the files.
    """

    settings: dict[str, Any]
    columns: dict[str, Points]
    evaluations: dict[str, Points]
    done: int
    planned: int | None
    skipped: int
    spans: list[Span] | None = None
    title: str = ""
    notes: list[str] = field(default_factory=list)


def load_run(folder: Path) -> RunData:
    """What `folder` holds of a run.

    Raises:
        ValueError: It is no folder of a run, has no step, or holds what cannot be read.
        OSError: A file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"run is {str(folder)!r}, which is not a directory")
    if not (folder / STEPS_FILE).is_file():
        raise UserError(
            f"run is {str(folder)!r}, which is not the folder of a run: it has no {STEPS_FILE}, as "
            "zo2ext train and ZOTrainer write it"
        )
    run = _logged(folder)
    if (folder / TRACE_FILE).is_file():
        run.spans, run.title = load_trace(folder / TRACE_FILE)
    return run


def _logged(folder: Path) -> RunData:
    table = read_steps(folder)
    if not table.rows:
        raise UserError(f"{folder / STEPS_FILE} has no step yet")
    notes = [f"the last line of {STEPS_FILE} was not whole and is left out"] if table.torn else []
    steps = [int(row[0]) for row in table.rows]
    columns = {
        name: list(zip(steps, table.numbers(name), strict=True)) for name in table.columns[1:]
    }
    skipped = sum(value > 0 for _, value in columns.pop("skipped"))
    evaluations: dict[str, Points] = {}
    if (folder / EVALUATIONS_FILE).is_file():
        judged = read_evaluations(folder)
        for step, name, value in judged.rows:
            evaluations.setdefault(name, []).append((int(step), float(value)))
        if judged.torn:
            notes.append(f"the last line of {EVALUATIONS_FILE} was not whole and is left out")
    path = folder / ARGUMENTS_FILE
    settings = _json(path) if path.is_file() else {}
    return RunData(
        settings=settings,
        columns=columns,
        evaluations={name: _last_of_each(points) for name, points in evaluations.items()},
        done=steps[-1] + 1,
        planned=_count(settings.get("steps")),
        skipped=skipped,
        notes=notes,
    )


def _last_of_each(points: Points) -> Points:
    """In order; a step that was done again counts as it was the last time."""
    return sorted(dict(points).items())


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def mean_of_last(points: Points, share: float = 0.1) -> float:
    """The mean of the finite ones among the last `share` of `points`; NaN where there are none."""
    last = points[-max(1, round(share * len(points))) :] if points else []
    finite = [value for _, value in last if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
