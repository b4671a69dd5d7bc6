"""Placeholders of an offloaded model's parameters while their weights are not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo2ext.model.layout import Placed, UnitLayout
from zo2ext.model.quantized import is_wrapper
from zo2ext.model.units import Unit
from zo2ext.streaming.views import Binding


def make_placeholders(layouts: Sequence[UnitLayout], device: torch.device) -> dict[Unit, Binding]:
    """Return a placeholder for every parameter: one NaN (0 for integers), expanded to its shape.

    Those of `layout.tensors` come first, in order; those of stand-ins follow.

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

    return {
        layout.unit: [(t.target, placeholder(t)) for t in layout.tensors]
        + [(t.stand_in, placeholder(t)) for t in layout.tensors if t.stand_in is not None]
        for layout in layouts
    }


def is_placeholder(tensor: Any) -> bool:
    """Return whether `tensor`, or a tensor that it consists of, is a placeholder made here."""
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        return any(is_placeholder(getattr(tensor, name)) for name in names)
    return bool(
        tensor.dtype.is_floating_point
        and tensor.numel() > 1
        and tensor.untyped_storage().nbytes() == tensor.itemsize
        and tensor.detach().as_strided((), ()).float().isnan()
    )
