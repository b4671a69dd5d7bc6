"""Ordinary transformers checkpoints of an offloaded model, written one unit at a time.

transformers decides what a checkpoint holds (names, conversions, shards, settings); the weights
themselves are brought to the host, converted and written unit by unit, to the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from zo2ext._files import replace_folder
from zo2ext.checkpoints.contents import (
    Groups,
    State,
    Values,
    describe_state,
    names_by_group,
    on_meta,
    read_values,
    revert_conversion,
    saved_state,
)
from zo2ext.checkpoints.safetensors import Shard, plan_shard, write_all, write_tensors
from zo2ext.streaming.stores.rounding import RoundingError, rounding_error

logger = logging.getLogger(__name__)


def save_checkpoint(
    model: Any,
    folder: str | Path,
    values: Values,
    groups: Groups,
    *,
    quantised: bool = False,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    dtype: torch.dtype | None = None,
    card: str = "",
) -> RoundingError:
    """Write what ``model.save_pretrained(folder)`` would, with one group of weights in memory.

    The folder appears, or takes the place of the one that was there, in one go: an interruption
    leaves what was there before.

    Args:
        model: A transformers model.
        folder: Where to.
        values: Those of some parameters of one group, on the host; until it is called again.
        groups: The model's parameters, in groups that are converted to the checkpoint's own form
            without the others: its units.
        quantised: Whether its modules save more than their parameters: then all of it is in memory.
        tokenizer: Saved beside it.
        max_shard_size: Of a weight file, as transformers takes it.
        dtype: Of floating-point weights there; None: their own.
        card: Text for a model card, README.md.

    Returns:
        What rounding to `dtype` did to the weights.

    Raises:
        OSError: It cannot be written.
        TypeError: It is not one of transformers, or one that transformers itself cannot save.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be one of transformers, got {type(model).__name__}")
    cast = _Cast(dtype)
    with replace_folder(Path(folder)) as new:
        if quantised:
            if dtype is not None:
                raise ValueError(f"dtype is {dtype}, but a quantised model is saved as it is")
            _save_quantised(model, new, max_shard_size)
        else:
            _save_by_groups(model, Path(folder), new, values, groups, cast, max_shard_size)
        if dtype is not None:
            _say_dtype(new / CONFIG_NAME, dtype)
        if card:
            (new / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    return cast.error


def read_along(model: Any, values: Values, groups: Groups) -> None:
    """Read what `save_checkpoint` does, in its order, and drop it."""
    source = saved_state(model)
    for part in names_by_group(source, groups):
        read_values(source, part, values)


class _Cast:
    """To another dtype; counts what that does to the weights."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype, self.error = dtype, RoundingError()

    def __call__(self, state: State) -> State:
        if self.dtype is None:
            return state
        return {name: self._one(tensor, self.dtype) for name, tensor in state.items()}

    def _one(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        rounded = tensor.to(dtype)
        if not tensor.is_meta:
            self.error += rounding_error(tensor, rounded)
        return rounded


def _say_dtype(file: Path, dtype: torch.dtype) -> None:
    """Write the weights' dtype into a model's config."""
    settings = json.loads(file.read_text())
    settings["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _save_quantised(model: Any, new: Path, max_shard_size: int | str) -> None:
    try:
        model.save_pretrained(new, max_shard_size=max_shard_size)
    except NotImplementedError as error:  # it does not undo what some formats do as they are read
        raise TypeError(
            f"transformers cannot save this quantised {type(model).__name__} once more; save what "
            "was trained: an adapter, or tensors of state_dict()"
        ) from error


def _save_by_groups(
    model: Any,
    folder: Path,
    new: Path,
    values: Values,
    groups: Groups,
    cast: _Cast,
    max_shard_size: int | str,
) -> None:
    source = saved_state(model)
    whole = revert_conversion(model, cast(on_meta(source, source)))
    plan = names_by_group(source, groups)
    parts: State = {}
    for part in plan:
        parts |= revert_conversion(model, cast(on_meta(source, part)))
    if describe_state(parts) == describe_state(whole):
        with _failing_to_write(folder):
            _write(model, new, whole, source, plan, values, cast, max_shard_size)
    else:
        logger.warning(
            "%s joins weights of several units in its checkpoints: all are brought to memory",
            type(model).__name__,
        )
        state = None if cast.dtype is None else cast(model.state_dict())
        model.save_pretrained(new, state_dict=state, max_shard_size=max_shard_size)


def _write(
    model: Any,
    folder: Path,
    whole: State,
    source: State,
    plan: list[list[str]],
    values: Values,
    cast: _Cast,
    max_shard_size: int | str,
) -> None:
    split = split_torch_state_dict_into_shards(
        whole,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    with _without_bar():
        model.save_pretrained(folder, state_dict={}, max_shard_size=max_shard_size)  # no weights
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    shards: dict[str, Shard] = {}  # by name of the tensor
    for file, members in split.filename_to_tensors.items():
        shards |= dict.fromkeys(members, plan_shard(file, {n: whole[n] for n in members}))
    with ExitStack() as stack:
        files: dict[str, int] = {}
        for shard in shards.values():
            if shard.name not in files:
                handle = os.open(folder / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                stack.callback(os.close, handle)
                files[shard.name] = handle
                write_all(handle, shard.opening, 0)
        for part in tqdm(plan, desc="Saving", unit="unit", leave=False, dynamic_ncols=True):
            write_tensors(
                revert_conversion(model, cast(read_values(source, part, values))), shards, files
            )
    if split.is_sharded:
        total = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text)


@contextmanager
def _failing_to_write(folder: Path) -> Iterator[None]:
    """Name the folder where the system does not, as on a full disk."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot write weights to {str(folder)!r}: {reason}") from error


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers draws no progress bar inside."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
