"""Move units between a store and the device: upload the next while one computes.

This module knows units and slots, but no models. Each order between queues is declared here, as a
named dependency.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext.config import parse_size
from zo2ext.model.layout import UnitLayout
from zo2ext.streaming.devices.device import Buffer, Dependency, Device, Region
from zo2ext.streaming.stores.store import Moved, WeightStore

PIECE_NBYTES = 2**25  # smallest piece of an upload; smaller copies would not be worth a call


@dataclass(eq=False)
class Slot:
    """Device memory with one unit's slab, and the events to wait for before it is filled anew."""

    name: Buffer
    buffer: Tensor  # uint8
    unit: int | None = None
    low: bool = False  # whether the unit's low planes are present, too
    resident: bool = False  # whether it holds the same unit for good
    holders: int = 0
    moved: Moved = Moved(0, 0)  # by uploads since it was last visited
    uploaded: object | None = None
    read: object | None = None
    offloaded: object | None = None

    @property
    def place(self) -> Region:
        """Its region of the memory that streamed units pass through."""
        assert isinstance(self.name, Region)
        return self.name


class _Ring:
    """Device memory that streamed units pass through, one behind the other, round and round.

    It is divided into slots without gaps. A unit is put behind the last one, or behind the next
    slot that has to be kept, if there is too little space before it. The rest of a slot that is
    overwritten in part stays a slot, without a unit: its events still have to be waited for.

    Args:
        name: Name of the memory.
        memory: The memory: uint8, shape (bytes,).
        free: Event to wait for before it is filled.
    """

    def __init__(self, name: Buffer, memory: Tensor, free: object | None) -> None:
        self._name, self.memory, self._end = name, memory, 0
        self.slots = [self._slot(0, memory.nbytes)]  # by their place
        self.slots[0].read = free

    def find(self, nbytes: int, kept: Iterable[Slot]) -> int | None:
        """Return the first place behind the last unit with `nbytes` beside the slots `kept`."""
        # Spaces between kept slots, from the one behind the last unit on, and around to it again.
        edges, begin = [], 0
        mine = (slot for slot in kept if slot.place.memory == self._name)
        for slot in sorted(mine, key=lambda slot: slot.place.begin):
            edges.append((begin, slot.place.begin))
            begin = slot.place.end
        edges.append((begin, self.memory.nbytes))
        behind = [(max(low, self._end), high) for low, high in edges if high > self._end]
        for low, high in (*behind, *edges):
            if high - low >= nbytes:
                return low
        return None

    def put(self, begin: int, nbytes: int) -> tuple[Slot, list[Slot]]:
        """Return a new slot, and the slots in whose place it is."""
        new = self._slot(begin, begin + nbytes)
        self._end = new.place.end
        replaced, slots = [], []
        for slot in self.slots:
            if not new.place.overlaps(slot.place):
                slots.append(slot)
                continue
            replaced.append(slot)
            for low, high in ((slot.place.begin, begin), (self._end, slot.place.end)):
                if low < high:
                    rest = self._slot(low, high)
                    rest.uploaded, rest.read, rest.offloaded = (
                        slot.uploaded,
                        slot.read,
                        slot.offloaded,
                    )
                    slots.append(rest)
        self.slots = sorted([*slots, new], key=lambda slot: slot.place.begin)
        return new, replaced

    def _slot(self, begin: int, end: int) -> Slot:
        return Slot(Region(self._name, begin, end), self.memory[begin:end])


@dataclass
class Traffic:
    """Bytes moved since the start: to the device, back home, and here from other ranks.

    Bytes that are uploaded ahead count from the visit that they are for.
    """

    uploaded: int = 0
    offloaded: int = 0
    gathered: int = 0


class _Order:
    """The order of visits, learned from the last step and expected of everything that follows."""

    def __init__(self, expected: list[int]) -> None:
        self._expected, self._position = expected, 0
        self._seen: list[int] | None = None

    def visit(self, unit: int) -> None:
        if self._seen is not None:
            self._seen.append(unit)
        upcoming = self.upcoming()
        if unit in upcoming:
            self._position += upcoming.index(unit) + 1
            self._position %= len(self._expected)

    def upcoming(self) -> list[int]:
        """Return the rest of this sweep, followed by the next sweep up to the same place."""
        return self._expected[self._position :] + self._expected[: self._position]

    def begin(self) -> None:
        self._seen = []

    def end(self) -> None:
        if self._seen:
            self._expected, self._position = self._seen, 0
        self._seen = None


class Pipeline:
    """Moves units to the device and back.

    If an exception interrupts `acquire` or `release`, the slot is released and forgets its unit.

    Args:
        store: The weights at rest.
        device: Device that computes on them.
        slots: Number of units, the largest, that fit the device memory for units that stream.
        resident: Indices of units that stay on the device.
    """

    def __init__(
        self, store: WeightStore, device: Device, *, slots: int, resident: frozenset[int]
    ) -> None:
        self._store, self._device = store, device
        self.traffic = Traffic()
        self._low = True  # whether the last visit, and so probably the next, needs low planes
        self._written: dict[int, object | None] = {}  # unit -> its last write-back, if unfinished
        self._stale: set[int] = set()  # resident units whose host copy is outdated
        streamed = [
            layout for layout in store.layouts if store.moves and layout.unit.index not in resident
        ]
        self._residents = {
            index: self._make_resident(index)
            for index in range(len(store.layouts))
            if not any(layout.unit.index == index for layout in streamed)
        }
        needed = [store.slot_nbytes(x.unit.index) for x in streamed]
        self._rings: list[_Ring] = []
        self._add_ring(ring_nbytes(needed, min(slots, store.most_slots or slots)))
        self._order = _Order([layout.unit.index for layout in streamed])
        self._prefetch()

    def acquire(self, unit: int, *, low: bool = True) -> Slot:
        """Return a slot with the slab of `unit`, for compute work that is queued after this call.

        The slot is held until `release` or `abandon`. Units that are expected next are uploaded.

        Args:
            unit: Index of the unit.
            low: Whether its low planes are needed.
        """
        resident = self._residents.get(unit)
        if resident is not None:
            self._count(resident)
            return resident
        self._order.visit(unit)
        self._low = low
        slot = self._present().get(unit) or self._fill_now(unit)
        slot.holders += 1
        try:
            if low and not slot.low:
                self._upload(slot, unit, range(self._store.layouts[unit].low_nbytes))
                slot.low = True
            self._count(slot)
            self._prefetch()
        except BaseException:
            self.abandon(slot)
            raise
        return slot

    def release(self, slot: Slot) -> None:
        """Give `slot` back. It may be filled anew after the compute work that is queued so far."""
        try:
            slot.read = self._device.computing([slot.name])
        except BaseException:
            self.abandon(slot)
            raise
        if not slot.resident:
            slot.holders -= 1
            self._prefetch()

    def abandon(self, slot: Slot) -> None:
        """Give `slot` back after a failure, and forget its contents.

        Blocks until the device is idle. The failure may have lost the event of work that was
        queued, so nothing else would order later work after it.
        """
        if not slot.resident:
            slot.unit = None
        self._device.synchronize()
        if not slot.resident:
            slot.holders -= 1

    def recover(self) -> None:
        """Release and forget all slots, after an exception that may have struck anywhere.

        Blocks until the device is idle.
        """
        try:
            self._device.synchronize()
        finally:
            for ring in self._rings:
                for slot in ring.slots:
                    slot.unit, slot.holders = None, 0

    def write_back(self, slot: Slot, updated: object | None) -> None:
        """Queue the write-back of the slab's trainable head, after the event `updated`.

        A resident unit is written back once the host needs it.
        """
        assert slot.unit is not None, "the slot was abandoned"
        if not slot.resident:
            self._offload(slot, slot.unit, updated)
        elif self._store.moves:
            self._stale.add(slot.unit)

    def begin_step(self) -> None:
        """Start to learn the order of visits."""
        self._order.begin()

    def end_step(self) -> None:
        """Expect the visits since `begin_step`, in their order, from the next step."""
        self._order.end()
        self._prefetch()

    def finish_write_backs(self) -> None:
        """Block until all write-backs are home, so that the host may read and write weights."""
        for unit in sorted(self._stale):
            slot = self._residents[unit]
            self._offload(slot, unit, slot.read)
        self._stale.clear()
        self._device.finish({Dependency.HOST_READ_AFTER_OFFLOAD: list(self._written.values())})
        for unit in self._written:
            self._device.host_reads(self._store.home(unit))
        self._written.clear()
        self._store.begin_host_reads()

    def forget(self, unit: int) -> None:
        """Upload `unit` anew when it is needed next: its host copy was replaced."""
        resident = self._residents.get(unit)
        if resident is not None:
            if self._store.moves:
                self._upload_slab(resident, unit, low=True)
            return
        slot = self._present().get(unit)
        if slot is not None:
            slot.unit = None

    def close(self) -> None:
        """Let go of all device memory. No work may be under way."""
        self._rings.clear()
        self._residents.clear()

    @property
    def device_nbytes(self) -> int:
        """Device bytes of slots and resident units."""
        residents = self._residents.values() if self._store.moves else ()
        memories = [*(ring.memory for ring in self._rings), *(slot.buffer for slot in residents)]
        return sum(memory.nbytes for memory in memories)

    def _make_resident(self, unit: int) -> Slot:
        if not self._store.moves:
            name, slab = self._store.home(unit), self._store.slab(unit)
            return Slot(name, slab, unit, low=True, resident=True)
        memory, free = self._new_memory(max(self._store.slot_nbytes(unit), 1))
        slot = Slot(("resident", unit), memory, unit, low=True, resident=True, read=free)
        self._upload_slab(slot, unit, low=True)
        return slot

    @torch.inference_mode(False)  # memory of a first `generate` is used for training, too
    def _new_memory(self, nbytes: int) -> tuple[Tensor, object | None]:
        """Return device memory, and the event to wait for before it is filled."""
        # The memory may be that of a freed tensor whose last kernel still runs.
        return self._device.empty(nbytes), self._device.computing([])

    def _add_ring(self, nbytes: int) -> None:
        self._rings.append(_Ring(("slots", len(self._rings)), *self._new_memory(nbytes)))

    def _present(self) -> dict[int, Slot]:
        """Return the slots of all streamed units that are on the device."""
        slots = (slot for ring in self._rings for slot in ring.slots)
        return {slot.unit: slot for slot in slots if slot.unit is not None}

    def _held(self) -> list[Slot]:
        return [slot for ring in self._rings for slot in ring.slots if slot.holders]

    def _prefetch(self) -> None:
        """Upload the units expected next, as many as fit beside those that are held."""
        kept, present = self._held(), self._present()
        for unit in self._order.upcoming():
            slot = present.get(unit)
            if slot is None or slot.unit != unit:
                slot = self._fill(unit, kept)
            if slot is None:
                return  # until another slot is released
            present[unit] = slot
            kept.append(slot)

    def _fill_now(self, unit: int) -> Slot:
        """Upload `unit`, to new memory if units are nested deeper than there are slots."""
        slot = self._fill(unit, self._held())
        if slot is None:
            self._add_ring(self._store.slot_nbytes(unit))
            slot = self._fill(unit, self._held())
        assert slot is not None
        return slot

    def _fill(self, unit: int, kept: Sequence[Slot]) -> Slot | None:
        """Upload `unit` to memory beside the slots `kept`; None if there is no room."""
        nbytes = self._store.slot_nbytes(unit)
        for ring in self._rings:
            begin = ring.find(nbytes, kept)
            if begin is None:
                continue
            slot, replaced = ring.put(begin, nbytes)
            for old in replaced:
                self._count(old)
                old.unit = None
            separate = self._store.low_apart and self._store.layouts[unit].low_nbytes > 0
            low = self._low or not separate
            try:
                self._upload_slab(slot, unit, low=low, before=replaced)
            except BaseException:
                self._device.synchronize()  # nobody else knows the events of `replaced`
                raise
            slot.unit, slot.low = unit, low
            return slot
        return None

    def _upload_slab(
        self, slot: Slot, unit: int, *, low: bool, before: Sequence[Slot] = ()
    ) -> None:
        """Queue the upload of a unit, whose memory was that of the slots `before`.

        It is cut where these end, so that its beginning need not wait for the last of them.
        """
        layout, waiting = self._store.layouts[unit], list[Slot]()
        begin, end = 0 if low else layout.low_nbytes, layout.nbytes
        for old in before if self._store.divisible else ():
            cut = old.place.end - slot.place.begin
            waiting.append(old)
            if cut - begin >= PIECE_NBYTES <= end - cut:
                self._upload(slot, unit, range(begin, cut), waiting)
                begin, waiting = cut, []
        self._upload(slot, unit, range(begin, end), waiting if self._store.divisible else before)

    def _upload(self, slot: Slot, unit: int, bytes_: range, before: Sequence[Slot] = ()) -> None:
        """Queue the upload of a part of a unit, in memory that the slots `before` had."""
        last, name = [slot, *before], slot.name
        if self._store.divisible and isinstance(name, Region):
            begin = name.begin
            name = Region(name.memory, begin + bytes_.start, begin + bytes_.stop)
        slot.uploaded = self._store.bring(
            unit,
            slot.buffer[: self._store.slot_nbytes(unit)],
            name,
            {
                Dependency.UPLOAD_AFTER_SLOT_WAS_READ: [s.read for s in last],
                # This also orders a unit's next upload after its write-back: uploads keep their
                # order, and the slot that it was written back from is filled anew before.
                Dependency.UPLOAD_AFTER_SLOT_WAS_OFFLOADED: [s.offloaded for s in last],
                # Uploads keep their order, but where slices are gathered, only gathers do.
                Dependency.UPLOAD_AFTER_SLOT_WAS_GATHERED: [s.uploaded for s in last],
            },
            bytes_,
        )
        moved, more = slot.moved, self._store.moved(unit, bytes_)
        slot.moved = Moved(moved.uploaded + more.uploaded, 0, moved.gathered + more.gathered)

    def _count(self, slot: Slot) -> None:
        self.traffic.uploaded += slot.moved.uploaded
        self.traffic.gathered += slot.moved.gathered
        slot.moved = Moved(0, 0)

    def _offload(self, slot: Slot, unit: int, updated: object | None) -> None:
        nbytes = self._store.layouts[unit].trainable_nbytes
        sent = self._store.send(unit, slot.buffer[:nbytes], slot.name, updated)
        slot.offloaded, self._written[unit] = sent.free, sent.home
        self.traffic.offloaded += self._store.moved(unit).offloaded


def ring_nbytes(sizes: Iterable[int], slots: int) -> int:
    """Return the bytes that units of `sizes` bytes pass through: those of the `slots` largest.

    That many different units fit, or more smaller ones: one large embedding does not make all
    slots large.
    """
    return sum(sorted(sizes, reverse=True)[:slots])


def spread(sizes: Sequence[int], resident: int | str, budget: int | None = None) -> frozenset[int]:
    """Choose the units that stay on the device, spread evenly over the order.

    The link then has about the same time for each upload.

    Args:
        sizes: Bytes of each unit, in order.
        resident: Number of resident units, or "all".
        budget: Bytes available to residents; if given, as many as fit instead of `resident`.

    Returns:
        Indices of the resident units.
    """
    total = len(sizes)
    if resident == "all":
        return frozenset(range(total))
    counts = [min(int(resident), total)] if budget is None else range(total, -1, -1)
    for count in counts:
        chosen = frozenset(i * total // count for i in range(count))
        if budget is None or sum(sizes[i] for i in chosen) <= budget:
            return chosen
    return frozenset()


def resident_units(layouts: Sequence[UnitLayout], resident: int | str) -> frozenset[int]:
    """Return the indices of the units that the setting `resident` keeps on the device."""
    sizes = [layout.nbytes for layout in layouts]
    if isinstance(resident, str) and resident != "all":
        return spread(sizes, 0, budget=parse_size(resident))
    return spread(sizes, resident)
