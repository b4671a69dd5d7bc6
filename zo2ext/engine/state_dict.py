"""Hooks that let ``state_dict()`` and ``load_state_dict()`` see the host's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zo2ext.engine.hooks import ModelHooks
from zo2ext.model.quantized import Target
from zo2ext.streaming.views import Binding


class StateDictHooks:
    """Puts host tensors in the parameters' place while a module's state is read or replaced.

    Args:
        read: Returns a target's host tensor, with all updates.
        before_load: Called before weights are replaced.
        write: Called with each target and its new values.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: ModelHooks,
        read: Callable[[Target], Tensor],
        before_load: Callable[[], None],
        write: Callable[[Target, Tensor], None],
    ) -> None:
        self._model, self._hooks, self._read = model, hooks, read
        self._before_load, self._write = before_load, write
        self._shown: dict[tuple[int, str], Binding] = {}  # by module and name
        self._handles: list[RemovableHandle] = []

    def add(self) -> None:
        """Add the hooks to the model. If that fails, `remove` removes those that were added."""
        for module in self._model.modules():
            if any(p is not None for p in module._parameters.values()):
                added = self._handles.append
                added(module.register_state_dict_pre_hook(self._show))
                added(module.register_state_dict_post_hook(lambda *args: self._hide(*args)))
                added(module.register_load_state_dict_pre_hook(self._show_for_load))
                added(module.register_load_state_dict_post_hook(self._loaded))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _own(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        if self._hooks.reading:
            raise RuntimeError("state_dict and load_state_dict cannot run inside a forward pass")
        return [
            (name, p)
            for name, p in module._parameters.items()
            if p is not None and self._hooks.unit_of(p) is not None
        ]

    def _show(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._hooks.close_reads()
        for name, parameter in self._own(module):
            shown = [(target, self._read(target)) for target in self._hooks.targets(parameter)]
            self._shown[id(module), name] = shown
            self._hooks.show(parameter, shown)

    def _hide(self, module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        for name, parameter in self._own(module):
            (target, values), *others = self._shown.pop((id(module), name))
            if state.get(prefix + name) is parameter:  # keep_vars
                state[prefix + name] = nn.Parameter(parameter.detach(), parameter.requires_grad)
            elif prefix + name in state and target is parameter and not others:
                state[prefix + name] = values  # the tensor that tied names share while it lives
            self._hooks.hide(parameter)

    def _show_for_load(self, module: nn.Module, *_: Any) -> None:
        self._before_load()
        self._show(module, "", False)

    def _loaded(self, module: nn.Module, incompatible: Any) -> None:
        for name, parameter in self._own(module):
            self._hooks.hide(parameter)
            for target, values in self._shown.pop((id(module), name)):
                self._write(target, values)
