"""The slab of one unit: the place and format of each of its tensors.

    | low planes | part: trainable, one format | part ... | frozen tensors as raw bytes |
    |<-------------- written back --------------------->|<------ only uploaded ------>|
                 |<-------------- uploaded between write-backs --------------------->|

A *part* contains the trainable tensors of one storage format and compute dtype (nearly always all
of them) that have dense directions, or those that have factored ones; one kernel launch processes
one part. Only the split format has low planes. See docs/contracts.md, "Slab".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zo2ext.config import ZOConfig
from zo2ext.errors import UnsupportedModel
from zo2ext.model.factored import is_factored
from zo2ext.model.factors import FactorPlaces, StandIn
from zo2ext.model.quantized import Component, Target
from zo2ext.model.units import TensorSpec, Unit
from zo2ext.ops import Segment
from zo2ext.ops.formats import TRAINABLE_DTYPES, PlaneOffsets, PlaneRange, Planes, Storage, ranges
from zo2ext.ops.tables import SEGMENT_ALIGNMENT, align

PART_ALIGNMENT = 256  # bytes, for cuBLAS and vector instructions


@dataclass(frozen=True)
class Placed:
    """A tensor's place: its element offset within its part, or its byte offset if it is frozen."""

    spec: TensorSpec
    shape: torch.Size
    dtype: torch.dtype  # in the forward pass
    offset: int
    component: Component | None = None  # of a quantized parameter
    stand_in: StandIn | None = None  # of a parameter with factored directions or joined passes

    @property
    def target(self) -> Target:
        """Object that shows the tensor."""
        return self.component or self.spec.parameter

    @property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class Part:
    """Trainable tensors of one unit that share a storage format and a compute dtype."""

    storage: Storage
    compute: torch.dtype
    numel: int  # including the padding between tensors
    offsets: PlaneOffsets  # into the unit's slab
    compute_offset: int  # bytes into a compute buffer
    tensors: tuple[Placed, ...]
    factors: FactorPlaces | None = None  # of factored directions; None: they are dense

    def segments(self) -> list[Segment]:
        return [
            Segment(begin=t.offset, numel=t.numel, tensor_id=t.spec.id, decays=len(t.shape) >= 2)
            for t in self.tensors
        ]

    def planes(self, slab: Tensor, *, low: bool = True) -> Planes:
        """Return the part's planes in `slab`: uint8, shape (bytes,).

        Args:
            low: Include the low plane, if the format has one.
        """
        found = ranges(self.storage, self.numel, self.offsets)
        views = {r.name: slab[r.begin : r.begin + r.nbytes].view(r.dtype) for r in found}
        if not low:
            views.pop("low", None)
        return Planes(**views)

    def stored_views(self, slab: Tensor) -> list[tuple[Placed, Tensor]]:
        """Return the part's tensors as stored in `slab`, in the storage dtype."""
        stored = self.planes(slab).stored
        return [(t, stored[t.offset : t.offset + t.numel].view(t.shape)) for t in self.tensors]

    def ranges(self, placed: Placed) -> list[PlaneRange]:
        """Return the ranges of a slab with the planes of one of the part's tensors."""
        return ranges(self.storage, placed.numel, self.offsets, placed.offset)

    @property
    def packed(self) -> bool:
        """Whether the storage format differs from the dtype that the forward pass needs."""
        return self.storage.scaled or self.storage.dtype != self.compute

    def computed(self, buffer: Tensor) -> Tensor:
        """Return the part in a compute `buffer` (uint8) in the compute dtype, shape (numel,)."""
        end = self.compute_offset + self.numel * self.compute.itemsize
        return buffer[self.compute_offset : end].view(self.compute)


@dataclass(frozen=True)
class UnitLayout:
    """The slab of one unit. Sizes in bytes."""

    unit: Unit
    parts: tuple[Part, ...]
    frozen: tuple[Placed, ...]
    nbytes: int  # of the slab
    low_nbytes: int  # of the low planes at its beginning, which are not always uploaded
    trainable_nbytes: int  # of its head, which is written back
    compute_nbytes: int  # of one perturbed copy

    @property
    def tensors(self) -> tuple[Placed, ...]:
        return tuple(t for part in self.parts for t in part.tensors) + self.frozen

    def part_of(self, placed: Placed) -> Part | None:
        """Return the part that contains a tensor; None for a frozen one."""
        return next((part for part in self.parts if placed in part.tensors), None)

    def ranges(self, placed: Placed) -> list[PlaneRange]:
        """Return the ranges of a tensor's planes in the slab; a frozen tensor has one plane."""
        part = self.part_of(placed)
        if part is not None:
            return part.ranges(placed)
        return [PlaneRange("stored", placed.dtype, placed.offset, placed.numel)]

    def frozen_views(self, slab: Tensor) -> list[tuple[Placed, Tensor]]:
        """Return the frozen tensors in `slab` (uint8), ready for a forward pass."""
        return [
            (t, slab[t.offset : t.offset + t.numel * t.dtype.itemsize].view(t.dtype).view(t.shape))
            for t in self.frozen
        ]

    def trainable_views(self, buffer: Tensor) -> list[tuple[Placed, Tensor]]:
        """Return the trainable tensors in a compute `buffer` (uint8)."""
        return [
            (t, computed[t.offset : t.offset + t.numel].view(t.shape))
            for part in self.parts
            for computed in (part.computed(buffer),)
            for t in part.tensors
        ]

    @property
    def factored(self) -> bool:
        """Whether any tensor has factored directions."""
        return any(part.factors for part in self.parts)

    @property
    def packed(self) -> bool:
        """Whether any part's storage format differs from what the forward pass needs."""
        return any(part.packed for part in self.parts)


def lay_out(unit: Unit, config: ZOConfig) -> UnitLayout:
    """Place the tensors of `unit`.

    Raises:
        UnsupportedModel: A trainable tensor is quantized, or its dtype has no storage format.
    """
    kinds: dict[tuple[Storage, torch.dtype, bool], list[TensorSpec]] = {}
    fixed: list[TensorSpec] = []
    for spec in unit.tensors:
        own = spec.parameter.dtype
        if not spec.parameter.requires_grad:
            fixed.append(spec)
            continue
        if spec.components:
            raise UnsupportedModel(
                f"parameter {spec.name} is a quantized weight ({type(spec.parameter).__name__}), "
                "which cannot be perturbed; freeze it with requires_grad_(False) and train an "
                "adapter on top (LoRA), or leave its module out of the quantization"
            )
        if own not in TRAINABLE_DTYPES:
            raise UnsupportedModel(
                f"parameter {spec.name} is {own}, which cannot be perturbed; convert it to "
                "float32, bfloat16 or float16, or freeze it with requires_grad_(False)"
            )
        storage = Storage.of(config.storage or own)
        factored = config.rank is not None and is_factored(spec.parameter.shape, config.rank)
        kind = storage, config.compute_dtype or own, factored
        kinds.setdefault(kind, []).append(spec)

    placed = {
        kind: _side_by_side(specs, kind[1], stand_ins=kind[2] or config.joined)
        for kind, specs in kinds.items()
    }
    lows, end = {}, 0
    for kind, (_, numel) in placed.items():
        lows[kind] = end
        end = align(end + numel * kind[0].has_low, PART_ALIGNMENT)
    low_nbytes, compute_end = end, 0
    parts = []
    for kind, (tensors, numel) in placed.items():
        storage, compute, factored = kind
        scales = end + numel * storage.dtype.itemsize
        offsets = PlaneOffsets(end, scales, lows[kind])
        factors = None
        if factored and config.rank is not None:
            shapes, ids = [t.shape for t in tensors], [t.spec.id for t in tensors]
            factors = FactorPlaces.of(shapes, ids, config.rank)
        parts.append(Part(storage, compute, numel, offsets, compute_end, tensors, factors))
        end = align(end + storage.nbytes(numel) - numel * storage.has_low, PART_ALIGNMENT)
        compute_end = align(compute_end + numel * compute.itemsize, PART_ALIGNMENT)

    stored_end = end
    frozen = []
    for tensor in (t for spec in fixed for t in _frozen_tensors(spec, config)):
        frozen.append(replace(tensor, offset=end))
        end = align(end + tensor.numel * tensor.dtype.itemsize, PART_ALIGNMENT)
    return UnitLayout(unit, tuple(parts), tuple(frozen), end, low_nbytes, stored_end, compute_end)


def _side_by_side(
    specs: list[TensorSpec], compute: torch.dtype, *, stand_ins: bool
) -> tuple[tuple[Placed, ...], int]:
    """Place a part's tensors at aligned elements; return them and the number of elements."""
    placed, numel = [], 0
    for spec in specs:
        stand_in = StandIn(spec.parameter) if stand_ins else None
        shape = spec.parameter.shape
        placed.append(Placed(spec, shape, compute, numel, stand_in=stand_in))
        numel = align(numel + spec.parameter.numel(), SEGMENT_ALIGNMENT)
    return tuple(placed), numel


def _frozen_tensors(spec: TensorSpec, config: ZOConfig) -> list[Placed]:
    """Return the tensors of a frozen parameter, at offset 0."""
    if spec.components:
        return [Placed(spec, c.shape, c.dtype, 0, c) for c in spec.components]
    own = spec.parameter.dtype
    computed = config.compute_dtype if own in TRAINABLE_DTYPES else None
    return [Placed(spec, spec.parameter.shape, computed or own, 0)]
