"""The interface of a store, which decides where weights rest between steps."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.errors import UserError
from zo2ext.model.layout import Part, Placed, UnitLayout
from zo2ext.ops.formats import PlaneRange, Planes
from zo2ext.streaming.devices.device import After, Buffer
from zo2ext.streaming.stores.rounding import RoundingError, read_rounded
from zo2ext.streaming.stores.sources import PIECE_NBYTES, HeldTensor, Source

HUGE_PAGE = 2**21


class Sent(NamedTuple):
    """Events of a write-back."""

    free: object | None  # the device buffer may be filled anew
    home: object | None  # the weights rest where they belong


class Moved(NamedTuple):
    """Bytes over each link of this process whenever a unit is brought and sent."""

    uploaded: int
    offloaded: int
    gathered: int = 0  # from other processes


class WeightStore(ABC):
    """The weights at rest: one slab per unit, in the storage format.

    The pipeline decides when a unit is brought to the device or sent home, and what that has to
    wait for; a store queues the copies on the device. To add a store, set the attributes below and
    implement the abstract methods: `bring` and `send` for the pipeline; `load_tensor`, `put` and
    `planes` for the host, which calls them between steps while no copy is under way.

    Attributes:
        layouts: Layouts of the units.
        moves: Whether units pass through device buffers; if not, they are computed on in `slab`.
        collective: Whether the ranks of a host share the store and have to make the same calls, in
            the same order.
        most_slots: Number of device buffers that the store allows; None for any number.
        low_apart: Whether a unit can be brought without its low planes.
        divisible: Whether a unit can be brought in any pieces, at no cost.
    """

    layouts: tuple[UnitLayout, ...]
    moves: bool
    collective = False
    most_slots: int | None = None
    low_apart = True
    divisible = False

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, padding included."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    @abstractmethod
    def host_nbytes(self) -> int:
        """Bytes of host memory that the store occupies."""

    # -- for the pipeline

    def slot_nbytes(self, unit: int) -> int:
        """Return the bytes of the device buffer that `unit` needs."""
        return self.layouts[unit].nbytes

    def moved(self, unit: int, bytes_: range = range(0)) -> Moved:
        """Return the bytes moved to bring `bytes_` of `unit`, and to send it."""
        return Moved(len(bytes_), self.layouts[unit].trainable_nbytes)

    def home(self, unit: int) -> Buffer:
        """Return the name of the memory where `unit` rests."""
        return ("host", unit)

    def slab(self, unit: int) -> Tensor:
        """Return the memory where `unit` rests: uint8, shape (bytes,). Called if not `moves`."""
        raise AssertionError(f"{type(self).__name__} has units computed on in slots")

    @abstractmethod
    def bring(
        self, unit: int, target: Tensor, name: Buffer, after: After, bytes_: range
    ) -> object | None:
        """Queue a copy of `unit` to a device buffer.

        Args:
            unit: Index of the unit.
            target: Device buffer, uint8, shape (`slot_nbytes`,).
            name: Name of the buffer.
            after: Events that the copy has to wait for.
            bytes_: Bytes of the slab to copy.

        Returns:
            The event of the copy.
        """

    @abstractmethod
    def send(self, unit: int, source: Tensor, name: Buffer, updated: object | None) -> Sent:
        """Queue a copy of the trainable head of `unit` home.

        Args:
            unit: Index of the unit.
            source: Head of the device buffer, uint8, shape (`trainable_nbytes`,).
            name: Name of the buffer.
            updated: Event of the kernel that updated it.
        """

    @property
    def readable(self) -> bool:
        """Whether the host can read all weights. Other processes may not have stored theirs yet."""
        return True

    def begin_host_reads(self) -> None:
        """Prepare for reads by the host. All write-backs of this process are home."""

    # -- for the host, between steps and while no copy is under way

    @abstractmethod
    def load_tensor(self, layout: UnitLayout, placed: Placed, source: Source) -> RoundingError:
        """Store the values of `source`, rounded to nearest even; return the error of that."""

    @abstractmethod
    def put(self, layout: UnitLayout, placed: Placed, planes: Planes) -> None:
        """Store a tensor's planes as they are."""

    @abstractmethod
    def planes(self, layout: UnitLayout, placed: Placed) -> Planes:
        """Return a tensor's planes, flat: the memory where they rest, or a copy."""

    def fill(self, layout: UnitLayout, placed: Placed, values: Tensor) -> None:
        """Store `values`, of the tensor's shape, rounded to nearest even."""
        if values.shape != placed.shape:
            raise UserError(
                f"{placed.spec.name} has shape {tuple(placed.shape)}, got {tuple(values.shape)}"
            )
        self.load_tensor(layout, placed, HeldTensor(values))

    def lock(self, layout: UnitLayout) -> None:
        """Finish the unit of `layout`, all tensors of which are loaded."""

    def view(self, layout: UnitLayout, placed: Placed) -> Tensor:
        """Return a tensor's stored values in their `Storage.whole_dtype`.

        The result is the memory where they rest if that is possible and needs no scales, else a
        copy. It has a storage of its own, so that transformers and safetensors do not take two
        weights of a slab for one shared tensor.
        """
        return self.planes(layout, placed).values().view(placed.shape)

    def current(
        self,
        layout: UnitLayout,
        part: Part,
        placed: Placed,
        updates: Tensor | None,
        distribution: ops.Distribution,
    ) -> Tensor:
        """Return a copy of a trainable tensor with `updates` applied, in the compute dtype."""
        planes = self.planes(layout, placed)
        plain = torch.empty(placed.numel, dtype=part.compute)
        segment = ops.Segment(
            begin=0, numel=placed.numel, tensor_id=placed.spec.id, decays=len(placed.shape) >= 2
        )
        ops.update_perturb(
            planes.stored,
            scales=planes.scales,
            low=planes.low,
            segments=ops.segment_table([segment], "cpu"),
            updates=updates,
            plain=plain,
            distribution=distribution,
        )
        return plain.view(placed.shape)

    @abstractmethod
    def close(self) -> None:
        """Release what the store holds. Memory lives on as long as tensors over it."""


Pieces = Iterator[tuple[int, Planes, RoundingError]]


def rounded_pieces(
    layout: UnitLayout,
    placed: Placed,
    source: Source,
    wanted: Callable[[int, int], bool] = lambda first, count: True,
) -> Pieces:
    """Round the values of `source` to storage, a piece of some MB at a time.

    Yields:
        The first element of a piece (a multiple of 32), its planes, and the error of rounding it.
        Pieces for which ``wanted(first, count)`` is false are skipped.
    """
    part = layout.part_of(placed)
    step = PIECE_NBYTES // torch.float32.itemsize
    for first in range(0, placed.numel, step):
        count = min(step, placed.numel - first)
        if not wanted(first, count):
            continue
        if part is None:
            planes = Planes(torch.empty(count, dtype=placed.dtype))
        else:
            planes = Planes.empty(part.storage, count)
        yield first, planes, read_rounded(source, first, planes)


def planes_over(places: list[PlaneRange], memory: Callable[[PlaneRange], Tensor]) -> Planes:
    """Return the planes at `places`, each made by `memory` unless it is empty."""
    return Planes(
        **{r.name: memory(r) if r.numel else torch.empty(0, dtype=r.dtype) for r in places}
    )


def map_arena(nbytes: int) -> mmap.mmap:
    """Return anonymous, zeroed, page-aligned memory, in huge pages if it is large enough.

    It is private, because Linux gives no huge pages to shared memory unless it is configured to.
    Forked processes do not get it: while they live, each page would be copied when it is written.
    """
    arena = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    arena.madvise(mmap.MADV_DONTFORK)
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    return arena


def copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
