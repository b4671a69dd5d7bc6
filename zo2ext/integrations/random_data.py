"""Tells whether making batches draws random numbers, as collators that mask tokens do."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomData:
    """Compares the states of the process's generators between two steps.

    Attributes:
        seen: Whether random numbers were drawn between any two steps of one epoch.
    """

    def __init__(self) -> None:
        self.seen = False
        self._before: tuple[Any, ...] | None = None

    def look(self) -> None:
        """Compare the generators with the last look, unless that was forgotten."""
        name, keys, place, *_ = np.random.get_state(legacy=True)
        torch_state = torch.get_rng_state().numpy().tobytes()
        now = (torch_state, name, np.asarray(keys).tobytes(), place, random.getstate())
        self.seen |= self._before is not None and now != self._before
        self._before = now

    def forget(self) -> None:
        """Forget the last look: what is drawn until the next one is not the data's."""
        self._before = None
