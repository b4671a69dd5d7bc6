"""The storage formats, and the planes of memory that each consists of.

    fp32, bf16, fp16     one plane: the weights
    e4m3                 8 bits per weight, and a scale for each 32 weights
    split                the same as e4m3, and a low plane with 8 more bits of mantissa

docs/contracts.md, "Formats", defines the bits.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext import ops

_SCALES = torch.float8_e8m0fnu


class Storage(StrEnum):
    """A storage format.

    To add one, add a member, its dtype in `_DTYPES`, and its planes in `PlaneOffsets`, `Planes` and
    `ranges`; docs/extending.md lists the kernels that it needs.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    E4M3 = "e4m3"
    SPLIT = "split"

    @classmethod
    def of(cls, name: Storage | torch.dtype | str) -> Storage:
        """Return the format called `name`, or the one that stores in the dtype `name`.

        Raises:
            ValueError: There is no such format.
        """
        text = str(name).removeprefix("torch.")
        for member in cls:
            dtype = str(member.dtype).removeprefix("torch.")
            if text == member.value or (text == dtype and member is not cls.SPLIT):
                return member
        raise ValueError(
            f"a storage format is one of {', '.join(cls)}, or the torch dtype of one; got {name!r}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the plane with the weights, or of the top plane if there are two."""
        return _DTYPES[self]

    @property
    def scaled(self) -> bool:
        """Whether groups of 32 weights share a scale."""
        return self in (Storage.E4M3, Storage.SPLIT)

    @property
    def has_low(self) -> bool:
        """Whether there is a low plane."""
        return self is Storage.SPLIT

    @property
    def whole_dtype(self) -> torch.dtype:
        """Dtype that represents every weight of this format, up to the ends of float32's range."""
        return torch.float32 if self.scaled else self.dtype

    def nbytes(self, numel: int) -> int:
        """Return the bytes of all planes of `numel` weights."""
        scales = -(-numel // ops.GROUP) if self.scaled else 0
        return numel * (self.dtype.itemsize + self.has_low) + scales


_DTYPES = {
    Storage.FP32: torch.float32,
    Storage.BF16: torch.bfloat16,
    Storage.FP16: torch.float16,
    Storage.E4M3: torch.float8_e4m3fn,
    Storage.SPLIT: torch.float8_e4m3fn,
}

TRAINABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that trainable weights and forward passes may have."""


class PlaneOffsets(NamedTuple):
    """The first byte of each plane of a part in a slab."""

    stored: int
    scales: int
    low: int

    @classmethod
    def from_low(cls, storage: Storage, numel: int) -> PlaneOffsets:
        """Return the offsets of consecutive planes, the low one first: it can be left out."""
        stored = numel if storage.has_low else 0
        return cls(stored, stored + numel * storage.dtype.itemsize, 0)


class PlaneRange(NamedTuple):
    """The range of a slab that a plane occupies: `numel` of `dtype`, from byte `begin` on."""

    name: str
    dtype: torch.dtype
    begin: int
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def elements(self, first: int, count: int) -> PlaneRange:
        """Return the range of `count` weights from `first` on, a multiple of 32."""
        group = ops.GROUP if self.name == "scales" else 1
        begin = self.begin + first // group * self.dtype.itemsize
        return self._replace(begin=begin, numel=-(-count // group))


class Planes(NamedTuple):
    """Weights in a storage format, as flat tensors; see `ops.Packed`."""

    stored: Tensor
    scales: Tensor | None = None
    low: Tensor | None = None

    @classmethod
    def empty(cls, storage: Storage, numel: int) -> Planes:
        """Return uninitialized host memory for `numel` weights."""
        return cls(
            torch.empty(numel, dtype=storage.dtype),
            torch.empty(-(-numel // ops.GROUP), dtype=_SCALES) if storage.scaled else None,
            torch.empty(numel, dtype=torch.uint8) if storage.has_low else None,
        )

    def named(self) -> dict[str, Tensor]:
        """Return the planes that the format has, by name."""
        return {name: plane for name, plane in self._asdict().items() if plane is not None}

    def elements(self, first: int, count: int) -> Planes:
        """Return views of `count` weights from `first` on, a multiple of 32."""
        groups = slice(first // ops.GROUP, -(-(first + count) // ops.GROUP))
        return Planes(
            self.stored[first : first + count],
            None if self.scales is None else self.scales[groups],
            None if self.low is None else self.low[first : first + count],
        )

    def copy_(self, other: Planes) -> None:
        """Copy the bytes of `other`."""
        for mine, theirs in zip(self.named().values(), other.named().values(), strict=True):
            mine.copy_(theirs)

    def values(self) -> Tensor:
        """Return the exact weights: the stored plane itself, or a new float32 tensor."""
        if self.scales is None:
            return self.stored
        return ops.unpack_scaled(ops.Packed(self.stored, self.scales, self.low))


def ranges(storage: Storage, numel: int, offsets: PlaneOffsets, first: int = 0) -> list[PlaneRange]:
    """Return the ranges of a slab with the planes of some weights.

    Args:
        storage: Format of the part.
        numel: Number of weights.
        offsets: Offsets of the part's planes, in bytes.
        first: Index of the first weight within the part, a multiple of 32.
    """
    planes = [PlaneRange("stored", storage.dtype, offsets.stored, 0)]
    if storage.scaled:
        planes.append(PlaneRange("scales", _SCALES, offsets.scales, 0))
    if storage.has_low:
        planes.append(PlaneRange("low", torch.uint8, offsets.low, 0))
    return [plane.elements(first, numel) for plane in planes]
