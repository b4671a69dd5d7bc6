"""Units on their way: upload the next while one computes and the last goes home.

Knows units and slots, no models. Every order between queues is declared here, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext.streaming.devices.device import Buffer, Dependency, Device
from zo2ext.streaming.stores.store import WeightStore


@dataclass(eq=False)
class Slot:
    """A device buffer that holds one unit's slab, and what has to pass before it holds another."""

    name: Buffer
    buffer: Tensor  # uint8
    unit: int | None = None
    whole: bool = False  # whether the low planes are there, too
    holders: int = 0
    uploaded: object | None = None
    read: object | None = None
    offloaded: object | None = None


@dataclass
class Traffic:
    """Bytes moved since the start: to the device's memory, home, and here from other ranks."""

    uploaded: int = 0
    offloaded: int = 0
    gathered: int = 0


class _Order:
    """The order of visits: learnt from the last step, expected of everything that follows."""

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
        """One round from here: what is left of this sweep, then the next from its start."""
        return self._expected[self._position :] + self._expected[: self._position]

    def begin(self) -> None:
        self._seen = []

    def end(self) -> None:
        if self._seen:
            self._expected, self._position = self._seen, 0
        self._seen = None


class Pipeline:
    """Brings units to the device and home again.

    Args:
        store: The weights at rest.
        device: Where they are computed on.
        slots: Device buffers for units that stream.
        resident: Indices of units that stay on the device.
    """

    def __init__(
        self, store: WeightStore, device: Device, *, slots: int, resident: frozenset[int]
    ) -> None:
        self._store, self._device = store, device
        self.traffic = Traffic()
        self._whole = True  # what the last visit asked for, and the next ones probably will
        self._written: dict[int, object | None] = {}  # unit -> its last offload, if not settled
        self._stale: set[int] = set()  # residents whose host copy is behind
        streamed = [
            layout for layout in store.layouts if store.moves and layout.unit.index not in resident
        ]
        self._residents = {
            index: self._settle(index)
            for index in range(len(store.layouts))
            if not any(layout.unit.index == index for layout in streamed)
        }
        needed = [store.slot_nbytes(x.unit.index) for x in streamed]
        sizes = slot_sizes(needed, min(slots, store.most_slots or slots))
        self._slots = [self._new_slot(k, nbytes) for k, nbytes in enumerate(sizes)]
        self._order = _Order([layout.unit.index for layout in streamed])
        self._prefetch()

    def acquire(self, unit: int, *, whole: bool = True) -> Slot:
        """The slab of `unit` on the device; compute work queued after this call may use it.

        Held until `release`. Uploads what is expected next.

        Args:
            whole: With its low planes.
        """
        slot = self._residents.get(unit)
        if slot is None:
            self._order.visit(unit)
            self._whole = whole
            slot = self._find(unit) or self._fill(self._free_slot(unit), unit)
            if whole and not slot.whole:
                self._upload(slot, unit, range(self._store.layouts[unit].low_nbytes))
                slot.whole = True
            slot.holders += 1
            self._prefetch()
        return slot

    def release(self, unit: int) -> None:
        """All compute work on `unit` is queued; its slot may be filled again after that work."""
        slot = self._residents.get(unit) or self._find(unit)
        assert slot is not None, f"unit {unit} was not acquired"
        slot.read = self._device.computing([slot.name])
        if unit not in self._residents:
            slot.holders -= 1
            self._prefetch()

    def write_back(self, unit: int, updated: object | None) -> None:
        """Send home the trainable head of `unit`'s slab, once the event `updated` is past."""
        if unit in self._residents:
            if self._store.moves:
                self._stale.add(unit)
            return
        slot = self._find(unit)
        assert slot is not None, f"unit {unit} was not acquired"
        self._offload(slot, unit, updated)

    def begin_step(self) -> None:
        """Learn the order of visits from here to `end_step`."""
        self._order.begin()

    def end_step(self) -> None:
        """The next step is expected to visit the units in the order of this one."""
        self._order.end()
        self._prefetch()

    def settle_host(self) -> None:
        """Block until every write-back is home, residents' too: the host may read and write."""
        for unit in sorted(self._stale):
            slot = self._residents[unit]
            self._offload(slot, unit, slot.read)
        self._stale.clear()
        self._device.finish({Dependency.HOST_READ_AFTER_OFFLOAD: list(self._written.values())})
        for unit in self._written:
            self._device.host_reads(self._store.home(unit))
        self._written.clear()
        self._store.settle()

    def forget(self, unit: int) -> None:
        """The host copy of `unit` was changed from outside: upload it anew."""
        if unit in self._residents:
            if self._store.moves:
                self._upload_slab(self._residents[unit], unit)
            return
        slot = self._find(unit)
        if slot is not None:
            slot.unit = None

    @property
    def device_nbytes(self) -> int:
        """Device bytes of slots and residents."""
        slots = [*self._slots, *(self._residents.values() if self._store.moves else ())]
        return sum(slot.buffer.nbytes for slot in slots)

    def _settle(self, unit: int) -> Slot:
        if not self._store.moves:
            return Slot(self._store.home(unit), self._store.slab(unit), unit, whole=True)
        size = max(self._store.slot_nbytes(unit), 1)
        slot = self._made(("resident", unit), size)
        slot.unit, slot.whole = unit, True
        self._upload_slab(slot, unit)
        return slot

    @torch.inference_mode(False)  # one that is made amid `generate` serves training, too
    def _new_slot(self, index: int, nbytes: int) -> Slot:
        return self._made(("slot", index), nbytes)

    def _made(self, name: Buffer, nbytes: int) -> Slot:
        """A slot over device memory, to be filled after what its memory was used for before."""
        buffer = self._device.empty(nbytes)  # perhaps of a tensor whose last kernel still runs
        return Slot(name, buffer, read=self._device.computing([]))

    def _find(self, unit: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.unit == unit), None)

    def _free_slot(self, unit: int) -> Slot:
        """An unheld slot for `unit`, the one whose unit is wanted last; else one more."""
        nbytes = self._store.slot_nbytes(unit)
        free = [s for s in self._slots if s.holders == 0 and s.buffer.nbytes >= nbytes]
        if not free:  # units nested deeper than there are slots
            self._slots.append(self._new_slot(len(self._slots), nbytes))
            return self._slots[-1]
        upcoming = self._order.upcoming()
        never = len(upcoming)
        return max(
            free,
            key=lambda s: upcoming.index(s.unit) if s.unit in upcoming else never,
        )

    def _prefetch(self) -> None:
        """Fill unheld slots with the units expected next, in order, each the smallest it fits."""
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
                if fitting is not None:  # else it waits for a slot that is in use
                    spare.remove(fitting)
                    self._fill(fitting, unit)

    def _fill(self, slot: Slot, unit: int) -> Slot:
        slot.unit, slot.whole = unit, self._brings_whole(unit)
        self._upload_slab(slot, unit)
        return slot

    def _brings_whole(self, unit: int) -> bool:
        apart = self._store.low_apart and self._store.layouts[unit].low_nbytes > 0
        return self._whole or not apart

    def _upload_slab(self, slot: Slot, unit: int) -> None:
        layout = self._store.layouts[unit]
        self._upload(slot, unit, range(0 if slot.whole else layout.low_nbytes, layout.nbytes))

    def _upload(self, slot: Slot, unit: int, bytes_: range) -> None:
        slot.uploaded = self._store.bring(
            unit,
            slot.buffer[: self._store.slot_nbytes(unit)],
            slot.name,
            {
                Dependency.UPLOAD_AFTER_SLOT_WAS_READ: [slot.read],
                # Orders a unit's next upload after its write-back, too: uploads keep their order,
                # and the slot that the unit was written back from has been filled anew before.
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
    """Bytes of each slot, for units of `sizes` bytes.

    `slots` slots hold as many different units, so the k-th largest slot need be no larger than the
    k-th largest unit. That one large embedding does not make all slots large.
    """
    return sorted(sizes, reverse=True)[:slots]


def spread(sizes: Sequence[int], resident: int | str, budget: int | None = None) -> frozenset[int]:
    """Which of the units of `sizes` bytes stay on the device, evenly over the order.

    Spread, so that between two uploads the link always has about the same time.

    Args:
        sizes: Bytes of each unit, in order.
        resident: A count, or "all".
        budget: Bytes that residents may take together, instead of a count.
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
