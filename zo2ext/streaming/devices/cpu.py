"""The CPU: work runs at once, and weights are computed on where they rest."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from zo2ext.streaming.devices.device import After, Buffer, Device, Queue, Work


class CpuDevice(Device):
    """A CPU. Units are computed on in host memory, or in slots if they rest on a disk."""

    torch_device = torch.device("cpu")
    moves = False

    def enqueue(
        self,
        queue: Queue,
        work: Work,
        after: After,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
    ) -> Future[Any] | None:
        if queue in self.threads:
            return self.on_thread(queue, work, after)
        self.finish(after)
        work()
        return None

    def wait(self, event: object) -> None:
        if isinstance(event, Future):
            event.result()
