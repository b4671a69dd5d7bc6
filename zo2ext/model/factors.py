"""Which tensors have factored directions, and where the factors of a part rest in flat memory.

Along a factored direction a tensor of shape [..., m, n] moves by ``U @ V.mT / sqrt(rank)``. U rests
as [..., rank, m] and V as [..., rank, n], side by side for all tensors of a part; see
docs/contracts.md, "Factored directions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn

from zo2ext import ops
from zo2ext.model.factored import Factored
from zo2ext.ops.tables import SEGMENT_ALIGNMENT, align


class StandIn:
    """Object that a model reads instead of `parameter`; a `Target`.

    Attributes:
        data: A `Factored`, a `Joined`, or any other tensor while the parameter itself is read.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.data: Any = parameter

    @property
    def shown(self) -> Tensor | None:
        """The tensor to read instead of the parameter; None: the parameter itself."""
        if isinstance(self.data, Joined):
            return self.data.of_this_pass()
        return self.data if type(self.data) is Factored else None


class JoinedPasses:
    """Forward passes that run as one batch, by ``torch.func.vmap`` over their numbers.

    Attributes:
        number: Number of the pass that runs, as vmap has it; None outside of passes.
    """

    def __init__(self) -> None:
        self.number: Tensor | None = None


class Joined:
    """A tensor per pass that joined passes read instead of a parameter.

    Args:
        passes: The passes.
        of_pass: Returns what the pass of a number reads.
    """

    def __init__(self, passes: JoinedPasses, of_pass: Callable[[Tensor], Tensor]) -> None:
        self._passes, self._of_pass = passes, of_pass

    def of_this_pass(self) -> Tensor | None:
        """Return what the pass that runs reads; None outside of passes."""
        number = self._passes.number
        return None if number is None else self._of_pass(number)


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
        """Return U in `memory`, shape (rows, flat left factors); shape [rows, ..., m, rank]."""
        return self._view(memory, self.left, self.shape[-2])

    def right_view(self, memory: Tensor) -> Tensor:
        """Return V in `memory`, shape (rows, flat right factors); shape [rows, ..., n, rank]."""
        return self._view(memory, self.right, self.shape[-1])

    def _view(self, memory: Tensor, begin: int, rows: int) -> Tensor:
        columns = memory[:, begin : begin + self.stack * self.rank * rows]
        factor: Tensor = columns.unflatten(1, (*self.shape[:-2], self.rank, rows))
        return factor.mT


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
            left = align(left + tensors[-1].left_numel, SEGMENT_ALIGNMENT)
            right = align(right + tensors[-1].right_numel, SEGMENT_ALIGNMENT)
        return FactorPlaces(tuple(tensors), tuple(ids), rank, left, right)

    def left_segments(self) -> list[ops.Segment]:
        """Return the segments of the left factors' noise."""
        return self._segments([(t.left, t.left_numel) for t in self.tensors])

    def right_segments(self) -> list[ops.Segment]:
        """Return the segments of the right factors' noise."""
        return self._segments([(t.right, t.right_numel) for t in self.tensors])

    def _segments(self, places: list[tuple[int, int]]) -> list[ops.Segment]:
        return [
            ops.Segment(begin, numel, id_, decays=False)
            for (begin, numel), id_ in zip(places, self.ids, strict=True)
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
