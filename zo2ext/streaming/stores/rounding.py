"""Round weights to storage, and measure the error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.ops.formats import Planes
from zo2ext.streaming.stores.sources import PIECE_NBYTES, Source


@dataclass
class RoundingError:
    """Error of storing weights in another format.

    Attributes:
        beyond: Number of finite weights beyond the format's range. They became infinite or, in a
            format with scales, its largest value.
        squares, error_squares: Sums of the squares of all other finite weights, and of their
            errors.
    """

    beyond: int = 0
    squares: float = 0.0
    error_squares: float = 0.0

    def __iadd__(self, other: RoundingError) -> RoundingError:
        self.beyond += other.beyond
        self.squares += other.squares
        self.error_squares += other.error_squares
        return self

    @property
    def relative(self) -> float:
        """2-norm of the error divided by that of the weights."""
        return math.sqrt(self.error_squares / self.squares) if self.squares else 0.0

    def __str__(self) -> str:
        text = f"relative error {self.relative:.2g}"
        return f"{text}, {self.beyond} weights beyond its range" if self.beyond else text


def read_rounded(source: Source, first: int, planes: Planes) -> RoundingError:
    """Fill `planes` with the values of `source` from `first` on, rounded to nearest."""
    error = RoundingError()
    if planes.scales is None and source.dtype == planes.stored.dtype:
        source.read(first, planes.stored)
        return error
    for begin, count in _pieces(planes.stored.numel()):
        values = torch.empty(count, dtype=source.dtype)
        source.read(first + begin, values)
        piece = planes.elements(begin, count)
        if planes.scales is None:
            piece.stored.copy_(values)
        else:
            packed = ops.pack_scaled(values.float(), split=planes.low is not None)
            piece.copy_(Planes(packed.stored, packed.scales, packed.low))
        error += rounding_error(values, piece.values(), _largest(planes))
    return error


def rounding_error(before: Tensor, after: Tensor, largest: float = math.inf) -> RoundingError:
    """Return the error of rounding the weights `before` to `after`, which has the same shape.

    Args:
        before, after: The weights.
        largest: Largest value of the format.
    """
    wide, moved = before.double(), after.double()
    finite = wide.isfinite()
    within = finite & moved.isfinite() & (wide.abs() <= largest)
    return RoundingError(
        int(finite.sum() - within.sum()),
        float(wide[within].square().sum()),
        float((moved - wide)[within].square().sum()),
    )


def _largest(planes: Planes) -> float:
    """Return the largest value of the format; see docs/contracts.md, "Scale"."""
    if planes.scales is None:
        return math.inf
    eps = torch.finfo(planes.stored.dtype).eps / (1 if planes.low is None else 256)
    return (2 - eps) * 2.0**127


def _pieces(numel: int) -> Iterator[tuple[int, int]]:
    step = PIECE_NBYTES // torch.float32.itemsize
    for begin in range(0, numel, step):
        yield begin, min(step, numel - begin)
