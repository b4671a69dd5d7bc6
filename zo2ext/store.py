"""Host memory: an aligned arena per unit, in the storage dtype, page-locked for GPUs."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.devices import Device
from zo2ext.layout import Part, Placed, UnitLayout

HUGE_PAGE = 2**21


def map_arena(nbytes: int) -> mmap.mmap:
    """Anonymous, zeroed, page-aligned memory; in huge pages where it is large enough."""
    arena = mmap.mmap(-1, max(nbytes, 1))
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    return arena


class HostStore:
    """The weights at rest: a slab per unit.

    Each tensor handed out has a storage of its own over its place in the arena, so that
    transformers and safetensors do not take two weights of a slab for one shared tensor.
    """

    def __init__(self, layouts: Sequence[UnitLayout], device: Device) -> None:
        self._device = device
        self._arenas = [map_arena(layout.nbytes) for layout in layouts]
        self.layouts = tuple(layouts)
        self.slabs = [
            torch.frombuffer(arena, dtype=torch.uint8, count=max(layout.nbytes, 1))
            for arena, layout in zip(self._arenas, layouts, strict=True)
        ]
        self._locked: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, padding included."""
        return sum(layout.nbytes for layout in self.layouts)

    def fill(self, layout: UnitLayout, placed: Placed, values: Tensor) -> None:
        """Write `values`, the shape of the tensor, rounded to nearest even, to its place."""
        target = self.view(layout, placed)
        target.copy_(values.detach())

    def lock(self, layout: UnitLayout) -> None:
        """Page-lock the slab of `layout`, once it is filled.

        Locking takes the memory at once. Unit by unit, as the model's own weights are dropped, the
        host never holds the weights twice.
        """
        slab = self.slabs[layout.unit.index]
        self._device.register(slab)
        self._locked.append(slab)

    def view(self, layout: UnitLayout, placed: Placed) -> Tensor:
        """The stored tensor itself, in the storage dtype (a frozen one in its own)."""
        for part in layout.parts:
            if placed in part.tensors:
                begin = part.stored_offset + placed.offset * part.storage.itemsize
                return self._tensor(layout, placed, part.storage, begin)
        return self._tensor(layout, placed, placed.dtype, placed.offset)

    def current(
        self,
        layout: UnitLayout,
        part: Part,
        placed: Placed,
        updates: Tensor | None,
        distribution: ops.Distribution,
    ) -> Tensor:
        """A copy of a trainable tensor with `updates` (a table) applied, in the compute dtype."""
        stored = self.view(layout, placed).view(-1)
        plain = torch.empty(placed.numel, dtype=part.compute)
        segment = ops.Segment(
            begin=0, numel=placed.numel, tensor_id=placed.spec.id, decays=len(placed.shape) >= 2
        )
        ops.update_perturb(
            stored,
            segments=ops.segment_table([segment], "cpu"),
            updates=updates,
            plain=plain,
            distribution=distribution,
        )
        return plain.view(placed.shape)

    def close(self) -> None:
        """Unlock the pages. The memory itself lives as long as tensors over it."""
        while self._locked:
            self._device.unregister(self._locked.pop())

    def _tensor(self, layout: UnitLayout, placed: Placed, dtype: torch.dtype, begin: int) -> Tensor:
        if placed.numel == 0:
            return torch.empty(placed.shape, dtype=dtype)
        arena = self._arenas[layout.unit.index]
        flat = torch.frombuffer(arena, dtype=dtype, count=placed.numel, offset=begin)
        return flat.view(placed.shape)
