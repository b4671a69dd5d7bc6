"""Tensors over a unit's memory, made once per buffer and then reused.

A unit returns to one of few buffers in every step, and a step of a small model is short: making its
views anew each time would take the host longer than a GPU takes for the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext.model.layout import UnitLayout
from zo2ext.model.quantized import Target, memories
from zo2ext.ops.formats import Planes
from zo2ext.streaming.devices.device import Buffer

Binding = list[tuple[Target, Tensor]]  # parameters, and the tensors that they are to show


@dataclass(frozen=True)
class SlabViews:
    """A unit in its slab.

    Attributes:
        planes: The planes of each part.
        top_planes: The same without low planes.
        stored: Tensors of trainable parameters, read as they are stored.
        frozen: Tensors of frozen parameters.
        bases: Tensors of parameters with factored directions that are read as stored, by id.
    """

    planes: list[Planes]
    top_planes: list[Planes]
    stored: Binding
    frozen: Binding
    bases: dict[int, Tensor]


@dataclass(frozen=True)
class CopyViews:
    """A copy of a unit's trainable weights in the compute dtype.

    Attributes:
        parts: Each part as one flat tensor.
        weights: Tensors of trainable parameters.
        dense: Those that have dense directions.
        bases: Those that have factored ones and another format at rest, by id.
    """

    parts: list[Tensor]
    weights: Binding
    dense: Binding
    bases: dict[int, Tensor]


class Views:
    """All views of units, by buffer."""

    def __init__(self) -> None:
        self._slabs: dict[tuple[Buffer, int], SlabViews] = {}
        self._copies: dict[tuple[Buffer, int], list[CopyViews]] = {}
        self._memories = set[int]()

    def slab(self, layout: UnitLayout, name: Buffer, memory: Tensor) -> SlabViews:
        """Return the unit of `layout` in the buffer `name`: `memory`, uint8, shape (bytes,)."""
        key = (name, layout.unit.index)
        views = self._slabs.get(key)
        if views is None:
            self._memories |= memories(memory)
            views = self._slabs[key] = _slab(layout, memory)
        return views

    def copies(self, layout: UnitLayout, name: Buffer, memory: Tensor) -> list[CopyViews]:
        """Return the copies in the buffer `name`: `memory`, uint8, shape (copies, bytes)."""
        key = (name, layout.unit.index)
        views = self._copies.get(key)
        if views is None:
            self._memories |= memories(memory)
            views = self._copies[key] = [_copy(layout, row) for row in memory]
        return views

    def has(self, tensor: Tensor) -> bool:
        """Return whether `tensor`, or a tensor that it consists of, is a view of weights."""
        return not self._memories.isdisjoint(memories(tensor))


# Views made during `generate` are used for training, too.
@torch.inference_mode(False)
def _slab(layout: UnitLayout, memory: Tensor) -> SlabViews:
    return SlabViews(
        [part.planes(memory) for part in layout.parts],
        [part.planes(memory, low=False) for part in layout.parts],
        [(t.target, v) for part in layout.parts for t, v in part.stored_views(memory)],
        [(t.target, v) for t, v in layout.frozen_views(memory)],
        {
            t.spec.id: v
            for part in layout.parts
            if part.factors and not part.packed
            for t, v in part.stored_views(memory)
        },
    )


@torch.inference_mode(False)
def _copy(layout: UnitLayout, memory: Tensor) -> CopyViews:
    views = layout.trainable_views(memory)
    factored = {t: part.packed for part in layout.parts if part.factors for t in part.tensors}
    return CopyViews(
        [part.computed(memory) for part in layout.parts],
        [(t.target, v) for t, v in views],
        [(t.target, v) for t, v in views if t not in factored],
        {t.spec.id: v for t, v in views if factored.get(t)},
    )
