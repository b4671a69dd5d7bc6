"""Reading the rows of a task from a folder or from the hub, and sampling examples from them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zo2ext.errors import UserError
from zo2ext.tasks.task import Example, Hub, Row, Sizes, Task

# File names of each split, in order of preference. A split called "test" often has no labels.
SPLIT_FILES = {"train": ("train",), "test": ("validation", "val", "dev", "test")}
HOW_TO_GET = "pip install 'zo2ext[hf]', or pass --data DIR"


@dataclass(frozen=True)
class Split:
    """Rows, and the name of their source for messages."""

    rows: Sequence[Row]
    source: str


@dataclass(frozen=True)
class TaskData:
    """Examples to train on, to evaluate on while training, to test on; and notes for the user."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: tuple[str, ...]


def load(task: Task, folder: str | None, sizes: Sizes, seed: int) -> TaskData:
    """Sample the examples of a task as MeZO does, "dev" and "train" from the training split.

    Args:
        task: The task.
        folder: Folder with a file per split. None: the data set on the hub.
        sizes: Number of examples. If there are fewer, all are used, with a note in the result.
        seed: Seed of the sample.

    Raises:
        UserError: The data is missing, cannot be read, or does not fit the task.
    """
    if folder is not None:
        splits = from_folder(task, Path(folder))
    elif task.rows is not None:
        splits = {name: Split(rows, f"split {name!r}") for name, rows in task.rows().items()}
    else:
        splits = from_hub(task)
    return sample(task, splits["train"], splits["test"], sizes, seed)


def from_folder(task: Task, folder: Path) -> dict[str, Split]:
    """Read the splits "train" and "test" of `task` from `folder`.

    A split is one file: ``train.jsonl`` or, if the task has raw text files, ``train.txt``; and the
    first of ``validation``, ``val``, ``dev`` and ``test`` that exists.

    Raises:
        UserError: A folder or file is missing or malformed.
    """
    if not folder.is_dir():
        raise UserError(f"data {str(folder)!r} is not a directory")
    return {
        split: Split(read_file(task, path := _find(task, folder, names)), str(path))
        for split, names in SPLIT_FILES.items()
    }


def read_file(task: Task, path: Path) -> list[Row]:
    """Read the rows of a file: one JSON object per line, or lines in the task's raw form.

    Raises:
        UserError: A line is malformed, or the file is not UTF-8 or is empty.
        OSError: The file cannot be read.
    """
    parse: Callable[[str], Row] = _json_object
    if path.suffix == ".txt":
        if task.line is None:
            raise UserError(f"task {task.name} has no text files: {path} must be a .jsonl file")
        parse = task.line
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse(line.rstrip("\r")))
        except ValueError as error:
            raise UserError(f"line {number} of {path} {error}") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def from_hub(task: Task) -> dict[str, Split]:
    """Read the splits "train" and "test" of `task` from the Hugging Face hub with ``datasets``.

    Raises:
        UserError: ``datasets`` is not installed, or the data cannot be loaded.
    """
    hub = task.hub
    if hub is None:
        raise UserError(f"task {task.name} is not on the hub; pass --data DIR")
    datasets = import_datasets(
        f"the data of task {task.name} is on the hub ({_hub_name(hub)}), which needs the package "
        f"datasets: {HOW_TO_GET}"
    )
    splits = {}
    for split, name in (("train", hub.train), ("test", hub.test)):
        with load_errors(
            f"split {name!r} of {_hub_name(hub)}", "; pass --data DIR to read local files"
        ):
            rows = datasets.load_dataset(hub.path, hub.config, split=name, revision=hub.revision)
        splits[split] = Split(rows, f"{_hub_name(hub)}, split {name!r}")
    return splits


def import_datasets(need: str) -> Any:
    """Return the package ``datasets``, or raise a `UserError` with the message `need`."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(need) from error


@contextmanager
def load_errors(source: str, hint: str) -> Iterator[None]:
    """Turn any exception of ``datasets`` in this block into a `UserError` that ends in `hint`."""
    try:
        yield
    except Exception as error:  # the libraries below raise errors of many kinds
        cause = error.__cause__ or error  # "while generating the dataset" names no reason
        raise UserError(
            f"cannot load {source}: {type(cause).__name__}: "
            f"{' '.join(str(cause).split())[:300]}{hint}"
        ) from error


def sample(task: Task, train: Split, test: Split, sizes: Sizes, seed: int) -> TaskData:
    """Draw examples without replacement; the result depends on the arguments only."""
    notes: list[str] = []
    wanted = sizes.train + sizes.dev
    chosen = _draw(task, train, wanted, seed, notes)
    if len(chosen) < 2:
        raise UserError(
            f"{train.source} has {len(chosen)} example; at least 2 are needed, 1 to train on and 1 "
            "as dev"
        )
    # As in MeZO, dev is the end of what is drawn; at most half if there are too few examples.
    count = len(chosen)
    dev = sizes.dev if count >= wanted else min(sizes.dev, count // 2)
    if count < wanted:
        notes.append(
            f"{train.source} has {count} of the requested {sizes.train} + {sizes.dev} examples: "
            f"{count - dev} are used to train on and {dev} as dev"
        )
    tested = _draw(task, test, sizes.test, seed, notes)
    if len(tested) < sizes.test:
        notes.append(f"{test.source} has {len(tested)} of the requested {sizes.test} examples")
    return TaskData(chosen[: count - dev], chosen[count - dev :], tested, tuple(notes))


def _draw(task: Task, split: Split, size: int, seed: int, notes: list[str]) -> list[Example]:
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(split.rows))
    examples, left_out = task.examples(split.rows, split.source, order.tolist(), size)
    if left_out:
        notes.append(f"{split.source}: {left_out} rows without a label were left out")
    return examples


def _find(task: Task, folder: Path, names: Iterable[str]) -> Path:
    endings = (".jsonl",) if task.line is None else (".txt", ".jsonl")
    wanted = [name + ending for name in names for ending in endings]
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    found = sorted(entry.name for entry in folder.iterdir())[:12]
    raise UserError(
        f"data folder {str(folder)!r} lacks {' or '.join(wanted)} for task {task.name}; "
        f"it has {', '.join(found) or 'nothing'}"
    )


def _json_object(line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"is {line[:60]!r}; expected a JSON object")
    return value


def _hub_name(hub: Hub) -> str:
    return "/".join(filter(None, (hub.path, hub.config)))
