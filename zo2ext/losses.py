"""What the loss closures returned, as the numbers that a step goes by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sums(rows: list[list[Any]]) -> list[float]:
    """Over the closures, the sum of each copy's values: in float64, then rounded to float32."""
    values = _scalars([value for row in rows for value in row])
    sums = [sum(values[i :: len(rows[0])]) for i in range(len(rows[0]))]
    return [float(torch.tensor(value, dtype=torch.float32)) for value in sums]


def _scalars(values: list[Any]) -> list[float]:
    """The closures' results as floats; on a GPU, one transfer for all."""
    for value in values:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"loss must be a scalar, got a tensor of shape {tuple(value.shape)}")
        if not isinstance(value, (Tensor, int, float)):
            raise ValueError(f"loss must be a tensor or a number, got {type(value).__name__}")
    if all(isinstance(value, Tensor) for value in values):
        stacked = torch.stack([value.detach().reshape(()).float() for value in values])
        return [float(v) for v in stacked.tolist()]
    return [float(torch.tensor(float(value), dtype=torch.float32)) for value in values]
