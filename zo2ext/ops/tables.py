"""The tables that a fused pass reads: segments, updates, directions."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext.ops.launch import Rounding, check_float32, check_integer, check_offset, code_of
from zo2ext.ops.packing import GROUP

_SEGMENT_ROW = struct.Struct("=qqqII")


_UPDATE_ROW = struct.Struct("=QffQiI")


_CHECKED = "_zo2ext_checked"  # attribute of a segment table: a _Checked


class _Checked(NamedTuple):
    """What is known of the rows of a segment table, which a GPU keeps to itself."""

    end: int
    """Of the last segment."""
    grouped: bool
    """Whether all offsets are multiples of GROUP."""


_ROUND_FIRST = {Rounding.NEAREST: 1, Rounding.STOCHASTIC: 2, None: 0}  # as kernels.h has them


@dataclass(frozen=True)
class Segment:
    """One tensor, or a slice of one, in a slab."""

    begin: int
    """Its first element in the slab; a multiple of 128."""
    numel: int
    """Elements."""
    tensor_id: int
    """Position in ``named_parameters()``, tied weights counted once."""
    decays: bool = True
    """Whether weight decay applies."""
    offset: int = 0
    """Index of its first element within the tensor; a multiple of 4, and of 32 in float8."""


@dataclass(frozen=True)
class Update:
    """A pending update: ``w <- w * decay - coefficient * z``, ``decay`` where segments decay."""

    key: int
    """Of the direction."""
    coefficient: float
    """``lr * projected_grad / directions``; rounded to float32."""
    decay: float = 1.0
    """``1 - lr * weight_decay``, and 1 after the first direction of a step; rounded to float32."""
    round_first: Rounding | None = None
    """How the weights are rounded to storage before this update: a write-back was due there."""
    rounding_key: int = 0
    """Of that rounding, where it is stochastic, ``0 <= rounding_key < 2**64``."""


class Direction(NamedTuple):
    """A direction to perturb along, and where the perturbed weights go."""

    key: int
    """Of the direction."""
    eps: float
    """Perturbation scale, in the weights' own units; positive."""
    plus: Tensor | None = None
    """Receives ``w + eps * z``: shape (numel,) of the slab, compute dtype."""
    minus: Tensor | None = None
    """Receives ``w - eps * z``: the same."""


def segment_table(segments: Iterable[Segment], device: torch.device | str = "cpu") -> Tensor:
    """Segments packed for `update_perturb`, to be made once and kept.

    Args:
        segments: In the order of `begin`, not overlapping.
        device: Where the slab lives. A CUDA table holds device memory.

    Returns:
        Shape ``(n, 4)``, int64, one packed row a segment.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of range, or segments overlap or are not in order.
    """
    rows = bytearray()
    end, grouped = 0, True
    for i, s in enumerate(segments):
        name = f"segments[{i}]"
        begin, numel = (
            check_integer(f"{name}.begin", s.begin, 63),
            check_integer(f"{name}.numel", s.numel, 63),
        )
        tensor_id = check_integer(f"{name}.tensor_id", s.tensor_id, 32)
        offset = check_offset(s.offset, f"{name}.offset")
        if begin % 128:
            raise ValueError(f"{name}.begin must be a multiple of 128, got {begin}")
        if begin < end:
            raise ValueError(
                f"{name}.begin is {begin}, inside the segment before it, which ends at {end}"
            )
        end, grouped = begin + numel, grouped and offset % GROUP == 0
        if max(end, offset + numel) >= 2**63:
            raise ValueError(
                f"{name} ends past the counter's range, 2**63 - 1: begin {begin}, offset {offset}, "
                f"numel {numel}"
            )
        rows += _SEGMENT_ROW.pack(begin, numel, offset, tensor_id, bool(s.decays))
    table = _table(rows, 4).to(device)
    setattr(table, _CHECKED, _Checked(end, grouped))
    return table


def update_table(updates: Iterable[Update], device: torch.device | str = "cpu") -> Tensor:
    """Updates packed for `update_perturb`, in the order in which they apply.

    Args:
        updates: Any number.
        device: Where the slab lives.

    Returns:
        Shape ``(n, 4)``, int64, one packed row an update. On CUDA its upload is queued on the
        current stream, and not waited for.

    Raises:
        TypeError: A key is not an integer, or `round_first` no `Rounding`.
        ValueError: A key is out of range, or a coefficient or decay is no finite float32.
    """
    rows = bytearray()
    for i, u in enumerate(updates):
        rows += _UPDATE_ROW.pack(
            check_integer(f"updates[{i}].key", u.key, 64),
            check_float32(f"updates[{i}].coefficient", u.coefficient),
            check_float32(f"updates[{i}].decay", u.decay),
            check_integer(f"updates[{i}].rounding_key", u.rounding_key, 64),
            code_of(f"updates[{i}].round_first", u.round_first, _ROUND_FIRST),
            0,
        )
    table = _table(rows, 4)
    if torch.device(device).type != "cuda":
        return table.to(device)
    # From page-locked memory, so that the host does not wait; torch keeps that until it is read.
    return table.pin_memory().to(device, non_blocking=True)


def _table(rows: bytearray, columns: int) -> Tensor:
    if not rows:
        return torch.empty((0, columns), dtype=torch.int64)
    return torch.frombuffer(rows, dtype=torch.int64).view(-1, columns)


def checked_table(segments: Tensor) -> _Checked:
    """What is known of a CUDA table.

    A table that was moved to the device after it was made is read back, once.
    """
    checked: _Checked | None = getattr(segments, _CHECKED, None)
    if checked is None:
        rows = segments.cpu().contiguous()
        unpacked = _SEGMENT_ROW.iter_unpack(rows.numpy().tobytes())
        table = segment_table(
            Segment(begin, numel, tensor_id, bool(decays), offset)
            for begin, numel, offset, tensor_id, decays in unpacked
        )
        checked = getattr(table, _CHECKED)
        setattr(segments, _CHECKED, checked)
    return checked
