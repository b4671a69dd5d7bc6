"""A device with a virtual clock, and a store without weights: a step is predicted by running it.

The pipeline and the unit loader run on them as they do on a GPU, so the order of uploads, passes
and write-backs, and the memory they take, are theirs. Only the work itself is replaced by the
seconds that it would take.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from zo2ext.model.layout import UnitLayout
from zo2ext.ops.formats import Planes
from zo2ext.planning.rates import Rates
from zo2ext.streaming.devices.device import After, Buffer, Dependency, Device, Queue, Work
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.stores.store import Sent, WeightStore

SUBMISSION = 6e-6  # seconds of the host to queue one kernel or copy
TRANSFER = 10e-6  # seconds of the link before the first byte of a copy
LAUNCH = 4e-6  # seconds of the device to start a kernel
COLUMNS_PER_DRAW = 12  # columns of factors that cost as many instructions as a normal


@dataclass(eq=False, slots=True)
class _Operation:
    left: float  # seconds of work left, at full rate
    link: bool  # whether it moves bytes over the link
    queued: float  # time at which the host queued it
    waits: list[_Operation]
    end: float = -1.0  # time at which it is done; negative before


class ClockDevice(Device):
    """A device whose queues have a virtual clock.

    Each queue runs one operation after the other, none before the host has queued it and before its
    events are past. While both directions of the link are busy, each has a share of its rate.

    Attributes:
        host: Time of the host, in seconds. Add to it what the host does besides queuing work.
        busy: Seconds of work queued so far, by queue.
    """

    torch_device = torch.device("cpu")

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.moves = rates.device.type != "cpu"
        self.host = 0.0
        self.busy = dict.fromkeys((Queue.UPLOAD, Queue.COMPUTE, Queue.OFFLOAD), 0.0)
        self._rates, self._now, self._spent = rates, 0.0, 0.0
        self._lanes = {queue: deque[_Operation]() for queue in self.busy}

    def spend(self, seconds: float) -> None:
        """Let the operation that is being queued take `seconds` more."""
        self._spent += seconds

    def enqueue(
        self,
        queue: Queue,
        work: Work,
        after: After,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
    ) -> _Operation:
        self._spent = 0.0
        work()
        self.busy[queue] += self._spent
        self.host += SUBMISSION
        waits = [e for events in after.values() for e in events if isinstance(e, _Operation)]
        operation = _Operation(self._spent, queue is not Queue.COMPUTE, self.host, waits)
        self._lanes[queue].append(operation)
        return operation

    def wait(self, event: object) -> None:
        assert isinstance(event, _Operation)
        while event.end < 0:
            self._advance()
        self.host = max(self.host, event.end)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def update_perturb(
        self,
        stored: Tensor,
        *,
        scales: Tensor | None,
        low: Tensor | None,
        updates: Tensor | None,
        directions: Sequence[Any],
        write_back: object | None,
        **_: object,
    ) -> None:
        """Stand in for `ops.update_perturb`: spend the time that it would take."""
        planes = [plane for plane in (stored, scales, low) if plane is not None]
        copies = [t for d in directions for t in (d.plus, d.minus) if t is not None]
        nbytes = sum(p.nbytes for p in planes) * (1 if write_back is None else 2)
        nbytes += sum(copy.nbytes for copy in copies)
        cost, draws = self._rates.kernel, len(directions) + (0 if updates is None else len(updates))
        each = cost.base + cost.draw * draws + (cost.rounding if write_back is not None else 0.0)
        self.spend(LAUNCH + max(nbytes / self._rates.copy, stored.numel() * each))

    def fold(
        self,
        stored: Tensor,
        *,
        scales: Tensor | None,
        low: Tensor | None,
        left: Tensor,
        rank: int,
        plain: Tensor | None,
        write_back: object | None,
        **_: object,
    ) -> None:
        """Stand in for `ops.fold`: spend the time that it would take."""
        planes = [plane for plane in (stored, scales, low) if plane is not None]
        nbytes = sum(p.nbytes for p in planes) * (1 if write_back is None else 2)
        nbytes += 0 if plain is None else plain.nbytes
        cost = self._rates.kernel
        each = cost.base + (cost.rounding if write_back is not None else 0.0)
        each += cost.draw / COLUMNS_PER_DRAW * rank * len(left)
        self.spend(LAUNCH + max(nbytes / self._rates.copy, stored.numel() * each))

    def _advance(self) -> None:
        """Start what can start, and run to the next end of an operation or time of queuing."""
        wake, active = math.inf, list[_Operation]()
        ended = True
        while ended:
            ended = False
            wake, active = math.inf, []
            for lane in self._lanes.values():
                while lane:
                    first = lane[0]
                    if any(other.end < 0 for other in first.waits):
                        break
                    if first.queued > self._now:
                        wake = min(wake, first.queued)
                        break
                    if first.left > 0:
                        active.append(first)
                        break
                    first.end, first.waits = self._now, []
                    lane.popleft()
                    ended = True
        both = sum(operation.link for operation in active) == 2
        share = self._rates.share if both else 1.0
        passed = wake - self._now
        for operation in active:
            passed = min(passed, operation.left / (share if operation.link else 1.0))
        if passed == math.inf:
            assert not any(self._lanes.values()), "an operation waits for one never queued"
            return
        self._now += passed
        for operation in active:
            operation.left -= passed * (share if operation.link else 1.0)
            if operation.left <= 1e-12:
                operation.left = 0.0


class ShapeStore(WeightStore):
    """A store that knows sizes only, and whose copies take the link's time."""

    divisible = True

    def __init__(self, layouts: Sequence[UnitLayout], device: ClockDevice, rates: Rates) -> None:
        self.layouts, self.moves = tuple(layouts), device.moves
        self._device, self._rates = device, rates

    @property
    def host_nbytes(self) -> int:
        return self.nbytes

    def slab(self, unit: int) -> Tensor:
        return self._device.empty(self.layouts[unit].nbytes)

    def bring(
        self, unit: int, target: Tensor, name: Buffer, after: After, bytes_: range
    ) -> object | None:
        return self._move(Queue.UPLOAD, len(bytes_) / self._rates.upload, after)

    def send(self, unit: int, source: Tensor, name: Buffer, updated: object | None) -> Sent:
        after = {Dependency.OFFLOAD_AFTER_KERNEL: [updated]}
        home = self._move(Queue.OFFLOAD, source.nbytes / self._rates.offload, after)
        return Sent(home, home)

    def _move(self, queue: Queue, seconds: float, after: After) -> object | None:
        return self._device.submit(
            queue, partial(self._device.spend, TRANSFER + seconds), after=after
        )

    def load_tensor(self, *_: Any) -> RoundingError:
        self._refuse()

    def put(self, *_: Any) -> None:
        self._refuse()

    def planes(self, *_: Any) -> Planes:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AssertionError("a store for predictions has no weights")

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
