"""Weights on a disk, read ahead into staging memory. The checkpoint's files are never written.

A unit's slab is assembled from *extents*, ranges of files. Tensors that the checkpoint stores in
the run's format are read from its own files, and everything else from one scratch file. A unit that
is written back goes to the scratch file and is read from there afterwards. The scratch file is in
the system's temporary folder (TMPDIR). It has no name, so it disappears with the process, and it is
not opened before something has to be written.

Reads bypass the system's page cache (O_DIRECT): a sweep over weights that do not fit into the cache
would find nothing there, and would replace everything in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from zo2ext._format import gib
from zo2ext.config import ZOConfig, parse_size
from zo2ext.errors import UserError
from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.ops.formats import PlaneRange, Planes
from zo2ext.ops.tables import align
from zo2ext.streaming.devices.device import After, Buffer, Dependency, Device, Queue
from zo2ext.streaming.stores.disk_files import BLOCK, SCRATCH, Files, Piece, Read
from zo2ext.streaming.stores.page_locks import PageLocks
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.stores.sources import Extent, Source, bytes_of
from zo2ext.streaming.stores.store import Sent, WeightStore, copy, map_arena, rounded_pieces

READERS = 8  # concurrent requests
REQUEST_NBYTES = 2**23  # large enough for full speed, small enough to divide a unit among readers


@dataclass(eq=False)
class _Staging:
    """Page-locked memory for a unit in transit, and the events to wait for before its next use."""

    name: Buffer
    memory: Tensor  # uint8
    uploaded: object | None = None
    written: object | None = None


@dataclass
class DiskTraffic:
    """Bytes of weights read and written since the start, without the padding of requests."""

    read: int = 0
    written: int = 0


class DiskStore(WeightStore):
    """Weights in files.

    Units reach a device with memory of its own through staging memory. For other devices, slots
    are host memory, and units are read into them directly.

    Args:
        layouts: Layouts of the units.
        device: Device to queue the work on.
        config: Its `host_memory` bounds staging memory or slots, together with the read buffers.

    Attributes:
        traffic: Bytes read from and written to the disk.

    Raises:
        ValueError: `host_memory` is too small for this model's units.
    """

    moves = True

    def __init__(self, layouts: Sequence[UnitLayout], device: Device, config: ZOConfig) -> None:
        self._device = device
        self.layouts = tuple(layouts)
        self.traffic = DiskTraffic()
        self._extents: list[dict[int, Extent]] = [{} for _ in layouts]  # by first byte in the slab
        self._files = Files()
        largest = max((layout.nbytes for layout in layouts), default=0)
        self._request = min(REQUEST_NBYTES, align(largest, BLOCK) + BLOCK)
        self._buffers = SimpleQueue[Tensor]()
        for _ in range(READERS):
            self._buffers.put(_host_memory(self._request))
        count = self._affordable(largest, config)
        self._staging: list[_Staging] = []
        self._locks = PageLocks(device)
        self._next = 0
        if device.moves:
            for k in range(min(count, config.slots + 1)):
                memory = _host_memory(largest)
                self._locks.add(memory)
                self._staging.append(_Staging(("staging", k), memory))
        else:
            self.most_slots = count
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="zo2ext-reader")

    def _affordable(self, largest: int, config: ZOConfig) -> int:
        """Return the number of units that fit into `host_memory` at the same time."""
        own = READERS * self._request
        least = 1 if self._device.moves else 2
        count = (parse_size(config.host_memory) - own) // max(largest, 1)
        if count < least:
            raise UserError(
                f"host_memory must be at least {gib(least * largest + own)} for this model, got "
                f"{config.host_memory!r}: its largest unit needs {gib(largest)}; "
                "granularity='module' makes units smaller"
            )
        return count

    @property
    def host_nbytes(self) -> int:
        return READERS * self._request + sum(s.memory.nbytes for s in self._staging)

    # -- for the pipeline

    def home(self, unit: int) -> Buffer:
        return ("disk", unit)

    def bring(
        self, unit: int, target: Tensor, name: Buffer, after: After, bytes_: range
    ) -> object | None:
        target = target[bytes_.start : bytes_.stop]
        if not self._device.moves:
            return self._disk(
                lambda: self._read_unit(unit, target, bytes_), after, self.home(unit), name
            )
        staging = self._next_staging()
        memory = staging.memory[: len(bytes_)]
        read = self._disk(
            lambda: self._read_unit(unit, memory, bytes_),
            {Dependency.DISK_READ_AFTER_STAGING_WAS_UPLOADED: [staging.uploaded]},
            self.home(unit),
            staging.name,
        )
        staging.uploaded = self._device.submit(
            Queue.UPLOAD,
            lambda: copy(target, memory),
            after={**after, Dependency.UPLOAD_AFTER_DISK_READ: [read]},
            reads=[staging.name],
            writes=[name],
            unit=unit,
        )
        return staging.uploaded

    def send(self, unit: int, source: Tensor, name: Buffer, updated: object | None) -> Sent:
        after_kernel = {Dependency.OFFLOAD_AFTER_KERNEL: [updated]}
        if not self._device.moves:
            written = self._disk(
                lambda: self._write_unit(unit, source), after_kernel, name, self.home(unit)
            )
            return Sent(written, written)
        staging = self._next_staging()
        memory = staging.memory[: source.nbytes]
        offloaded = self._device.submit(
            Queue.OFFLOAD,
            lambda: copy(memory, source),
            after={
                **after_kernel,
                Dependency.OFFLOAD_AFTER_STAGING_WAS_UPLOADED: [staging.uploaded],
                Dependency.OFFLOAD_AFTER_STAGING_WAS_WRITTEN: [staging.written],
            },
            reads=[name],
            writes=[staging.name],
            unit=unit,
        )
        staging.written = self._disk(
            lambda: self._write_unit(unit, memory),
            {Dependency.DISK_WRITE_AFTER_OFFLOAD: [offloaded]},
            staging.name,
            self.home(unit),
        )
        return Sent(offloaded, staging.written)

    def _disk(
        self, work: Callable[[], None], after: After, reads: Buffer, writes: Buffer
    ) -> object | None:
        return self._device.submit(Queue.DISK, work, after=after, reads=[reads], writes=[writes])

    def _next_staging(self) -> _Staging:
        self._next = (self._next + 1) % len(self._staging)
        return self._staging[self._next]

    # -- for the host

    def load_tensor(self, layout: UnitLayout, placed: Placed, source: Source) -> RoundingError:
        part = layout.part_of(placed)
        stored = layout.ranges(placed)[0]
        extents = self._extents[layout.unit.index]
        there = source.extent(placed.dtype if part is None else part.storage.dtype)
        if there is not None and (part is None or not part.storage.scaled):
            self._device.synchronize()  # reads ahead use the extents, too
            if stored.nbytes and _find(extents, stored.begin) is None:
                extents[stored.begin] = there
                return RoundingError()
        total = RoundingError()
        for first, planes, error in rounded_pieces(layout, placed, source):
            self._put(layout, placed, planes, first)
            total += error
        return total

    def put(self, layout: UnitLayout, placed: Placed, planes: Planes) -> None:
        self._put(layout, placed, planes, 0)

    def _put(self, layout: UnitLayout, placed: Placed, planes: Planes, first: int) -> None:
        """Write the planes of a tensor's elements from `first` on to the scratch file."""
        self._device.synchronize()  # reads ahead use the extents, too
        extents = self._extents[layout.unit.index]
        for plane, values in zip(layout.ranges(placed), planes.named().values(), strict=True):
            if plane.nbytes == 0:
                continue
            known = _find(extents, plane.begin)
            if known is None or known[1].path != SCRATCH:
                extents[plane.begin] = self._files.allocate(plane.nbytes)
                known = plane.begin, extents[plane.begin]
            begin = plane.elements(first, planes.stored.numel()).begin
            self._files.write(known[1].begin + begin - known[0], bytes_of(values))
            self.traffic.written += values.nbytes

    def planes(self, layout: UnitLayout, placed: Placed) -> Planes:
        return Planes(**{r.name: self._plane(layout, r) for r in layout.ranges(placed)})

    def _plane(self, layout: UnitLayout, plane: PlaneRange) -> Tensor:
        values = torch.empty(plane.numel, dtype=plane.dtype)
        found = _find(self._extents[layout.unit.index], plane.begin)
        if plane.numel and found is not None:
            first, extent = found
            here = Extent(extent.path, extent.begin + plane.begin - first, plane.nbytes)
            self._read({0: here}, values.view(torch.uint8))
        return values

    def close(self) -> None:
        """Unlock staging memory and close the files; the scratch file is gone."""
        self._readers.shutdown()
        self._staging.clear()
        self._locks.close()
        self._files.close()

    # -- on the disk's thread

    def _read_unit(self, unit: int, target: Tensor, bytes_: range) -> None:
        """Assemble bytes of a slab in `target`, which has their length."""
        self._read(_cut(self._extents[unit], bytes_), target)

    def _write_unit(self, unit: int, source: Tensor) -> None:
        """Write the head of a slab to the scratch file, and read it from there from now on."""
        extents = self._extents[unit]
        head = extents.get(0)
        if head is None or head.path != SCRATCH or head.nbytes < source.nbytes:
            head = self._files.allocate(source.nbytes)
        begin, memory = head.begin, bytes_of(source)

        def write(first: int) -> None:
            self._files.write(begin + first, memory[first : first + REQUEST_NBYTES])

        _run(self._readers.map(write, range(0, len(memory), REQUEST_NBYTES)))
        tail = {first: extent for first, extent in extents.items() if first >= source.nbytes}
        self._extents[unit] = {0: head, **tail}
        self.traffic.written += source.nbytes

    def _read(self, extents: dict[int, Extent], target: Tensor) -> None:
        """Assemble `extents`, keyed by their first byte, in `target` (uint8)."""
        reads = self._requests(extents)
        _run(self._readers.map(lambda read: self._request_one(read, target), reads))
        self.traffic.read += sum(extent.nbytes for extent in extents.values())

    def _requests(self, extents: dict[int, Extent]) -> list[Read]:
        """Return requests for aligned ranges; extents in the same or adjacent blocks share one."""
        pieces = sorted(  # each at most as long as a request
            (e.path, e.begin + k, first + k, min(self._request - BLOCK, e.nbytes - k))
            for first, e in extents.items()
            for k in range(0, e.nbytes, self._request - BLOCK)
        )
        reads: list[Read] = []
        for path, begin, target, nbytes in pieces:
            low, high = begin // BLOCK * BLOCK, align(begin + nbytes, BLOCK)
            last = reads[-1] if reads else None
            if (
                last is not None
                and last.path == path
                and low <= last.begin + last.nbytes
                and high - last.begin <= self._request
            ):
                piece = Piece(begin - last.begin, target, nbytes)
                end = max(high, last.begin + last.nbytes)
                reads[-1] = Read(path, last.begin, end - last.begin, (*last.pieces, piece))
            else:
                piece = Piece(begin - low, target, nbytes)
                reads.append(Read(path, low, high - low, (piece,)))
        return reads

    def _request_one(self, read: Read, target: Tensor) -> None:
        buffer = self._buffers.get()
        try:
            memory = bytes_of(buffer[: read.nbytes])
            handle, done = self._files.handle(read.path), 0
            while done < read.needed:
                count = os.preadv(handle, [memory[done:]], read.begin + done)
                if count == 0:
                    raise OSError(
                        f"{read.path or 'the scratch file'} ends at byte {read.begin + done}, "
                        "within a tensor"
                    )
                done += count
            for piece in read.pieces:
                source = buffer[piece.source : piece.source + piece.nbytes]
                target[piece.target : piece.target + piece.nbytes].copy_(source)
        finally:
            self._buffers.put(buffer)


def _cut(extents: dict[int, Extent], bytes_: range) -> dict[int, Extent]:
    """Return the pieces of `extents` within `bytes_` of a slab, keyed by their offset there."""
    found = {}
    for first, extent in extents.items():
        low, high = max(first, bytes_.start), min(first + extent.nbytes, bytes_.stop)
        if low < high:
            found[low - bytes_.start] = Extent(extent.path, extent.begin + low - first, high - low)
    return found


def _find(extents: dict[int, Extent], begin: int) -> tuple[int, Extent] | None:
    """Return the extent with byte `begin` of a slab, and its first byte in the slab."""
    for first, extent in extents.items():
        if first <= begin < first + extent.nbytes:
            return first, extent
    return None


def _host_memory(nbytes: int) -> Tensor:
    return torch.frombuffer(map_arena(nbytes), dtype=torch.uint8, count=max(nbytes, 1))


def _run(results: Iterable[None]) -> None:
    """Wait for all results; raise the first failure."""
    for _ in results:
        pass
