"""Moves a model's parameters into a store, and back."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm import tqdm

from zo2ext.config import ZOConfig
from zo2ext.engine.hooks import TriggeredParameters
from zo2ext.engine.lockstep import bind
from zo2ext.engine.placeholders import is_placeholder, make_placeholders
from zo2ext.errors import UnsupportedModel, UserError
from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.model.quantized import Target, rebuild
from zo2ext.model.units import Unit
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.stores.select import make_store
from zo2ext.streaming.stores.sources import HeldTensor, Source

logger = logging.getLogger(__name__)

Sources = Mapping[int, Source]  # by id of the parameter


class HostWeights:
    """All weights of `model` in a store, moved there one by one to save memory.

    Buffers move to the device. Parameters become placeholders.

    Args:
        host_ranks: Returns the processes that share the weights, for a store that is shared.

    Attributes:
        store: The store.
        placeholders: Placeholders of every unit.
        rounding: Rounding error of storing the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Sequence[UnitLayout],
        device: Device,
        config: ZOConfig,
        host_ranks: Callable[[], HostRanks],
    ) -> None:
        self._model, self._layouts, self._device = model, layouts, device
        self.placeholders = make_placeholders(layouts, device.torch_device)
        self.store = make_store(layouts, device, config, host_ranks)
        self.rounding = RoundingError()
        self._places = {
            id(t.target): (layout, index)
            for layout in layouts
            for index, t in enumerate(layout.tensors)
        }

    def take(self, sources: Sources, undo: ExitStack) -> None:
        """Move the model's weights into the store.

        Args:
            sources: Sources of parameters whose values are not their own, by id of the parameter.
            undo: Gets callbacks that give the model back as it was, and drop the store. A model
                with `sources` stays without weights.
        """
        taken: list[tuple[UnitLayout, int, torch.device]] = []
        undo.callback(self._release)
        undo.callback(_put_buffers, _buffers(self._model))
        if not sources:
            undo.push(lambda kind, error, trace: self._restore(taken, error))
        shown = None if sources else True  # disable: None draws a bar on terminals alone
        for layout in tqdm(
            self._layouts, desc="Loading weights", unit="unit", leave=False, disable=shown
        ):
            for index, placed in enumerate(layout.tensors):
                target, placeholder = self.placeholders[layout.unit][index]
                error = self.store.load_tensor(layout, placed, source_of(target, sources))
                if error.beyond:
                    _report_beyond(layout, placed, error.beyond)
                self.rounding += error
                taken.append((layout, index, target.data.device))
                target.data = placeholder
            self._rebuild(layout, self._device.torch_device)
            self.store.lock(layout)
            return_freed_memory()
        self.store.begin_host_reads()
        _move_buffers(self._model, self._device.torch_device)

    def _restore(
        self, taken: Sequence[tuple[UnitLayout, int, torch.device]], error: BaseException | None
    ) -> None:
        """Give back what was taken, each tensor on its device before, as `error` ends `take`."""
        if error is None:
            return
        if not self.store.readable:
            error.add_note("The model is incomplete: other ranks had not stored their parts of it.")
            return
        for layout, index, device in taken:
            placed = layout.tensors[index]
            placed.target.data = self.store.view(layout, placed).to(device, placed.dtype)
        for layout, device in {
            layout.unit: (layout, device) for layout, _, device in taken
        }.values():
            self._rebuild(layout, device)
        if self.rounding.beyond or self.rounding.error_squares:
            note = "The model has its weights back as they were stored, rounded"
            error.add_note(f"{note} ({self.rounding}).")

    def place(self, target: Target) -> tuple[UnitLayout, int]:
        """Return the layout of the unit that `target` belongs to, and its index there."""
        return self._places[id(target)]

    def inexact(self, *, pending: bool) -> list[tuple[UnitLayout, Placed]]:
        """Return the trained weights that the compute dtype cannot represent as they are stored.

        With `pending` updates, these are all trained weights.
        """
        return [
            (layout, placed)
            for layout in self._layouts
            for part in layout.parts
            if pending
            or torch.promote_types(part.storage.whole_dtype, part.compute) != part.compute
            for placed in part.tensors
        ]

    def give_back(self, values: Callable[[UnitLayout, int], Tensor]) -> None:
        """Make `values` (of layout and index) the model's own, on the CPU."""
        for layout in self._layouts:
            for index, placed in enumerate(layout.tensors):
                placed.target.data = values(layout, index).to(placed.dtype)
            self._rebuild(layout, torch.device("cpu"))

    def _rebuild(self, layout: UnitLayout, device: torch.device) -> None:
        """Update quantized parameters of a unit, whose tensors have moved to `device`."""
        for tensor in layout.unit.tensors:
            if tensor.components and tensor.parameter.device != device:
                rebuild(tensor.parameter)

    def leave_placeholders(self) -> None:
        """Leave the model without weights and without device memory."""
        for binding in make_placeholders(self._layouts, torch.device("cpu")).values():
            bind(binding)

    def drop(self) -> None:
        """Release the device and the store."""
        _move_buffers(self._model, torch.device("cpu"))
        self._release()

    def _release(self) -> None:
        self.placeholders.clear()
        try:
            self._device.synchronize()
        finally:  # it raises what failed on a thread of the device
            self._device.close()
            self.store.close()


def _report_beyond(layout: UnitLayout, placed: Placed, count: int) -> None:
    part = layout.part_of(placed)
    name = str(placed.dtype) if part is None else part.storage.value
    logger.warning(
        "%s: %d of %d weights are beyond the range of %s and were stored as its largest value or "
        "as infinity; use a format with a larger range to keep them",
        *(placed.spec.name, count, placed.numel, name),
    )


def source_of(target: Target, sources: Sources) -> Source:
    """Return the source of `target`'s values: the tensor itself, unless `sources` has another."""
    return sources.get(id(target)) or HeldTensor(target.data)


def return_freed_memory() -> None:
    """Return freed memory to the system; glibc would keep most of a dropped model's memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_model(model: nn.Module, device: torch.device) -> None:
    """Raise an error if the weights of `model` cannot be offloaded, or not used on `device`.

    Raises:
        UnsupportedModel, UserError: Name the parameter or module and what is wrong.
    """
    if any(isinstance(m._parameters, TriggeredParameters) for m in model.modules()):
        raise UserError("model is offloaded already; close its engine first")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and len(list(module.parameters())):
            raise UnsupportedModel(
                f"module {name or 'model'} is a {type(module).__name__} of torch.jit, whose "
                "weights cannot be replaced while it runs; use the module that it was made of, "
                "and zo2ext.compile_blocks to compile it"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"parameter {name} is on the meta device: load its weights first")
        if parameter.layout is not torch.strided or parameter.dtype.is_complex:
            raise UnsupportedModel(
                f"parameter {name} must be a dense real tensor, got {parameter.layout}"
            )
        # bitsandbytes' GPU kernels ignore this attribute and would read wrong weights.
        state = getattr(parameter, "quant_state", None)
        if device.type != "cpu" and getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"parameter {name} is to be used on {device}, which expects 4-bit codes in the "
                "order in which they are loaded, but bitsandbytes has repacked them for CPUs, as "
                "the model has computed on one: load the model anew and offload it before it "
                "computes, or use device='cpu'"
            )


def check_weights_are_there(units: Sequence[Unit], sources: Sources) -> None:
    """Refuse a model whose parameters are the placeholders of another engine.

    Raises:
        UserError: Names the first of them.
    """
    for tensor in (tensor for unit in units for tensor in unit.tensors):
        if id(tensor.parameter) not in sources and is_placeholder(tensor.parameter):
            raise UserError(
                f"parameter {tensor.name} is the placeholder of an engine that was not closed, or "
                "closed with keep_weights=False: its weights are gone; load the model anew"
            )


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor | None]]:
    return [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items()]


def _put_buffers(buffers: Sequence[tuple[nn.Module, str, Tensor | None]]) -> None:
    for module, name, buffer in buffers:
        module._buffers[name] = buffer


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    moved: dict[int, Tensor] = {}
    for module, name, buffer in _buffers(model):
        if buffer is not None:
            moved.setdefault(id(buffer), buffer.to(device))
            module._buffers[name] = moved[id(buffer)]
