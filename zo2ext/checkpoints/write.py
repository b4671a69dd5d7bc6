"""Writes ordinary transformers checkpoints of an offloaded model, one unit at a time.

transformers decides what a checkpoint contains (names, conversions, shards, settings). The weights
are read, converted and written unit by unit, with the same bytes as a result.
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

from zo2ext._files import replace_folder
from zo2ext.checkpoints.contents import (
    Groups,
    State,
    Values,
    meta_tensors,
    names_by_group,
    read_values,
    revert_conversion,
    saved_state,
    shapes_and_dtypes,
)
from zo2ext.checkpoints.pretrained import transformers_bars
from zo2ext.checkpoints.safetensors import Shard, lay_out_shard, write_all, write_tensors
from zo2ext.errors import FileError, UnsupportedModel, UserError
from zo2ext.streaming.stores.rounding import RoundingError, rounding_error

logger = logging.getLogger(__name__)


def save_checkpoint(
    model: Any,
    folder: str | Path,
    values: Values,
    groups: Groups,
    *,
    quantized: bool = False,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    dtype: torch.dtype | None = None,
    card: str = "",
) -> RoundingError:
    """Write what ``model.save_pretrained(folder)`` would, with one group of weights in memory.

    The folder appears, or replaces an existing one, atomically.

    Args:
        model: A transformers model.
        folder: Where to save.
        values: Returns values of some parameters of one group, on the host, valid until it is
            called again.
        groups: The model's parameters, in groups that can be converted to the checkpoint's form
            separately: its units.
        quantized: Whether modules save more than their parameters. All of them are then in memory.
        tokenizer: Saved beside the weights.
        max_shard_size: Maximum size of a weight file, as in transformers.
        dtype: Dtype of saved floating-point weights; None keeps it.
        card: Text of the model card, README.md.

    Returns:
        The error of rounding to `dtype`.

    Raises:
        OSError: It cannot be written.
        UnsupportedModel: It is not a transformers model, or transformers cannot save it.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"model must be one of transformers, got {type(model).__name__}")
    cast = _Cast(dtype)
    with replace_folder(Path(folder)) as new:
        if quantized:
            if dtype is not None:
                raise UserError(f"dtype is {dtype}, but a quantized model is saved as it is")
            _save_quantized(model, new, max_shard_size)
        else:
            with _naming_folder(Path(folder)):
                _save_by_groups(model, new, values, groups, cast, max_shard_size)
        if dtype is not None:
            _set_dtype(new / CONFIG_NAME, dtype)
        if card:
            (new / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    return cast.error


def read_checkpoint_values(model: Any, values: Values, groups: Groups) -> None:
    """Read what `save_checkpoint` reads, in the same order, and drop it."""
    state = saved_state(model)
    for names in names_by_group(state, groups):
        read_values(state, names, values)


class _Cast:
    """Converts to another dtype, and accumulates the rounding error."""

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


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    """Write the weights' dtype into a model's config."""
    settings = json.loads(file.read_text())
    settings["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _save_quantized(model: Any, new: Path, max_shard_size: int | str) -> None:
    try:
        model.save_pretrained(new, max_shard_size=max_shard_size)
    except NotImplementedError as error:  # it cannot revert what loading some formats does
        raise UnsupportedModel(
            f"transformers cannot save this quantized {type(model).__name__} again; save what was "
            "trained: an adapter, or tensors of state_dict()"
        ) from error


def _save_by_groups(
    model: Any,
    folder: Path,
    values: Values,
    groups: Groups,
    cast: _Cast,
    max_shard_size: int | str,
) -> None:
    source = saved_state(model)
    together = revert_conversion(model, cast(meta_tensors(source, source)))
    names_of_groups = names_by_group(source, groups)
    separately: State = {}
    for names in names_of_groups:
        separately |= revert_conversion(model, cast(meta_tensors(source, names)))
    if shapes_and_dtypes(separately) != shapes_and_dtypes(together):
        logger.warning(
            "%s joins weights of several units in its checkpoints: all are loaded into memory",
            type(model).__name__,
        )
        state = None if cast.dtype is None else cast(model.state_dict())
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        return
    split = split_torch_state_dict_into_shards(
        together,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    with transformers_bars(False):
        model.save_pretrained(folder, state_dict={}, max_shard_size=max_shard_size)  # no weights
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    shards: dict[str, Shard] = {}  # by name of the tensor
    with ExitStack() as stack:
        files: dict[str, int] = {}
        for file, members in split.filename_to_tensors.items():
            shard = lay_out_shard(file, {name: together[name] for name in members})
            shards |= dict.fromkeys(members, shard)
            handle = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, handle)
            files[file] = handle
            write_all(handle, shard.header, 0)
        progress = tqdm(names_of_groups, desc="Saving", unit="unit", leave=False, disable=None)
        for names in progress:
            state = revert_conversion(model, cast(read_values(source, names, values)))
            write_tensors(state, shards, files)
    if split.is_sharded:
        total = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text)


@contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Name the folder in errors in which the system does not, such as a full disk."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise FileError(f"cannot write weights to {str(folder)!r}: {reason}") from error
