"""What the loss closures returned, as the numbers that a step goes by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def float32_rows(rows: list[list[Any]]) -> tuple[tuple[float, ...], ...]:
    """The values of each closure, one a copy of the weights, rounded to float32."""
    values = _scalars([value for row in rows for value in row])
    ends = [sum(map(len, rows[: i + 1])) for i in range(len(rows))]
    return tuple(tuple(values[end - len(row) : end]) for row, end in zip(rows, ends, strict=True))


def _scalars(values: list[Any]) -> list[float]:
    """The closures' results as floats; on a GPU, one transfer for all."""
    for value in values:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"loss must be a scalar, got a tensor of shape {tuple(value.shape)}")
        if not isinstance(value, (Tensor, int, float)):
            raise ValueError(f"loss must be a tensor or a number, got {type(value).__name__}")
    if values and all(isinstance(value, Tensor) for value in values):
        stacked = torch.stack([value.detach().reshape(()).float() for value in values])
        return [float(v) for v in stacked.tolist()]
    return [float(torch.tensor(float(value), dtype=torch.float32)) for value in values]


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...] | None:
    """Those of `count` micro-batches.

    Raises:
        ValueError: There are not as many, or one is negative or not finite.
    """
    if weights is None:
        return None
    if len(weights) != count:
        raise ValueError(f"weights must be {count}, one a micro-batch, got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights must be finite and at least 0, got {list(weights)}")
    return tuple(float(weight) for weight in weights)
