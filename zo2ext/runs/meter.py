"""Time, throughput, memory and traffic of the steps of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from zo2ext._format import gib
from zo2ext.engine.engine import ZOEngine


class Meter:
    """Measures the steps of an engine.

    Attributes:
        seconds: Duration of the last step.
        tokens: Tokens of the last step's batch, in all processes together.
        uploaded: Bytes that the last step moved to the device.
        offloaded: Bytes that the last step moved to the host.
    """

    def __init__(self, engine: ZOEngine) -> None:
        self._engine = engine
        self._rate = 0.0
        self.seconds, self.tokens, self.uploaded, self.offloaded = 0.0, 0, 0, 0
        self._begin_window()

    @contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        """Measure a step over `tokens` tokens."""
        start, before = time.perf_counter(), replace(self._engine.traffic)
        yield
        after = self._engine.traffic
        self.seconds, self.tokens = time.perf_counter() - start, tokens
        self.uploaded = after.uploaded - before.uploaded
        self.offloaded = after.offloaded - before.offloaded
        rate = tokens / self.seconds
        self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
        self._window.append((self.seconds, tokens, self.uploaded, self.offloaded))

    def metrics(self) -> dict[str, float]:
        """Return a Trainer's metrics: the losses and projected gradient of the last step, as means
        over its directions, and rates over the steps since the last call."""
        last = self._engine.last
        assert last is not None, "no step was made"
        found: dict[str, float] = {
            "zo/projected_grad": last.projected_grad,
            "zo/loss_plus": fmean(last.losses_plus),
            "zo/skipped_steps": self._engine.skipped,
            "zo/equal_steps": self._engine.equal,
        }
        if last.losses_minus:
            found["zo/loss_minus"] = fmean(last.losses_minus)
        if self._engine.config.clip is not None:
            found["zo/clipped_steps"] = self._engine.clipped
        if self._window:
            seconds, tokens, up, down = (sum(column) for column in zip(*self._window, strict=True))
            found |= {
                "zo/tokens_per_second": tokens / seconds,
                "zo/uploaded_bytes_per_step": up / len(self._window),
                "zo/offloaded_bytes_per_step": down / len(self._window),
            }
        self._begin_window()
        return found

    @property
    def device_memory(self) -> int:
        """Bytes allocated on the GPU at peak; 0 on the CPU."""
        device = self._engine.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

    def __str__(self) -> str:
        return f"{self._rate:,.0f} tok/s, {gib(self.device_memory or process_nbytes())}"

    def _begin_window(self) -> None:
        self._window: list[tuple[float, int, int, int]] = []


def process_nbytes() -> int:
    """Return the resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS line")
