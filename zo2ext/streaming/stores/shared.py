"""One copy of the weights for all ranks of a host, each of which moves a slice of every unit.

A rank uploads its slice of a unit's slab, gathers the other slices over the fast link between the
devices, and offloads its slice of the updated weights. Each byte crosses a host link once,
independent of the number of ranks, and a rank uploads only bytes that it has written itself. So
ranks wait for each other only in gathers.

The host reads and writes all slices. Phases of reading and of writing alternate, and the ranks meet
between them.

Each rank updates the whole unit after gathering it, in the pass that perturbs it. To update slices
before gathering them would save that work, but the update of a step is known only when the first
units of the next step have been prefetched; they would have to be gathered twice. The pass reads
every weight anyway, and its noise and rounding depend only on the element, so all ranks compute the
same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext.errors import HostRankError
from zo2ext.model.layout import PART_ALIGNMENT, Placed, UnitLayout
from zo2ext.ops.formats import PlaneRange, Planes
from zo2ext.ops.tables import align
from zo2ext.streaming.devices.device import After, Buffer, Dependency, Device, Queue
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.page_locks import PageLocks
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.stores.shared_memory import PAGE, SharedMemory, page_range, room_for
from zo2ext.streaming.stores.sources import Source
from zo2ext.streaming.stores.store import (
    Moved,
    Sent,
    WeightStore,
    copy,
    planes_over,
    rounded_pieces,
)


@dataclass(frozen=True)
class Slice:
    """A rank's slice of a slab, in bytes. Those of the last ranks may be shorter, or empty.

    Attributes:
        begin, end: Range of the slab.
        nbytes: Bytes that each rank contributes to a gather, padding included.
    """

    begin: int
    end: int
    nbytes: int

    def of_head(self, nbytes: int) -> slice:
        """Return the range of the slice within the first `nbytes` of the slab."""
        return slice(min(self.begin, nbytes), min(self.end, nbytes))


def slice_of(nbytes: int, rank: int, size: int) -> Slice:
    """Return the slice of `rank` of `size` in a slab of `nbytes`: aligned, of one size for all."""
    each = align(max(nbytes, 1), size * PART_ALIGNMENT) // size
    return Slice(min(rank * each, nbytes), min((rank + 1) * each, nbytes), each)


class SlicedStore(WeightStore):
    """Weights in memory that the ranks of a host share.

    All ranks have to make and use it alike: the same units in the same order, and the same reads by
    the host (``state_dict``, saving, closing). If a rank does something else, all of them fail with
    an error that names what each was about to do.

    Args:
        layouts: Layouts of the units.
        device: Device to queue the work on.
        ranks: Ranks of this host.

    Raises:
        HostRankError: The ranks have different units, or one does not come.
        MemoryError: The host has too little memory.
        OSError: The ranks cannot open each other's memory.
    """

    moves = True
    collective = True
    low_apart = False  # slices are cut from the complete slab

    def __init__(self, layouts: Sequence[UnitLayout], device: Device, ranks: HostRanks) -> None:
        self._device, self._ranks = device, ranks
        self.layouts = tuple(layouts)
        self._names = [layout.unit.name for layout in layouts]
        self._check_alike()
        self._slices = [slice_of(layout.nbytes, ranks.rank, ranks.size) for layout in layouts]
        self._begins, end = [], 0
        for layout in layouts:
            self._begins.append(end)
            end += align(layout.nbytes, PAGE)
        self._shared = SharedMemory(end, ranks, room_for(ranks.size * _held(layouts)))
        self._locks = PageLocks(device)
        self._reading = False  # phase: whether the host's weights are read, or written

    def _check_alike(self) -> None:
        own = [[x.unit.name, x.nbytes, x.trainable_nbytes] for x in self.layouts]
        for rank, theirs in enumerate(self._ranks.meet("lay out the units", own)):
            if theirs != own:
                differing = [pair for pair in zip(own, theirs, strict=False) if pair[0] != pair[1]]
                mine, other = differing[0] if differing else ([len(own)], [len(theirs)])
                raise HostRankError(
                    f"the ranks of this host have different models or settings: {tuple(mine)} "
                    f"here, {tuple(other)} on the host's rank {rank} (unit, bytes, bytes that are "
                    "trained)"
                )

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory, for all ranks together."""
        return self._shared.memory.nbytes

    # -- for the pipeline

    def slot_nbytes(self, unit: int) -> int:
        return self._ranks.size * self._slices[unit].nbytes

    def moved(self, unit: int, bytes_: range = range(0)) -> Moved:
        own, head = self._slices[unit], self._head(unit)
        others = self._ranks.size - 1
        return Moved(own.end - own.begin, head.stop - head.start, others * own.nbytes)

    def bring(
        self, unit: int, target: Tensor, name: Buffer, after: After, bytes_: range
    ) -> object | None:
        own = self._slices[unit]
        here = slice(own.begin, own.end)
        source = self._slab(unit)[here]
        uploaded = self._device.submit(
            Queue.UPLOAD,
            lambda: copy(target[here], source),
            after=after,
            reads=[self.home(unit)],
            writes=[name],
            unit=unit,
        )
        return self._device.submit(
            Queue.GATHER,
            lambda: self._ranks.gather(unit, self._names, target),
            after={Dependency.GATHER_AFTER_UPLOAD: [uploaded]},
            writes=[name],
        )

    def send(self, unit: int, source: Tensor, name: Buffer, updated: object | None) -> Sent:
        self._write()
        head = self._head(unit)
        target = self._slab(unit)[head]
        home = self._device.submit(
            Queue.OFFLOAD,
            lambda: copy(target, source[head]),
            after={Dependency.OFFLOAD_AFTER_KERNEL: [updated]},
            reads=[name],
            writes=[self.home(unit)],
            unit=unit,
        )
        return Sent(home, home)

    @property
    def readable(self) -> bool:
        return self._reading or self._ranks.size == 1

    def begin_host_reads(self) -> None:
        if not self._reading:
            self._ranks.meet("read the host's weights")
        self._reading = True

    # -- for the host

    def load_tensor(self, layout: UnitLayout, placed: Placed, source: Source) -> RoundingError:
        """Store the values that lie in this rank's slice, so that each byte has one writer."""
        self._write()
        places, total = layout.ranges(placed), RoundingError()

        def wanted(first: int, count: int) -> bool:
            return any(self._mine(layout, r.elements(first, count)) for r in places)

        for first, planes, error in rounded_pieces(layout, placed, source, wanted):
            self._put(layout, placed, planes, first)
            total += error
        return total

    def put(self, layout: UnitLayout, placed: Placed, planes: Planes) -> None:
        self._write()
        self._put(layout, placed, planes, 0)

    def _put(self, layout: UnitLayout, placed: Placed, planes: Planes, first: int) -> None:
        """Store the planes of a tensor's elements from `first` on that lie in this rank's slice."""
        for plane, values in zip(layout.ranges(placed), planes.named().values(), strict=True):
            place = plane.elements(first, planes.stored.numel())
            mine = self._mine(layout, place)
            if mine:
                self._shared.allocate(self._begins[layout.unit.index] + mine.start, len(mine))
                here = values.view(torch.uint8)[mine.start - place.begin : mine.stop - place.begin]
                self._slab(layout.unit.index)[mine.start : mine.stop].copy_(here)

    def _mine(self, layout: UnitLayout, place: PlaneRange) -> range:
        """Return the bytes of `place` that lie in this rank's slice."""
        own = self._slices[layout.unit.index]
        low = max(own.begin, place.begin)
        return range(low, max(low, min(own.end, place.begin + place.nbytes)))

    def lock(self, layout: UnitLayout) -> None:
        """Page-lock this rank's slice, the only one that it copies from and to."""
        own, begin = self._slices[layout.unit.index], self._begins[layout.unit.index]
        if own.begin < own.end:
            self._locks.add(self._shared.memory[page_range(begin + own.begin, begin + own.end)])

    def planes(self, layout: UnitLayout, placed: Placed) -> Planes:
        """Return a tensor's planes. Writes to them are visible in this process only."""
        begin = self._begins[layout.unit.index]
        return planes_over(
            layout.ranges(placed),
            lambda r: self._shared.private(begin + r.begin, r.dtype, r.numel),
        )

    def close(self) -> None:
        """Unlock the pages. Views of weights stay valid."""
        self._locks.close()
        self._shared.close()

    # --

    def _write(self) -> None:
        """Wait until no rank reads weights that this rank is about to change."""
        if self._reading:
            self._ranks.meet("write the host's weights")
        self._reading = False

    def _slab(self, unit: int) -> Tensor:
        begin = self._begins[unit]
        return self._shared.memory[begin : begin + self.layouts[unit].nbytes]

    def _head(self, unit: int) -> slice:
        return self._slices[unit].of_head(self.layouts[unit].trainable_nbytes)


def _held(layouts: Sequence[UnitLayout]) -> int:
    """Return the bytes of host memory that become free when the model's own weights are dropped."""
    parameters = [t.spec.parameter for layout in layouts for t in layout.tensors]
    return sum(p.nbytes for p in parameters if p.device.type == "cpu")
