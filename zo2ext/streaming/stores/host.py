"""Weights at rest in host memory, page-locked for GPUs."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.ops.formats import Planes
from zo2ext.streaming.devices.device import After, Buffer, Dependency, Device, Queue
from zo2ext.streaming.stores.page_locks import PageLocks
from zo2ext.streaming.stores.rounding import RoundingError, read_rounded
from zo2ext.streaming.stores.sources import Source
from zo2ext.streaming.stores.store import Sent, WeightStore, copy, map_arena, planes_over


class HostStore(WeightStore):
    """Weights in host memory."""

    divisible = True

    def __init__(self, layouts: Sequence[UnitLayout], device: Device) -> None:
        self._device, self.moves = device, device.moves
        self._arenas = [map_arena(layout.nbytes) for layout in layouts]
        self.layouts = tuple(layouts)
        self.slabs = [
            torch.frombuffer(arena, dtype=torch.uint8, count=max(layout.nbytes, 1))
            for arena, layout in zip(self._arenas, layouts, strict=True)
        ]
        self._locks = PageLocks(device)

    @property
    def host_nbytes(self) -> int:
        return self.nbytes

    def slab(self, unit: int) -> Tensor:
        return self.slabs[unit]

    def bring(
        self, unit: int, target: Tensor, name: Buffer, after: After, bytes_: range
    ) -> object | None:
        here = slice(bytes_.start, bytes_.stop)
        return self._device.submit(
            Queue.UPLOAD,
            lambda: copy(target[here], self.slabs[unit][here]),
            after=after,
            reads=[self.home(unit)],
            writes=[name],
            unit=unit,
        )

    def send(self, unit: int, source: Tensor, name: Buffer, updated: object | None) -> Sent:
        target = self.slabs[unit][: source.nbytes]
        home = self._device.submit(
            Queue.OFFLOAD,
            lambda: copy(target, source),
            after={Dependency.OFFLOAD_AFTER_KERNEL: [updated]},
            reads=[name],
            writes=[self.home(unit)],
            unit=unit,
        )
        return Sent(home, home)

    def load_tensor(self, layout: UnitLayout, placed: Placed, source: Source) -> RoundingError:
        return read_rounded(source, 0, self.planes(layout, placed))

    def put(self, layout: UnitLayout, placed: Placed, planes: Planes) -> None:
        self.planes(layout, placed).copy_(planes)

    def lock(self, layout: UnitLayout) -> None:
        """Page-lock the unit's slab.

        Locking allocates the memory at once. Since units are locked one by one while the model's
        own weights are dropped, the host never holds the weights twice.
        """
        self._locks.add(self.slabs[layout.unit.index])

    def planes(self, layout: UnitLayout, placed: Placed) -> Planes:
        arena = self._arenas[layout.unit.index]
        return planes_over(
            layout.ranges(placed),
            lambda r: torch.frombuffer(arena, dtype=r.dtype, count=r.numel, offset=r.begin),
        )

    def close(self) -> None:
        self._locks.close()
        for arena in self._arenas:  # a model that is closed may be used in forked processes
            arena.madvise(mmap.MADV_DOFORK)
        self.slabs.clear()
        self._arenas.clear()
