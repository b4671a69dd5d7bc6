"""Where weights rest. Host memory: an aligned arena per unit, page-locked for GPUs."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.model.layout import Part, Placed, UnitLayout
from zo2ext.ops.formats import Planes
from zo2ext.streaming.devices.device import After, Buffer
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.stores.sources import HeldTensor, Source

HUGE_PAGE = 2**21


class Sent(NamedTuple):
    """Events of a write-back."""

    free: object | None  # the device buffer may be filled anew
    home: object | None  # the weights rest where they belong


class Moved(NamedTuple):
    """Bytes that cross each link of this process whenever a unit travels."""

    uploaded: int
    offloaded: int
    gathered: int = 0  # from other processes


class WeightStore(ABC):
    """The weights at rest: a slab per unit, in the storage format.

    The pipeline says when a unit is to be brought and sent, and after what; a store queues that on
    the device. docs/storage.md says how to add one.

    Attributes:
        layouts: Of the units.
        moves: Whether units pass through device buffers; if not, `slab` is computed on itself.
        most_slots: Device buffers that the store allows; None where it does not care.
        low_apart: Whether a unit can be brought without its low planes.
    """

    layouts: tuple[UnitLayout, ...]
    moves: bool
    most_slots: int | None = None
    low_apart = True

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, padding included."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    @abstractmethod
    def host_nbytes(self) -> int:
        """Host memory that the store holds."""

    # -- for the pipeline

    def slot_nbytes(self, unit: int) -> int:
        """Bytes of the device buffer that `unit` is brought to."""
        return self.layouts[unit].nbytes

    def moved(self, unit: int, bytes_: range = range(0)) -> Moved:
        """What it takes to bring `bytes_` of `unit`, and to send it."""
        return Moved(len(bytes_), self.layouts[unit].trainable_nbytes)

    def home(self, unit: int) -> Buffer:
        """The name of the memory where `unit` rests."""
        return ("host", unit)

    @abstractmethod
    def slab(self, unit: int) -> Tensor:
        """The memory where `unit` rests: uint8, shape (bytes,). Only where units do not move."""

    @abstractmethod
    def bring(
        self, unit: int, target: Tensor, name: Buffer, after: After, bytes_: range
    ) -> object | None:
        """Queue a copy of `unit` to the device buffer `target`, called `name`; returns its event.

        Args:
            target: uint8, shape (`slot_nbytes`,).
            after: What the copy has to wait for.
            bytes_: Those of the slab that are copied.
        """

    @abstractmethod
    def send(self, unit: int, source: Tensor, name: Buffer, updated: object | None) -> Sent:
        """Queue a copy of the trainable head of `unit` from the device buffer `source`, home."""

    def settle(self) -> None:
        """This process has nothing on its way home: the host is about to read."""

    # -- for the host, between steps and with nothing on its way

    @abstractmethod
    def take(self, layout: UnitLayout, placed: Placed, source: Source) -> RoundingError:
        """Store a tensor's values, rounded to nearest even."""

    @abstractmethod
    def put(self, layout: UnitLayout, placed: Placed, planes: Planes) -> None:
        """Store a tensor's planes as they are."""

    @abstractmethod
    def planes(self, layout: UnitLayout, placed: Placed) -> Planes:
        """A tensor's planes, flat: the memory where they rest, or a copy."""

    def fill(self, layout: UnitLayout, placed: Placed, values: Tensor) -> None:
        """Store `values`, the shape of the tensor, rounded to nearest even."""
        if values.shape != placed.shape:
            raise ValueError(
                f"{placed.spec.name} has shape {tuple(placed.shape)}, got {tuple(values.shape)}"
            )
        self.take(layout, placed, HeldTensor(values))

    def lock(self, layout: UnitLayout) -> None:
        """All tensors of `layout` were taken."""

    def view(self, layout: UnitLayout, placed: Placed) -> Tensor:
        """A tensor's stored values, in their `Storage.whole_dtype`: itself where it is in memory
        and no scales are to be applied, else a copy.

        Each is a tensor with a storage of its own, so that transformers and safetensors do not take
        two weights of a slab for one shared tensor.
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
        """A copy of a trainable tensor with `updates` (a table) applied, in the compute dtype."""
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


def map_arena(nbytes: int) -> mmap.mmap:
    """Anonymous, zeroed, page-aligned memory; in huge pages where it is large enough."""
    arena = mmap.mmap(-1, max(nbytes, 1))
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    return arena


def copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
