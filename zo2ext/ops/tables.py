"""The tables that a fused pass reads: segments, updates, directions."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext._choices import Rounding
from zo2ext.ops.launch import check_float32, check_integer, check_offset, code_of
from zo2ext.ops.packing import GROUP

_SEGMENT_ROW = struct.Struct("=qqqII")  # Segment and Update in csrc/kernels.h
_UPDATE_ROW = struct.Struct("=QffQiI")
_CHECKED = "_zo2ext_checked"  # attribute of a segment table: a _Checked


class _Checked(NamedTuple):
    """Properties of a segment table, to check one in device memory without reading it."""

    end: int  # of the last segment
    grouped: bool  # whether all offsets are multiples of GROUP


_ROUND_FIRST = {Rounding.NEAREST: 1, Rounding.STOCHASTIC: 2, None: 0}  # RoundFirst in kernels.h


SEGMENT_ALIGNMENT = 128  # elements


def align(value: int, to: int) -> int:
    """Return `value` rounded up to a multiple of `to`."""
    return -(-value // to) * to


@dataclass(frozen=True)
class Segment:
    """One tensor, or a slice of one, in a slab.

    Attributes:
        begin: Index of its first element in the slab; a multiple of 128.
        numel: Number of elements.
        tensor_id: Position of the tensor in ``named_parameters()``, where tied weights occur once.
        decays: Whether weight decay applies.
        offset: Index of its first element within the tensor; a multiple of 4, or of 32 in float8.
    """

    begin: int
    numel: int
    tensor_id: int
    decays: bool = True
    offset: int = 0


@dataclass(frozen=True)
class Update:
    """A pending update: ``w <- w * decay - coefficient * z``; `decay` in segments that decay.

    Attributes:
        key: Key of the direction.
        coefficient: ``lr * projected_grad / directions``; rounded to float32.
        decay: ``1 - lr * weight_decay`` for the first direction of a step, 1 for the others;
            rounded to float32.
        round_first: How to round the weights to storage before this update, because a write-back
            was due; None: not at all.
        rounding_key: Key of that rounding if it is stochastic, ``0 <= rounding_key < 2**64``.
    """

    key: int
    coefficient: float
    decay: float = 1.0
    round_first: Rounding | None = None
    rounding_key: int = 0


class Direction(NamedTuple):
    """A direction to perturb along, and the outputs for the perturbed weights.

    Attributes:
        key: Key of the direction.
        eps: Perturbation scale, in the units of the weights; positive.
        plus: Output for ``w + eps * z``: shape ``(numel,)`` of the slab, compute dtype; or None.
        minus: Output for ``w - eps * z``, in the same way.
    """

    key: int
    eps: float
    plus: Tensor | None = None
    minus: Tensor | None = None


def segment_table(segments: Iterable[Segment], device: torch.device | str = "cpu") -> Tensor:
    """Pack segments for `update_perturb`. Make a table once and keep it.

    Args:
        segments: Segments in the order of `begin`, not overlapping.
        device: Device of the slab.

    Returns:
        A table of shape ``(n, 4)``, int64, one packed row per segment.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of range, or segments overlap or are not in order.
    """
    rows = bytearray()
    end, grouped = 0, True
    for i, s in enumerate(segments):
        rows += segment_row(f"segments[{i}]", s, end)
        end, grouped = s.begin + s.numel, grouped and s.offset % GROUP == 0
    table = table_of(rows, 4).to(device)
    setattr(table, _CHECKED, _Checked(end, grouped))
    return table


def segment_row(name: str, segment: Segment, end: int) -> bytes:
    """Check a segment, called `name`, and pack it.

    Args:
        end: End of the segment before it in the slab.
    """
    begin = check_integer(f"{name}.begin", segment.begin, 63)
    numel = check_integer(f"{name}.numel", segment.numel, 63)
    tensor_id = check_integer(f"{name}.tensor_id", segment.tensor_id, 32)
    offset = check_offset(segment.offset, f"{name}.offset")
    if begin % SEGMENT_ALIGNMENT:
        raise ValueError(f"{name}.begin must be a multiple of {SEGMENT_ALIGNMENT}, got {begin}")
    if begin < end:
        raise ValueError(
            f"{name}.begin is {begin}, inside the segment before it, which ends at {end}"
        )
    if max(begin, offset) + numel >= 2**63:
        raise ValueError(
            f"{name} ends past the counter's range, 2**63 - 1: begin {begin}, offset {offset}, "
            f"numel {numel}"
        )
    return _SEGMENT_ROW.pack(begin, numel, offset, tensor_id, bool(segment.decays))


def check_fits(end: int, grouped: bool, stored: Tensor, scales: Tensor | None) -> None:
    """Check a table's end, and whether its offsets are multiples of `GROUP`, against a slab."""
    if end > stored.numel():
        raise ValueError(
            f"segments end at {end}, beyond stored, which has {stored.numel()} elements"
        )
    if scales is not None and not grouped:
        raise ValueError(f"with scales, offsets of segments must be multiples of {GROUP}")


def update_table(updates: Iterable[Update], device: torch.device | str = "cpu") -> Tensor:
    """Pack updates for `update_perturb`.

    Args:
        updates: Updates in the order in which they apply.
        device: Device of the slab.

    Returns:
        A table of shape ``(n, 4)``, int64, one packed row per update. On CUDA its upload is queued
        on the current stream and not waited for.

    Raises:
        TypeError: A key is not an integer, or `round_first` is not a `Rounding`.
        ValueError: A key is out of range, or a coefficient or decay is not a finite float32.
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
    table = table_of(rows, 4)
    if torch.device(device).type != "cuda":
        return table.to(device)
    # From page-locked memory, so that the host does not wait; torch keeps it until it was read.
    return table.pin_memory().to(device, non_blocking=True)


def table_of(rows: bytearray, columns: int) -> Tensor:
    """Return packed rows as a table of int64."""
    if not rows:
        return torch.empty((0, columns), dtype=torch.int64)
    return torch.frombuffer(rows, dtype=torch.int64).view(-1, columns)


def checked_table(segments: Tensor) -> _Checked:
    """Return the properties of a CUDA table.

    A table that was moved to the device after it was made is read back once.
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
