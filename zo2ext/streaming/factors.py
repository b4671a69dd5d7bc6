"""The factors of directions: made from their keys, read by forward passes, folded into weights.

Between two write-back steps the weights of a factored tensor stay as they are stored. The steps
since then add the sum over directions of ``U @ V.mT``, where U collects the updates and V is fixed;
a forward pass moves the U of its direction by eps. At the write-back step all of this is folded
into the weights in one pass. See docs/contracts.md, "Factored directions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.model.factored import Factored
from zo2ext.model.factors import FactorPlaces, StandIn
from zo2ext.model.layout import Part, Placed, UnitLayout
from zo2ext.model.units import Unit
from zo2ext.ops.formats import Planes
from zo2ext.streaming.devices.device import Buffer
from zo2ext.streaming.pending import PendingUpdates
from zo2ext.streaming.views import Binding
from zo2ext.streaming.visit import Perturbation


class Kernels(Protocol):
    """The kernels that a loader calls: `zo2ext.ops`; predictions' ones only take their time."""

    @property
    def update_perturb(self) -> Callable[..., None]: ...

    @property
    def fold(self) -> Callable[..., None]: ...


class Folder:
    """Makes factors on one device, and folds them into weights there.

    Args:
        empty: Returns that many bytes of memory on the device, uint8.
        where: The device.
        config: Settings of the run, with a `rank`.
        pending: Updates that weights may be missing.
        places: Places of all factors that it will fold, which say how much memory that takes.
        kernels: Kernels to call.
    """

    def __init__(
        self,
        empty: Callable[[int], Tensor],
        where: torch.device,
        config: ZOConfig,
        pending: PendingUpdates,
        places: Iterable[FactorPlaces],
        kernels: Kernels,
    ) -> None:
        assert config.rank is not None
        self._where, self._config, self._pending, self._kernels = where, config, pending, kernels
        self._scale = 1 / math.sqrt(config.rank)
        left = right = 0
        for place in places:
            left, right = max(left, place.left_numel), max(right, place.right_numel)
        n, itemsize = config.count, torch.float32.itemsize
        self._zeros = empty(itemsize * max(left, right)).zero_().view(torch.float32)
        self._left = empty(itemsize * n * left).view(torch.float32)
        self._right = empty(itemsize * n * right).view(torch.float32)
        self._rounded = empty(itemsize * right)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it works in."""
        return sum(t.nbytes for t in (self._zeros, self._left, self._right, self._rounded))

    # -- factors

    def move(
        self, tables: FactorTables, perturbation: Perturbation, first: int, step: int, out: Tensor
    ) -> None:
        """Write the U that collects steps `first` to `step`, moved along a direction, to `out`."""
        key, eps, k = perturbation
        updates = self._pending.of_direction(k, first, step, self._where)
        direction = ops.Direction(key, abs(eps), **{"plus" if eps > 0 else "minus": out})
        self._write(tables.left, ops.Domain.LEFT, len(out), updates, [direction])

    def collect(self, tables: FactorTables, k: int, first: int, end: int, out: Tensor) -> None:
        """Write the U of direction `k` that collects steps `first` to `end` to `out`."""
        updates = self._pending.of_direction(k, first, end, self._where)
        self._write(tables.left, ops.Domain.LEFT, len(out), updates, [], plain=out)

    def make_right(self, tables: FactorTables, k: int, step: int, out: Tensor) -> None:
        """Write the V of direction `k` in the period of `step`, over root rank, to `out`."""
        direction = ops.Direction(self._pending.right_key(step, k), self._scale, out)
        self._write(tables.right, ops.Domain.RIGHT, len(out), None, [direction])

    def _write(
        self,
        segments: Tensor,
        domain: ops.Domain,
        numel: int,
        updates: Tensor | None,
        directions: list[ops.Direction],
        plain: Tensor | None = None,
    ) -> None:
        self._kernels.update_perturb(
            self._zeros[:numel],
            scales=None,
            low=None,
            segments=segments,
            updates=updates,
            plain=plain,
            directions=directions,
            write_back=None,
            distribution=self._config.distribution,
            domain=domain,
        )

    # -- weights

    def round(
        self,
        tables: FactorTables,
        planes: Planes,
        version: int,
        until: int,
        compute: torch.dtype,
        plain: Tensor | None = None,
    ) -> None:
        """Bring weights from one write-back step to another; arguments as in `fold`."""
        stretches = self._pending.stretches(version, until)
        for first, end in stretches:
            out = plain if (first, end) == stretches[-1] else None
            self.fold(tables, planes, first, end, compute, out, rounded=True)
        if plain is not None and not stretches:
            self.fold(tables, planes, until, until, compute, plain)

    def fold(
        self,
        tables: FactorTables,
        planes: Planes,
        first: int,
        end: int,
        compute: torch.dtype,
        plain: Tensor | None = None,
        *,
        rounded: bool = False,
    ) -> None:
        """Add what steps `first` to `end` made to the weights in `planes`.

        Args:
            compute: Dtype of V in forward passes.
            plain: Output for the weights in that dtype; None: not wanted.
            rounded: Whether they are rounded as before step `end`, and replace those in `planes`.
        """
        left, right = tables.places.left_numel, tables.places.right_numel
        n = self._config.count if self._pending.any_since(first, end) else 0
        lefts = self._left[: n * left].view(n, left)
        rights = self._right[: n * right].view(n, right)
        for k in range(n):
            self.collect(tables, k, first, end, lefts[k])
            used = self._rounded.view(compute)[:right]
            self.make_right(tables, k, first, used)
            rights[k].copy_(used)
        self._kernels.fold(
            planes.stored,
            scales=planes.scales,
            low=planes.low,
            segments=tables.fold,
            left=lefts,
            right=rights,
            rank=tables.places.rank,
            decay=self._pending.decay(first, end),
            plain=plain,
            write_back=self._config.rounding if rounded else None,
            rounding_key=ops.direction_key(self._config.seed, end, 0) if rounded else 0,
        )


@dataclass(frozen=True)
class FactorTables:
    """The tables of the kernels for the factors at `places`, on a device."""

    places: FactorPlaces
    left: Tensor
    right: Tensor
    fold: Tensor

    @staticmethod
    def of(places: FactorPlaces, begins: Sequence[int], where: torch.device) -> FactorTables:
        """Return the tables for weights that begin at elements `begins` of a slab."""
        return FactorTables(
            places,
            ops.segment_table(places.left_segments(), where),
            ops.segment_table(places.right_segments(), where),
            ops.fold_table(places.fold_segments(begins), where),
        )


@dataclass(eq=False)
class FactorMemory:
    """Device memory for the factors that forward passes read, of one unit at a time.

    Attributes:
        memory: All of it, uint8.
        direction: Direction whose U is moved; None if all factors are to be made.
        parts: Factors of each factored part, by unit.
        bindings: What factored parameters show, by unit and the slot that the unit is in.
    """

    memory: Tensor
    direction: int | None = None
    parts: dict[int, list[_Part]] = field(default_factory=dict)
    bindings: dict[tuple[int, Buffer], Binding] = field(default_factory=dict)


class _Part(NamedTuple):
    """A factored part, its tables, and its factors: shape (directions, numel), compute dtype."""

    part: Part
    tables: FactorTables
    left: Tensor
    right: Tensor


class Factors:
    """The factors of all units on one device.

    Args:
        layouts: Layouts of all units.
        empty, where, config, pending, kernels: As those of `Folder`.

    Attributes:
        units: Units of the weights that factors add to, by id of their views.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        empty: Callable[[int], Tensor],
        where: torch.device,
        config: ZOConfig,
        pending: PendingUpdates,
        kernels: Kernels,
    ) -> None:
        self.units: dict[int, Unit] = {}
        self._empty, self._config, self._pending = empty, config, pending
        self._tables = {
            layout.unit.index: [
                FactorTables.of(part.factors, [t.offset for t in part.tensors], where)
                if part.factors is not None
                else None
                for part in layout.parts
            ]
            for layout in layouts
        }
        places = [t.places for tables in self._tables.values() for t in tables if t is not None]
        self.folder = Folder(empty, where, config, pending, places, kernels)
        self._most = max(
            sum(
                (t.places.left_numel + t.places.right_numel) * part.compute.itemsize
                for part, t in self._factored(layout)
            )
            for layout in layouts
        )

    def tables(self, layout: UnitLayout) -> list[FactorTables | None]:
        """Return the tables of each part of a unit; None for one whose directions are dense."""
        return self._tables[layout.unit.index]

    def _factored(self, layout: UnitLayout) -> list[tuple[Part, FactorTables]]:
        tables = self._tables[layout.unit.index]
        return [(p, t) for p, t in zip(layout.parts, tables, strict=True) if t is not None]

    # -- forward passes

    @property
    def memory_nbytes(self) -> int:
        """Bytes of one `FactorMemory`."""
        return self._rows * self._most

    @property
    def _rows(self) -> int:
        """Number of directions whose factors a forward pass reads.

        With a period of 1 the weights miss nothing when a pass reads them.
        """
        return 1 if self._pending.period == 1 else self._config.count

    def new_memory(self) -> FactorMemory:
        """Return memory for the factors of any unit."""
        return FactorMemory(self._empty(self.memory_nbytes))

    def move(
        self, layout: UnitLayout, memory: FactorMemory, perturbation: Perturbation, version: int
    ) -> None:
        """Queue the kernels that move the factors in `memory` along a direction.

        Args:
            version: Write-back step of the weights that the factors add to.
        """
        step, one_row = self._pending.step, self._rows == 1
        own, before = perturbation.direction, memory.direction
        for part in self._parts(layout, memory):
            for k in [own] if one_row else range(self._config.count):
                row = 0 if one_row else k
                if before is None or (one_row and before != own):
                    self.folder.make_right(part.tables, k, step, part.right[row])
                if k == own:
                    self.folder.move(part.tables, perturbation, version, step, part.left[row])
                elif before in (None, k):
                    self.folder.collect(part.tables, k, version, step, part.left[row])
        memory.direction = own

    @torch.inference_mode(False)
    def binding(
        self, layout: UnitLayout, memory: FactorMemory, slot: Buffer, bases: Mapping[int, Tensor]
    ) -> Binding:
        """Return what the factored parameters of a unit are to show.

        Args:
            slot: Name of the slot that the unit is in.
            bases: Weights that the factors in `memory` add to, by tensor id.
        """
        key = layout.unit.index, slot
        if key not in memory.bindings:
            self.units |= {id(base): layout.unit for base in bases.values()}
            memory.bindings[key] = [
                _shown(placed, bases[placed.spec.id], terms)
                for part in self._parts(layout, memory)
                for placed, terms in zip(part.part.tensors, _terms(part), strict=True)
            ]
        return memory.bindings[key]

    def _parts(self, layout: UnitLayout, memory: FactorMemory) -> list[_Part]:
        parts = memory.parts.get(layout.unit.index)
        if parts is not None:
            return parts
        parts, at = [], 0
        for part, tables in self._factored(layout):
            factors = []
            for numel in (tables.places.left_numel, tables.places.right_numel):
                end = at + self._rows * numel * part.compute.itemsize
                factors.append(memory.memory[at:end].view(part.compute).view(self._rows, numel))
                at = end
            parts.append(_Part(part, tables, *factors))
        memory.parts[layout.unit.index] = parts
        return parts


def _terms(part: _Part) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the factors of each tensor of a part, one pair per direction."""
    return [
        [
            (tensor.left_view(left), tensor.right_view(right))
            for left, right in zip(part.left, part.right, strict=True)
        ]
        for tensor in part.tables.places.tensors
    ]


def _shown(
    placed: Placed, base: Tensor, terms: list[tuple[Tensor, Tensor]]
) -> tuple[StandIn, Factored]:
    assert placed.stand_in is not None
    return placed.stand_in, Factored(base, terms)


def folded_on_host(
    planes: Planes,
    placed: Placed,
    compute: torch.dtype,
    version: int,
    config: ZOConfig,
    pending: PendingUpdates,
) -> Tensor:
    """Return a copy of a tensor with factored directions with all updates, in the compute dtype.

    Args:
        planes: Its planes in host memory.
        version: Write-back step at which they were stored.
    """
    assert config.rank is not None
    host = torch.device("cpu")
    places = FactorPlaces.of([placed.shape], [placed.spec.id], config.rank)
    tables = FactorTables.of(places, [0], host)
    empty = partial(torch.empty, dtype=torch.uint8)
    folder = Folder(empty, host, config, pending, [places], ops)
    plain = torch.empty(placed.numel, dtype=compute)
    rounded = max(version, pending.last_write_back())
    if pending.any_since(version, rounded):
        planes = Planes(**{name: plane.clone() for name, plane in planes.named().items()})
        folder.round(tables, planes, version, rounded, compute)
    folder.fold(tables, planes, rounded, pending.step, compute, plain)
    return plain.view(placed.shape)
