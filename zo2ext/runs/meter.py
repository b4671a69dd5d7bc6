"""Speed and memory of a run, for progress bars and logs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from zo2ext._format import gib


class Meter:
    """Tokens a second, smoothed over about ten steps, and memory in use.

    Attributes:
        seconds, tokens: Of the last step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rate = 0.0
        self.seconds, self.tokens = 0.0, 0

    @contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        """Time a step over `tokens` tokens."""
        start = time.perf_counter()
        yield
        self.seconds, self.tokens = time.perf_counter() - start, tokens
        rate = tokens / self.seconds
        self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate

    @property
    def device_memory(self) -> int:
        """Bytes allocated on the GPU at peak; 0 on the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return 0

    @property
    def memory(self) -> int:
        """Bytes: allocated on the GPU at peak, or the whole process's on the CPU."""
        return self.device_memory or process_nbytes()

    def __str__(self) -> str:
        return f"{self._rate:,.0f} tok/s, {gib(self.memory)}"


def process_nbytes() -> int:
    """Resident memory of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS line")
