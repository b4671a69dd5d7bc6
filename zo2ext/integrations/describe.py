"""A Trainer's run and its batches in words: for the journal's header, and for errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn

_ROWS = 8  # of the data set that are looked at

# Arguments that decide a step's batch, loss or learning rate, as far as a Trainer has them. Those
# of the engine are in the header already.
_DEFINING = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("data_seed", "dataloader_drop_last"),
    *("train_sampling_strategy", "label_smoothing_factor", "bf16"),
    *("max_length", "packing", "padding_free", "completion_only_loss"),  # of TRL
    *("assistant_only_loss", "loss_type"),
)


_LENGTH = ("max_steps", "num_train_epochs")  # decide what a schedule is, unless it is constant


def describe_run(args: Any, data: Any) -> dict[str, Any]:
    """What a journal's header says of a Trainer's run, as JSON values.

    Args:
        args: ``TrainingArguments``.
        data: The data set to train on.
    """
    names = _DEFINING if args.lr_scheduler_type == "constant" else (*_DEFINING, *_LENGTH)
    settings = {name: _plain(getattr(args, name)) for name in names if hasattr(args, name)}
    settings["gradient_accumulation_steps"] *= args.data_ranks  # micro-batches of a step
    return {**settings, "data": _describe_data(data)}


def describe_batch(inputs: Mapping[str, Any], model: nn.Module) -> str:
    """What a model was given when it failed: kinds and shapes of the batch, dtypes of the weights.

    Args:
        inputs: The batch.
        model: That could not compute a loss from it.
    """
    batch = ", ".join(f"{name}: {_kind(value)}" for name, value in inputs.items())
    dtypes = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
    mixed = "; compute_dtype makes them one" if len(dtypes) > 1 else ""
    return (
        f"{type(model).__name__} was given {batch or 'an empty batch'}; a causal language model "
        "expects input_ids and labels, both of torch.int64 and one shape (batch, length), labels "
        f"-100 where no loss is wanted. Its weights are of {' and '.join(dtypes)}{mixed}."
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        # Not asked of a GPU, which answers nothing any more where an index was out of range.
        ranged = value.numel() and value.device.type == "cpu" and not value.is_complex()
        values = f" from {value.min()} to {value.max()}" if ranged else ""
        return f"{value.dtype} of shape {tuple(value.shape)}{values}"
    return type(value).__name__


def _describe_data(data: Any) -> list[Any]:
    """Kind, length, and a digest of a few rows, evenly spread; of a stream, its kind alone."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return [type(data).__name__]
    count, digest = len(data), hashlib.blake2b(digest_size=16)
    for index in sorted({i * (count - 1) // (_ROWS - 1) for i in range(_ROWS)} if count else ()):
        row = json.dumps(_content(data[index]), sort_keys=True)
        digest.update(row.encode())
    return [count, digest.hexdigest()]


def _content(value: Any) -> Any:
    """`value` as JSON, where it is made of numbers and text; its kind, where it is not."""
    if isinstance(value, Mapping):
        return {str(name): _content(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _content(value.tolist())
    if value is None or isinstance(value, (str, int, float)):
        return value
    return type(value).__name__


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
