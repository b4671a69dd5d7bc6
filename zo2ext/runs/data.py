"""What a run left behind, read from the folder of ``zo2ext train`` or of a Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo2ext.runs.log import EVALUATIONS_FILE, STEPS_FILE, read_evaluations, read_steps
from zo2ext.runs.names import ARGUMENTS_FILE, STATE_FILE, TRAINER_STATE_FILE
from zo2ext.runs.timeline import TRACE_FILE, Span, load_trace

Points = list[tuple[int, float]]  # (step, value)

_OF_TRAINER = {  # column of steps.csv: what a Trainer logs it as
    "loss": "loss",
    "loss_plus": "zo/loss_plus",
    "loss_minus": "zo/loss_minus",
    "projected_grad": "zo/projected_grad",
    "lr": "learning_rate",
    "tokens_per_s": "zo/tokens_per_second",
    "uploaded_bytes": "zo/uploaded_bytes_per_step",
    "offloaded_bytes": "zo/offloaded_bytes_per_step",
}
_SPEEDS = ("_runtime", "_per_second")  # endings of what a Trainer measures of its evaluations
_SETTINGS_OF_TRAINER = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps")


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
        raise ValueError(f"run is {str(folder)!r}, which is no folder")
    if (folder / STEPS_FILE).is_file():
        run = _of_command(folder)
    elif (state := _newest_state(folder)) is not None:
        run = _of_trainer(state)
    else:
        raise ValueError(
            f"run is {str(folder)!r}, which is no folder of a run: it has neither {STEPS_FILE}, as "
            f"zo2ext train writes, nor {TRAINER_STATE_FILE}, as a Trainer does, itself or in a "
            "checkpoint"
        )
    if (folder / TRACE_FILE).is_file():
        run.spans, run.title = load_trace(folder / TRACE_FILE)
    return run


def _of_command(folder: Path) -> RunData:
    table = read_steps(folder)
    if not table.rows:
        raise ValueError(f"{folder / STEPS_FILE} has no step yet")
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


def _of_trainer(path: Path) -> RunData:
    state = _json(path)
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, Mapping) for entry in log):
        raise ValueError(f"{path} has no log_history, as a Trainer writes it")
    steps = [entry for entry in log if "loss" in entry]
    if not steps:
        raise ValueError(f"{path} has no logged step; lower logging_steps")
    if not any("zo/projected_grad" in entry for entry in steps):
        raise ValueError(f"{path} is not of a ZOTrainer: it has no zo/projected_grad")
    columns = {name: _points(steps, key) for name, key in _OF_TRAINER.items()}
    names = {key for entry in log for key in entry if key.startswith("eval_")}
    chosen = sorted(name for name in names if not name.endswith(_SPEEDS))
    settings = {key: state[key] for key in _SETTINGS_OF_TRAINER if key in state}
    beside = path.parent / STATE_FILE
    if beside.is_file():
        settings |= _json(beside).get("config", {})
    return RunData(
        settings=settings,
        columns={name: points for name, points in columns.items() if points},
        evaluations={name: _last_of_each(_points(log, name)) for name in chosen},
        done=_count(state.get("global_step")) or columns["loss"][-1][0],
        planned=_count(state.get("max_steps")),
        skipped=int(max(value for _, value in _points(steps, "zo/skipped_steps"))),
    )


def _newest_state(folder: Path) -> Path | None:
    """The Trainer's state that is furthest on: the folder's own, or a checkpoint's."""
    paths = [folder / TRAINER_STATE_FILE, *folder.glob(f"checkpoint-*/{TRAINER_STATE_FILE}")]
    found = [path for path in paths if path.is_file()]
    return max(found, key=lambda path: _count(_json(path).get("global_step")) or 0, default=None)


def _points(entries: Iterable[Mapping[str, Any]], key: str) -> Points:
    return [
        (int(entry["step"]), float(entry[key]))
        for entry in entries
        if isinstance(entry.get(key), (int, float))
    ]


def _last_of_each(points: Points) -> Points:
    """In order; a step that was done again counts as it was the last time."""
    return sorted(dict(points).items())


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def mean_of_last(points: Points, share: float = 0.1) -> float:
    """The mean of the finite ones among the last `share` of `points`; NaN where there are none."""
    last = points[-max(1, round(share * len(points))) :] if points else []
    finite = [value for _, value in last if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
