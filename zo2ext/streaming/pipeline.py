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
from zo2ext.streaming.devices.device import Buffer, Dependency, Device
from zo2ext.streaming.stores.store import WeightStore


@dataclass(eq=False)
class Slot:
    """A device buffer for one unit's slab, and the events to wait for before it is filled anew."""

    name: Buffer
    buffer: Tensor  # uint8
    unit: int | None = None
    low: bool = False  # whether the unit's low planes are present, too
    resident: bool = False  # whether it holds the same unit for good
    holders: int = 0
    uploaded: object | None = None
    read: object | None = None
    offloaded: object | None = None


@dataclass
class Traffic:
    """Bytes moved since the start: to the device, back home, and here from other ranks."""

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
        slots: Number of device buffers for units that stream.
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
        sizes = slot_sizes(needed, min(slots, store.most_slots or slots))
        self._slots = [self._new_slot(("slot", k), nbytes) for k, nbytes in enumerate(sizes)]
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
            return resident
        self._order.visit(unit)
        self._low = low
        slot = self._find(unit) or self._fill(self._free_slot(unit), unit)
        slot.holders += 1
        try:
            if low and not slot.low:
                self._upload(slot, unit, range(self._store.layouts[unit].low_nbytes))
                slot.low = True
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
        slot = self._find(unit)
        if slot is not None:
            slot.unit = None

    def close(self) -> None:
        """Let go of all device memory. No work may be under way."""
        self._slots.clear()
        self._residents.clear()

    @property
    def device_nbytes(self) -> int:
        """Device bytes of slots and resident units."""
        slots = [*self._slots, *(self._residents.values() if self._store.moves else ())]
        return sum(slot.buffer.nbytes for slot in slots)

    def _make_resident(self, unit: int) -> Slot:
        if not self._store.moves:
            name, slab = self._store.home(unit), self._store.slab(unit)
            return Slot(name, slab, unit, low=True, resident=True)
        slot = self._new_slot(("resident", unit), max(self._store.slot_nbytes(unit), 1))
        slot.unit, slot.low, slot.resident = unit, True, True
        self._upload_slab(slot, unit, low=True)
        return slot

    @torch.inference_mode(False)  # a slot made during `generate` is used for training, too
    def _new_slot(self, name: Buffer, nbytes: int) -> Slot:
        # The memory may be that of a freed tensor whose last kernel still runs.
        buffer = self._device.empty(nbytes)
        return Slot(name, buffer, read=self._device.computing([]))

    def _find(self, unit: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.unit == unit), None)

    def _free_slot(self, unit: int) -> Slot:
        """Return a slot that nobody holds, the one whose unit is needed last, or a new one."""
        nbytes = self._store.slot_nbytes(unit)
        free = [s for s in self._slots if s.holders == 0 and s.buffer.nbytes >= nbytes]
        if not free:  # units are nested deeper than there are slots
            self._slots.append(self._new_slot(("slot", len(self._slots)), nbytes))
            return self._slots[-1]
        upcoming = self._order.upcoming()
        never = len(upcoming)
        return max(
            free,
            key=lambda s: upcoming.index(s.unit) if s.unit in upcoming else never,
        )

    def _prefetch(self) -> None:
        """Fill free slots with the units expected next, each the smallest that fits."""
        free = [slot for slot in self._slots if slot.holders == 0]
        wanted: list[int] = []
        for unit in self._order.upcoming():
            if len(wanted) == len(free):
                break
            slot = self._find(unit)
            if unit not in wanted and (slot is None or slot.holders == 0):
                wanted.append(unit)
        spare = [slot for slot in free if slot.unit not in wanted]
        spare.sort(key=lambda slot: slot.buffer.nbytes)
        for unit in wanted:
            if self._find(unit) is None:
                nbytes = self._store.slot_nbytes(unit)
                fitting = next((s for s in spare if s.buffer.nbytes >= nbytes), None)
                if fitting is not None:  # otherwise it waits for a slot that is in use
                    spare.remove(fitting)
                    self._fill(fitting, unit)

    def _fill(self, slot: Slot, unit: int) -> Slot:
        slot.unit = None  # until all of its upload is queued
        separate = self._store.low_apart and self._store.layouts[unit].low_nbytes > 0
        low = self._low or not separate
        self._upload_slab(slot, unit, low=low)
        slot.unit, slot.low = unit, low
        return slot

    def _upload_slab(self, slot: Slot, unit: int, *, low: bool) -> None:
        layout = self._store.layouts[unit]
        self._upload(slot, unit, range(0 if low else layout.low_nbytes, layout.nbytes))

    def _upload(self, slot: Slot, unit: int, bytes_: range) -> None:
        slot.uploaded = self._store.bring(
            unit,
            slot.buffer[: self._store.slot_nbytes(unit)],
            slot.name,
            {
                Dependency.UPLOAD_AFTER_SLOT_WAS_READ: [slot.read],
                # This also orders a unit's next upload after its write-back: uploads keep their
                # order, and the slot that it was written back from is filled anew before.
                Dependency.UPLOAD_AFTER_SLOT_WAS_OFFLOADED: [slot.offloaded],
            },
            bytes_,
        )
        moved = self._store.moved(unit, bytes_)
        self.traffic.uploaded += moved.uploaded
        self.traffic.gathered += moved.gathered

    def _offload(self, slot: Slot, unit: int, updated: object | None) -> None:
        nbytes = self._store.layouts[unit].trainable_nbytes
        sent = self._store.send(unit, slot.buffer[:nbytes], slot.name, updated)
        slot.offloaded, self._written[unit] = sent.free, sent.home
        self.traffic.offloaded += self._store.moved(unit).offloaded


def slot_sizes(sizes: Iterable[int], slots: int) -> list[int]:
    """Return the bytes of each slot, for units of `sizes` bytes.

    `slots` slots hold as many different units, so the k-th largest slot need not be larger than the
    k-th largest unit: one large embedding does not make all slots large.
    """
    return sorted(sizes, reverse=True)[:slots]


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
