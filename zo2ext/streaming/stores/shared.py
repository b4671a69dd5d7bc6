"""One host copy of the weights for all ranks of a host, each of which moves a slice of every unit.

A rank uploads its slice of a unit's slab; the slices are gathered over the fast link between the
devices; and it offloads its slice of what was updated. So each byte crosses a host link once,
whatever the number of ranks, and a rank uploads no byte that another one has written: on the way
of a weight, ranks wait for each other only in gathers.

The host's own reads and writes are another matter: they see all slices. Reading (`settle`) and
writing alternate in phases, and where one ends, the ranks meet.

Each rank updates the whole unit that it gathered, in the pass that perturbs it. To update slices
before they are gathered would spare the other ranks that work, but the update of a step is known
only when the first units of the next one are on their way already: they would have to be gathered
twice, or nothing could be fetched ahead. The pass reads every weight anyhow, and its noise and
rounding depend on nothing but the element, so that all ranks come to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.errors import HostRankError
from zo2ext.model.layout import PART_ALIGNMENT, Placed, UnitLayout, align
from zo2ext.ops.formats import PlaneRange, Planes
from zo2ext.streaming.devices.device import After, Buffer, Dependency, Device, Queue
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.rounding import RoundingError, read_rounded
from zo2ext.streaming.stores.shared_memory import PAGE, SharedMemory, page_range, room_for
from zo2ext.streaming.stores.sources import PIECE_NBYTES, Source
from zo2ext.streaming.stores.store import Moved, Sent, WeightStore, copy


@dataclass(frozen=True)
class Slice:
    """A rank's part of a slab, in bytes. The last ranks' may be short, or empty.

    Attributes:
        begin, end: Where it lies.
        nbytes: Of a slice that is not short: what each rank hands to a gather.
    """

    begin: int
    end: int
    nbytes: int

    def of_head(self, nbytes: int) -> slice:
        """The part of it that lies in the first `nbytes` of the slab."""
        return slice(min(self.begin, nbytes), min(self.end, nbytes))


def slice_of(nbytes: int, rank: int, size: int) -> Slice:
    """The slice that `rank` of `size` has of a slab of `nbytes`: aligned, and equal for all."""
    each = align(max(nbytes, 1), size * PART_ALIGNMENT) // size
    return Slice(min(rank * each, nbytes), min((rank + 1) * each, nbytes), each)


class SlicedStore(WeightStore):
    """Weights in memory that the ranks of a host share.

    Made and used by all of them alike: the same units, in the same order, and the same reads on the
    host (``state_dict``, saving, closing). A rank that does something else ends all of them, with
    an error that says what each was to do.

    Args:
        ranks: Of this host.

    Raises:
        HostRankError: The ranks have different units, or one does not come.
        MemoryError: The host has too little memory.
        OSError: The ranks cannot open each other's memory.
    """

    moves = True
    low_apart = False  # units are cut into slices whole, and gathered whole

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
        self._locked: list[Tensor] = []
        self._gathered: dict[Buffer, object | None] = {}  # a device buffer's last gather
        self._reading = False  # the host's weights are read from now on; else they are written

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
        """Of all ranks together."""
        return self._shared.memory.nbytes

    # -- for the pipeline

    def slab(self, unit: int) -> Tensor:
        raise AssertionError("shared units are computed on in slots")

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
            after={
                **after,
                Dependency.UPLOAD_AFTER_SLOT_WAS_GATHERED: [self._gathered.get(name)],
            },
            reads=[self.home(unit)],
            writes=[name],
            unit=unit,
        )
        self._gathered[name] = self._device.submit(
            Queue.GATHER,
            lambda: self._ranks.gather(unit, self._names, target),
            after={Dependency.GATHER_AFTER_UPLOAD: [uploaded]},
            writes=[name],
        )
        return self._gathered[name]

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

    def settle(self) -> None:
        if not self._reading:
            self._ranks.meet("read the host's weights")
        self._reading = True

    # -- for the host

    def take(self, layout: UnitLayout, placed: Placed, source: Source) -> RoundingError:
        """Store a tensor's values, as far as this rank's slice has them.

        So each byte has one writer, here as on the way of a unit.
        """
        self._write()
        part, error = layout.part_of(placed), RoundingError()
        step = PIECE_NBYTES // torch.float32.itemsize  # a multiple of 32
        for first in range(0, placed.numel, step):
            count = min(step, placed.numel - first)
            if not any(
                self._mine(layout, r) for r in _part_of(layout.ranges(placed), first, count)
            ):
                continue
            if part is None:
                planes = Planes(torch.empty(count, dtype=placed.dtype))
            else:
                planes = Planes.empty(part.storage, count)
            error += read_rounded(source, first, planes)
            self._put(layout, placed, planes, first)
        return error

    def put(self, layout: UnitLayout, placed: Placed, planes: Planes) -> None:
        self._write()
        self._put(layout, placed, planes, 0)

    def _put(self, layout: UnitLayout, placed: Placed, planes: Planes, first: int) -> None:
        """Store `planes`, those of a tensor's elements from `first` on, in this rank's slice."""
        places = _part_of(layout.ranges(placed), first, planes.stored.numel())
        for place, values in zip(places, planes.named().values(), strict=True):
            mine = self._mine(layout, place)
            if mine:
                self._shared.allocate(self._begins[layout.unit.index] + mine.start, len(mine))
                here = values.view(torch.uint8)[mine.start - place.begin : mine.stop - place.begin]
                self._slab(layout.unit.index)[mine.start : mine.stop].copy_(here)

    def _mine(self, layout: UnitLayout, place: PlaneRange) -> range:
        """The bytes of `place` that this rank's slice has."""
        own = self._slices[layout.unit.index]
        low = max(own.begin, place.begin)
        return range(low, max(low, min(own.end, place.begin + place.nbytes)))

    def lock(self, layout: UnitLayout) -> None:
        """Page-lock this rank's slice: no other is copied from or to here."""
        own, begin = self._slices[layout.unit.index], self._begins[layout.unit.index]
        if own.begin < own.end:
            pages = self._shared.memory[page_range(begin + own.begin, begin + own.end)]
            self._device.register(pages)
            self._locked.append(pages)

    def planes(self, layout: UnitLayout, placed: Placed) -> Planes:
        """A tensor's planes. What is written to them stays in this process."""
        return Planes(
            **{
                r.name: self._shared.private(
                    self._begins[layout.unit.index] + r.begin, r.dtype, r.numel
                )
                if r.numel
                else torch.empty(0, dtype=r.dtype)
                for r in layout.ranges(placed)
            }
        )

    def close(self) -> None:
        """Unlock the pages. Views of weights stay as they are."""
        while self._locked:
            self._device.unregister(self._locked.pop())
        self._shared.close()

    # --

    def _write(self) -> None:
        """Before this rank changes what others may be reading."""
        if self._reading:
            self._ranks.meet("write the host's weights")
        self._reading = False

    def _slab(self, unit: int) -> Tensor:
        begin = self._begins[unit]
        return self._shared.memory[begin : begin + self.layouts[unit].nbytes]

    def _head(self, unit: int) -> slice:
        return self._slices[unit].of_head(self.layouts[unit].trainable_nbytes)


def _part_of(places: Sequence[PlaneRange], first: int, count: int) -> list[PlaneRange]:
    """Where `count` elements from `first` on, a multiple of 32, lie in each plane of a tensor."""
    found = []
    for place in places:
        group = ops.GROUP if place.name == "scales" else 1
        begin = place.begin + first // group * place.dtype.itemsize
        found.append(place._replace(begin=begin, numel=-(-count // group)))
    return found


def _held(layouts: Sequence[UnitLayout]) -> int:
    """Bytes of host memory that the model gives back as its weights are taken over."""
    parameters = [t.spec.parameter for layout in layouts for t in layout.tensors]
    return sum(p.nbytes for p in parameters if p.device.type == "cpu")
