"""A device without copies: the engine's own work, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from zo2ext.streaming.devices import observer
from zo2ext.streaming.devices.device import After, Buffer, Dependency, Device, Queue, Worker, listed


class CpuDevice(Device):
    """The host computes on the weights where they rest, or were read to from the disk."""

    torch_device = torch.device("cpu")
    moves = False

    def __init__(self) -> None:
        self._threads = {Queue.DISK: Worker("disk"), Queue.GATHER: Worker("gather")}

    def submit(
        self,
        queue: Queue,
        work: Callable[[], None],
        *,
        after: After | None = None,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
    ) -> Future[Any] | None:
        work = observer.queued(queue, work, reads, writes)
        if queue in self._threads:
            # Whatever it comes after is done, or before it in its queue.
            return self._threads[queue].submit(work)
        self.finish(after or {})
        work()
        return None

    def finish(self, after: Mapping[Dependency, Sequence[object | None]]) -> None:
        for event in listed(after):
            if isinstance(event, Future):
                event.result()

    def synchronize(self) -> None:
        for thread in self._threads.values():
            thread.wait()
