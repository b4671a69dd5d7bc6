"""Descriptions of a Trainer's run for the journal's header, and of its batches for errors."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import IterableDataset

_ROWS = 8  # rows of any data set that identify it
_CHEAP_ROWS = 2**17  # most rows of data in memory, or in Arrow files, that do
_CHEAP_NCHARS = 2**27  # most characters of their text
_LIBRARIES = {"zo2ext", "transformers", "trl", "peft", "torch", "datasets", "accelerate"}
_LIBRARIES |= {"sentence_transformers"}
_SIMPLE = (str, int, float, type(None))

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


def describe_run(
    args: Any, data: Any, functions: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what identifies a Trainer's run in the journal's header, as JSON values.

    Args:
        args: ``TrainingArguments``.
        data: Data set to train on, or several by name.
        functions: Functions and other objects that make batches and losses, by name.
    """
    names = _DEFINING if args.lr_scheduler_type == "constant" else (*_DEFINING, *_LENGTH)
    settings = {name: _plain(getattr(args, name)) for name in names if hasattr(args, name)}
    settings["gradient_accumulation_steps"] *= args.data_ranks  # per step, all ranks
    described = {
        **settings,
        "data": _describe_data(data),
        "functions": {n: _describe_function(f) for n, f in (functions or {}).items() if f},
    }
    rows = _by_name(data, _digest_of_rows)
    return described if rows is None else {**described, "rows": rows}


def not_compared(run: Mapping[str, Any]) -> list[str]:
    """Return what in a description of `describe_run` other runs may differ in unnoticed."""
    sources = [f"the source of {name}" for name, f in run["functions"].items() if not f["source"]]
    return sources + (["most rows of train_dataset"] if "rows" not in run else [])


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


def _by_name(data: Any, describe: Callable[[Any], Any]) -> Any:
    """Describe a data set, or each of several."""
    if isinstance(data, Mapping):
        return {str(name): describe(part) for name, part in data.items()}
    return describe(data)


def _describe_data(data: Any) -> Any:
    """Return the length and a digest of a few evenly spread rows; for a stream, its type."""
    return _by_name(data, _length_and_rows)


def _length_and_rows(data: Any) -> list[Any]:
    has_rows = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, IterableDataset) or not has_rows:
        return [type(data).__name__]
    return [len(data), _digest(_content(data[index]) for index in _few(len(data)))]


def _few(count: int) -> list[int]:
    """Return the indices of a few evenly spread rows among `count`."""
    return sorted({i * (count - 1) // (_ROWS - 1) for i in range(_ROWS)} if count else ())


def _stride(count: int, nchars: int) -> int:
    """Return the distance of rows that are read cheaply among `count` of `nchars` characters."""
    return max(-(-count // _CHEAP_ROWS), -(-count * nchars // _CHEAP_NCHARS), 1)


def _digest_of_rows(data: Any) -> str | None:
    """Return a digest of all rows, or of many evenly spread ones, if they can be read cheaply."""
    count = len(data) if hasattr(data, "__len__") else 0
    if isinstance(data, (list, tuple)):
        nchars = max((len(json.dumps(_content(data[i]))) for i in _few(count)), default=1)
        return _digest(_content(row) for row in data[:: _stride(count, nchars)])
    if hasattr(data, "with_format") and hasattr(data, "select") and hasattr(data, "features"):
        nchars = max(map(len, _arrow_batches(data.select(_few(count)), 1)), default=1)
        chosen = range(0, count, _stride(count, nchars))
        return _digest(_arrow_batches(data.select(chosen), max(1, min(1000, 2**24 // nchars))))
    return None


def _arrow_batches(data: Any, size: int) -> Iterator[str]:
    """Yield the rows of a ``datasets.Dataset`` in batches, without decoding images or sound."""
    for table in data.with_format("arrow").iter(batch_size=size):
        yield repr(table.to_pydict())


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _describe_function(function: Any) -> dict[str, Any]:
    """Describe a function or another object by its name, its source and its simple values.

    Libraries are known by name alone, so that another version of one does not end a run.
    """
    if isinstance(function, functools.partial):
        given = {str(i): value for i, value in enumerate(function.args)} | function.keywords
        return {**_describe_function(function.func), "given": _simple(given)}
    named = function if hasattr(function, "__qualname__") else type(function)
    code = inspect.unwrap(named, stop=_wraps_no_function)
    found = {"name": f"{code.__module__}.{code.__qualname__}", "source": _source(code)}
    if named is function:
        cells = getattr(code, "__closure__", None) or ()
        names = code.__code__.co_freevars if cells else ()
        values = {n: c.cell_contents for n, c in zip(names, cells, strict=True) if _is_set(c)}
        return {**found, "values": _simple(values)}
    return {**found, "values": _simple(getattr(function, "__dict__", {}))}


def _source(code: Any) -> str | None:
    """Return a digest of a function's or class's source; None if it has none that can be read."""
    if str(code.__module__).partition(".")[0] in _LIBRARIES:
        return "library"
    if code.__qualname__.endswith("<lambda>"):  # its lines have what stands beside it, too
        return None
    try:
        return _digest([inspect.getsource(code)])
    except (OSError, TypeError):  # made by exec, or in C
        return None


def _wraps_no_function(function: Any) -> bool:
    """Return whether what `function` wraps is not a function, but for example a partial."""
    return not hasattr(function.__wrapped__, "__qualname__")


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _simple(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and texts among `values`; NaN as a text, since it equals nothing."""
    simple = {str(name): value for name, value in values.items() if isinstance(value, _SIMPLE)}
    return {name: value if value == value else "nan" for name, value in simple.items()}


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
