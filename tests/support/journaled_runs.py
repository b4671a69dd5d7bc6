"""Steps of a tiny model that keep a journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import batches
from torch import nn

import zo2ext

SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "seed": 5, "device": "cpu"}

DATA = batches("opt", 8)


def train(
    model: nn.Module,
    journal: Path | None,
    steps: int,
    *,
    after: Callable[[zo2ext.ZOEngine], object] = lambda zo: None,
    **config: Any,
) -> zo2ext.ZOEngine:
    """Steps up to `steps`, batch by batch, `after` called after each; the engine is left open."""
    zo = zo2ext.offload(model, zo2ext.ZOConfig(**{**SETTINGS, **config}), journal=journal)
    for step in range(zo.steps, steps):
        batch = DATA[step % len(DATA)]
        zo.step(lambda: model(**batch).loss)
        after(zo)
    return zo
