"""Which tensors have factored directions, and where the factors of a part rest in flat memory.

Along a factored direction a tensor of shape [..., m, n] moves by ``U @ V.mT / sqrt(rank)``. U rests
as [..., rank, m] and V as [..., rank, n], side by side for all tensors of a part; see
docs/contracts.md, "Factored directions".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Size, Tensor, nn

from zo2ext import ops

_ALIGNMENT = 128  # elements, as of segments


class StandIn:
    """What a model reads instead of `parameter` where its direction is in factors; a `Target`.

    Attributes:
        data: A `Factored`, or any other tensor while the parameter itself is to be read.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.data: Tensor = parameter


@dataclass(frozen=True)
class FactoredTensor:
    """The places of one tensor's factors: elements of the memory of all left or right factors."""

    shape: Size
    rank: int
    left: int
    right: int

    @property
    def stack(self) -> int:
        """Number of matrices."""
        return math.prod(self.shape[:-2])

    @property
    def left_numel(self) -> int:
        return self.stack * self.rank * self.shape[-2]

    @property
    def right_numel(self) -> int:
        return self.stack * self.rank * self.shape[-1]

    def left_view(self, memory: Tensor) -> Tensor:
        """Return U in `memory`, the flat left factors of one direction; shape [..., m, rank]."""
        flat = memory[self.left : self.left + self.left_numel]
        return flat.view(*self.shape[:-2], self.rank, self.shape[-2]).mT

    def right_view(self, memory: Tensor) -> Tensor:
        """Return V in `memory`, the flat right factors of one direction; shape [..., n, rank]."""
        flat = memory[self.right : self.right + self.right_numel]
        return flat.view(*self.shape[:-2], self.rank, self.shape[-1]).mT


@dataclass(frozen=True)
class FactorPlaces:
    """The factors' places of several tensors. Sizes in elements, for one direction."""

    tensors: tuple[FactoredTensor, ...]
    ids: tuple[int, ...]
    rank: int
    left_numel: int
    right_numel: int

    @staticmethod
    def of(shapes: Sequence[Size], ids: Sequence[int], rank: int) -> FactorPlaces:
        """Place the factors of tensors of `shapes`, whose ids are `ids`."""
        tensors, left, right = [], 0, 0
        for shape in shapes:
            tensors.append(FactoredTensor(shape, rank, left, right))
            left = _aligned(left + tensors[-1].left_numel)
            right = _aligned(right + tensors[-1].right_numel)
        return FactorPlaces(tuple(tensors), tuple(ids), rank, left, right)

    def left_segments(self) -> list[ops.Segment]:
        """Return the segments of the left factors' noise."""
        return [
            ops.Segment(t.left, t.left_numel, id_, decays=False)
            for t, id_ in zip(self.tensors, self.ids, strict=True)
        ]

    def right_segments(self) -> list[ops.Segment]:
        """Return the segments of the right factors' noise."""
        return [
            ops.Segment(t.right, t.right_numel, id_, decays=False)
            for t, id_ in zip(self.tensors, self.ids, strict=True)
        ]

    def fold_segments(self, begins: Sequence[int]) -> list[ops.FoldSegment]:
        """Return the segments of a fold into a slab in which the tensors begin at `begins`."""
        return [
            ops.FoldSegment(
                begin=begin,
                numel=t.shape.numel(),
                tensor_id=id_,
                rows=t.shape[-2],
                columns=t.shape[-1],
                left_begin=t.left,
                right_begin=t.right,
            )
            for t, id_, begin in zip(self.tensors, self.ids, begins, strict=True)
        ]


def _aligned(value: int) -> int:
    return -(-value // _ALIGNMENT) * _ALIGNMENT
