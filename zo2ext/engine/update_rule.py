"""From a step's losses to its update; see docs/contracts.md, "Update". Numbers only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.journal.records import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """Losses of one step, and whether it changed the weights.

    Attributes:
        step: Number of the step, from 0.
        losses_plus, losses_minus: Losses at +eps and -eps, one per direction.
        projected_grads: (loss_plus - loss_minus) / (2 eps), one per direction.
        lr: Learning rate.
        skipped: Whether the weights were left unchanged because a loss, or the update's coefficient
            in float32, was not finite.
    """

    step: int
    losses_plus: tuple[float, ...]
    losses_minus: tuple[float, ...]
    projected_grads: tuple[float, ...]
    lr: float
    skipped: bool

    @classmethod
    def of(cls, result: StepResult, eps: float) -> StepRecord:
        """Return the record of a step with perturbations of scale `eps`."""
        plus, minus = result.losses_plus, result.losses_minus
        grads = projected_grads(plus, minus, eps)
        return cls(result.step, plus, minus, grads, result.lr, result.skipped)

    @property
    def loss(self) -> float:
        """Mean over all forward passes."""
        losses = self.losses_plus + self.losses_minus
        return sum(losses) / len(losses)


def step_keys(config: ZOConfig, step: int) -> list[int]:
    """Return the noise keys of a step's directions."""
    return [ops.direction_key(config.seed, step, k) for k in range(config.directions)]


def projected_grads(plus: Sequence[float], minus: Sequence[float], eps: float) -> tuple[float, ...]:
    """Return the slope of the loss along each direction, between -eps and +eps."""
    return tuple((p - m) / (2 * eps) for p, m in zip(plus, minus, strict=True))


def decide(
    config: ZOConfig, step: int, losses: Sequence[float], lr: float, data_rank_mask: int
) -> StepResult:
    """Return a step's result: its updates, or that it is skipped.

    Args:
        losses: Losses of its forward passes: plus, minus, plus, minus, ...
        lr: Learning rate.
        data_rank_mask: As in `StepResult`.
    """
    keys, plus, minus = step_keys(config, step), tuple(losses[0::2]), tuple(losses[1::2])
    decay = 1.0 - lr * config.weight_decay
    updates = tuple(
        ops.Update(key, lr * grad / len(keys), decay if k == 0 else 1.0)
        for k, (key, grad) in enumerate(
            zip(keys, projected_grads(plus, minus, config.eps), strict=True)
        )
    )
    # A finite coefficient means finite losses: NaN and infinity propagate to it.
    finite = all(abs(u.coefficient) <= torch.finfo(torch.float32).max for u in updates)
    if not finite:
        logger.warning("step %d is skipped: its losses are %s", step, list(losses))
    return StepResult(step, tuple(keys), plus, minus, updates if finite else (), lr, data_rank_mask)
