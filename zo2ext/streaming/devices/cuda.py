"""A GPU: streams ordered by events."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from zo2ext.streaming.devices.device import (
    After,
    Buffer,
    Dependency,
    Device,
    Queue,
    Work,
    Worker,
)


class CudaDevice(Device):
    """One GPU: the caller's current stream computes, other streams copy. The host never waits.

    If units rest on a disk, one thread reads and writes files and another queues each upload once
    its unit was read; the host then waits for the disk where the GPU would have to. Slices of other
    ranks are gathered by a thread that waits for those ranks.
    """

    moves = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self._streams = {
            q: torch.cuda.Stream(self.torch_device)
            for q in (Queue.UPLOAD, Queue.OFFLOAD, Queue.GATHER)
        }
        self.threads[Queue.UPLOAD] = Worker("upload")
        self._uploads_wait = False

    def enqueue(
        self,
        queue: Queue,
        work: Work,
        after: After,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
    ) -> torch.cuda.Event | Future[Any]:
        if queue is Queue.DISK:
            return self.on_thread(queue, work, after)
        # Once one upload waits for the disk, all later ones queue up behind it.
        self._uploads_wait |= Dependency.UPLOAD_AFTER_DISK_READ in after
        if queue is Queue.GATHER or (queue is Queue.UPLOAD and self._uploads_wait):
            return self.threads[queue].submit(lambda: self._copy(queue, work, after))
        if queue in self._streams:
            return self._copy(queue, work, after)
        return self._record(torch.cuda.current_stream(self.torch_device), work, after)

    def _copy(self, queue: Queue, work: Work, after: After) -> torch.cuda.Event:
        with torch.cuda.stream(self._streams[queue]):
            return self._record(self._streams[queue], work, after)

    def _record(self, stream: torch.cuda.Stream, work: Work, after: After) -> torch.cuda.Event:
        """Queue `work` on `stream`, the current one, after the events in `after`."""
        for events in after.values():
            for event in events:
                found = event.result() if isinstance(event, Future) else event
                if isinstance(found, torch.cuda.Event):
                    stream.wait_event(found)
        work()
        done: torch.cuda.Event = stream.record_event()
        return done

    def wait(self, event: object) -> None:
        found = event.result() if isinstance(event, Future) else event
        if isinstance(found, torch.cuda.Event):
            found.synchronize()

    def synchronize(self) -> None:
        super().synchronize()
        torch.cuda.synchronize(self.torch_device)

    def register(self, slab: Tensor) -> None:
        code = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)
        if int(code) != 0:
            raise RuntimeError(
                f"could not page-lock {slab.nbytes} bytes of host memory (CUDA error {int(code)}); "
                "free host memory, or raise the container's locked-memory limit"
            )

    def unregister(self, slab: Tensor) -> None:
        code = torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())
        if int(code) != 0:
            raise RuntimeError(f"could not unlock host memory (CUDA error {int(code)})")
