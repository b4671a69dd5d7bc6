"""Descriptions of a Trainer's run for the journal's header, and of its batches for errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn

_ROWS = 8  # rows of the data set that identify it

# Arguments that decide a step's batch, loss or learning rate. The header also has the engine's.
_DEFINING = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("data_seed", "dataloader_drop_last"),
    *("train_sampling_strategy", "label_smoothing_factor", "bf16"),
    *("max_length", "packing", "padding_free", "completion_only_loss"),  # TRL
    *("assistant_only_loss", "loss_type"),
)
_LENGTH = ("max_steps", "num_train_epochs")  # decide every schedule but the constant one


def describe_run(args: Any, data: Any) -> dict[str, Any]:
    """Return what identifies a Trainer's run in the journal's header, as JSON values.

    Args:
        args: ``TrainingArguments``.
        data: Data set to train on.
    """
    names = _DEFINING if args.lr_scheduler_type == "constant" else (*_DEFINING, *_LENGTH)
    settings = {name: _plain(getattr(args, name)) for name in names if hasattr(args, name)}
    settings["gradient_accumulation_steps"] *= args.data_ranks  # per step, all ranks
    return {**settings, "data": _describe_data(data)}


def describe_batch(inputs: Mapping[str, Any], model: nn.Module) -> str:
    """Return a note for an error of the loss: types and shapes in the batch, dtypes of the weights.

    Args:
        inputs: Batch that the model received.
        model: Model that failed to compute a loss.
    """
    batch = ", ".join(f"{name}: {_kind(value)}" for name, value in inputs.items())
    dtypes = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
    mixed = "; compute_dtype sets one dtype for all" if len(dtypes) > 1 else ""
    return (
        f"{type(model).__name__} received {batch or 'an empty batch'}; a causal language model "
        "expects input_ids and labels, both of torch.int64 and the same shape (batch, length), "
        f"with label -100 where no loss is wanted. Its weights are {' and '.join(dtypes)}{mixed}."
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        # On the CPU only: after an index out of range a GPU fails at every call.
        has_range = value.numel() and value.device.type == "cpu" and not value.is_complex()
        values = f" from {value.min()} to {value.max()}" if has_range else ""
        return f"{value.dtype} of shape {tuple(value.shape)}{values}"
    return type(value).__name__


def _describe_data(data: Any) -> list[Any]:
    """Return the length and a digest of a few evenly spread rows; for a stream, its type."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return [type(data).__name__]
    count, digest = len(data), hashlib.blake2b(digest_size=16)
    for index in sorted({i * (count - 1) // (_ROWS - 1) for i in range(_ROWS)} if count else ()):
        row = json.dumps(_content(data[index]), sort_keys=True)
        digest.update(row.encode())
    return [count, digest.hexdigest()]


def _content(value: Any) -> Any:
    """Return numbers and text in `value` as JSON values, and the type's name of anything else."""
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
