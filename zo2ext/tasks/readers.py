"""Rows of a task from a folder or from the hub, and what of them is used."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zo2ext.tasks.task import Example, Row, Sizes, Task

# Names of a split's file, the one to be used first. A test split often comes without labels.
SPLIT_FILES = {
    "train": ("train",),
    "test": ("validation", "val", "dev", "test"),
}
HOW_TO_GET = "pip install 'zo2ext[hf]', or pass --data DIR"


@dataclass(frozen=True)
class Split:
    """Rows and where they come from."""

    rows: Sequence[Row]
    source: str


@dataclass(frozen=True)
class TaskData:
    """Examples to train on, to watch while training, and to test on; and what is to be said."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: tuple[str, ...]


def load(task: Task, folder: str | None, sizes: Sizes, seed: int) -> TaskData:
    """A task's examples: sampled as MeZO does, dev and train from the training split.

    Args:
        task: Which.
        folder: With a file for each split; the hub's data set when None.
        sizes: Wanted. Where there are too few, all are used, and `TaskData.notes` says so.
        seed: Of the sample.

    Raises:
        ValueError: The data is not there, cannot be read, or does not fit the task.
    """
    splits = from_hub(task) if folder is None else from_folder(task, Path(folder))
    return sample(task, splits["train"], splits["test"], sizes, seed)


def from_folder(task: Task, folder: Path) -> dict[str, Split]:
    """The splits "train" and "test" of `task` in `folder`.

    A split is one file: ``train.jsonl`` or, where the task has a raw text form, ``train.txt``; and
    ``validation``, ``val``, ``dev`` or ``test``, whichever is there first.

    Raises:
        ValueError: A folder or file is missing, or cannot be understood.
    """
    if not folder.is_dir():
        raise ValueError(f"data is {str(folder)!r}, which is no folder")
    return {split: _read(task, _find(task, folder, names)) for split, names in SPLIT_FILES.items()}


def read_file(task: Task, path: Path) -> list[Row]:
    """The rows of one file: JSON objects, one a line, or lines in the task's raw form.

    Raises:
        ValueError: A line cannot be understood, or the file is not UTF-8 or is empty.
        OSError: It cannot be read.
    """
    parse: Callable[[str], Row] = _json_object
    if path.suffix == ".txt":
        if task.line is None:
            raise ValueError(f"task {task.name} has no raw text form: {path} must be a .jsonl file")
        parse = task.line
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse(line.rstrip("\r")))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} {error}") from None
    if not rows:
        raise ValueError(f"{path} has no row")
    return rows


def from_hub(task: Task) -> dict[str, Split]:
    """The splits "train" and "test" of `task` from the Hugging Face hub, through ``datasets``.

    Raises:
        ValueError: ``datasets`` is not installed, or the data cannot be had.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"task {task.name} comes from the hub ({_hub_name(task)}), which needs the package "
            f"datasets: {HOW_TO_GET}"
        ) from error
    hub, splits = task.hub, {}
    for split, name in (("train", hub.train), ("test", hub.test)):
        try:
            rows: Any = datasets.load_dataset(
                hub.path, hub.config, split=name, revision=hub.revision
            )
        except Exception as error:  # whatever the libraries below raise, said as one thing
            raise ValueError(
                f"cannot load split {name!r} of {_hub_name(task)}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}; pass --data DIR to read local files"
            ) from error
        splits[split] = Split(rows, f"{_hub_name(task)}, split {name!r}")
    return splits


def sample(task: Task, train: Split, test: Split, sizes: Sizes, seed: int) -> TaskData:
    """Examples drawn without replacement, a function of the arguments alone."""
    notes: list[str] = []
    chosen = _draw(task, train, sizes.train + sizes.dev, seed, notes)
    # Dev is the end of what is drawn, as in MeZO; at most half where there is too little.
    wanted, there = sizes.train + sizes.dev, len(chosen)
    dev = sizes.dev if there >= wanted else min(sizes.dev, there // 2)
    if there < wanted:
        notes.append(
            f"{train.source} has {there} examples, {sizes.train} + {sizes.dev} were asked for: "
            f"all are used, {there - dev} to train on and {dev} as dev"
        )
    tested = _draw(task, test, sizes.test, seed, notes)
    if len(tested) < sizes.test:
        notes.append(
            f"{test.source} has {len(tested)} examples, {sizes.test} were asked for: all are used"
        )
    return TaskData(chosen[: there - dev], chosen[there - dev :], tested, tuple(notes))


def _draw(task: Task, split: Split, size: int, seed: int, notes: list[str]) -> list[Example]:
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(split.rows))
    examples, left_out = task.examples(split.rows, split.source, order.tolist(), size)
    if left_out:
        notes.append(f"{split.source}: left out {left_out} of the rows drawn, without a label")
    return examples


def _find(task: Task, folder: Path, names: Iterable[str]) -> Path:
    endings = (".jsonl",) if task.line is None else (".txt", ".jsonl")
    wanted = [name + ending for name in names for ending in endings]
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    found = sorted(entry.name for entry in folder.iterdir())[:12]
    raise ValueError(
        f"data folder {str(folder)!r} lacks {' or '.join(wanted)} for task {task.name}; "
        f"it has {', '.join(found) or 'nothing'}"
    )


def _read(task: Task, path: Path) -> Split:
    return Split(read_file(task, path), str(path))


def _json_object(line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {line[:60]!r}; expected a JSON object")
    return value


def _hub_name(task: Task) -> str:
    return "/".join(filter(None, (task.hub.path, task.hub.config)))
