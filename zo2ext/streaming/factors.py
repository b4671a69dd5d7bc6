"""The factors of directions: made from their keys, read by forward passes, folded into weights.

Between two write-back steps the weights of a factored tensor stay as they are stored. The steps
since then add the sum over directions of ``U @ V.mT``, where U collects the updates and V is fixed;
a forward pass moves the U of its direction by eps. At the write-back step all of this is folded
into the weights in one pass. See docs/contracts.md, "Factored directions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.model.factored import Factored
from zo2ext.model.factors import FactorPlaces, Joined, JoinedPasses
from zo2ext.model.layout import Part, Placed, UnitLayout
from zo2ext.model.quantized import Target
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
        units: Factors and copies of each unit, by its index.
        bindings: Tensors that parameters show, by unit and the slot that the unit is in.
    """

    memory: Tensor
    direction: int | None = None
    units: dict[int, _Held] = field(default_factory=dict)
    bindings: dict[tuple[int, Buffer], Binding] = field(default_factory=dict)


class _Part(NamedTuple):
    """A factored part, its tables, and its factors in the compute dtype.

    The shape of both is (directions, numel), or of `left` (passes, numel) if they are joined.
    """

    part: Part
    tables: FactorTables
    left: Tensor
    right: Tensor


class _Held(NamedTuple):
    """A unit in a `FactorMemory`: its factored parts, and of joined passes the others' copies."""

    factored: list[_Part]
    dense: dict[int, Tensor]


class Factors:
    """The factors of all units on one device.

    Args:
        layouts: Layouts of all units.
        empty, where, config, pending, kernels: As those of `Folder`.
        forwards: Forward passes per step on this process.

    Attributes:
        passes: The passes, if they are joined; None: they run one after the other.
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
        forwards: int,
    ) -> None:
        self.passes = JoinedPasses() if config.joined else None
        self._forwards = forwards
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
        self._layouts = layouts

    def tables(self, layout: UnitLayout) -> list[FactorTables | None]:
        """Return the tables of each part of a unit; None for one whose directions are dense."""
        return self._tables[layout.unit.index]

    # -- forward passes

    @property
    def memory_nbytes(self) -> int:
        """Bytes of one `FactorMemory`."""
        return max(
            sum(rows * numel * dtype.itemsize for rows, numel, dtype in self._places(layout))
            for layout in self._layouts
        )

    @property
    def _rows(self) -> int:
        """Number of directions whose factors forward passes read at once.

        With a period of 1 the weights miss nothing when a pass reads them.
        """
        one_by_one = self._pending.period == 1 and self.passes is None
        return 1 if one_by_one else self._config.count

    def _places(self, layout: UnitLayout) -> Iterator[tuple[int, int, torch.dtype]]:
        """Yield rows, columns and dtype of what a `FactorMemory` holds of a unit, in order.

        That is the left and the right factors of each factored part and, of joined passes, a copy
        per pass of the others.
        """
        lefts = self._rows if self.passes is None else self._forwards
        for part in layout.parts:
            if part.factors is not None:
                yield lefts, part.factors.left_numel, part.compute
                yield self._rows, part.factors.right_numel, part.compute
            elif self.passes is not None:
                yield self._forwards, part.numel, part.compute

    def new_memory(self) -> FactorMemory:
        """Return memory for the factors of any unit."""
        return FactorMemory(self._empty(self.memory_nbytes))

    def _held(self, layout: UnitLayout, memory: FactorMemory) -> _Held:
        held = memory.units.get(layout.unit.index)
        if held is not None:
            return held
        tensors, at = [], 0
        for rows, numel, dtype in self._places(layout):
            end = at + rows * numel * dtype.itemsize
            tensors.append(memory.memory[at:end].view(dtype).view(rows, numel))
            at = end
        held, left = _Held([], {}), iter(tensors)
        for i, (part, tables) in enumerate(zip(layout.parts, self.tables(layout), strict=True)):
            if tables is not None:
                held.factored.append(_Part(part, tables, next(left), next(left)))
            elif self.passes is not None:
                held.dense[i] = next(left)
        memory.units[layout.unit.index] = held
        return held

    def copies(self, layout: UnitLayout, memory: FactorMemory, part: int) -> list[Tensor]:
        """Return the copies of a part with dense directions, one per joined pass."""
        return list(self._held(layout, memory).dense[part])

    def move(
        self,
        layout: UnitLayout,
        memory: FactorMemory,
        perturbations: Sequence[Perturbation],
        version: int,
    ) -> None:
        """Queue the kernels that move the factors in `memory` along directions.

        Args:
            perturbations: Perturbation of the pass that comes next, or of all joined passes.
            version: Write-back step of the weights that the factors add to.
        """
        for part in self._held(layout, memory).factored:
            if self.passes is None:
                self._move_one(part, perturbations[0], version, memory.direction)
            else:
                self._move_all(part, perturbations, version)
        memory.direction = perturbations[0].direction

    def _move_one(
        self, part: _Part, perturbation: Perturbation, version: int, before: int | None
    ) -> None:
        step, one_row, own = self._pending.step, self._rows == 1, perturbation.direction
        for k in [own] if one_row else range(self._config.count):
            row = 0 if one_row else k
            if before is None or (one_row and before != own):
                self.folder.make_right(part.tables, k, step, part.right[row])
            if k == own:
                self.folder.move(part.tables, perturbation, version, step, part.left[row])
            elif before in (None, k):
                self.folder.collect(part.tables, k, version, step, part.left[row])

    def _move_all(self, part: _Part, perturbations: Sequence[Perturbation], version: int) -> None:
        step = self._pending.step
        for k in range(self._config.count):
            self.folder.make_right(part.tables, k, step, part.right[k])
        for perturbation, left in zip(perturbations, part.left, strict=True):
            self.folder.move(part.tables, perturbation, version, step, left)

    @torch.inference_mode(False)
    def binding(
        self, layout: UnitLayout, memory: FactorMemory, slot: Buffer, bases: Mapping[int, Tensor]
    ) -> Binding:
        """Return what the parameters of a unit are to show whose directions are in factors, and in
        joined passes the others, too.

        Args:
            slot: Name of the slot that the unit is in.
            bases: Weights that the factors in `memory` add to, by tensor id.
        """
        key = layout.unit.index, slot
        if key not in memory.bindings:
            self.units |= {id(base): layout.unit for base in bases.values()}
            memory.bindings[key] = list(self._shown(layout, memory, bases))
        return memory.bindings[key]

    def _shown(
        self, layout: UnitLayout, memory: FactorMemory, bases: Mapping[int, Tensor]
    ) -> Iterator[tuple[Target, Any]]:
        held = self._held(layout, memory)
        for part in held.factored:
            for placed, places in zip(part.part.tensors, part.tables.places.tensors, strict=True):
                base, stand_in = bases[placed.spec.id], placed.stand_in
                assert stand_in is not None
                left, right = places.left_view(part.left), places.right_view(part.right)
                if self.passes is None:
                    yield stand_in, Factored(base, list(zip(left, right, strict=True)))
                else:
                    yield stand_in, Joined(self.passes, partial(self._of_pass, base, left, right))
        for i, copies in held.dense.items():
            assert self.passes is not None
            for placed in layout.parts[i].tensors:
                columns = copies[:, placed.offset : placed.offset + placed.numel]
                assert placed.stand_in is not None
                shaped = columns.unflatten(1, placed.shape) if placed.shape else columns[:, 0]
                yield placed.stand_in, Joined(self.passes, shaped.__getitem__)

    def _of_pass(self, base: Tensor, left: Tensor, right: Tensor, number: Tensor) -> Factored:
        """Return what a joined pass reads, by its number among all, as `mesh.perturbations` has it.

        Args:
            left, right: Factors, shapes (passes, ..., m, rank) and (directions, ..., n, rank).
        """
        if len(right) == 1:
            return Factored(base, [(left[number], right[0])])
        return Factored(base, [(left[number], right[number // self._config.slopes.sides])])


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
