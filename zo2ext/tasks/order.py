"""The order of training examples: each once per epoch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np


def shuffled(positions: Iterable[int], count: int, seed: int) -> list[int]:
    """Return the examples at some positions of a run's order; a pure function.

    Args:
        positions: Positions, counted from the beginning of the run.
        count: Number of examples; each epoch has all of them, in an order of its own.
        seed: Seed of the order.
    """
    places = (divmod(position, count) for position in positions)
    return [int(_epoch(seed, epoch, count)[place]) for epoch, place in places]


@lru_cache(maxsize=2)  # a batch touches one epoch or two, unless there are few examples
def _epoch(seed: int, epoch: int, count: int) -> Any:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch + 1]))
    return generator.permutation(count)
