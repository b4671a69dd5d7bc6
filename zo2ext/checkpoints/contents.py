"""The tensors of a model's checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

State = dict[str, Tensor]
Values = Callable[[list[nn.Parameter]], list[Tensor]]  # values of some parameters of one group
Groups = Iterable[Iterable[nn.Parameter]]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1)


def saved_state(model: Any) -> State:
    """Return what a checkpoint consists of, in the order of ``state_dict``.

    These are the parameters, tied ones once, and the persistent buffers.
    """
    ignored = model._keys_to_ignore_on_save or ()
    state: State = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters}
        own |= {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, tensor in own.items():
            full = f"{prefix}.{name}" if prefix else name
            if tensor is not None and full not in ignored:
                state[full] = tensor
    unread: Any = _Unread(model, state)
    kept = remove_tied_weights_from_state_dict(meta_tensors(state, state), unread)
    return {name: state[name] for name in kept}


class _Unread:
    """`model`, with parameters that can be looked up without being loaded."""

    def __init__(self, model: Any, state: State) -> None:
        self._model, self._state = model, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self._state[name]


def names_by_group(state: State, groups: Groups) -> list[list[str]]:
    """Return the names in `state` of each group, and of what is in none."""
    group_of = {id(p): i for i, group in enumerate(groups) for p in group}
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(group_of.get(id(tensor), -1), []).append(name)
    return list(names.values())


def read_values(state: State, names: list[str], values: Values) -> State:
    """Return `names` of `state` with the parameters' values, on the host."""
    parameters = {n: p for n in names if isinstance(p := state[n], nn.Parameter)}
    tensors = values(list(parameters.values())) if parameters else []
    read = dict(zip(parameters, tensors, strict=True))
    return {name: read[name] if name in read else state[name].cpu() for name in names}


def shapes_and_dtypes(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def meta_tensors(state: State, names: Iterable[str]) -> State:
    """Return tensors without memory that have the shapes and dtypes of those in `state`."""
    return {
        name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta")
        for name in names
    }


def revert_conversion(model: Any, state: State) -> State:
    """Return `state` in the form in which transformers saves it."""
    reverted: State = revert_weight_conversion(model, state)
    return reverted
