"""Load units: from weights at rest to tensors that a forward pass can read.

`visit.decide` works out all that loading a unit involves; `Loader.load` then acts on it: acquire a
slot, run the kernel, write back, bind.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.model.factors import JoinedPasses
from zo2ext.model.layout import PART_ALIGNMENT, Part, UnitLayout
from zo2ext.model.units import Unit
from zo2ext.ops.formats import Planes
from zo2ext.ops.tables import align
from zo2ext.streaming.devices.device import Buffer, Dependency, Device, Queue
from zo2ext.streaming.factors import (
    FactorMemory,
    Factors,
    FactorTables,
    Kernels,
    folded_on_host,
)
from zo2ext.streaming.pending import NOTHING_MISSING, MissingUpdates, PendingUpdates
from zo2ext.streaming.pipeline import Pipeline, Slot
from zo2ext.streaming.stores.store import WeightStore
from zo2ext.streaming.views import Binding, Views
from zo2ext.streaming.visit import Perturbation as Perturbation
from zo2ext.streaming.visit import Visit, decide


@dataclass(eq=False)
class Loaded:
    """A loaded unit, and the tensors that each coroutine's parameters are to show."""

    unit: Unit
    copies: list[Binding]  # one per coroutine; a single one if nothing is perturbed
    compute: _ComputeBuffer | None  # memory of the perturbed copies
    slot: Slot | None  # slot of the slab, if it is still needed
    written: int = 0  # index of the copy in `compute`, if there is room for one only
    write: Callable[[int], None] | None = None  # overwrites it with another copy


@dataclass(eq=False)
class _ComputeBuffer:
    """Device memory for the perturbed copies of one unit, side by side."""

    name: Buffer
    memory: Tensor  # uint8, shape (copies, bytes)
    factors: FactorMemory | None = None


class _Rows(NamedTuple):
    """A direction, and the rows of a compute buffer for its two copies; None: not made."""

    key: int
    eps: float
    plus: int | None
    minus: int | None


@lru_cache(maxsize=64)  # the same for every unit of a step
def _directions(perturbations: tuple[Perturbation, ...]) -> tuple[_Rows, ...]:
    """Return the directions of some copies, one row each.

    Consecutive copies at +eps and -eps along one direction share its noise.
    """
    found: list[_Rows] = []
    for row, (key, eps, _) in enumerate(perturbations):
        side = "plus" if eps > 0 else "minus"
        last = found.pop() if found else None
        if last and (last.key != key or last.eps != abs(eps) or getattr(last, side) is not None):
            found.append(last)
            last = None
        found.append((last or _Rows(key, abs(eps), None, None))._replace(**{side: row}))
    return tuple(found)


class Loader:
    """Loads units for training, perturbed along directions, and for reading, as they are.

    If an exception interrupts a visit, its slot is released and forgets the unit, and the unit's
    version still is that of its stored weights. Weights that are updated in the place where they
    rest may be left half updated by an interrupt; the loader then refuses to go on.

    Args:
        store, device, pipeline: Where the weights rest, are computed on, and pass through.
        config: Configuration of the run.
        forwards: Forward passes per step on this process, so the copies needed at the same time.
        kernels: Kernels to call.

    Attributes:
        before_write_back: Function to call before weights at rest are replaced, once the pass that
            computes the new ones is queued. If it raises, they stay as they are.
    """

    def __init__(
        self,
        store: WeightStore,
        device: Device,
        pipeline: Pipeline,
        config: ZOConfig,
        forwards: int,
        kernels: Kernels = ops,
    ) -> None:
        self._kernels = kernels
        self.before_write_back: Callable[[], None] = lambda: None
        self.device, self.pending = device, PendingUpdates(device, config)
        # Factors are small, and made anew for each forward pass.
        self._room = 1 if config.one_copy or config.rank else max(forwards, 1)
        self._store, self._pipeline, self._config = store, pipeline, config
        self._versions = [0] * len(store.layouts)  # write-back step each unit was stored at
        self._half_updated: str | None = None  # unit that an exception may have left so
        self._segments = [
            [ops.segment_table(part.segments(), device.torch_device) for part in layout.parts]
            for layout in store.layouts
        ]
        self._factors: Factors | None = None
        if any(layout.factored for layout in store.layouts):
            where, pending = device.torch_device, self.pending
            self._factors = Factors(
                store.layouts, device.empty, where, config, pending, self._kernels, forwards
            )
        self._copy_nbytes = align(
            max(layout.compute_nbytes for layout in store.layouts), PART_ALIGNMENT
        )
        self._all_buffers = [self._new_buffer(0)]
        self._buffers = list(self._all_buffers)  # those that are free
        self._views = Views()

    # -- for the forward pass

    def load(self, unit: Unit, perturbations: tuple[Perturbation, ...]) -> Loaded:
        """Bring `unit` to the device, apply all updates, and perturb it.

        Args:
            unit: Unit to load. Held until `unload`.
            perturbations: One per copy. Empty: one copy, unperturbed.
        """
        self._check_intact()
        layout, version = self._store.layouts[unit.index], self._versions[unit.index]
        room = len(perturbations) if self.joined else self._room
        visit = decide(layout, perturbations, self.pending, version, room)
        if visit.overdue is not None:
            self._write_back_until(layout, visit.overdue)
        slot = compute = None
        try:
            slot = self._pipeline.acquire(unit.index, low=visit.low)
            compute = self._free_buffer() if visit.copies else None
            if compute and perturbations and self._factors:
                compute.factors = compute.factors or self._factors.new_memory()
            if visit.copies or visit.write_back:
                first = perturbations[:1] if visit.one_at_a_time else perturbations
                step = self.pending.step if visit.write_back else None
                self._update(layout, slot, compute, first, visit.missing, visit.low, step)
            reads = [slot.name] if visit.holds_slot else []
            reads += [compute.name] if compute else []
            self.device.computing(reads, {Dependency.KERNEL_AFTER_UPLOAD: [slot.uploaded]})
            copies = self._bindings(layout, slot, compute, perturbations)
            loaded = Loaded(unit, copies, compute, slot)
            if visit.one_at_a_time:
                loaded.write = self._writer(layout, slot, compute, perturbations, visit)
            if not visit.holds_slot:
                loaded.slot, done, slot = None, slot, None
                self._pipeline.release(done)
            return loaded
        except BaseException:
            if compute is not None:
                self._buffers.append(compute)
            if slot is not None:
                self._pipeline.abandon(slot)
            raise

    def copy(self, loaded: Loaded, index: int) -> Binding:
        """Return the tensors that the parameters of `loaded` are to show to coroutine `index`.

        Forward passes that are queued from here on read that copy.
        """
        if loaded.write is not None and loaded.written != index:
            loaded.write(index)
            loaded.written = index
        return loaded.copies[index]

    def unload(self, loaded: Loaded) -> None:
        """Give the memory of `loaded` back, once all forward passes that read it are queued."""
        if loaded.compute is not None:
            self._buffers.append(loaded.compute)
        if loaded.slot is not None:
            self._pipeline.release(loaded.slot)

    def recover(self) -> None:
        """Give all memory back, after an exception that may have struck anywhere in a step."""
        self._pipeline.recover()
        self._buffers = list(self._all_buffers)

    def shows(self, tensor: Tensor) -> bool:
        """Return whether `tensor` is a view of loaded weights, which the next unit overwrites."""
        return self._views.has(tensor)

    def unit_of_base(self, tensor: Tensor) -> Unit | None:
        """Return the unit whose weights factors add to in `tensor`; None for any other."""
        return self._factors.units.get(id(tensor)) if self._factors else None

    @property
    def joined(self) -> JoinedPasses | None:
        """The passes, if they run as one batch; None: they run one after the other."""
        return self._factors.passes if self._factors else None

    @property
    def factored(self) -> bool:
        """Whether any tensor has factored directions."""
        return self._factors is not None

    # -- for the step

    def finish_step(self) -> None:
        """Forget the updates that every unit has."""
        self.pending.drop_before(self._oldest())

    def flush(self) -> None:
        """Write every unit back with all updates, at a write-back step; wait for the transfers."""
        assert self.flushing_is_free, "an unrecorded write-back"
        self._write_all_back(self.pending.step)
        self._pipeline.finish_write_backs()

    def catch_up(self) -> None:
        """Write every unit back as of the last write-back step, and wait for the transfers.

        This changes no later result: units that are loaded later would be rounded the same.
        """
        self._write_all_back(self.pending.last_write_back())
        self._pipeline.finish_write_backs()

    def settle(self) -> None:
        """Wait until every write-back so far is home."""
        self._pipeline.finish_write_backs()

    def restart(self, step: int, pending: Sequence[tuple[ops.Update, ...]]) -> None:
        """Continue from stored weights as before `step`, with the updates `pending` from it on."""
        self.pending.restart(step, pending)
        self._versions = [step] * len(self._versions)

    @property
    def flushing_is_free(self) -> bool:
        """Whether a write-back now would round nothing that the run does not round anyway."""
        pending = self.pending
        return pending.is_write_back(pending.step) or not pending.any_since(self._oldest())

    # -- for the host

    def host_tensor(
        self, layout: UnitLayout, index: int, cache: MutableMapping[int, Tensor]
    ) -> Tensor:
        """Return tensor `index` of `layout` as the forward pass sees it, in host memory.

        All updates are applied. The result shares memory with the stored weights if these are
        current and of the compute dtype. Otherwise it is a copy, which tied names share through
        `cache`, by tensor id.
        """
        self._check_intact()
        return self._host_tensor(layout, index, cache)

    def _host_tensor(
        self, layout: UnitLayout, index: int, cache: MutableMapping[int, Tensor]
    ) -> Tensor:
        self._pipeline.finish_write_backs()
        placed = layout.tensors[index]
        part = layout.part_of(placed)
        version = self._versions[layout.unit.index]
        if part is None or not (part.packed or self.pending.any_since(version)):
            return self._store.view(layout, placed)
        values = cache.get(placed.spec.id)
        if values is None:
            if part.factors is None:
                updates = self.pending.missing(version, host=True).updates
                distribution = self._config.distribution
                values = self._store.current(layout, part, placed, updates, distribution)
            else:
                planes = self._store.planes(layout, placed)
                values = folded_on_host(
                    planes, placed, part.compute, version, self._config, self.pending
                )
            cache[placed.spec.id] = values
        return values

    def read(self, unit: Unit) -> dict[int, Tensor]:
        """Return copies of all tensors of `unit` as the forward pass sees them, in host memory.

        One kernel on the device applies all pending updates. Keys are the ids of the targets.
        """
        loaded = self.load(unit, ())
        try:
            return {id(p): tensor.to("cpu", copy=True) for p, tensor in loaded.copies[0]}
        finally:
            self.unload(loaded)

    def given_back(self, layout: UnitLayout, index: int) -> Tensor:
        """Return what `host_tensor` does, in the stored weights' own memory if it fits there."""
        stored = self._store.view(layout, layout.tensors[index])
        values = self._host_tensor(layout, index, {})
        return stored.copy_(values) if stored.dtype == values.dtype else values

    def host_was_written(self, unit: Unit) -> None:
        """Note that the stored weights of `unit` were replaced from outside."""
        self._pipeline.forget(unit.index)

    @property
    def compute_nbytes(self) -> int:
        """Device bytes of the buffers that hold perturbed copies, and of factors."""
        each = self._room * self._copy_nbytes
        factors = self._factors
        if factors is None:
            return len(self._all_buffers) * each
        return len(self._all_buffers) * (each + factors.memory_nbytes) + factors.folder.nbytes

    def close(self) -> None:
        """Wait until all work is done, and let go of all device memory."""
        try:
            self.device.synchronize()
        finally:  # it raises what failed on a thread
            self._buffers.clear()
            self._all_buffers.clear()
            self._segments.clear()
            self._factors, self._views = None, Views()
            self.pending.drop_tables()
            self._pipeline.close()

    # -- private

    def _oldest(self) -> int:
        """Return the oldest version of a unit that has trainable weights."""
        versions = [self._versions[x.unit.index] for x in self._store.layouts if x.parts]
        return min(versions, default=self.pending.step)

    def _check_intact(self) -> None:
        if self._half_updated is not None:
            raise RuntimeError(
                f"the weights of unit {self._half_updated} may be updated in part, because an "
                "exception interrupted their update; load the model anew, and continue from a "
                "checkpoint or the journal"
            )

    def _write_all_back(self, step: int) -> None:
        """Write back every unit that misses updates of steps before the write-back step `step`."""
        for layout in self._store.layouts:
            self._write_back_until(layout, step)
        self.pending.drop_before(self._oldest())

    def _write_back_until(self, layout: UnitLayout, step: int) -> None:
        """Write a unit back as it was before `step`, a write-back step."""
        unit = layout.unit.index
        version = self._versions[unit]
        if not layout.parts or version >= step:
            return
        if not self.pending.any_since(version, step):
            self._versions[unit] = step
            return
        slot = self._pipeline.acquire(unit)
        try:
            missing = self.pending.missing(version, until=step)
            self._update(layout, slot, None, (), missing, True, step)
        except BaseException:
            self._pipeline.abandon(slot)
            raise
        self._pipeline.release(slot)

    def _update(
        self,
        layout: UnitLayout,
        slot: Slot,
        compute: _ComputeBuffer | None,
        perturbations: tuple[Perturbation, ...],
        missing: MissingUpdates,
        low: bool,
        write_back: int | None,
        *,
        again: bool = False,
    ) -> None:
        """Queue the kernels over every part of a slab, and the write-back if there is one.

        Args:
            compute: Buffer for a copy per perturbation; without any, for the plain weights.
            low: Whether to use the low planes.
            write_back: Write-back step, the unit's version from then on; None: no write-back.
            again: Whether the buffer has another copy of the same unit, which is overwritten.
        """
        config, unit = self._config, layout.unit
        directions, version = _directions(perturbations), self._versions[unit.index]
        slab = self._views.slab(layout, slot.name, slot.buffer)
        copies = self._views.copies(layout, compute.name, compute.memory) if compute else []
        factors, moved = self._factors, compute.factors if compute and perturbations else None
        tables = factors.tables(layout) if factors else [None] * len(layout.parts)
        started = queued = False

        def work() -> None:
            nonlocal started
            started = True
            for i, planes in enumerate(slab.planes if low else slab.top_planes):
                own = tables[i]
                rows = [copy.parts[i] for copy in copies]
                if own is None and factors and moved and self.joined:
                    rows = factors.copies(layout, moved, i)
                if own is not None:
                    if again:
                        continue
                    copy = rows[0] if rows else None
                    self._fold(
                        layout.parts[i], own, planes, version, write_back, copy, not directions
                    )
                    continue
                self._kernels.update_perturb(
                    planes.stored,
                    scales=planes.scales,
                    low=planes.low,
                    segments=self._segments[unit.index][i],
                    updates=missing.updates,
                    plain=rows[0] if rows and not directions else None,
                    directions=[
                        ops.Direction(
                            key,
                            eps,
                            None if plus is None else rows[plus],
                            None if minus is None else rows[minus],
                        )
                        for key, eps, plus, minus in directions
                    ],
                    write_back=None if write_back is None else config.rounding,
                    rounding_key=missing.rounding_key,
                    distribution=config.distribution,
                )
            if factors and moved:
                since = version if write_back is None else write_back
                if not again:
                    moved.direction = None
                factors.move(layout, moved, perturbations, since)

        after = {Dependency.KERNEL_AFTER_UPLOAD: [slot.uploaded]}
        writes = [compute.name] if compute else []
        if write_back is not None:
            after[Dependency.KERNEL_AFTER_SLOT_WAS_OFFLOADED] = [slot.offloaded]
            writes = [slot.name, *writes]
        updated = None
        try:
            updated = self.device.submit(
                Queue.COMPUTE, work, after=after, reads=[slot.name], writes=writes, unit=unit.index
            )
            if write_back is not None and not slot.resident:
                self.before_write_back()
            queued = True
            if write_back is not None:
                self._pipeline.write_back(slot, updated)
                self._versions[unit.index] = write_back
        except BaseException:
            if write_back is not None and queued:
                # Whether the write-back was queued is unknown. To queue it again does no harm.
                self._half_updated = unit.name
                self._pipeline.write_back(slot, updated)
                self._versions[unit.index] = write_back
                self._half_updated = None
            elif write_back is not None and started and slot.resident:
                self._half_updated = unit.name  # the slab is where the weights rest
            raise

    def _fold(
        self,
        part: Part,
        tables: FactorTables,
        planes: Planes,
        version: int,
        write_back: int | None,
        copy: Tensor | None,
        whole: bool,
    ) -> None:
        """Queue the kernels over a part with factored directions.

        Args:
            write_back: Write-back step to round the weights for; None: none.
            copy: Memory for a copy of the weights in the compute dtype.
            whole: Whether the copy is to have all updates; if not, it is what the factors of a
                forward pass add to, and only made if the weights rest in another format.
        """
        assert self._factors is not None
        folder, step = self._factors.folder, self.pending.step
        plain = copy if whole or part.packed else None
        if write_back is not None:
            folder.round(tables, planes, version, write_back, part.compute, plain)
        elif plain is not None:
            folder.fold(tables, planes, version if whole else step, step, part.compute, plain)

    def _writer(
        self,
        layout: UnitLayout,
        slot: Slot,
        compute: _ComputeBuffer | None,
        perturbations: tuple[Perturbation, ...],
        visit: Visit,
    ) -> Callable[[int], None]:
        """Return the function that overwrites the single copy in `compute` with another one."""
        assert compute is not None
        missing = NOTHING_MISSING if visit.write_back else visit.missing

        def write(copy: int) -> None:
            one = perturbations[copy : copy + 1]
            self._update(layout, slot, compute, one, missing, visit.low, None, again=True)
            self.device.computing([slot.name, compute.name])

        return write

    def _free_buffer(self) -> _ComputeBuffer:
        """Return a free buffer; make another if nested units need several at the same time."""
        if not self._buffers:
            self._all_buffers.append(self._new_buffer(len(self._all_buffers)))
            self._buffers.append(self._all_buffers[-1])
        return self._buffers.pop()

    def _new_buffer(self, index: int) -> _ComputeBuffer:
        memory = self.device.empty(self._room * self._copy_nbytes)
        return _ComputeBuffer(("copies", index), memory.view(self._room, self._copy_nbytes))

    def _bindings(
        self,
        layout: UnitLayout,
        slot: Slot,
        compute: _ComputeBuffer | None,
        perturbations: tuple[Perturbation, ...],
    ) -> list[Binding]:
        """Return each copy's parameters and their tensors."""
        count = len(perturbations) or 1
        slab = self._views.slab(layout, slot.name, slot.buffer)
        if compute is None:
            return [slab.stored + slab.frozen] * count
        copies = self._views.copies(layout, compute.name, compute.memory)[:count]
        if perturbations and compute.factors and self._factors:
            bases = slab.bases | copies[0].bases
            shown = self._factors.binding(layout, compute.factors, slot.name, bases)
            dense = [] if self.joined else copies[0].dense
            return [dense + shown + slab.frozen] * count
        bindings = [copy.weights + slab.frozen for copy in copies]
        return bindings if len(bindings) == count else bindings * count
