"""Add directions that are held as factors to a slab of weights."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext._choices import Rounding
from zo2ext.ops._extension import _C
from zo2ext.ops.launch import ROUNDING_CODES, check_float32, check_integer, code_of, launch
from zo2ext.ops.packing import GROUP, scale_bytes
from zo2ext.ops.tables import Segment, check_fits, segment_row, table_of

_FACTORS = struct.Struct("=qqqq")  # FoldSegment in csrc/kernels.h, behind a Segment
_ROW = struct.Struct("=qqqIIqqqq")
_COLUMNS = _ROW.size // 8
_CHECKED = "_zo2ext_checked_fold"  # attribute of a fold table: a _Checked


class _Factors(NamedTuple):
    """Place of one segment's factors, left and right: the begin, and the length per rank."""

    left_begin: int
    left_length: int
    right_begin: int
    right_length: int


class _Checked(NamedTuple):
    """Properties of a fold table, to check one without reading it."""

    end: int  # of the last segment
    grouped: bool  # whether all offsets are multiples of GROUP
    factors: list[_Factors]


@dataclass(frozen=True, kw_only=True)
class FoldSegment(Segment):
    """One tensor in factors, or a slice of one, in a slab; `numel` and `offset` may cut its rows.

    Attributes:
        rows: Number of rows m of the tensor, which has shape ``(..., m, n)``; below ``2**31``.
        columns: Number of columns n; below ``2**31``. A GPU is fastest at multiples of 4, and at
            multiples of 32 in float8.
        left_begin: Index in a row of `left` where the whole tensor's U begins, of shape
            ``(matrices, rank, m)``; `matrices` is the product of the leading dimensions.
        right_begin: Index in a row of `right` where its V begins, of shape ``(matrices, rank, n)``.
            A GPU is fastest at multiples of 4.
    """

    rows: int
    columns: int
    left_begin: int
    right_begin: int


def fold_table(segments: Iterable[FoldSegment], device: torch.device | str = "cpu") -> Tensor:
    """Pack segments for `fold`. Make a table once and keep it.

    Args:
        segments: Segments in the order of `begin`, not overlapping.
        device: Device of the slab.

    Returns:
        A table of shape ``(n, 8)``, int64, one packed row per segment.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of range, or segments overlap or are not in order.
    """
    rows = bytearray()
    end, grouped, factors = 0, True, []
    for i, s in enumerate(segments):
        name = f"segments[{i}]"
        rows += segment_row(name, s, end)
        for field in ("rows", "columns"):
            if check_integer(f"{name}.{field}", getattr(s, field), 31) == 0:
                raise ValueError(f"{name}.{field} must be at least 1, got 0")
        left_begin = check_integer(f"{name}.left_begin", s.left_begin, 63)
        right_begin = check_integer(f"{name}.right_begin", s.right_begin, 63)
        rows += _FACTORS.pack(s.rows, s.columns, left_begin, right_begin)
        end, grouped = s.begin + s.numel, grouped and s.offset % GROUP == 0
        matrices = -(-(s.offset + s.numel) // (s.rows * s.columns))
        factors.append(_Factors(left_begin, matrices * s.rows, right_begin, matrices * s.columns))
    table = table_of(rows, _COLUMNS).to(device)
    setattr(table, _CHECKED, _Checked(end, grouped, factors))
    return table


def fold(
    stored: Tensor,
    *,
    segments: Tensor,
    left: Tensor,
    right: Tensor,
    rank: int,
    decay: float = 1.0,
    scales: Tensor | None = None,
    low: Tensor | None = None,
    plain: Tensor | None = None,
    write_back: Rounding | None = None,
    rounding_key: int = 0,
) -> None:
    """Add directions in factors, ``U^T V`` each, to a slab, and write it back, in one pass.

    For the element in row i and column j of matrix s of each segment, in float32: unpack it;
    multiply it by `decay` if the segment decays; for each direction in order, and in it for each q
    below `rank` in order, add ``U[s, q, i] * V[s, q, j]`` by a fused multiply-add; with
    `write_back`, round to the storage dtype, store, and continue from the rounded value; then write
    the weight to `plain`, rounded to nearest. Elements outside the segments are neither read nor
    written. Coefficients, and ``1 / sqrt(rank)``, have to be in the factors already.

    Args:
        stored: Slab, shape ``(numel,)``, contiguous, in the storage dtype: float32, bfloat16,
            float16 or float8_e4m3fn. Written only with `write_back`.
        segments: Table from `fold_table`, on the slab's device. In float8 every
            `FoldSegment.offset` is a multiple of 32.
        left: Left factors U, shape ``(directions, left_numel)``, contiguous, float32, on the slab's
            device. There may be 0 directions.
        right: Right factors V, shape ``(directions, right_numel)``, in the same way.
        rank: Rank of a direction in each matrix, at least 1.
        decay: Factor of weights in segments that decay; rounded to float32.
        scales: Scales of a float8 slab, as in `update_perturb`. Written with `stored`.
        low: Low plane of a slab in the split format, as in `update_perturb`. Written with `stored`.
        plain: Output for the weights: shape ``(numel,)``, float32, bfloat16 or float16. It may be
            `stored` itself, if nothing is written back.
        write_back: Rounding to storage; None leaves `stored` unchanged.
        rounding_key: Key of stochastic rounding, ``0 <= rounding_key < 2**64``. The words are those
            of `update_perturb`.

    On CUDA the work is queued on the current stream and not waited for. All tensors, tables
    included, must live until the stream is past; torch's allocator ensures that for tensors that
    were allocated on it.

    Raises:
        TypeError: There is no kernel for a dtype.
        ValueError: Shapes, devices or tables do not match, factors are shorter than the segments
            need, memory overlaps, or an argument is out of range.
        RuntimeError: `stored` is on a GPU and this build has no CUDA kernels.

    Source:
        Low-rank directions as in EGGROLL, arXiv:2511.16652; updates that are collected in U while V
        stays, as in LOZO, arXiv:2410.07698.

    Example:
        >>> segment = FoldSegment(0, 512, 7, rows=16, columns=32, left_begin=0, right_begin=0)
        >>> slab, left, right = torch.zeros(512), torch.ones(1, 16), torch.ones(1, 32)
        >>> fold(slab, segments=fold_table([segment]), left=left, right=right, rank=1,
        ...      write_back=Rounding.NEAREST)
    """
    if check_integer("rank", rank, 31) == 0:
        raise ValueError("rank must be at least 1, got 0")
    _check_table(segments, stored, scales, left, right, rank)
    launch(
        _C.fold,
        stored,
        (
            stored,
            scale_bytes(scales),
            low,
            segments,
            left,
            right,
            rank,
            check_float32("decay", decay),
            plain,
            None if write_back is None else code_of("write_back", write_back, ROUNDING_CODES),
            check_integer("rounding_key", rounding_key, 64),
        ),
    )


def _check_table(
    segments: Tensor, stored: Tensor, scales: Tensor | None, left: Tensor, right: Tensor, rank: int
) -> None:
    """Check that the segments lie in the slab, and their factors in `left` and `right`.

    A table that was copied or moved after it was made is read back once. Tensors of other dtypes
    and shapes are left to the binding, which names them.
    """
    if segments.dtype != torch.int64 or segments.dim() != 2 or segments.size(1) != _COLUMNS:
        return
    checked: _Checked | None = getattr(segments, _CHECKED, None)
    if checked is None:
        rows = _ROW.iter_unpack(segments.cpu().contiguous().numpy().tobytes())
        table = fold_table(
            FoldSegment(
                begin,
                numel,
                tensor_id,
                bool(decays),
                offset,
                rows=m,
                columns=n,
                left_begin=left_begin,
                right_begin=right_begin,
            )
            for begin, numel, offset, tensor_id, decays, m, n, left_begin, right_begin in rows
        )
        checked = getattr(table, _CHECKED)
        setattr(segments, _CHECKED, checked)
    check_fits(checked.end, checked.grouped, stored, scales)
    if left.dim() != 2 or right.dim() != 2:
        return
    for i, f in enumerate(checked.factors):
        ends = {
            "left": (f.left_begin + rank * f.left_length, left.size(1)),
            "right": (f.right_begin + rank * f.right_length, right.size(1)),
        }
        for name, (end, numel) in ends.items():
            if end > numel:
                raise ValueError(
                    f"{name} has {numel} elements per direction, but the factors of segments[{i}] "
                    f"end at {end} with rank {rank}"
                )
