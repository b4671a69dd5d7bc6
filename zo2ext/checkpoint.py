"""Ordinary transformers checkpoints of an offloaded model, written one unit at a time.

transformers decides what a checkpoint holds (names, conversions, shards, settings); the weights
themselves are brought to the host, converted and written unit by unit, to the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from zo2ext.files import replace_folder
from zo2ext.formats import RoundingError, rounding_error

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
Values = Callable[[list[nn.Parameter]], list[Tensor]]
Groups = Iterable[Iterable[nn.Parameter]]


@dataclass(frozen=True)
class _Shard:
    """A file to be: its name, what comes before the tensors, and where each tensor begins."""

    name: str
    opening: bytes
    offsets: dict[str, int]  # into the file


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
    source = _source(model)
    for part in _plan(source, groups):
        _real(source, part, values)


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
    source = _source(model)
    whole = _reverted(model, cast(_metas(source, source)))
    plan = _plan(source, groups)
    parts: State = {}
    for part in plan:
        parts |= _reverted(model, cast(_metas(source, part)))
    if _described(parts) == _described(whole):
        with _failing_to_write(folder):
            _write(model, new, whole, source, plan, values, cast, max_shard_size)
    else:
        logger.warning(
            "%s joins weights of several units in its checkpoints: all are brought to memory",
            type(model).__name__,
        )
        state = None if cast.dtype is None else cast(model.state_dict())
        model.save_pretrained(new, state_dict=state, max_shard_size=max_shard_size)


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from a checkpoint's.

    Attributes:
        name: In the checkpoint.
        what: In words.
        count, largest: Elements that are not the same bits, and the largest distance of two; zero
            where one side lacks the tensor, or it has another shape or dtype.
    """

    name: str
    what: str
    count: int = 0
    largest: float = 0.0


def compare_checkpoint(
    model: Any, folder: str | Path, values: Values, groups: Groups
) -> list[Difference]:
    """How a checkpoint differs from the model, bit by bit, one group of weights in memory.

    Args:
        model, values, groups: As for `save_checkpoint`.
        folder: The checkpoint, as safetensors.

    Raises:
        ValueError: There are no weights as safetensors in `folder`.
    """
    files = {
        name: file
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name in _header_of(file)
        if name != "__metadata__"
    }
    if not files:
        raise ValueError(f"{folder} has no weights as safetensors")
    found, differences = set[str](), []
    source = _source(model)
    for part in _plan(source, groups):
        for name, tensor in _reverted(model, _real(source, part, values)).items():
            found.add(name)
            if name not in files:
                differences.append(Difference(name, "is missing in the checkpoint"))
                continue
            with safe_open(files[name], framework="pt") as file:
                differences += _compared(name, file.get_tensor(name), tensor)
    extra = [Difference(n, "is in the checkpoint alone") for n in files if n not in found]
    return differences + extra


def _compared(name: str, there: Tensor, here: Tensor) -> list[Difference]:
    if (there.shape, there.dtype) != (here.shape, here.dtype):
        return [
            Difference(
                name,
                f"is {there.dtype} {tuple(there.shape)} in the checkpoint, "
                f"{here.dtype} {tuple(here.shape)} here",
            )
        ]
    if torch.equal(_bytes(there), _bytes(here)):
        return []
    size = there.element_size()
    count = int((_bytes(there).view(-1, size) != _bytes(here).view(-1, size)).any(1).sum())
    largest = float((there.double() - here.double()).abs().max())
    what = f"differs in {count} of {there.numel()} elements, by up to {largest:.3g}"
    return [Difference(name, what, count, largest)]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1)


def _header_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        size = stream.read(8)
        return _header(size + stream.read(int.from_bytes(size, "little")))


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
    shards: dict[str, _Shard] = {}  # by name of the tensor
    for file, members in split.filename_to_tensors.items():
        shards |= dict.fromkeys(members, _plan_shard(file, {n: whole[n] for n in members}))
    with ExitStack() as stack:
        files: dict[str, int] = {}
        for shard in shards.values():
            if shard.name not in files:
                handle = os.open(folder / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                stack.callback(os.close, handle)
                files[shard.name] = handle
                _write_all(handle, shard.opening, 0)
        for part in tqdm(plan, desc="Saving", unit="unit", leave=False, dynamic_ncols=True):
            _write_tensors(_reverted(model, cast(_real(source, part, values))), shards, files)
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


def _write_tensors(state: State, shards: Mapping[str, _Shard], files: Mapping[str, int]) -> None:
    for name, tensor in state.items():
        shard = shards[name]
        _write_all(files[shard.name], _bytes(tensor).numpy(), shard.offsets[name])


def _write_all(handle: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _plan_shard(name: str, tensors: State) -> _Shard:
    """safetensors' own layout: its order, which dtype and name decide, and its header."""
    empty = {n: torch.empty(0, dtype=t.dtype) for n, t in tensors.items()}
    header = _header(serialize(empty, {"format": "pt"}))
    entries: dict[str, Any] = {"__metadata__": header.pop("__metadata__")}
    end, begins = 0, {}
    for key, entry in header.items():
        begins[key], begin = end, end
        end += tensors[key].numel() * tensors[key].element_size()
        entries[key] = {
            "dtype": entry["dtype"],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    opening = len(text).to_bytes(8, "little") + text
    return _Shard(name, opening, {n: len(opening) + b for n, b in begins.items()})


def _header(serialized: bytes) -> dict[str, Any]:
    size = int.from_bytes(serialized[:8], "little")
    header: dict[str, Any] = json.loads(serialized[8 : 8 + size])
    return header


def _source(model: Any) -> State:
    """What a checkpoint is made of, in the order of ``state_dict``: parameters, tied ones once, and
    persistent buffers."""
    ignored = model._keys_to_ignore_on_save or ()
    state: State = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters}
        own |= {n: b for n, b in module._buffers.items() if _is_persistent(module, n)}
        for name, tensor in own.items():
            full = f"{prefix}.{name}" if prefix else name
            if tensor is not None and full not in ignored:
                state[full] = tensor
    metas = _metas(state, state)
    unread: Any = _Unread(model, state)
    kept = remove_tied_weights_from_state_dict(metas, unread)
    return {name: state[name] for name in kept}


def _is_persistent(module: nn.Module, buffer: str) -> bool:
    return buffer not in module._non_persistent_buffers_set


class _Unread:
    """`model`, whose parameters can be looked up without being loaded."""

    def __init__(self, model: Any, state: State) -> None:
        self._model, self._state = model, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self._state[name]


def _plan(source: State, groups: Groups) -> list[list[str]]:
    """The names in `source` of each group, and of what is in none."""
    group_of = {id(p): i for i, group in enumerate(groups) for p in group}
    plan: dict[int, list[str]] = {}
    for name, tensor in source.items():
        plan.setdefault(group_of.get(id(tensor), -1), []).append(name)
    return list(plan.values())


def _real(source: State, part: list[str], values: Values) -> State:
    parameters = {n: p for n in part if isinstance(p := source[n], nn.Parameter)}
    tensors = values(list(parameters.values())) if parameters else []
    real = dict(zip(parameters, tensors, strict=True))
    return {name: real[name] if name in real else source[name].cpu() for name in part}


def _described(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def _metas(state: State, names: Iterable[str]) -> State:
    """What tensors of `state` look like, without memory."""
    return {
        name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta")
        for name in names
    }


def _reverted(model: Any, state: State) -> State:
    reverted: State = revert_weight_conversion(model, state)
    return reverted
