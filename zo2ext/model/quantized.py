"""Quantized parameters: the plain tensors that they consist of, and where their library keeps them.

There are two kinds. A *wrapper* (torchao) has no memory of its own; its class names the attributes
that hold its tensors. The other kind (bitsandbytes) is a Parameter of a special class, whose scales
are attributes of it, or of library objects that it or its module refers to. In both cases a tensor
is an attribute of some object and is replaced there, so no library needs code of its own here. An
ordinary parameter in a dtype that torch can hold but not copy (two elements per byte, for example)
is treated as quantized: it consists of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo2ext.errors import UnsupportedModel

_Place = tuple[Any, str]  # an object, and the name of its attribute


class Target(Protocol):
    """An object that shows a tensor: a parameter, or a component of one."""

    data: Tensor


class Component:
    """One plain tensor of a quantized parameter; a `Target`.

    Attributes:
        shape, dtype: Shape and dtype of `data`.

    Raises:
        ValueError: torch cannot copy its dtype, not even as bytes.
    """

    def __init__(self, places: list[_Place], state: _LibraryState) -> None:
        self._places, self._state = places, state
        own: Tensor = getattr(*places[0])
        # Kernels may rely on the order of the dimensions in memory.
        stride = own.stride()
        order = sorted(range(own.dim()), key=lambda d: -stride[d])
        self._order = order if own.permute(order).is_contiguous() else list(range(own.dim()))
        self._inverse = sorted(range(own.dim()), key=self._order.__getitem__)
        self.shape, self.dtype = own.permute(self._order).shape, _moved_as(own)
        self._own_dtype = own.dtype

    @property
    def namespaces(self) -> list[dict[str, Any]]:
        """Attributes of the library's objects, which setting `data` restores."""
        return [now for now, _, _ in self._state._first]

    @property
    def data(self) -> Tensor:
        """The tensor, with its dimensions in memory order, as bytes if torch cannot copy it."""
        own: Tensor = getattr(*self._places[0])
        if own.dtype == self._own_dtype:  # not a placeholder
            own = own.view(self.dtype)
        return own.permute(self._order)

    @data.setter
    def data(self, tensor: Tensor) -> None:
        self._state.restore()
        if tensor.dtype == self.dtype:  # not a placeholder
            tensor = tensor.view(self._own_dtype)
        for holder, name in self._places:
            setattr(holder, name, tensor.permute(self._inverse))


class _LibraryState:
    """The attributes of a library's objects other than tensors, as they were at first.

    A forward pass may change them together with the tensors to save time in the next pass: it may
    repack codes for the processor and note that, or move scales to another object. The tensors are
    replaced by the original ones for the next pass, so these attributes have to be restored, too.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._first = [
            (vars(x), set(vars(x)), {k: v for k, v in vars(x).items() if not _is_plain(v)})
            for x in objects
        ]

    def restore(self) -> None:
        for now, names, values in self._first:
            for name in now.keys() - names:
                del now[name]
            now.update(values)


def components(
    name: str, parameter: nn.Parameter, owners: Iterable[nn.Module]
) -> tuple[Component, ...]:
    """Return the plain tensors that `parameter` consists of; none if it is an ordinary parameter.

    Args:
        name: Name of the parameter, for errors.
        parameter: Parameter of any class.
        owners: Modules that have it.

    Raises:
        UnsupportedModel: Its class does not list its tensors or let them be replaced, or torch
            cannot copy them.
    """
    objects: list[Any] = []
    if type(parameter) is nn.Parameter:
        if _is_movable(parameter.dtype):
            return ()
        places: list[_Place] = [(parameter, "data")]
    elif is_wrapper(parameter):
        try:
            places = list(_flattened(parameter))
        except (NotImplementedError, AttributeError, TypeError) as error:
            raise _refusal(name, parameter, str(error)) from error
    elif parameter.numel() and not _has_memory(parameter):
        raise _refusal(name, parameter, "its class has no __tensor_flatten__")
    else:
        objects = _library_objects(parameter, owners)
        found = [(x, k) for x in objects for k, v in vars(x).items() if _is_plain(v)]
        if not found:
            return ()
        places = [(parameter, "data"), *found]
    state = _LibraryState(objects)
    try:
        return tuple(Component(same, state) for same in _by_memory(places))
    except ValueError as error:
        raise _refusal(name, parameter, str(error)) from error


def rebuild(parameter: nn.Parameter) -> None:
    """Rebuild a wrapper around the tensors that it holds, so that it shows their device.

    It stays the same object, and so do wrappers within it. Other parameters are left alone.
    """
    if is_wrapper(parameter):
        torch.utils.swap_tensors(parameter, nn.Parameter(_rebuilt(parameter), requires_grad=False))


def memories(tensor: Any) -> set[int]:
    """Return the addresses of the storages of `tensor`, or of the tensors that it consists of."""
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        return set().union(*(memories(getattr(tensor, name)) for name in names))
    return {tensor.untyped_storage().data_ptr()}


def is_wrapper(tensor: Any) -> bool:
    """Return whether `tensor` has no memory of its own, but lists other tensors (as torchao's)."""
    return bool(is_traceable_wrapper_subclass(tensor))


def _refusal(name: str, parameter: nn.Parameter, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"parameter {name} is a {type(parameter).__name__}, which cannot be taken apart into plain "
        f"tensors to be uploaded: {reason}; leave its module out of the quantization, or quantize "
        "it in another format"
    )


def _flattened(wrapper: Any) -> Iterator[_Place]:
    names, _ = wrapper.__tensor_flatten__()
    for name in names:
        tensor = getattr(wrapper, name)
        if is_wrapper(tensor):
            yield from _flattened(tensor)
        else:
            setattr(wrapper, name, tensor)  # if this fails, it fails here and not during a step
            yield wrapper, name


def _rebuilt(wrapper: Any) -> Tensor:
    names, context = wrapper.__tensor_flatten__()
    held: dict[str, Tensor] = {name: getattr(wrapper, name) for name in names}
    for tensor in held.values():
        if is_wrapper(tensor):
            torch.utils.swap_tensors(tensor, _rebuilt(tensor))
    rebuilt: Tensor = type(wrapper).__tensor_unflatten__(
        held, context, wrapper.shape, wrapper.stride()
    )
    return rebuilt


def _library_objects(parameter: nn.Parameter, owners: Iterable[nn.Module]) -> list[Any]:
    """Return `parameter`, and the objects of its package that it and its modules refer to."""
    found: dict[int, Any] = {id(parameter): parameter}
    waiting = [*vars(parameter).values(), *(v for owner in owners for v in vars(owner).values())]
    while waiting:
        x = waiting.pop()
        ours = _package(x) == _package(parameter) and hasattr(x, "__dict__")
        if ours and id(x) not in found and not isinstance(x, (Tensor, nn.Module)):
            found[id(x)] = x
            waiting += vars(x).values()
    return list(found.values())


def _package(x: Any) -> str:
    return type(x).__module__.partition(".")[0]


@cache
def _is_movable(dtype: torch.dtype) -> bool:
    """Return whether torch can copy `dtype`: not if an element is less than a byte."""
    try:
        torch.zeros(()).to(dtype)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _moved_as(tensor: Tensor) -> torch.dtype:
    """Return the dtype to copy `tensor` as: its own, or bytes.

    Raises:
        ValueError: It cannot be copied.
    """
    if _is_movable(tensor.dtype):
        return tensor.dtype
    if tensor.dtype.itemsize > 1 or tensor.is_quantized:  # its scales are not in its memory
        raise ValueError(f"torch can neither copy {tensor.dtype} nor view it as bytes")
    return torch.uint8


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, nn.Parameter)


def _has_memory(parameter: nn.Parameter) -> bool:
    try:
        return parameter.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def _by_memory(places: Iterable[_Place]) -> list[list[_Place]]:
    """Group `places` that hold the same tensor under several names."""
    groups: dict[Any, list[_Place]] = {}
    for place in places:
        tensor: Tensor = getattr(*place)
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # Tensors that are empty or on the meta device have no address to compare.
        groups.setdefault(same if same[0] else (id(place[0]), place[1]), []).append(place)
    return list(groups.values())
