"""Rates of a machine, measured or given, from which the time of a step is predicted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from zo2ext import ops
from zo2ext._choices import Distribution, Rounding
from zo2ext.ops.build import why_not_on_gpu

_COPY_NBYTES = 2**28
_RUNS = 5
_LONG = 1.0  # seconds; work that takes longer needs neither warm-up nor repetition
_MORE = 4  # additional updates in the measurement of a replay


@dataclass(frozen=True)
class KernelCosts:
    """Costs of the fused pass in seconds per weight; it takes at least as long as its memory.

    Attributes:
        base: Cost of unpacking a weight and writing its copies.
        draw: Cost of one more value of noise: for each update and for each direction.
        rounding: Cost of rounding it to storage.
    """

    base: float = 0.0
    draw: float = 0.0
    rounding: float = 0.0

    @staticmethod
    def from_instructions(
        rate: float,
        distribution: Distribution = Distribution.GAUSSIAN,
        rounding: Rounding = Rounding.STOCHASTIC,
    ) -> KernelCosts:
        """Return the costs on a GPU that issues `rate` instructions of a thread per second.

        ``benchmarks/sass.py`` counts the instructions of the main loop, for bfloat16 on sm_90: with
        an update and a direction 70.4, of which two values of noise are 59 if they are normal and
        16 if they are signs; stochastic rounding takes 13.4 more.
        """
        draw = 29.5 if distribution is Distribution.GAUSSIAN else 8.0
        stochastic = 13.4 if rounding is Rounding.STOCHASTIC else 0.0
        return KernelCosts(11.4 / rate, draw / rate, stochastic / rate)


@dataclass(frozen=True)
class Rates:
    """Rates of a machine, in bytes or operations per second.

    Attributes:
        device: Device on which forward passes run.
        copy: Memory copy on the device, bytes read plus bytes written.
        upload: From page-locked host memory to the device; infinite on a CPU.
        offload: From the device to page-locked host memory; infinite on a CPU.
        multiply: Matrix product per dtype; a multiply-add is two operations.
        share: Share of its rate that each direction of the link keeps while both are busy.
        kernel: Costs of the fused pass.
        memory: Bytes of device memory; None if unknown.
        name: Name of a GPU whose rates these are without having been measured; "" if measured.
    """

    device: torch.device
    copy: float
    upload: float
    offload: float
    multiply: dict[torch.dtype, float]
    share: float = 1.0
    kernel: KernelCosts = KernelCosts()
    memory: int | None = None
    name: str = ""

    def __str__(self) -> str:
        products = ", ".join(
            f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.3g}"
            for dtype, rate in self.multiply.items()
        )
        transfers = "no transfers"
        if self.device.type == "cuda":
            transfers = (
                f"upload {self.upload / 1e9:.3g}, offload {self.offload / 1e9:.3g} GB/s, "
                f"{self.share:.0%} of each both ways at once"
            )
        return (
            f"{self.name or self.device}: copy {self.copy / 1e9:.3g} GB/s; {transfers}; "
            f"matrix product {products} TFLOP/s"
        )


def measure_rates(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    distribution: Distribution = Distribution.GAUSSIAN,
    rounding: Rounding = Rounding.STOCHASTIC,
) -> Rates:
    """Measure `device` for a second or two: medians of a few runs on random data."""
    source = torch.randint(0, 255, (_COPY_NBYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * _COPY_NBYTES / _seconds(lambda: target.copy_(source), device)
    upload = offload = float("inf")
    share, memory = 1.0, None
    if device.type == "cuda":
        hosts = [torch.empty(_COPY_NBYTES, dtype=torch.uint8) for _ in range(2)]
        with suppress(RuntimeError):  # where locking is refused, the run's transfers are slow, too
            hosts = [host.pin_memory() for host in hosts]
        streams = [torch.cuda.Stream(device) for _ in range(2)]

        def move(up: bool, down: bool) -> None:
            # The streams start after the idle device, and `_seconds` waits for all of it.
            if up:
                with torch.cuda.stream(streams[0]):
                    target.copy_(hosts[0], non_blocking=True)
            if down:
                with torch.cuda.stream(streams[1]):
                    hosts[1].copy_(source, non_blocking=True)

        up = _seconds(lambda: move(True, False), device)
        down = _seconds(lambda: move(False, True), device)
        both = _seconds(lambda: move(True, True), device)
        upload, offload = _COPY_NBYTES / up, _COPY_NBYTES / down
        # Both are busy for the shorter of the two, at `share` of their rates; then one goes on.
        share = min(1.0, min(up, down) / max(both - abs(up - down), 1e-9))
        memory = torch.cuda.get_device_properties(device).total_memory
    multiply = {dtype: _multiply_rate(device, dtype) for dtype in dtypes}
    kernel = _measure_kernel(device, distribution, rounding)
    return Rates(device, copy, upload, offload, multiply, share, kernel, memory)


def _measure_kernel(
    device: torch.device, distribution: Distribution, rounding: Rounding
) -> KernelCosts:
    """Measure the fused pass over bfloat16 weights; no costs if this build has no kernel for it."""
    if device.type == "cuda" and why_not_on_gpu(device) is not None:
        return KernelCosts()
    numel = 2**24 if device.type == "cuda" else 2**20
    stored = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    plus, minus = torch.empty_like(stored), torch.empty_like(stored)
    segments = ops.segment_table([ops.Segment(0, numel, 0)], device)

    def seconds(updates: int, write_back: Rounding | None) -> float:
        table = ops.update_table([ops.Update(k, 1e-9) for k in range(updates)], device)
        return _seconds(
            lambda: ops.update_perturb(
                stored,
                segments=segments,
                updates=table,
                directions=[ops.Direction(1, 1e-3, plus, minus)],
                write_back=write_back,
                distribution=distribution,
            ),
            device,
        )

    one, more, rounded = seconds(1, None), seconds(1 + _MORE, None), seconds(1, rounding)
    draw = max(more - one, 0.0) / _MORE / numel
    return KernelCosts(max(one / numel - 2 * draw, 0.0), draw, max(rounded - one, 0.0) / numel)


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
