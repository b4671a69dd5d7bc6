"""The slab of one unit: where each of its tensors lies, in which format, and what moves it.

    | part: trainable, one dtype pair | part ... | frozen tensors as raw bytes |
    |<---------- written back ------------------>|<------ only uploaded ------>|

A *part* holds the trainable tensors of one storage and compute dtype, nearly always all of them,
and is what one kernel launch works on. See docs/contracts.md, "Slab".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zo2ext.config import STORAGE_DTYPES, ZOConfig
from zo2ext.inner import InnerTensor, Target
from zo2ext.ops import Segment
from zo2ext.units import TensorSpec, Unit

SEGMENT_ALIGNMENT = 128  # elements
PART_ALIGNMENT = 256  # bytes; what cuBLAS and vector units like


def align(value: int, to: int) -> int:
    """`value` rounded up to a multiple of `to`."""
    return -(-value // to) * to


@dataclass(frozen=True)
class Placed:
    """A tensor's place: element offset within its part, or byte offset of a frozen one."""

    spec: TensorSpec
    shape: torch.Size
    dtype: torch.dtype  # what the forward pass sees
    offset: int
    inner: InnerTensor | None = None  # which tensor of a quantised parameter

    @property
    def target(self) -> Target:
        """What the tensor is put into."""
        return self.inner or self.spec.parameter

    @property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class Part:
    """Trainable tensors of one unit that share a storage and a compute dtype."""

    storage: torch.dtype
    compute: torch.dtype
    numel: int  # with the padding between tensors
    stored_offset: int  # bytes into the unit's slab
    compute_offset: int  # bytes into a compute buffer
    tensors: tuple[Placed, ...]

    def segments(self) -> list[Segment]:
        return [
            Segment(begin=t.offset, numel=t.numel, tensor_id=t.spec.id, decays=len(t.shape) >= 2)
            for t in self.tensors
        ]

    def stored(self, slab: Tensor) -> Tensor:
        """The part of `slab` (uint8, shape (bytes,)) in the storage dtype, shape (numel,)."""
        end = self.stored_offset + self.numel * self.storage.itemsize
        return slab[self.stored_offset : end].view(self.storage)

    def computed(self, buffer: Tensor) -> Tensor:
        """The part of a compute `buffer` (uint8) in the compute dtype, shape (numel,)."""
        end = self.compute_offset + self.numel * self.compute.itemsize
        return buffer[self.compute_offset : end].view(self.compute)


@dataclass(frozen=True)
class UnitLayout:
    """The slab of one unit. Sizes in bytes."""

    unit: Unit
    parts: tuple[Part, ...]
    frozen: tuple[Placed, ...]
    nbytes: int  # whole slab: what is uploaded
    trainable_nbytes: int  # its head: what is written back
    compute_nbytes: int  # one perturbed copy

    @property
    def tensors(self) -> tuple[Placed, ...]:
        return tuple(t for part in self.parts for t in part.tensors) + self.frozen

    def frozen_views(self, slab: Tensor) -> list[tuple[Placed, Tensor]]:
        """The frozen tensors as they lie in `slab` (uint8), ready for a forward pass."""
        return [
            (t, slab[t.offset : t.offset + t.numel * t.dtype.itemsize].view(t.dtype).view(t.shape))
            for t in self.frozen
        ]

    def trainable_views(self, buffer: Tensor) -> list[tuple[Placed, Tensor]]:
        """The trainable tensors as they lie in a compute `buffer` (uint8)."""
        return [
            (t, computed[t.offset : t.offset + t.numel].view(t.shape))
            for part in self.parts
            for computed in (part.computed(buffer),)
            for t in part.tensors
        ]

    @property
    def packed(self) -> bool:
        """Whether storage differs from what the forward pass needs in any part."""
        return any(p.storage != p.compute for p in self.parts)


def lay_out(unit: Unit, config: ZOConfig) -> UnitLayout:
    """Place the tensors of `unit`.

    Raises:
        TypeError: A trainable tensor is quantised, or its dtype has no storage format.
    """
    pairs: dict[tuple[torch.dtype, torch.dtype], list[TensorSpec]] = {}
    still: list[TensorSpec] = []
    for spec in unit.tensors:
        own = spec.parameter.dtype
        if not spec.parameter.requires_grad:
            still.append(spec)
            continue
        if spec.inner:
            raise TypeError(
                f"parameter {spec.name} is a quantised weight ({type(spec.parameter).__name__}), "
                "which cannot be perturbed; freeze it with requires_grad_(False) and train an "
                "adapter on top (LoRA), or leave its module out of the quantisation"
            )
        if own not in STORAGE_DTYPES:
            raise TypeError(
                f"parameter {spec.name} is {own}, which cannot be perturbed; convert it to "
                "float32, bfloat16 or float16, or freeze it with requires_grad_(False)"
            )
        pairs.setdefault((config.storage or own, config.compute_dtype or own), []).append(spec)

    parts, stored_end, compute_end = [], 0, 0
    for (storage, compute), specs in pairs.items():
        placed, numel = [], 0
        for spec in specs:
            placed.append(Placed(spec, spec.parameter.shape, compute, numel))
            numel = align(numel + spec.parameter.numel(), SEGMENT_ALIGNMENT)
        parts.append(Part(storage, compute, numel, stored_end, compute_end, tuple(placed)))
        stored_end = align(stored_end + numel * storage.itemsize, PART_ALIGNMENT)
        compute_end = align(compute_end + numel * compute.itemsize, PART_ALIGNMENT)

    frozen, end = [], stored_end
    for tensor in (t for spec in still for t in _still(spec, config)):
        frozen.append(replace(tensor, offset=end))
        end = align(end + tensor.numel * tensor.dtype.itemsize, PART_ALIGNMENT)
    return UnitLayout(unit, tuple(parts), tuple(frozen), end, stored_end, compute_end)


def _still(spec: TensorSpec, config: ZOConfig) -> list[Placed]:
    """The tensors of a frozen parameter, not placed yet: a quantised one's as they are."""
    if spec.inner:
        return [Placed(spec, inner.shape, inner.dtype, 0, inner) for inner in spec.inner]
    own = spec.parameter.dtype
    computed = config.compute_dtype if own in STORAGE_DTYPES else None
    return [Placed(spec, spec.parameter.shape, computed or own, 0)]
