"""Checks of a checkpoint's folder, which somebody else may have made, before its files are read."""

from __future__ import annotations

import json
from pathlib import Path

from zo2ext.errors import UserError
from zo2ext.journal.journal import JOURNAL_FILE

INDEX_FILE, ADAPTER_FILE = "model.safetensors.index.json", "adapter_config.json"


def check_folder(path: Path) -> None:
    """Check that a folder has one model, and no name or link that leads out of it.

    Raises:
        UserError: It has no model or also an adapter, or leads to other folders.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"model is {str(path)!r}, a folder without a config.json{_instead(path)}")
    if (path / ADAPTER_FILE).is_file():
        refuse_adapter(str(path))
    if (path / INDEX_FILE).is_file():
        check_index(path / INDEX_FILE)
    for file in path.glob("*.safetensors"):
        check_link(file)


def refuse_adapter(source: str) -> None:
    """Raise the error for a model that has an adapter beside its weights."""
    raise UserError(
        f"model is {source!r}, which has an adapter ({ADAPTER_FILE}) beside its weights; expected "
        "a model alone: remove the adapter's files from a copy, or load the model with "
        "transformers, merge_and_unload() the adapter with peft, and save it"
    )


def _instead(path: Path) -> str:
    """Describe what a folder without a model has instead."""
    if (path / JOURNAL_FILE).is_file():
        weights = sorted(p.parent.name for p in path.glob("*/config.json"))
        return f": it is the folder of a run, with weights in {', '.join(weights) or 'no folder'}"
    if (path / ADAPTER_FILE).is_file():
        return (
            ": it has an adapter; load it with peft on its base model, merge_and_unload() it, and "
            "save the result"
        )
    return ""


def check_index(path: Path) -> None:
    """Check that the index of a checkpoint names files of its own folder only.

    Raises:
        UserError: It names a file by more than its name, or is not an index.
    """
    try:
        names = set(json.loads(path.read_bytes())["weight_map"].values())
        outside = sorted(n for n in names if n != Path(n).name or n in ("", "..") or "\0" in n)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not an index of weights: {error}") from error
    if outside:
        raise UserError(
            f"{path} names {outside[0]!r}: expected files of its own folder, such as "
            "'model-00001-of-00002.safetensors'"
        )


def check_link(path: Path) -> None:
    """Check that a file of a checkpoint is no link to a file outside of its folder.

    The links of the hub's cache, from its snapshots to its blobs, may leave their folder.

    Raises:
        UserError: It is one.
    """
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(folder) and target.parent != blobs:
        raise UserError(
            f"{path} is a link to {str(target)!r}, outside of its folder; copy the file if you "
            "trust it"
        )
