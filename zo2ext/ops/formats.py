"""What weights rest in: the storage formats, and the planes of memory that one takes.

    fp32, bf16, fp16     one plane: the weights
    e4m3                 8 bits a weight, and a scale for each 32 of them
    split                the same as e4m3, and a low plane with 8 further bits of mantissa

docs/contracts.md, "Formats", says what the bits mean.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext import ops

_SCALES = torch.float8_e8m0fnu


class Storage(StrEnum):
    """A storage format."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    E4M3 = "e4m3"
    SPLIT = "split"

    @classmethod
    def of(cls, name: Storage | torch.dtype | str) -> Storage:
        """The format called `name`, or that stores in the dtype `name`.

        Raises:
            ValueError: There is none.
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
        """Of the plane that has every weight; of the top plane, where there are two."""
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
        """The dtype that holds every weight of this format, except at the ends of float32's range;
        what its values are shown in."""
        return torch.float32 if self.scaled else self.dtype

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` weights, all planes."""
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
"""What a model's trainable weights may be in, and what a forward pass may see them in."""


class PlaneOffsets(NamedTuple):
    """First bytes of a part's planes in a slab."""

    stored: int
    scales: int
    low: int

    @classmethod
    def from_low(cls, storage: Storage, numel: int) -> PlaneOffsets:
        """One plane behind the other, the low one first: it is what is not always wanted."""
        stored = numel if storage.has_low else 0
        return cls(stored, stored + numel * storage.dtype.itemsize, 0)


class PlaneRange(NamedTuple):
    """Where a plane of some weights lies: `numel` of `dtype`, from byte `begin` on."""

    name: str
    dtype: torch.dtype
    begin: int
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Planes(NamedTuple):
    """Weights in a storage format, flat; see `ops.Packed`."""

    stored: Tensor
    scales: Tensor | None = None
    low: Tensor | None = None

    @classmethod
    def empty(cls, storage: Storage, numel: int) -> Planes:
        """Host memory for `numel` weights, not initialised."""
        return cls(
            torch.empty(numel, dtype=storage.dtype),
            torch.empty(-(-numel // ops.GROUP), dtype=_SCALES) if storage.scaled else None,
            torch.empty(numel, dtype=torch.uint8) if storage.has_low else None,
        )

    def named(self) -> dict[str, Tensor]:
        """The planes there are, by name."""
        return {name: plane for name, plane in self._asdict().items() if plane is not None}

    def part(self, first: int, count: int) -> Planes:
        """`count` weights from `first` on, a multiple of 32: memory of these planes."""
        groups = slice(first // ops.GROUP, -(-(first + count) // ops.GROUP))
        return Planes(
            self.stored[first : first + count],
            None if self.scales is None else self.scales[groups],
            None if self.low is None else self.low[first : first + count],
        )

    def copy_(self, other: Planes) -> None:
        """Take over the bytes of `other`."""
        for mine, theirs in zip(self.named().values(), other.named().values(), strict=True):
            mine.copy_(theirs)

    def values(self) -> Tensor:
        """The weights, exactly: the stored plane itself, or float32 of its own."""
        if self.scales is None:
            return self.stored
        return ops.unpack_scaled(ops.Packed(self.stored, self.scales, self.low))


def ranges(storage: Storage, numel: int, offsets: PlaneOffsets, first: int = 0) -> list[PlaneRange]:
    """Where each plane of `numel` weights lies in a slab, from weight `first` of a part on.

    Args:
        offsets: Of the part's planes, in bytes.
        first: A multiple of 32.
    """
    found = [
        PlaneRange("stored", storage.dtype, offsets.stored + first * storage.dtype.itemsize, numel)
    ]
    if storage.scaled:
        groups = -(-numel // ops.GROUP)
        begin = offsets.scales + first // ops.GROUP
        found.append(PlaneRange("scales", _SCALES, begin, groups))
    if storage.has_low:
        found.append(PlaneRange("low", torch.uint8, offsets.low + first, numel))
    return found
