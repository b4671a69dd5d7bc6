"""What a loss closure may return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zo2ext


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        torch.tensor([1.5]),
        np.float64(1.5),
        np.float32(1.5),
        np.float16(1.5),
        np.array(1.5),
        np.array([1.5], dtype=np.float32),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_scalars_of_any_kind(value: Any) -> None:
    model = nn.Linear(4, 4)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        assert zo.step(lambda: (model(torch.ones(1, 4)), value)[1]) == 1.5


def test_integers_of_numpy() -> None:
    model = nn.Linear(4, 4)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo:
        assert zo.step(lambda: (model(torch.ones(1, 4)), np.int64(3))[1]) == 3.0


@pytest.mark.parametrize("value", [np.ones(2), np.str_("1.5"), np.complex64(1)])
def test_what_is_no_scalar_is_refused(value: Any) -> None:
    model = nn.Linear(4, 4)
    with (
        zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")) as zo,
        pytest.raises(zo2ext.UserError, match="loss must be a tensor or a number, got"),
    ):
        zo.step(lambda: (model(torch.ones(1, 4)), value)[1])
