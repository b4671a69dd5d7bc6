"""``write_back="auto"``: measures which write-back period costs the least time on this machine.

Replaying an update costs a pass of noise over the weights; a write-back costs the time that its
transfers add to those of every step. With period K a step replays (K + 1) / 2 updates on average
and pays for 1 / K write-backs, so the cheapest K is sqrt(2 write-back / update).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from zo2ext import ops
from zo2ext.config import ZOConfig
from zo2ext.model.layout import Part, UnitLayout
from zo2ext.ops.formats import PlaneOffsets
from zo2ext.streaming.devices.device import Device, Queue
from zo2ext.streaming.stores.page_locks import PageLocks
from zo2ext.streaming.stores.store import map_arena

logger = logging.getLogger(__name__)

LONGEST = 256  # steps; so many replays are never cheap
_RUNS, _MORE = 5, 4  # timed runs; additional updates in the second measurement


@dataclass(frozen=True)
class Costs:
    """Costs in seconds per weight.

    Attributes:
        update: Cost of replaying one more update in a pass.
        write_back: Cost of rounding and offloading, beyond the transfers of every step.
    """

    update: float
    write_back: float

    @property
    def period(self) -> int:
        """The cheapest number of steps between write-backs."""
        if self.update <= 0:
            return LONGEST
        best = round(math.sqrt(2 * max(self.write_back, 0.0) / self.update))
        return min(max(best, 1), LONGEST)


def with_measured_period(
    layouts: Sequence[UnitLayout], device: Device, config: ZOConfig
) -> ZOConfig:
    """Return `config` with the cheapest write-back period for these weights on `device`."""
    if not any(layout.parts for layout in layouts):
        return config.replace(write_back=1)
    costs = measure(layouts, device, config)
    logger.info(
        "write_back='auto' is %d here: a write-back costs %.3g ns per weight, an update %.3g ns",
        *(costs.period, costs.write_back * 1e9, costs.update * 1e9),
    )
    return config.replace(write_back=costs.period)


def measure(layouts: Sequence[UnitLayout], device: Device, config: ZOConfig) -> Costs:
    """Measure what updates and write-backs of these weights cost; takes about a second.

    The slab measured has the formats of the largest part, and at most 64 MiB.
    """
    part = max((p for layout in layouts for p in layout.parts), key=lambda p: p.numel)
    numel = min(part.numel, 2**24 if device.torch_device.type == "cuda" else 2**20)
    slab = _Slab(part, numel, device, config)
    one = _seconds(device, lambda: slab.run(updates=1, write_back=False))
    more = _seconds(device, lambda: slab.run(updates=1 + _MORE, write_back=False))
    rounded = _seconds(device, lambda: slab.run(updates=1, write_back=True))
    return Costs(
        update=max(more - one, 0.0) / _MORE / numel,
        write_back=(rounded - one + slab.seconds_home()) / numel,
    )


class _Slab:
    """A slab to measure with, on the host and on the device."""

    def __init__(self, part: Part, numel: int, device: Device, config: ZOConfig) -> None:
        self._device, self._config, where = device, config, device.torch_device
        nbytes, offsets = part.storage.nbytes(numel), PlaneOffsets.from_low(part.storage, numel)
        self._low_nbytes = offsets.stored
        arenas = [map_arena(nbytes) for _ in range(2)]
        self._hosts = [torch.frombuffer(a, dtype=torch.uint8, count=nbytes) for a in arenas]
        self._slots = [device.empty(nbytes).zero_() for _ in range(2)]
        self._planes = replace(part, numel=numel, offsets=offsets).planes(self._slots[0])
        self._copies = [torch.empty(numel, dtype=part.compute, device=where) for _ in range(2)]
        self._segments = ops.segment_table([ops.Segment(0, numel, 0)], where)
        self._tables = {
            n: ops.update_table([ops.Update(k, 1e-9) for k in range(n)], where)
            for n in (1, 1 + _MORE)
        }

    def run(self, *, updates: int, write_back: bool) -> None:
        """Queue the kernel of a step."""
        ops.update_perturb(
            self._planes.stored,
            scales=self._planes.scales,
            low=self._planes.low,
            segments=self._segments,
            updates=self._tables[updates],
            directions=[ops.Direction(1, self._config.eps, *self._copies)],
            write_back=self._config.rounding if write_back else None,
            distribution=self._config.distribution,
        )

    def seconds_home(self) -> float:
        """Return the seconds that a write-back's transfers add to the upload of every step.

        These are a concurrent download and the upload of low planes; 0 if nothing is transferred.
        """
        if not self._device.moves:
            return 0.0
        locks = PageLocks(self._device)
        try:
            for host in self._hosts:
                locks.add(host)
            usual = slice(self._low_nbytes, None)
            up = _seconds(self._device, lambda: self._move(Queue.UPLOAD, part=usual))
            both = _seconds(self._device, lambda: self._move(Queue.UPLOAD, Queue.OFFLOAD))
        finally:
            locks.close()
        return max(both - up, 0.0)

    def _move(self, *queues: Queue, part: slice = slice(None)) -> None:
        for queue, host, slot in zip(queues, self._hosts, self._slots, strict=False):
            target, source = (slot, host) if queue is Queue.UPLOAD else (host, slot)
            self._device.submit(queue, partial(_copy, target[part], source[part]))


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _seconds(device: Device, work: Callable[[], None]) -> float:
    """Return the median over some runs, after a warm-up."""
    times = []
    for _ in range(1 + _RUNS):
        device.synchronize()
        begin = time.perf_counter()
        work()
        device.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times[1:])
