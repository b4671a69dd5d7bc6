"""The weights of an offloaded model: stored, streamed to a device, read between steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from zo2ext import ops
from zo2ext.checkpoints.fingerprint import describe
from zo2ext.config import ZOConfig
from zo2ext.engine.hooks import ModelHooks
from zo2ext.engine.host_weights import (
    HostWeights,
    Sources,
    check_model,
    check_weights_are_there,
    source_of,
)
from zo2ext.engine.out_of_memory import explain_out_of_memory
from zo2ext.engine.state_dict import StateDictHooks
from zo2ext.errors import UnsupportedModel, UserError
from zo2ext.model.layout import lay_out
from zo2ext.model.quantized import Target
from zo2ext.model.units import find_units
from zo2ext.planning.period import with_period
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.pipeline import Pipeline, Traffic, resident_units
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.planes import named_planes
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.unit_loader import Loader

if TYPE_CHECKING:
    from zo2ext.checkpoints.compare import Difference


class StoredModel:
    """The part of `ZOEngine` that does not depend on steps being made.

    Args:
        train: Whether the model must have trainable parameters.
        sources: Sources of parameters whose values are in files, by id; None if all are in memory.
        host_ranks: Returns the ranks that share the host's weights, for a store that is shared.
        forwards: Number of forward passes per step in this process.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ZOConfig,
        device: Device,
        *,
        train: bool,
        sources: Sources | None,
        host_ranks: Callable[[], HostRanks],
        forwards: int,
    ) -> None:
        own = sources or {}
        check_model(model, device.torch_device)
        units, entries = find_units(model, config.granularity)
        check_weights_are_there(units, own)
        self.layouts = tuple(lay_out(unit, config) for unit in units)
        config = config.with_learning_rate(self.trainable)
        if train:
            self._check_trainable()
        self._chosen_period = config.write_back == "auto"
        if self._chosen_period:
            config = (
                with_period(model, self.layouts, config, device)
                if train
                else config.replace(write_back=1)
            )
        self.config = config
        self._model, self._device, self._closed = model, device, False
        targets = {id(t.parameter): t.targets for unit in units for t in unit.tensors}
        self._description = describe(model, lambda p: [source_of(t, own) for t in targets[id(p)]])
        self._weights = HostWeights(model, self.layouts, device, config, host_ranks)
        store = self._weights.store
        with ExitStack() as undo:
            self._weights.take(own, undo)
            with explain_out_of_memory(model, self.layouts, config):
                resident = resident_units(self.layouts, config.resident)
                self._pipeline = Pipeline(store, device, slots=config.slots, resident=resident)
                self._loader = Loader(store, device, self._pipeline, config, forwards)
            undo.callback(self._loader.close)
            self._hooks = ModelHooks(model, self._loader, units, self._weights.placeholders)
            undo.callback(self._hooks.remove)
            self._hooks.add(entries)
            self._state_dict_hooks = StateDictHooks(
                model, self._hooks, self._host_tensor, self._before_load, self._replace
            )
            undo.callback(self._state_dict_hooks.remove)
            self._state_dict_hooks.add()
            self._undo = undo.pop_all()  # until the engine is complete
        self._shared = WeakValueDictionary[int, Tensor]()  # host copies that tied names share

    # -- weights

    def exact_weights(self) -> dict[str, Tensor]:
        """Return the stored weights that ``state_dict()`` cannot represent exactly, by name.

        These are tensors stored in a wider format than the model computes in and, if updates are
        pending, all trainable tensors. Save them with `pending` and give both to `resume` to
        continue bit for bit.

        Returns:
            The store's tensors, not copies, to be used before the next step. A format with several
            planes has one tensor per plane; see docs/contracts.md, "Split".
        """
        self._check_usable()
        self._hooks.close_reads()
        self._loader.catch_up()
        return named_planes(
            self._weights.store, self._weights.inexact(pending=bool(self.pending()))
        )

    def pending(self) -> list[tuple[ops.Update, ...]]:
        """Return the updates of each step since the last write-back step; [] if there are none."""
        return self._loader.pending.since_write_back()

    def compare(self, folder: str | Path) -> list[Difference]:
        """Return the tensors in which a transformers checkpoint differs from the model, in bits.

        Raises:
            UnsupportedModel: The model is quantized: its files hold more than its parameters.
            UserError: `folder` has no weights as safetensors.
        """
        from zo2ext.checkpoints.compare import compare_checkpoint

        self._check_usable()
        if self._quantized:
            raise UnsupportedModel("the model is quantized: what it saves cannot be compared")
        return compare_checkpoint(self._model, folder, self._values, self._parameters_by_unit())

    # -- numbers

    @property
    def device(self) -> torch.device:
        """Device that the model's inputs belong on."""
        return self._device.torch_device

    @property
    def description(self) -> dict[str, Any]:
        """Description of the starting weights for a journal's header; see `describe`."""
        return self._description

    @property
    def rounding_error(self) -> RoundingError:
        """Error of rounding the starting weights to their storage format."""
        return self._weights.rounding

    @property
    def traffic(self) -> Traffic:
        """Bytes uploaded, offloaded, and gathered from other ranks of the host so far."""
        return self._pipeline.traffic

    @property
    def trainable(self) -> int:
        """Number of trained weights, tied ones counted once."""
        parts = [part for layout in self.layouts for part in layout.parts]
        return sum(tensor.numel for part in parts for tensor in part.tensors)

    @property
    def host_nbytes(self) -> int:
        """Host memory of the store, in bytes, including padding or staging memory."""
        return self._weights.store.host_nbytes

    @property
    def device_nbytes(self) -> int:
        """Device memory of slots, resident units and perturbed copies, without activations."""
        return self._pipeline.device_nbytes + self._loader.compute_nbytes

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed; call zo2ext.offload(model, config) again")

    def _check_trainable(self) -> None:
        if not any(layout.parts for layout in self.layouts):
            raise UserError(
                "model has no trainable parameter: every requires_grad is False; "
                "set requires_grad_(True) on what is to be trained"
            )

    def _before_load(self) -> None:
        """Prepare for ``load_state_dict``."""
        if not self._loader.flushing_is_free:
            self._loader.pending.add_write_back(self._loader.pending.step)
        self._loader.flush()

    @property
    def _quantized(self) -> bool:
        return any(t.components for layout in self.layouts for t in layout.unit.tensors)

    def _parameters_by_unit(self) -> list[list[nn.Parameter]]:
        return [[t.spec.parameter for t in layout.tensors] for layout in self.layouts]

    def _values(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return values of some parameters of one unit, with all updates, on the host."""
        self._hooks.close_reads()
        if self._loader.flushing_is_free:
            return [self._host_tensor(parameter) for parameter in parameters]
        layout, _ = self._weights.place(parameters[0])
        values = self._loader.read(layout.unit)
        return [values[id(parameter)] for parameter in parameters]

    def _give_back(self, *, keep_weights: bool) -> None:
        """Make the model an ordinary one on the CPU, with its weights or placeholders."""
        self._hooks.close_reads()
        if keep_weights and self._loader.flushing_is_free:
            self._loader.flush()
        if keep_weights:
            self._loader.settle()
        self._state_dict_hooks.remove()
        self._hooks.remove()
        self._shared.clear()
        if keep_weights:
            self._weights.give_back(self._loader.given_back)
        else:
            self._weights.leave_placeholders()
        self._closed = True
        try:
            self._loader.close()
        finally:  # it raises what failed on a thread of the device
            self._weights.drop()

    def _host_tensor(self, target: Target) -> Tensor:
        layout, index = self._weights.place(target)
        if self._loader.flushing_is_free:
            self._loader.flush()
        return self._loader.host_tensor(layout, index, self._shared)

    def _replace(self, target: Target, values: Tensor) -> None:
        layout, index = self._weights.place(target)
        self._shared.clear()
        self._weights.store.fill(layout, layout.tensors[index], values)
        self._loader.host_was_written(layout.unit)
