"""Places in which a forward pass may leave something: attributes, containers, tensors, ...

Each kind of place has a class that can copy its contents, compare them and put them back. Contents
are compared by identity: an object that is exchanged for an equal one counts as changed.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Set
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from zo2ext._random_state import HostGenerators

_DICTS = {dict, OrderedDict, defaultdict}  # others may mind being refilled
_DEPTH = 6  # levels that are looked into: a namespace, its hooks, a hook, its variables, a list


class Place:
    """Something that has contents which a forward may change.

    Attributes:
        owner: The object with the contents.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def read(self) -> Any:
        """Return a copy of the contents."""
        return list(self.owner)

    def write(self, contents: Any) -> None:
        """Replace the contents by those that `read` has returned."""
        if self.changed(contents):
            self._replace(contents)

    def changed(self, contents: Any) -> bool:
        """Return whether the contents are no longer those that `read` has returned."""
        owner = self.owner
        return len(contents) != len(owner) or not all(map(operator.is_, owner, contents))

    def inside(self) -> Iterable[Any]:
        """Return what may have contents of its own."""
        return list(self.read())

    def _replace(self, contents: Any) -> None:
        self.owner.clear()
        self.owner.extend(contents)


class _Set(Place):
    def changed(self, contents: list[Any]) -> bool:
        return set(map(id, self.owner)) != set(map(id, contents))

    def _replace(self, contents: list[Any]) -> None:
        self.owner.clear()
        self.owner.update(contents)


class _Dict(Place):
    def read(self) -> dict[Any, Any]:
        return dict(self.owner.items())

    def changed(self, contents: dict[Any, Any]) -> bool:
        own = self.owner
        return (
            len(contents) != len(own)
            or not all(map(operator.is_, own.values(), contents.values()))
            or list(own) != list(contents)
        )

    def inside(self) -> Iterable[Any]:
        return list(self.owner.values())

    def _replace(self, contents: dict[Any, Any]) -> None:
        self.owner.clear()
        self.owner.update(contents)


class Namespace(_Dict):
    """The attributes of an object; their order means nothing.

    Attributes:
        names: Names that a pass was seen to change.
    """

    def __init__(self, owner: dict[str, Any]) -> None:
        super().__init__(owner)
        self.names = set[str]()

    def learn(self, contents: dict[str, Any]) -> None:
        own = self.owner
        self.names.update(n for n, value in own.items() if contents.get(n, self) is not value)
        self.names.update(contents.keys() - own.keys())

    def inside(self) -> Iterable[Any]:
        return [self.owner[name] for name in self.names if name in self.owner]

    def _replace(self, contents: dict[str, Any]) -> None:
        own = self.owner
        for name in [n for n in own if n not in contents]:
            del own[name]
        for name, value in contents.items():
            if own.get(name, self) is not value:
                own[name] = value


class _Cell(Place):
    """A variable of the function that a hook was defined in."""

    def read(self) -> list[Any]:
        try:
            return [self.owner.cell_contents]
        except ValueError:  # it has no value yet
            return []

    def changed(self, contents: list[Any]) -> bool:
        own = self.read()
        return len(own) != len(contents) or not all(map(operator.is_, own, contents))

    def _replace(self, contents: list[Any]) -> None:
        if contents:
            self.owner.cell_contents = contents[0]
        else:
            del self.owner.cell_contents


class Class(Place):
    """The class of a module, which parametrizations exchange."""

    def read(self) -> Any:
        return type(self.owner)

    def changed(self, contents: Any) -> bool:
        return type(self.owner) is not contents

    def inside(self) -> Iterable[Any]:
        return ()

    def _replace(self, contents: Any) -> None:
        self.owner.__class__ = contents


class Values(Place):
    """The values of a tensor that is written in place."""

    def read(self) -> Tensor:
        values: Tensor = self.owner.detach().clone()
        return values

    def write(self, contents: Tensor) -> None:
        self._replace(contents)  # to compare them would wait for a GPU

    def changed(self, contents: Tensor) -> bool:
        # Not by version: batch norms write their running mean without counting it.
        return not torch.equal(_bytes(self.owner), _bytes(contents))

    def inside(self) -> Iterable[Any]:
        return ()

    def _replace(self, contents: Tensor) -> None:
        with torch.no_grad():
            self.owner.copy_(contents)


class Generators(Place):
    """The global generators of Python and NumPy."""

    def read(self) -> HostGenerators:
        return HostGenerators.current()

    def changed(self, contents: HostGenerators) -> bool:
        return HostGenerators.current() != contents

    def inside(self) -> Iterable[Any]:
        return ()

    def _replace(self, contents: HostGenerators) -> None:
        contents.restore()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Finder:
    """Collects places, each once.

    Args:
        skipped: Ids of objects and of dictionaries that are not looked into.
    """

    def __init__(self, skipped: Set[int]) -> None:
        self._skipped = skipped
        self.places: dict[tuple[type, int], Place] = {}

    def add(self, place: Place) -> bool:
        """Add `place`; return whether it is new."""
        return self.places.setdefault((type(place), id(place.owner)), place) is place

    def module(self, module: nn.Module) -> None:
        self.add(Class(module))
        self.namespace(module.__dict__, _DEPTH, objects=True)

    def namespace(self, owner: dict[str, Any], depth: int, *, objects: bool) -> None:
        place = Namespace(owner)
        if id(owner) not in self._skipped and self.add(place):
            for value in list(owner.values()):
                self.walk(value, depth - 1, objects=objects)

    def walk(self, value: Any, depth: int = _DEPTH, *, objects: bool = True) -> None:
        """Add what `value` contains: containers, and `objects` that are not inside objects."""
        if isinstance(value, (type, nn.Parameter)) or id(value) in self._skipped or depth == 0:
            return
        inside: Iterable[Any] = _parts(value)
        place = _container(value)
        if place is not None and self.add(place):
            inside = place.inside()
        elif place is None and objects and _has_attributes(value):
            self.namespace(value.__dict__, depth, objects=False)
        for item in inside:
            self.walk(item, depth - 1, objects=objects)


def _container(value: Any) -> Place | None:
    if isinstance(value, Tensor):
        return Values(value) if value.layout is torch.strided and not value.is_meta else None
    if isinstance(value, dict):
        refillable = type(value) in _DICTS or _module_of(value).startswith("zo2ext.")
        return _Dict(value) if refillable else None
    if isinstance(value, (list, deque)):
        return Place(value)
    if isinstance(value, set):
        return _Set(value)
    return _Cell(value) if isinstance(value, CellType) else None


def _parts(value: Any) -> tuple[Any, ...]:
    """Return what an immutable `value` consists of."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, FunctionType):
        return value.__closure__ or ()
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    return ()


def _has_attributes(value: Any) -> bool:
    ours = _module_of(value).startswith(("zo2ext.", "torch."))
    if ours or isinstance(value, (FunctionType, MethodType, functools.partial)):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _module_of(value: Any) -> str:
    return str(type(value).__module__)
