"""A GPU: three streams, ordered by events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from zo2ext.streaming.devices import observer
from zo2ext.streaming.devices.device import After, Buffer, Dependency, Device, Queue, Worker, listed


class CudaDevice(Device):
    """One GPU: the caller's current stream computes, others copy. The host never waits.

    Where units come from a disk, a thread reads and writes, and another queues each upload once its
    unit was read; then the host waits for the disk where the GPU would have to. Where slices come
    from other ranks, a thread queues each gather once their hosts are there, too.
    """

    moves = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self._copies = {
            q: torch.cuda.Stream(self.torch_device)
            for q in (Queue.UPLOAD, Queue.OFFLOAD, Queue.GATHER)
        }
        self._disk, self._uploads, self._gathers = (
            Worker("disk"),
            Worker("upload"),
            Worker("gather"),
        )
        self._uploads_wait = False

    def submit(
        self,
        queue: Queue,
        work: Callable[[], None],
        *,
        after: After | None = None,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
    ) -> torch.cuda.Event | Future[Any]:
        after = after or {}
        work = observer.queued(queue, work, reads, writes)
        if queue is Queue.DISK:

            def on_disk() -> None:
                self.finish(after)
                work()

            return self._disk.submit(on_disk)
        # Once one upload waits for the disk, all that come later wait behind it.
        self._uploads_wait |= Dependency.UPLOAD_AFTER_DISK_READ in after
        if queue is Queue.UPLOAD and self._uploads_wait:
            return self._uploads.submit(lambda: self._copy(queue, work, after))
        if queue is Queue.GATHER:
            return self._gathers.submit(lambda: self._copy(queue, work, after))
        if queue in self._copies:
            return self._copy(queue, work, after)
        return self._queue(torch.cuda.current_stream(self.torch_device), work, after)

    def _copy(self, queue: Queue, work: Callable[[], None], after: After) -> torch.cuda.Event:
        with torch.cuda.stream(self._copies[queue]):
            return self._queue(self._copies[queue], work, after)

    def _queue(
        self, stream: torch.cuda.Stream, work: Callable[[], None], after: After
    ) -> torch.cuda.Event:
        """`work`, which goes to `stream`, the current one, after the events in `after`."""
        for event in listed(after):
            found = event.result() if isinstance(event, Future) else event
            if isinstance(found, torch.cuda.Event):
                stream.wait_event(found)
        work()
        done: torch.cuda.Event = stream.record_event()
        return done

    def finish(self, after: Mapping[Dependency, Sequence[object | None]]) -> None:
        for event in listed(after):
            found = event.result() if isinstance(event, Future) else event
            if isinstance(found, torch.cuda.Event):
                found.synchronize()

    def synchronize(self) -> None:
        for thread in (self._uploads, self._disk, self._gathers):
            thread.wait()
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
