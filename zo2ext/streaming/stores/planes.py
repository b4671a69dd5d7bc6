"""Stored weights as named tensors, one per plane, as checkpoints save them.

A weight's stored plane has the weight's name and shape; its other planes are ``name:scales`` and
``name:low``, flat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from zo2ext.errors import UserError
from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.ops.formats import Planes
from zo2ext.streaming.stores.store import WeightStore

Weights = Iterable[tuple[UnitLayout, Placed]]
_STORED = "stored"


def named_planes(store: WeightStore, weights: Weights) -> dict[str, Tensor]:
    """Return the planes of `weights` in `store`, without copying them."""
    named = {}
    for layout, placed in weights:
        for plane, tensor in store.planes(layout, placed).named().items():
            shaped = tensor.view(placed.shape) if plane == _STORED else tensor
            named[_name(placed, plane)] = shaped
    return named


def put_planes(store: WeightStore, weights: Weights, named: Mapping[str, Tensor]) -> None:
    """Store planes that `named_planes` returned."""
    for layout, placed in weights:
        planes = {r.name: named[_name(placed, r.name)].view(-1) for r in layout.ranges(placed)}
        store.put(layout, placed, Planes(**planes))


def check_planes(weights: Weights, named: Mapping[str, Tensor]) -> None:
    """Check that `named` can be the planes of `weights`.

    Raises:
        ValueError: A name, shape or dtype differs, or a scale is not finite.
    """
    expected = {
        _name(placed, r.name): (
            tuple(placed.shape) if r.name == _STORED else (r.numel,),
            r.dtype,
        )
        for layout, placed in weights
        for r in layout.ranges(placed)
    }
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named.items()}
    if found != expected:
        wrong = sorted({name for name, _ in found.items() ^ expected.items()})
        raise UserError(
            f"exact_weights must have the names, shapes and dtypes of {len(expected)} tensors of "
            f"this model, got {len(found)}; they differ in {', '.join(wrong[:5])}"
        )
    for name, tensor in named.items():
        if tensor.dtype == torch.float8_e8m0fnu:
            lost = int((tensor.view(torch.uint8) == 0xFF).sum())  # NaN, all others are finite
            if lost:
                raise UserError(
                    f"exact_weights: {lost} of {tensor.numel()} scales in {name} are not finite: "
                    "the checkpoint is damaged; use another one, or export the step from the "
                    "journal"
                )


def _name(placed: Placed, plane: str) -> str:
    return placed.spec.name if plane == _STORED else f"{placed.spec.name}:{plane}"
