"""Rates of a Trainer's steps, from one log to the next."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from zo2ext.engine.update_rule import StepRecord
from zo2ext.streaming.pipeline import Traffic


@dataclass
class Window:
    """Steps computed since the last log, to report rates of."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    uploaded: int = 0  # bytes
    offloaded: int = 0

    def add(self, tokens: int, seconds: float, before: Traffic, after: Traffic) -> None:
        self.steps += 1
        self.seconds += seconds
        self.tokens += tokens
        self.uploaded += after.uploaded - before.uploaded
        self.offloaded += after.offloaded - before.offloaded

    def metrics(self, last: StepRecord, skipped: int) -> dict[str, float]:
        """Losses and projected gradient of the last step (means over its directions), and rates."""
        metrics: dict[str, float] = {
            "zo/projected_grad": fmean(last.projected_grads),
            "zo/loss_plus": fmean(last.losses_plus),
            "zo/loss_minus": fmean(last.losses_minus),
            "zo/skipped_steps": skipped,
        }
        if self.steps:
            metrics |= {
                "zo/tokens_per_second": self.tokens / self.seconds,
                "zo/uploaded_bytes_per_step": self.uploaded / self.steps,
                "zo/offloaded_bytes_per_step": self.offloaded / self.steps,
            }
        return metrics
