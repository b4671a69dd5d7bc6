"""From a unit at rest to weights a forward pass can read: acquire, update, perturb, write back."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.model.layout import PART_ALIGNMENT, UnitLayout, align
from zo2ext.model.units import Unit
from zo2ext.streaming.devices.device import Buffer, Dependency, Device, Queue
from zo2ext.streaming.pending import Lacking, PendingUpdates
from zo2ext.streaming.pipeline import Pipeline, Slot
from zo2ext.streaming.stores.store import WeightStore
from zo2ext.streaming.views import Binding, Views


@dataclass(eq=False)
class Loaded:
    """A unit ready to be read: what each coroutine's parameters are to be."""

    unit: Unit
    copies: list[Binding]  # one per coroutine; a single one when nothing is perturbed
    compute: _ComputeBuffer | None  # where perturbed copies lie
    holds_slot: bool  # whether the slab itself is still needed
    written: int = 0  # the copy that is in `compute`, where there is room for one
    write: Callable[[int], None] | None = None  # writes another copy over it


class Perturbation(NamedTuple):
    """What one forward pass sees: the weights at ``eps`` along a direction."""

    key: int
    """Of the direction."""
    eps: float
    """Of either sign."""


@dataclass(frozen=True)
class _Sides:
    """A direction, and the rows of a compute buffer that its two copies go to; None: not made."""

    key: int
    eps: float
    plus: int | None = None
    minus: int | None = None

    def direction(self, rows: Sequence[Tensor]) -> ops.Direction:
        """What the kernel is told, for the rows of one part."""
        plus = None if self.plus is None else rows[self.plus]
        minus = None if self.minus is None else rows[self.minus]
        return ops.Direction(self.key, self.eps, plus, minus)


@lru_cache(maxsize=64)  # the same for every unit of a step
def _sides(perturbations: tuple[Perturbation, ...], only: int | None) -> tuple[_Sides, ...]:
    """All copies, one a row; or copy `only`, in the one row there is.

    Two neighbours on either side of one direction share its noise.
    """
    if only is not None:
        perturbations = perturbations[only : only + 1]
    found: list[_Sides] = []
    for row, (key, eps) in enumerate(perturbations):
        sides = _Sides(key, abs(eps))
        last = found[-1] if found else None
        if last and (last.key, last.eps, last.plus if eps > 0 else last.minus) == (
            key,
            abs(eps),
            None,
        ):
            sides = found.pop()
        found.append(replace(sides, plus=row) if eps > 0 else replace(sides, minus=row))
    return tuple(found)


@dataclass(eq=False)
class _ComputeBuffer:
    """Device memory for the perturbed copies of one unit, side by side."""

    name: Buffer
    memory: Tensor  # uint8, shape (copies, bytes)


class Loader:
    """Loads units for training (perturbed along directions) and for reading (as they are).

    Args:
        store, device, pipeline: Where the weights rest, are computed on, and pass through.
        config: Of the run.
        forwards: Forward passes a step here: the perturbed copies that are needed at once.
    """

    def __init__(
        self,
        store: WeightStore,
        device: Device,
        pipeline: Pipeline,
        config: ZOConfig,
        forwards: int,
    ) -> None:
        self.pending = PendingUpdates(device, config)
        self._copies = 1 if config.one_copy else max(forwards, 1)
        self._store, self._device, self._pipeline, self._config = store, device, pipeline, config
        # Per unit: the write-back step at which it was stored.
        self._versions = [0] * len(store.layouts)
        self._segments = [
            [ops.segment_table(part.segments(), device.torch_device) for part in layout.parts]
            for layout in store.layouts
        ]
        self._copy_nbytes = align(
            max(layout.compute_nbytes for layout in store.layouts), PART_ALIGNMENT
        )
        self._buffers = [self._new_buffer(0)]
        self._buffers_made = 1
        self._views = Views()

    # -- for the forward pass

    def load(self, unit: Unit, perturbations: tuple[Perturbation, ...]) -> Loaded:
        """Bring `unit` to the device with all updates, and perturb it.

        Args:
            unit: To load. Held until `unload`.
            perturbations: One a copy. Empty: one copy, unperturbed.
        """
        layout = self._store.layouts[unit.index]
        whole = self._whole(layout, bool(perturbations))
        if not whole:
            self._write_back_late(layout)
        slot = self._pipeline.acquire(unit.index, whole=whole)
        lacking = self._lacking(layout)
        due = lacking.updates is not None and self._due()
        as_stored = not layout.packed and (lacking.updates is None or due)
        needs_copies = bool(layout.parts) and bool(perturbations or not as_stored)
        compute = self._take_buffer() if needs_copies else None
        in_turn = compute is not None and len(compute.memory) < len(perturbations)
        updated = None
        if layout.parts and (needs_copies or due):
            wanted = _sides(perturbations, 0 if in_turn else None)
            updated = self._pass(layout, slot, compute, wanted, lacking, due, whole)
        if due:
            self._versions[unit.index] = self.pending.step
            self._pipeline.write_back(unit.index, updated)

        holds_slot = compute is None or bool(layout.frozen) or in_turn
        reads = [slot.name] if holds_slot else []
        reads += [compute.name] if compute else []
        self._device.computing(reads, {Dependency.KERNEL_AFTER_UPLOAD: [slot.uploaded]})
        if not holds_slot:
            self._pipeline.release(unit.index)
        copies = self._bindings(layout, slot, compute, len(perturbations) or 1)
        loaded = Loaded(unit, copies, compute, holds_slot)
        if in_turn:
            left = Lacking(None, 0) if due else lacking

            def write(copy: int) -> None:
                self._pass(layout, slot, compute, _sides(perturbations, copy), left, False, whole)
                self._device.computing(reads)

            loaded.write = write
        return loaded

    def copy(self, loaded: Loaded, index: int) -> Binding:
        """What the parameters of `loaded` are to be while coroutine `index` runs.

        Forward passes that are queued from here on read that copy.
        """
        if loaded.write is not None and loaded.written != index:
            loaded.write(index)
            loaded.written = index
        return loaded.copies[index]

    def unload(self, loaded: Loaded) -> None:
        """The forward passes over `loaded` are queued."""
        if loaded.compute is not None:
            self._buffers.append(loaded.compute)
        if loaded.holds_slot:
            self._pipeline.release(loaded.unit.index)

    def shows(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a view of weights that were loaded: it changes with the next unit."""
        return self._views.has(tensor)

    # -- for the step

    def finish_step(self) -> None:
        """Forget the updates that every unit has."""
        self.pending.drop_before(self._oldest())

    def flush(self) -> None:
        """Write every unit back with all updates, at a write-back step, and wait for that."""
        assert self.flushing_is_free, "an unrecorded write-back"
        self._write_all_back(self.pending.step)
        self._pipeline.settle_host()

    def catch_up(self) -> None:
        """Write every unit back as it was at the last write-back step, and wait for that.

        Changes no bit of what follows: units that are loaded late round there as well.
        """
        self._write_all_back(self.pending.last_write_back())
        self._pipeline.settle_host()

    def settle(self) -> None:
        """Wait until every write-back so far is home."""
        self._pipeline.settle_host()

    def restart(self, step: int, pending: Sequence[tuple[ops.Update, ...]]) -> None:
        """The stored weights are those before step `step`; the steps from it on are `pending`."""
        self.pending.restart(step, pending)
        self._versions = [step] * len(self._versions)

    @property
    def flushing_is_free(self) -> bool:
        """Whether writing back now rounds nowhere but where the run does in any case."""
        return self._due() or not self._any_lacking()

    # -- for the host

    def host_tensor(
        self, layout: UnitLayout, index: int, cache: MutableMapping[int, Tensor]
    ) -> Tensor:
        """Tensor `index` of `layout` in host memory, as the forward pass sees it, all updates in.

        The stored weights themselves where they are current and of the compute dtype; else a
        copy, which `cache` (by tensor id) shares among tied names.
        """
        self._pipeline.settle_host()
        placed = layout.tensors[index]
        part = layout.part_of(placed)
        version = self._versions[layout.unit.index]
        if part is None:
            return self._store.view(layout, placed)
        if not part.packed and not self.pending.any_since(version):
            return self._store.view(layout, placed)
        values = cache.get(placed.spec.id)
        if values is None:
            updates = self.pending.lacking(version, host=True).updates
            values = self._store.current(layout, part, placed, updates, self._config.distribution)
            cache[placed.spec.id] = values
        return values

    def read(self, unit: Unit) -> dict[int, Tensor]:
        """All of `unit` as the forward pass sees it, on the host, by id of the target.

        One pass on the device, whatever updates are pending. Copies.
        """
        loaded = self.load(unit, ())
        values = {id(p): tensor.to("cpu", copy=True) for p, tensor in loaded.copies[0]}
        self.unload(loaded)
        return values

    def given_back(self, layout: UnitLayout, index: int) -> Tensor:
        """What `host_tensor` gives, in the stored weights' own memory where it fits in there."""
        stored = self._store.view(layout, layout.tensors[index])
        values = self.host_tensor(layout, index, {})
        return stored.copy_(values) if stored.dtype == values.dtype else values

    def host_was_written(self, unit: Unit) -> None:
        """The stored weights of `unit` were replaced from outside."""
        self._pipeline.forget(unit.index)

    @property
    def compute_nbytes(self) -> int:
        """Device bytes of the buffers that hold perturbed copies."""
        return self._buffers_made * self._copies * self._copy_nbytes

    # --

    def _due(self) -> bool:
        return self.pending.is_write_back(self.pending.step)

    def _any_lacking(self) -> bool:
        return self.pending.any_since(self._oldest())

    def _lacking(self, layout: UnitLayout) -> Lacking:
        if not layout.parts:
            return Lacking(None, 0)
        return self.pending.lacking(self._versions[layout.unit.index])

    def _oldest(self) -> int:
        """The oldest version of a unit that has any weights to update."""
        versions = [self._versions[x.unit.index] for x in self._store.layouts if x.parts]
        return min(versions, default=self.pending.step)

    def _whole(self, layout: UnitLayout, training: bool) -> bool:
        """Whether a unit is needed with its low planes; see docs/contracts.md, "Split"."""
        return not layout.low_nbytes or not training or self._due()

    def _write_all_back(self, step: int) -> None:
        """Write back every unit that lacks updates of steps before `step`, a write-back step."""
        for layout in self._store.layouts:
            self._write_back_until(layout, step)
        self.pending.drop_before(self._oldest())

    def _write_back_late(self, layout: UnitLayout) -> None:
        """Write back a unit that no forward visited at the last write-back step.

        Until the next one its top planes stand for it, those that it has after that rounding.
        """
        self._write_back_until(layout, self.pending.last_write_back())

    def _write_back_until(self, layout: UnitLayout, step: int) -> None:
        """Write a unit back as it was before `step`, a write-back step."""
        unit = layout.unit.index
        if not layout.parts or self._versions[unit] >= step:
            return
        if self.pending.any_since(self._versions[unit], step):
            slot = self._pipeline.acquire(unit)
            lacking = self.pending.lacking(self._versions[unit], until=step)
            updated = self._pass(layout, slot, None, (), lacking, True, True)
            self._pipeline.write_back(unit, updated)
            self._pipeline.release(unit)
        self._versions[unit] = step

    def _pass(
        self,
        layout: UnitLayout,
        slot: Slot,
        compute: _ComputeBuffer | None,
        sides: tuple[_Sides, ...],
        lacking: Lacking,
        write_back: bool,
        whole: bool,
    ) -> object | None:
        """Queue the fused pass over every part of a slab; returns its event.

        Without `sides`, what is written to `compute`, if given, is the plain weights.

        Args:
            whole: Whether the low planes count.
        """
        config = self._config
        slab = self._views.slab(layout, slot.name, slot.buffer)
        copies = self._views.copies(layout, compute.name, compute.memory) if compute else []

        def work() -> None:
            for i, planes in enumerate(slab.whole if whole else slab.top):
                rows = [copy.parts[i] for copy in copies]
                ops.update_perturb(
                    planes.stored,
                    scales=planes.scales,
                    low=planes.low,
                    segments=self._segments[layout.unit.index][i],
                    updates=lacking.updates,
                    plain=rows[0] if rows and not sides else None,
                    directions=[side.direction(rows) for side in sides],
                    write_back=config.rounding if write_back else None,
                    rounding_key=lacking.rounding_key,
                    distribution=config.distribution,
                )

        after = {Dependency.KERNEL_AFTER_UPLOAD: [slot.uploaded]}
        if write_back:
            after[Dependency.KERNEL_AFTER_SLOT_WAS_OFFLOADED] = [slot.offloaded]
        return self._device.submit(
            Queue.COMPUTE,
            work,
            after=after,
            reads=[slot.name],
            writes=([slot.name] if write_back else []) + ([compute.name] if compute else []),
        )

    def _take_buffer(self) -> _ComputeBuffer:
        """A free buffer; one more where nested units need several at once."""
        if not self._buffers:
            self._buffers.append(self._new_buffer(self._buffers_made))
            self._buffers_made += 1
        return self._buffers.pop()

    def _new_buffer(self, index: int) -> _ComputeBuffer:
        memory = self._device.empty(self._copies * self._copy_nbytes)
        return _ComputeBuffer(("copies", index), memory.view(self._copies, self._copy_nbytes))

    def _bindings(
        self, layout: UnitLayout, slot: Slot, compute: _ComputeBuffer | None, count: int
    ) -> list[Binding]:
        """Each copy's parameters and their tensors."""
        slab = self._views.slab(layout, slot.name, slot.buffer)
        if compute is None:
            return [slab.stored + slab.frozen] * count
        copies = self._views.copies(layout, compute.name, compute.memory)[:count]
        bindings = [copy.weights + slab.frozen for copy in copies]
        return bindings if len(bindings) == count else bindings * count
