"""A model's parameters, moved into a store, and what stands in for them meanwhile."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zo2ext.config import Store, ZOConfig
from zo2ext.engine.hooks import TriggeredParameters, make_placeholders
from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.model.quantized import Target, rebuild
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.stores.disk import DiskStore
from zo2ext.streaming.stores.host import HostStore
from zo2ext.streaming.stores.host_group import HostRanks, OneRank
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.stores.shared import SlicedStore
from zo2ext.streaming.stores.sources import HeldTensor, Source
from zo2ext.streaming.stores.store import WeightStore

logger = logging.getLogger(__name__)

Sources = Mapping[int, Source]  # by id of the parameter


class HostWeights:
    """Every weight of `model` in a store, taken over one by one as the model's own is dropped.

    Buffers move to the device. Parameters become placeholders full of NaN.

    Args:
        sources: What the parameters' values are, where not their own.
        ranks: Processes that share the weights, where the config's store is shared.

    Attributes:
        store: Where the weights are now.
        placeholders: Of each unit: its parameters, with what stands in for them.
        rounding: What storing the weights did to them.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Sequence[UnitLayout],
        device: Device,
        config: ZOConfig,
        sources: Sources,
        ranks: HostRanks | None = None,
    ) -> None:
        self._model, self._layouts, self._device = model, layouts, device
        self.store = _make_store(layouts, device, config, ranks or OneRank())
        self.rounding = RoundingError()
        self.placeholders = make_placeholders(layouts, device.torch_device)
        self._places = {
            id(t.target): (layout, index)
            for layout in layouts
            for index, t in enumerate(layout.tensors)
        }
        for layout in layouts:
            for placed, (target, placeholder) in zip(
                layout.tensors, self.placeholders[layout.unit], strict=True
            ):
                error = self.store.load_tensor(layout, placed, source_of(target, sources))
                if error.beyond:
                    _report_beyond(layout, placed, error.beyond)
                self.rounding += error
                target.data = placeholder
            self._rebuild(layout, device.torch_device)
            self.store.lock(layout)
            return_freed_memory()
        self.store.begin_host_reads()
        _move_buffers(model, device.torch_device)

    def place(self, target: Target) -> tuple[UnitLayout, int]:
        """The unit that has what is put into `target`, and its index there."""
        return self._places[id(target)]

    def inexact(self, all_of_them: bool) -> list[tuple[UnitLayout, Placed]]:
        """Trained weights that are stored finer than their compute dtype is; or all of them."""
        return [
            (layout, placed)
            for layout in self._layouts
            for part in layout.parts
            if all_of_them
            or torch.promote_types(part.storage.whole_dtype, part.compute) != part.compute
            for placed in part.tensors
        ]

    def give_back(self, values: Callable[[UnitLayout, int], Tensor]) -> None:
        """Make `values` (layout, index) the model's own, on the CPU, and release the device."""
        for layout in self._layouts:
            for index, placed in enumerate(layout.tensors):
                placed.target.data = values(layout, index).to(placed.dtype)
            self._rebuild(layout, torch.device("cpu"))
        self.drop()

    def _rebuild(self, layout: UnitLayout, device: torch.device) -> None:
        """Let the wrappers in a unit show that their tensors are on `device` now."""
        for tensor in layout.unit.tensors:
            if tensor.components and tensor.parameter.device != device:
                rebuild(tensor.parameter)

    def drop(self) -> None:
        """Release the device and the store; what stands in for weights stays."""
        _move_buffers(self._model, torch.device("cpu"))
        self._device.synchronize()
        self.store.close()


def _report_beyond(layout: UnitLayout, placed: Placed, count: int) -> None:
    part = layout.part_of(placed)
    name = str(placed.dtype) if part is None else part.storage.value
    logger.warning(
        "%s: %d of %d weights are beyond the range of %s, and were stored as its largest value or "
        "as infinity; a format with a larger range keeps them",
        *(placed.spec.name, count, placed.numel, name),
    )


def _make_store(
    layouts: Sequence[UnitLayout], device: Device, config: ZOConfig, ranks: HostRanks
) -> WeightStore:
    if config.store is Store.DISK:
        return DiskStore(layouts, device, config)
    if config.store is Store.SHARED:
        return SlicedStore(layouts, device, ranks)
    return HostStore(layouts, device)


def source_of(target: Target, sources: Sources) -> Source:
    """Where the values of `target` come from: its own, unless `sources` has others."""
    return sources.get(id(target)) or HeldTensor(target.data)


def return_freed_memory() -> None:
    """Give the system what was freed; without, glibc keeps most of a dropped model's memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_model(model: nn.Module, device: torch.device) -> None:
    """Refuse a model whose weights cannot be taken over, or would not be understood on `device`.

    Raises:
        TypeError, ValueError: Naming the parameter and what is wrong.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device: load its weights first")
        if parameter.layout is not torch.strided or parameter.dtype.is_complex:
            raise TypeError(f"parameter {name} must be a dense real tensor, got {parameter.layout}")
        # bitsandbytes' kernels for GPUs do not look at this mark, and would read other weights.
        state = getattr(parameter, "quant_state", None)
        if device.type != "cpu" and getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"parameter {name} is to be used on {device}, which expects 4-bit codes in the "
                "order in which they are loaded, but bitsandbytes has repacked them for CPUs, as "
                "the model has computed on one: load the model anew and offload it before it "
                "computes, or use device='cpu'"
            )
    if any(isinstance(m._parameters, TriggeredParameters) for m in model.modules()):
        raise ValueError("model is offloaded already; close its engine first")


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                moved.setdefault(id(buffer), buffer.to(device))
                module._buffers[name] = moved[id(buffer)]
