"""Models of a known shape with random weights, made without ever holding the weights twice.

A *hollow* model has its structure and buffers, but each parameter is one number seen in the whole
shape: it takes no memory. `materialise` gives it weights on one device. `random_store` makes
`zo2ext.offload` fill its host memory with random weights instead of the hollow ones.

Random, because equal weights would be quicker to multiply than a real model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from shapes import make_config
from torch import Tensor, nn

from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.stores.host import HostStore
from zo2ext.streaming.stores.page_locks import PageLocks
from zo2ext.streaming.stores.rounding import RoundingError, read_rounded
from zo2ext.streaming.stores.sources import HeldTensor, Source
from zo2ext.streaming.stores.store import map_arena

TILE = 2**20 - 3  # odd, so that no two rows of a matrix are alike


def hollow_model(
    shape: str, dtype: torch.dtype, *, layers: int | None = None, length: int | None = None
) -> nn.Module:
    """A causal language model of `shape`, in eval mode, that takes no memory for weights."""
    from transformers import AutoModelForCausalLM

    config = make_config(shape, layers=layers, length=length)
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", register_on_meta):
        make: Any = AutoModelForCausalLM.from_config
        model: nn.Module = make(config, dtype=dtype).eval()
    cast("Any", model).tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_hollow(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    return model


def empty(model: nn.Module) -> None:
    """Make `model` hollow again, and move its buffers home."""
    for parameter in model.parameters():
        parameter.data = _hollow(parameter)
    _move_buffers(model, torch.device("cpu"))


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a hollow `model` random weights on `device`."""
    tile = _tile(device)
    for name, parameter in model.named_parameters():
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        fill_random(data, name, tile)
        parameter.data = data
    _move_buffers(model, device)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiplied_count(model: nn.Module) -> int:
    """Weights that a token is multiplied with: those of linear layers, tied ones at each use.

    An embedding is only looked up. What attention does beside is left out.
    """
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def fill_random(target: Tensor, name: str, tile: Tensor) -> None:
    """Normal with deviation 0.02; gains of norms are 1 and biases 0, as in a fresh model."""
    if target.dim() < 2:
        target.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    flat = target.view(-1)
    whole = flat.numel() // tile.numel() * tile.numel()
    flat[:whole].view(-1, tile.numel()).copy_(tile)
    flat[whole:].copy_(tile[: flat.numel() - whole])


class RandomStore(HostStore):
    """A host store full of random weights, whatever it is told to hold.

    Units of one size share memory where all together would take more than `budget`: each is
    uploaded and written back from several places of the order, so the bytes moved and the device's
    memory are those of the whole model, and only the host's memory is not. Losses then mean
    nothing, and times are what they would be.
    """

    def __init__(self, layouts: Sequence[UnitLayout], device: Device, *, budget: int) -> None:
        self._device, self.moves = device, device.moves
        self.layouts = tuple(layouts)
        owners = share(layouts, budget)
        arenas = {i: map_arena(layouts[i].nbytes) for i in sorted(set(owners))}
        slabs = {
            i: torch.frombuffer(arena, dtype=torch.uint8, count=max(layouts[i].nbytes, 1))
            for i, arena in arenas.items()
        }
        self._owners = owners
        self._arenas = [arenas[i] for i in owners]
        self.slabs = [slabs[i] for i in owners]
        self._distinct = list(slabs.values())
        self._locks = PageLocks(device)
        for slab in self._distinct:
            self._locks.add(slab)
        self._tile = _tile(torch.device("cpu"))

    @property
    def distinct_nbytes(self) -> int:
        """Host bytes that are really there."""
        return sum(slab.nbytes for slab in self._distinct)

    def load_tensor(self, layout: UnitLayout, placed: Placed, source: Source) -> RoundingError:
        if self._owners[layout.unit.index] == layout.unit.index:
            planes = self.planes(layout, placed)
            values = planes.stored.view(placed.shape)
            if planes.scales is not None:
                values = torch.empty(placed.shape)
            fill_random(values, placed.spec.name, self._tile)
            if planes.scales is not None:
                read_rounded(HeldTensor(values), 0, planes)
        return RoundingError()

    def lock(self, layout: UnitLayout) -> None:
        """Nothing: the model has no weights that had to be dropped first."""


def share(layouts: Sequence[UnitLayout], budget: int) -> list[int]:
    """For each unit, the unit whose memory it uses, so that all fit in `budget` bytes.

    Each size keeps as many units of its own as fit, the same number for all sizes.

    Raises:
        ValueError: One unit of each size is already too much.
    """
    groups: dict[int, list[int]] = {}
    for index, layout in enumerate(layouts):
        groups.setdefault(layout.nbytes, []).append(index)
    for own in range(max(map(len, groups.values())), 0, -1):
        if sum(size * min(own, len(units)) for size, units in groups.items()) <= budget:
            owners = {
                index: units[k % own] for units in groups.values() for k, index in enumerate(units)
            }
            return [owners[i] for i in range(len(layouts))]
    raise ValueError(f"the host budget of {budget} bytes does not hold one unit of each size")


@contextmanager
def random_store(budget: int) -> Iterator[None]:
    """Within, `zo2ext.offload` makes a `RandomStore`."""
    with patch("zo2ext.streaming.stores.select.HostStore", partial(RandomStore, budget=budget)):
        yield


def _tile(device: torch.device) -> Tensor:
    return torch.empty(TILE, device=device).normal_(0, 0.02, generator=_seeded(device))


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _hollow(parameter: Tensor) -> Tensor:
    return torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                moved.setdefault(id(buffer), buffer.to(device))
                module._buffers[name] = moved[id(buffer)]
