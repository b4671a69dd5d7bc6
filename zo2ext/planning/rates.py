"""What this machine can do: the rates that bound a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_NBYTES = 2**28
_RUNS = 5
_LONG = 1.0  # seconds; what takes longer has no need to be warm, or repeated


@dataclass(frozen=True)
class Rates:
    """Measured rates. Bytes or operations a second.

    Attributes:
        device: Where the forward pass runs.
        copy: Memory copy on the device, bytes read plus bytes written.
        upload, offload: Page-locked host to device and back; infinite where nothing travels.
        multiply: Matrix product by dtype, two operations a multiply-add.
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
        travel = "nothing travels"
        if self.device.type == "cuda":
            travel = f"upload {self.upload / 1e9:.3g}, offload {self.offload / 1e9:.3g} GB/s"
        return (
            f"{self.device}: copy {self.copy / 1e9:.3g} GB/s; {travel}; "
            f"matrix product {products} TFLOP/s"
        )


def measure_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Rates:
    """Measure `device`, in a second or two: medians of a few runs on random data."""
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
    first = _timed(work, device)
    if first > _LONG:
        return first
    return statistics.median(_timed(work, device) for _ in range(_RUNS))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
