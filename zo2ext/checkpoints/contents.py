"""What a checkpoint of a model holds, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

State = dict[str, Tensor]


Values = Callable[[list[nn.Parameter]], list[Tensor]]


Groups = Iterable[Iterable[nn.Parameter]]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1)


def saved_state(model: Any) -> State:
    """What a checkpoint is made of, in the order of ``state_dict``: parameters, tied ones once, and
    persistent buffers."""
    ignored = model._keys_to_ignore_on_save or ()
    state: State = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters}
        own |= {n: b for n, b in module._buffers.items() if _is_persistent(module, n)}
        for name, tensor in own.items():
            full = f"{prefix}.{name}" if prefix else name
            if tensor is not None and full not in ignored:
                state[full] = tensor
    metas = on_meta(state, state)
    unread: Any = _Unread(model, state)
    kept = remove_tied_weights_from_state_dict(metas, unread)
    return {name: state[name] for name in kept}


def _is_persistent(module: nn.Module, buffer: str) -> bool:
    return buffer not in module._non_persistent_buffers_set


class _Unread:
    """`model`, whose parameters can be looked up without being loaded."""

    def __init__(self, model: Any, state: State) -> None:
        self._model, self._state = model, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self._state[name]


def names_by_group(source: State, groups: Groups) -> list[list[str]]:
    """The names in `source` of each group, and of what is in none."""
    group_of = {id(p): i for i, group in enumerate(groups) for p in group}
    plan: dict[int, list[str]] = {}
    for name, tensor in source.items():
        plan.setdefault(group_of.get(id(tensor), -1), []).append(name)
    return list(plan.values())


def read_values(source: State, part: list[str], values: Values) -> State:
    parameters = {n: p for n in part if isinstance(p := source[n], nn.Parameter)}
    tensors = values(list(parameters.values())) if parameters else []
    real = dict(zip(parameters, tensors, strict=True))
    return {name: real[name] if name in real else source[name].cpu() for name in part}


def describe_state(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def on_meta(state: State, names: Iterable[str]) -> State:
    """What tensors of `state` look like, without memory."""
    return {
        name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta")
        for name in names
    }


def revert_conversion(model: Any, state: State) -> State:
    reverted: State = revert_weight_conversion(model, state)
    return reverted
