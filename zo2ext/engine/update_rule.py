"""From a step's losses to its update; see docs/contracts.md, "Update". Numbers only."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.journal.records import StepResult
from zo2ext.parallel.mesh import exact_sum

logger = logging.getLogger(__name__)

_WINDOW, _LEAST = 33, 5  # steps that the guard remembers; fewest that it judges by


@dataclass(frozen=True)
class StepRecord:
    """Losses of one step, and whether it changed the weights.

    Attributes:
        step: Number of the step, from 0.
        losses_plus, losses_minus: Losses at +eps and -eps, one per direction; none at -eps with
            ``estimator="centered"``.
        projected_grads: Slope of the loss along each direction: (loss_plus - loss_minus) / (2 eps)
            or, centered, (loss_plus - their mean) / eps * n / (n - 1).
        lr: Learning rate.
        skipped: Whether the weights were left unchanged because a loss, or the update's coefficient
            in float32, was not finite, or because slopes that are all zero cannot be normalized.
        clipped: Whether the step was shortened; see ``clip``.
    """

    step: int
    losses_plus: tuple[float, ...]
    losses_minus: tuple[float, ...]
    projected_grads: tuple[float, ...]
    lr: float
    skipped: bool
    clipped: bool = False

    @classmethod
    def of(cls, result: StepResult, eps: float) -> StepRecord:
        """Return the record of a step with perturbations of scale `eps`."""
        plus, minus = result.losses_plus, result.losses_minus
        found = slopes(plus, minus, eps)
        return cls(result.step, plus, minus, found, result.lr, result.skipped, result.clipped)

    @property
    def loss(self) -> float:
        """Mean over all forward passes."""
        losses = self.losses_plus + self.losses_minus
        return sum(losses) / len(losses)

    @property
    def projected_grad(self) -> float:
        """Slope along the direction or, of several, the root mean square."""
        slopes = self.projected_grads
        return slopes[0] if len(slopes) == 1 else root_mean_square(slopes)

    @property
    def equal(self) -> bool:
        """Whether no loss differs from those it is compared with, so that nothing is learned."""
        return not any(self.projected_grads)


class Guard:
    """Shortens steps whose slopes are far larger than those of the steps before.

    It depends on recorded losses alone, so a run that continues shortens the same steps.

    Args:
        clip: Multiple of the median that slopes may reach; None for any.

    Attributes:
        sizes: Root mean squares of the slopes in the last 33 steps, without any that were zero or
            not finite.
    """

    def __init__(self, clip: float | None, sizes: Iterable[float] = ()) -> None:
        self._clip = clip
        self.sizes = deque[float](sizes, maxlen=_WINDOW)

    def factor(self, size: float) -> float:
        """Return what to multiply a step by whose slopes have the root mean square `size`."""
        if self._clip is None or len(self.sizes) < _LEAST:
            return 1.0
        limit = self._clip * median(self.sizes)
        return limit / size if size > limit else 1.0

    def add(self, record: StepRecord) -> None:
        """Remember the slopes of a step."""
        size = root_mean_square(record.projected_grads)
        if 0 < size < math.inf:
            self.sizes.append(size)


def step_keys(config: ZOConfig, step: int) -> list[int]:
    """Return the noise keys of a step's directions."""
    return [ops.direction_key(config.seed, step, k) for k in range(config.count)]


def slopes(plus: Sequence[float], minus: Sequence[float], eps: float) -> tuple[float, ...]:
    """Return the slope of the loss along each direction, from losses at +eps and perhaps at -eps.

    Without losses at -eps the mean of the others takes their place, in n / (n - 1) of its
    distance, since it contains the loss itself.
    """
    if minus:
        return tuple((p - m) / (2 * eps) for p, m in zip(plus, minus, strict=True))
    n = len(plus)
    mean = exact_sum(plus) / n
    return tuple((loss - mean) / eps * n / (n - 1) for loss in plus)


def root_mean_square(values: Sequence[float]) -> float:
    """Return the root mean square of `values`, whose squares are summed exactly."""
    return math.sqrt(exact_sum([value * value for value in values]) / len(values))


def decide(
    config: ZOConfig,
    step: int,
    losses: Sequence[float],
    lr: float,
    data_rank_mask: int,
    guard: Guard,
) -> StepResult:
    """Return a step's result: its updates, or that it is skipped.

    Args:
        losses: Losses of its forward passes: plus, minus, plus, minus, ..., or all plus.
        lr: Learning rate.
        data_rank_mask: As in `StepResult`.
        guard: Guard that remembers the steps before.
    """
    sides = config.slopes.sides
    keys, plus = step_keys(config, step), tuple(losses[::sides])
    minus = tuple(losses[1::2]) if sides == 2 else ()
    decay = 1.0 - lr * config.weight_decay
    found = slopes(plus, minus, config.eps)
    size = root_mean_square(found)
    factor, unit = guard.factor(size), size if config.normalized else 1.0
    updates: tuple[ops.Update, ...] = ()
    if unit:
        updates = tuple(
            ops.Update(key, lr * (slope / unit * factor) / len(keys), decay if k == 0 else 1.0)
            for k, (key, slope) in enumerate(zip(keys, found, strict=True))
        )
    # A finite coefficient means finite losses: NaN and infinity propagate to it.
    finite = all(abs(u.coefficient) <= torch.finfo(torch.float32).max for u in updates)
    if not finite:
        logger.warning("step %d is skipped: its losses are %s", step, list(losses))
        updates = ()
    clipped = bool(updates) and factor < 1
    return StepResult(step, tuple(keys), plus, minus, updates, lr, data_rank_mask, clipped)
