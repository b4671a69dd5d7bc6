"""Units as tensors where they lie: views that are made once for each place, then reused.

A unit comes to lie in one of few buffers, step after step, and a step of a small model is short:
making its views anew each time would take the host longer than a GPU takes for the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext.model.layout import UnitLayout
from zo2ext.model.quantized import Target, memories
from zo2ext.ops.formats import Planes
from zo2ext.streaming.devices.device import Buffer

Binding = list[tuple[Target, Tensor]]


@dataclass(frozen=True)
class SlabViews:
    """A unit in its slab.

    Attributes:
        whole: The planes of each part.
        top: The same without low planes.
        stored: What trainable parameters are, read as they are stored.
        frozen: What frozen ones are.
    """

    whole: list[Planes]
    top: list[Planes]
    stored: Binding
    frozen: Binding


@dataclass(frozen=True)
class CopyViews:
    """A copy of a unit's trainable weights in the compute dtype.

    Attributes:
        parts: All of each part, flat.
        weights: What trainable parameters are.
    """

    parts: list[Tensor]
    weights: Binding


class Views:
    """All views of units, by buffer."""

    def __init__(self) -> None:
        self._slabs: dict[tuple[Buffer, int], SlabViews] = {}
        self._copies: dict[tuple[Buffer, int], list[CopyViews]] = {}
        self._memories = set[int]()

    def slab(self, layout: UnitLayout, name: Buffer, memory: Tensor) -> SlabViews:
        """`layout`'s unit in the buffer `name`, which is `memory` (uint8, shape (bytes,))."""
        key = (name, layout.unit.index)
        views = self._slabs.get(key)
        if views is None:
            self._memories |= memories(memory)
            views = self._slabs[key] = _slab(layout, memory)
        return views

    def copies(self, layout: UnitLayout, name: Buffer, memory: Tensor) -> list[CopyViews]:
        """The copies in the buffer `name`, which is `memory` (uint8, shape (copies, bytes))."""
        key = (name, layout.unit.index)
        views = self._copies.get(key)
        if views is None:
            self._memories |= memories(memory)
            views = self._copies[key] = [_copy(layout, row) for row in memory]
        return views

    def has(self, tensor: Tensor) -> bool:
        """Whether `tensor`, or one that it consists of, is a view of weights."""
        return not self._memories.isdisjoint(memories(tensor))


# Views that are made amid `generate` serve training, too.
@torch.inference_mode(False)
def _slab(layout: UnitLayout, memory: Tensor) -> SlabViews:
    return SlabViews(
        [part.planes(memory) for part in layout.parts],
        [part.planes(memory, whole=False) for part in layout.parts],
        [(t.target, v) for part in layout.parts for t, v in part.stored_views(memory)],
        [(t.target, v) for t, v in layout.frozen_views(memory)],
    )


@torch.inference_mode(False)
def _copy(layout: UnitLayout, memory: Tensor) -> CopyViews:
    return CopyViews(
        [part.computed(memory) for part in layout.parts],
        [(t.target, v) for t, v in layout.trainable_views(memory)],
    )
