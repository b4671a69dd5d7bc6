"""A run for processes that are to be killed. Importing this once makes their start quick."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tiny_models import batches, tiny
from torch import nn

import zo2ext

torch.set_num_threads(1)
MODEL, DATA = tiny("opt"), batches("opt", 8)
CONFIG = zo2ext.ZOConfig(lr=1e-2, eps=1e-3, seed=5, device="cpu", storage=torch.bfloat16)


def run(path: Path | None, until: int, reached: Any = None) -> nn.Module:
    """Train up to `until` steps; `reached.value` counts those that are finished."""
    model = copy.deepcopy(MODEL)
    with zo2ext.offload(model, CONFIG, journal=path) as zo:
        for step in range(zo.steps, until):
            batch = DATA[step % len(DATA)]
            zo.step(lambda batch=batch: model(**batch).loss)
            if reached is not None:
                reached.value = zo.steps
    return model
