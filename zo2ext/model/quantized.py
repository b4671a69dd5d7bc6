"""Quantised parameters: the plain tensors that one consists of, and where its library keeps them.

There are two kinds. A *wrapper* (torchao's) has no memory of its own; its class names the
attributes that hold its tensors. The other (bitsandbytes') is a Parameter of a class of its own,
whose scales hang on it, or on objects of its library that it or its module refers to. Either way a
tensor is an attribute of some object, and is put there: no library has code of its own here. An
ordinary parameter in a dtype that torch can hold but not copy (two elements a byte, say) counts as
quantised: it consists of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_Place = tuple[Any, str]  # an object, and its attribute


class Target(Protocol):
    """What a tensor is put into: a parameter, or one of those that a parameter consists of."""

    data: Tensor


class InnerTensor:
    """One plain tensor of a quantised parameter; a `Target`.

    Attributes:
        shape, dtype: Of `data`.

    Raises:
        ValueError: torch cannot move its dtype, not even as bytes.
    """

    def __init__(self, places: list[_Place], kept: _Kept) -> None:
        self._places, self._kept = places, kept
        own: Tensor = getattr(*places[0])
        # Kernels may rely on the order that dimensions have in memory.
        stride = own.stride()
        order = sorted(range(own.dim()), key=lambda d: -stride[d])
        self._order = order if own.permute(order).is_contiguous() else list(range(own.dim()))
        self._inverse = sorted(range(own.dim()), key=self._order.__getitem__)
        self.shape, self.dtype = own.permute(self._order).shape, _moved_as(own)
        self._own_dtype = own.dtype

    @property
    def data(self) -> Tensor:
        """The tensor, its dimensions in the order that they have in memory.

        It is seen as bytes where its own dtype is one that torch can hold but not copy.
        """
        own: Tensor = getattr(*self._places[0])
        if own.dtype == self._own_dtype:  # and no placeholder
            own = own.view(self.dtype)
        return own.permute(self._order)

    @data.setter
    def data(self, tensor: Tensor) -> None:
        self._kept.restore()
        if tensor.dtype == self.dtype:  # and no placeholder
            tensor = tensor.view(self._own_dtype)
        for holder, name in self._places:
            setattr(holder, name, tensor.permute(self._inverse))


class _Kept:
    """What a library's objects say beside their tensors, as it was at first.

    A forward pass may change it together with the tensors, to save time in the next one: repack
    codes for the processor and say so, or move scales to another object. The tensors that are put
    in for the next pass are those of the beginning again, so the rest has to be, too.
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


def inner_tensors(
    name: str, parameter: nn.Parameter, owners: Iterable[nn.Module]
) -> tuple[InnerTensor, ...]:
    """The plain tensors that `parameter` consists of; none where it is an ordinary one.

    Args:
        name: Of the parameter, for errors.
        owners: The modules that have it.

    Raises:
        TypeError: Its class does not say what they are, or does not let them be replaced, or they
            cannot be moved.
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
    kept = _Kept(objects)
    try:
        return tuple(InnerTensor(same, kept) for same in _by_memory(places))
    except ValueError as error:
        raise _refusal(name, parameter, str(error)) from error


def rebuild(parameter: nn.Parameter) -> None:
    """Make a wrapper anew around the tensors that it holds, so that it shows their device.

    It stays the same object, and so do wrappers within it. Nothing is done for other parameters.
    """
    if is_wrapper(parameter):
        torch.utils.swap_tensors(parameter, nn.Parameter(_rebuilt(parameter), requires_grad=False))


def memories(tensor: Any) -> set[int]:
    """Where the memory begins that `tensor`, or those that it consists of, share with views."""
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        return set().union(*(memories(getattr(tensor, name)) for name in names))
    return {tensor.untyped_storage().data_ptr()}


def is_wrapper(tensor: Any) -> bool:
    """Whether `tensor` has no memory of its own, and others that say so; torchao's weights are."""
    return bool(is_traceable_wrapper_subclass(tensor))


def _refusal(name: str, parameter: nn.Parameter, reason: str) -> TypeError:
    return TypeError(
        f"parameter {name} is a {type(parameter).__name__}, which cannot be taken apart into plain "
        f"tensors to be uploaded: {reason}; leave its module out of the quantisation, or quantise "
        "it in another format"
    )


def _flattened(wrapper: Any) -> Iterator[_Place]:
    names, _ = wrapper.__tensor_flatten__()
    for name in names:
        tensor = getattr(wrapper, name)
        if is_wrapper(tensor):
            yield from _flattened(tensor)
        else:
            setattr(wrapper, name, tensor)  # fails here, if at all, and not amid a step
            yield wrapper, name


def _rebuilt(wrapper: Any) -> Tensor:
    names, context = wrapper.__tensor_flatten__()
    inner: dict[str, Tensor] = {name: getattr(wrapper, name) for name in names}
    for tensor in inner.values():
        if is_wrapper(tensor):
            torch.utils.swap_tensors(tensor, _rebuilt(tensor))
    rebuilt: Tensor = type(wrapper).__tensor_unflatten__(
        inner, context, wrapper.shape, wrapper.stride()
    )
    return rebuilt


def _library_objects(parameter: nn.Parameter, owners: Iterable[nn.Module]) -> list[Any]:
    """`parameter`, and what it and its modules refer to of the package that its class is from."""
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
    """Whether torch can copy `dtype` and fill memory with it: not if its elements are no bytes."""
    try:
        torch.zeros(()).to(dtype)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _moved_as(tensor: Tensor) -> torch.dtype:
    """The dtype that `tensor` is seen as to be moved: its own, or bytes.

    Raises:
        ValueError: It cannot be moved.
    """
    if _is_movable(tensor.dtype):
        return tensor.dtype
    if tensor.dtype.itemsize > 1 or tensor.is_quantized:  # that has scales beside its memory
        raise ValueError(f"torch can neither copy {tensor.dtype} nor see it as a byte an element")
    return torch.uint8


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, nn.Parameter)


def _has_memory(parameter: nn.Parameter) -> bool:
    try:
        return parameter.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def _by_memory(places: Iterable[_Place]) -> list[list[_Place]]:
    """`places`, those together that hold the same tensor under several names."""
    groups: dict[Any, list[_Place]] = {}
    for place in places:
        tensor: Tensor = getattr(*place)
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # An empty tensor has no memory to be known by, nor has one on the meta device.
        groups.setdefault(same if same[0] else (id(place[0]), place[1]), []).append(place)
    return list(groups.values())
