"""Measured rates of this machine, which bound the time of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_NBYTES = 2**28
_RUNS = 5
_LONG = 1.0  # seconds; work that takes longer needs neither warm-up nor repetition


@dataclass(frozen=True)
class Rates:
    """Measured rates, in bytes or operations per second.

    Attributes:
        device: Device on which forward passes run.
        copy: Memory copy on the device, bytes read plus bytes written.
        upload: From page-locked host memory to the device; infinite on a CPU.
        offload: From the device to page-locked host memory; infinite on a CPU.
        multiply: Matrix product per dtype; a multiply-add is two operations.
    """

    device: torch.device
    copy: float
    upload: float
    offload: float
    multiply: dict[torch.dtype, float]

    def __str__(self) -> str:
        products = ", ".join(
            f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.3g}"
            for dtype, rate in self.multiply.items()
        )
        transfers = "no transfers"
        if self.device.type == "cuda":
            transfers = f"upload {self.upload / 1e9:.3g}, offload {self.offload / 1e9:.3g} GB/s"
        return (
            f"{self.device}: copy {self.copy / 1e9:.3g} GB/s; {transfers}; "
            f"matrix product {products} TFLOP/s"
        )


def measure_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Rates:
    """Measure `device` for a second or two: medians of a few runs on random data."""
    source = torch.randint(0, 255, (_COPY_NBYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * _COPY_NBYTES / _seconds(lambda: target.copy_(source), device)
    upload = offload = float("inf")
    if device.type == "cuda":
        host = torch.empty(_COPY_NBYTES, dtype=torch.uint8, pin_memory=True)
        upload = _COPY_NBYTES / _seconds(lambda: target.copy_(host, non_blocking=True), device)
        offload = _COPY_NBYTES / _seconds(lambda: host.copy_(target, non_blocking=True), device)
    multiply = {dtype: _multiply_rate(device, dtype) for dtype in dtypes}
    return Rates(device, copy, upload, offload, multiply)


def _multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def run() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = run()
    return first if first > _LONG else statistics.median(run() for _ in range(_RUNS))
