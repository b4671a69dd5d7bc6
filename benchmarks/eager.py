"""MeZO as it is written in plain PyTorch: the loop that everything here is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class EagerMeZO:
    """Weights perturbed in place; the direction drawn again each time from a seeded generator.

    Args:
        weights: Perturbed and updated, one tensor each.
        lr, eps: Of the step. No weight decay: that spares this loop a pass.
        tight: Spare temporaries: draw into one buffer and fold the scale into the addition. As
            published codes have it (False), every perturbation allocates z and multiplies it twice.

    Source:
        Malladi et al. 2023, arXiv:2305.17333, Algorithm 1.
    """

    def __init__(
        self, weights: Iterable[Tensor], *, lr: float, eps: float, tight: bool = False
    ) -> None:
        self.weights = list(weights)
        self.lr, self.eps = lr, eps
        self._tight = tight
        self._generator = torch.Generator(self.weights[0].device)
        largest = max(self.weights, key=Tensor.numel)
        self._buffer = torch.empty_like(largest).view(-1) if tight else None

    def perturb(self, seed: int, sign: float) -> None:
        """``w += sign * eps * z``"""
        self._generator.manual_seed(seed)
        for w in self.weights:
            if self._tight:
                w.add_(self._draw(w), alpha=sign * self.eps)
            else:
                w.add_(sign * self._draw(w) * self.eps)

    def update(self, seed: int, projected_grad: float) -> None:
        """``w -= lr * projected_grad * z``"""
        self._generator.manual_seed(seed)
        for w in self.weights:
            if self._tight:
                w.sub_(self._draw(w), alpha=self.lr * projected_grad)
            else:
                w.sub_(self.lr * (projected_grad * self._draw(w)))

    def sequence(self, seed: int, projected_grad: float) -> None:
        """All work on weights of one step: what the fused pass does in one go."""
        self.perturb(seed, 1)
        self.perturb(seed, -2)
        self.perturb(seed, 1)
        self.update(seed, projected_grad)

    def step(self, seed: int, loss: Callable[[], Tensor]) -> float:
        """One step; the mean of its two losses."""
        with torch.no_grad():
            self.perturb(seed, 1)
            plus = loss()
            self.perturb(seed, -2)
            minus = loss()
            self.perturb(seed, 1)
            projected_grad = float((plus - minus) / (2 * self.eps))
            self.update(seed, projected_grad)
        return float((plus + minus) / 2)

    def _draw(self, w: Tensor) -> Tensor:
        if self._buffer is not None:
            return self._buffer[: w.numel()].view(w.shape).normal_(generator=self._generator)
        return torch.normal(
            0.0, 1.0, size=w.shape, generator=self._generator, device=w.device, dtype=w.dtype
        )
