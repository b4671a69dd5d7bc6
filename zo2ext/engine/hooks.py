"""Hooks that make an unmodified model wait for its weights.

While a unit is not loaded its parameters are placeholders; see `placeholders`. Weights take their
place

- while a module that needs them runs: forward hooks on each entry open its units before the forward
  and close them after it;
- when a parameter is read outside of such a forward, as by a fused loss that reads
  ``lm_head.weight``: each module's parameters are in a dictionary that reports reads;
- when a parameter is used later than that: the first forward of each kind is watched;
- during ``state_dict`` and ``load_state_dict``; see `state_dict`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from zo2ext.engine.lockstep import Coroutine, Reader, bind
from zo2ext.errors import LateRead, ReadAroundStandIn, UserError
from zo2ext.model.compile import uncompiled
from zo2ext.model.factored import Factored
from zo2ext.model.factors import Joined, StandIn
from zo2ext.model.quantized import Component, Target, memories
from zo2ext.model.units import Entry, Unit
from zo2ext.streaming.unit_loader import Loaded, Loader
from zo2ext.streaming.views import Binding

logger = logging.getLogger(__name__)


class TriggeredParameters(dict[str, Any]):
    """A module's parameters; reading one by name may pause the forward pass.

    Iteration (``named_parameters``, ``state_dict``) does not. A copy is a plain dict.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        read: Callable[[nn.Parameter], None],
        stand_ins: Mapping[int, StandIn],
    ) -> None:
        super().__init__(parameters)
        self._read, self._stand_ins = read, stand_ins

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        # A compiled forward belongs to an entry, whose units are open. Tracing through `_read`
        # would compile it for this very parameter, once for each block.
        if parameter is not None and not torch.compiler.is_dynamo_compiling():
            self._read(parameter)
            stand_in = self._stand_ins.get(id(parameter))
            shown = None if stand_in is None else stand_in.shown
            if shown is not None:
                return shown
        return parameter

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class ReadCheck(TorchDispatchMode):
    """Finds parameters that are used while their unit is closed; see `ModelHooks.check`.

    A view of a parameter (``head.weight.t()``) counts as the parameter: it shares its memory, which
    holds other weights once the unit is closed.

    Args:
        used: Called with each tensor that is used.
    """

    supports_higher_order_operators = True  # such as flex attention, if it is not compiled

    def __init__(self, hooks: ModelHooks, used: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hooks, self._used = hooks, used
        self._viewed = WeakTensorKeyDictionary()  # view -> unit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = _tensors((args, kwargs))
        used = [(t, unit) for t in arguments if (unit := self._unit(t)) is not None]
        for tensor in arguments:
            self._used(tensor)
        for tensor, unit in used:
            self._hooks.check(unit, tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result) if used else ():
            for viewed, unit in used:
                if tensor is not viewed and memories(tensor) & memories(viewed):
                    self._viewed[tensor] = unit
                    self._hooks.keep_viewed(unit)
        return result

    def _unit(self, tensor: Tensor) -> Unit | None:
        if isinstance(tensor, nn.Parameter):
            return self._hooks.unit_of(tensor)
        base = self._hooks.unit_of_base(tensor)
        if base is not None:
            return base
        unit: Unit | None = self._viewed.get(tensor)
        return unit


def _nbytes(unit: Unit) -> int:
    return sum(t.parameter.nbytes for t in unit.tensors)


def _kind(value: Any) -> Hashable:
    """Return what tells forwards apart that take other paths, such as decoding one more token."""
    if isinstance(value, Tensor):
        return bool(value.shape[-1:] == (1,))
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _tensors(values: Any) -> list[Tensor]:
    """Return all dense tensors in nested `values`."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor) and t.layout is torch.strided]


class ModelHooks:
    """The hooks on one model, which open units for the code that reads them.

    Attributes:
        kept: Units that are open to every reader from its start on.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        units: Sequence[Unit],
        placeholders: dict[Unit, Binding],
    ) -> None:
        self.kept: list[Unit] = []
        self._model, self._loader = model, loader
        self._plain = Reader([])  # the caller's own code
        self._reader: Reader = self._plain
        self._watches: list[ExitStack] = []  # of the plain forwards that run
        self._outermost: FrameType | None = None  # of the plain forwards
        self._watched = set[Hashable]()  # kinds of plain forwards
        self._most = max(map(_nbytes, units), default=0)
        self._loaded: dict[Unit, Loaded] = {}
        self._unit_of = {id(t.parameter): unit for unit in units for t in unit.tensors}
        self._targets = {id(t.parameter): t.targets for unit in units for t in unit.tensors}
        self._placeholders = placeholders
        self._stand_ins = {
            id(target.parameter): target
            for binding in placeholders.values()
            for target, _ in binding
            if isinstance(target, StandIn)
        }
        self._shown = set[int]()  # ids of parameters that hold the host's weights
        self._handles: list[RemovableHandle] = []

    def __reduce__(self) -> Any:
        raise UserError(
            f"{type(self._model).__name__} is offloaded and cannot be copied or pickled: its "
            "weights are elsewhere. Copy it before it is offloaded or once its engine is closed, "
            "or save it with save_pretrained"
        )

    def add(self, entries: Sequence[Entry]) -> None:
        """Add the hooks to the model. If that fails, `remove` removes those that were added."""
        for entry in (entry for entry in entries if entry.paused):
            module, enter, leave = entry.module, self._enter_hook(entry), self._exit_hook(entry)
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        model = self._model
        watch = model.register_forward_pre_hook(self._watch, prepend=True, with_kwargs=True)
        self._handles.append(watch)
        self._handles.append(model.register_forward_hook(self._unwatch, always_call=True))
        for module in model.modules():
            if any(p is not None for p in module._parameters.values()):
                module._parameters = TriggeredParameters(
                    module._parameters, self._read, self._stand_ins
                )

    def restore(self, unit: Unit) -> None:
        """Put `unit`'s placeholders back."""
        bind(self._placeholders[unit])

    def activate(self, coroutine: Coroutine | None) -> None:
        """Attribute reads to `coroutine` from now on, or to the caller's own code if None."""
        self._reader = coroutine or self._plain

    def check(self, unit: Unit, tensor: Tensor) -> None:
        """Prepare for a use of `tensor`, which is a parameter of `unit` or shares memory with one.

        Raises:
            LateRead: The unit is closed, and cannot be opened now without running again.
        """
        reader = self._reader
        if reader.has(unit) or id(tensor) in self._shown:
            stand_in = self._stand_ins.get(id(tensor))
            if stand_in is not None and isinstance(stand_in.data, (Factored, Joined)):
                name = next(t.name for t in unit.tensors if t.parameter is tensor)
                raise ReadAroundStandIn(
                    f"parameter {name} is not read as an attribute of its module, so the model "
                    "would not see its direction; set rank=None"
                )
            return
        for kept in (reader.kept, self._plain.kept):
            kept += [unit] if unit not in kept else []
        if reader is not self._plain or not isinstance(tensor, nn.Parameter):
            raise LateRead(unit)
        logger.info("unit %s is read late; it is kept loaded", unit.name)
        self._load(unit)
        reader.read.add(unit)

    def keep_viewed(self, unit: Unit) -> None:
        """Keep what the caller's own code takes a view of outside of any forward that needs it."""
        reader = self._plain
        if reader is self._reader and unit in reader.read and unit not in reader.running:
            reader.kept += [unit] if unit not in reader.kept else []

    def close_reads(self) -> None:
        """Close units that the caller's own code has read outside of any forward."""
        self._recover()
        self._plain.read.clear()
        self._unload_unused()

    def remove(self) -> None:
        """Remove all hooks from the model; parameters stay placeholders."""
        self.close_reads()
        for handle in self._handles:
            handle.remove()
        for module in self._model.modules():
            if isinstance(module._parameters, TriggeredParameters):
                module._parameters = dict(module._parameters)

    # -- where forward passes pause

    def _enter_hook(self, entry: Entry) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            reader = self._reader
            if not all(reader.has(unit) for unit in (*entry.units, *reader.kept)):
                self._open(reader, entry.units)
            self._loader.device.follow_stream()
            reader.enter(entry.units)
            if reader is self._plain and self._outermost is None:
                self._outermost = sys._getframe(1)

        return enter

    def _exit_hook(self, entry: Entry) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            reader = self._reader
            own = self._without_views(output)
            reader.exit(entry.units)
            if reader is self._plain:
                self._left()
                self._unload_unused()
            return own

        return leave

    def _without_views(self, output: Any) -> Any:
        """Return `output` with copies in place of views of weights, which are about to be replaced.

        None, which leaves the output of a forward as it is, if there is no such view.
        """
        shows = self._shows
        if not any(shows(t) for t in _tensors(output)):
            return None
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.clone() if shows(t) else t, output
        )

    def _shows(self, tensor: Tensor) -> bool:
        """Return whether `tensor` is a view of weights; one of joined passes never is."""
        return not torch._C._functorch.is_batchedtensor(tensor) and self._loader.shows(tensor)

    def _read(self, parameter: nn.Parameter) -> None:
        reader = self._reader
        unit = self._unit_of.get(id(parameter))
        if unit is None or unit in reader.running or unit in reader.read:
            return  # nearly always: `Reader.has`, inlined for speed
        if id(parameter) not in self._shown:
            self._open(reader, (unit,))
            self._loader.device.follow_stream()
            reader.read.add(unit)

    def _open(self, reader: Reader, units: tuple[Unit, ...]) -> None:
        """Return once `units` are loaded and bound for `reader`."""
        # Code outside of any forward may use what it has read at any time: keep it while it is
        # little, as parameters are that an adapter's method of saving collects one by one.
        few = not self._watches and sum(map(_nbytes, {*reader.read, *units})) <= self._most
        if isinstance(reader, Coroutine) or not few:
            reader.drop_reads()
        if isinstance(reader, Coroutine):
            reader.pause(units)
            return
        self._unload_unused()
        for unit in (*reader.kept, *units):
            self._load(unit)
        reader.read.update(reader.kept)

    def _load(self, unit: Unit) -> None:
        """Show `unit` to the caller's own code."""
        if unit not in self._loaded:
            self._loaded[unit] = self._loader.load(unit, ())
        bind(self._loaded[unit].copies[0])

    # -- the caller's own forward passes

    def _watch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Watch what a plain forward pass reads if it is the first of its kind."""
        if torch.compiler.is_compiling() or self._reader is not self._plain:
            return
        self._recover()
        watch = ExitStack()
        if not self._watches:
            self._outermost = self._outermost or sys._getframe(1)
            if self._plain.kept:
                self._open(self._plain, ())
            named = [*enumerate(args), *kwargs.items()]
            kind = (module.training, *((name, _kind(value)) for name, value in named))
            if kind not in self._watched:
                self._watched.add(kind)
                watch.enter_context(uncompiled())
                watch.enter_context(ReadCheck(self, lambda tensor: None))
        self._watches.append(watch)

    def _unwatch(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._reader is self._plain and self._watches:
            self._watches.pop().close()
            self._left()

    def _left(self) -> None:
        """Note that a plain forward has ended."""
        if not self._plain.running and not self._watches:
            self._outermost = None

    def _recover(self) -> None:
        """Close what a plain forward left open that an interrupt has ended.

        torch calls no hook then, so such a forward is one whose frame is no longer running.
        """
        frame = sys._getframe(1) if self._outermost else None
        while frame is not None and frame is not self._outermost:
            frame = frame.f_back
        if self._outermost is None or frame is not None:
            return
        self._outermost = None
        while self._watches:
            self._watches.pop().close()
        self._plain.close()
        self._unload_unused()

    def _unload_unused(self) -> None:
        for unit in [u for u in self._loaded if not self._plain.has(u)]:
            self.restore(unit)
            self._loader.unload(self._loaded.pop(unit))

    # -- for `StateDictHooks`

    @property
    def reading(self) -> bool:
        """Whether the caller's own code is in a forward pass."""
        self._recover()
        return bool(self._plain.running)

    def unit_of(self, parameter: nn.Parameter) -> Unit | None:
        return self._unit_of.get(id(parameter))

    def unit_of_base(self, tensor: Tensor) -> Unit | None:
        """Return the unit whose weights factors add to in `tensor`; None for any other."""
        return self._loader.unit_of_base(tensor)

    @property
    def restored_namespaces(self) -> set[int]:
        """Ids of dictionaries of quantizing libraries' objects, which `bind` restores."""
        targets = [t for targets in self._targets.values() for t in targets]
        return {id(x) for t in targets if isinstance(t, Component) for x in t.namespaces}

    def targets(self, parameter: nn.Parameter) -> tuple[Target, ...]:
        """Return what `parameter` consists of: itself, unless it is quantized."""
        return self._targets[id(parameter)]

    def show(self, parameter: nn.Parameter, values: Binding) -> None:
        """Let `parameter` hold `values` of the host, for any reader, until `hide`."""
        self._shown.add(id(parameter))
        bind(values)

    def hide(self, parameter: nn.Parameter) -> None:
        """Make `parameter` a placeholder again."""
        self._shown.discard(id(parameter))
        own = {id(target) for target in self.targets(parameter)}
        placeholders = self._placeholders[self._unit_of[id(parameter)]]
        bind([(target, tensor) for target, tensor in placeholders if id(target) in own])
