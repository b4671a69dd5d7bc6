"""Placeholders of an offloaded model's parameters while their weights are not loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.model.units import Unit
from zo2ext.streaming.views import Binding


def make_placeholders(layouts: Sequence[UnitLayout], device: torch.device) -> dict[Unit, Binding]:
    """Return a placeholder for every parameter: one NaN (0 for integers), expanded to its shape.

    Of a quantized parameter, the scales and whatever else is floating-point become NaN. One that
    consists of integers only could be used without anyone noticing, so its placeholder is NaN as
    well, which kernels reject or propagate.
    """
    scalars: dict[torch.dtype, Tensor] = {}

    def placeholder(placed: Placed) -> Tensor:
        components = placed.spec.components
        only_integers = components and not any(c.dtype.is_floating_point for c in components)
        dtype = torch.float32 if only_integers else placed.dtype
        if dtype not in scalars:
            value = float("nan") if dtype.is_floating_point else 0
            scalars[dtype] = torch.full((), value, device=device).to(dtype)
        return scalars[dtype].expand(placed.shape)

    return {layout.unit: [(t.target, placeholder(t)) for t in layout.tensors] for layout in layouts}
