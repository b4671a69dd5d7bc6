"""A GPU: streams ordered by events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zo2ext._format import gib
from zo2ext.ops.launch import clear_cuda_error
from zo2ext.streaming.devices.device import (
    After,
    Buffer,
    Dependency,
    Device,
    Queue,
    Work,
)

logger = logging.getLogger(__name__)


class CudaDevice(Device):
    """One GPU: the caller's current stream computes, other streams copy. The host never waits.

    The caller may change the current stream: compute work on another stream is ordered after all
    that was queued before. The current device stays the caller's.

    If units rest on a disk, one thread reads and writes files and another queues each upload once
    its unit was read; the host then waits for the disk where the GPU would have to. Slices of other
    ranks are gathered by a thread that waits for those ranks.

    Where the system refuses to page-lock memory, CUDA moves it through page-locked staging buffers
    of its own, in the call that queues the copy. Threads then make these calls, and wait for what a
    copy depends on first.
    """

    moves = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        # A thread begins on GPU 0, and would take memory of it for a context of its own.
        super().__init__(partial(torch.cuda.set_device, index))
        self._index, self.torch_device = index, torch.device("cuda", index)
        self._computing = torch.cuda.current_stream(index)
        self._streams = {
            q: torch.cuda.Stream(index) for q in (Queue.UPLOAD, Queue.OFFLOAD, Queue.GATHER)
        }
        self.add_threads(Queue.UPLOAD, Queue.OFFLOAD)
        self._uploads_wait = self._staged = False

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
        if self._staged and queue in (Queue.UPLOAD, Queue.OFFLOAD):
            return self.on_thread(queue, lambda: self._copy(queue, work, {}), after)
        # Once one upload waits for the disk, all later ones queue up behind it.
        self._uploads_wait |= Dependency.UPLOAD_AFTER_DISK_READ in after
        if queue is Queue.GATHER or (queue is Queue.UPLOAD and self._uploads_wait):
            return self.threads[queue].submit(lambda: self._copy(queue, work, after))
        if queue in self._streams:
            return self._copy(queue, work, after)
        self.follow_stream()
        return self._record(self._computing, work, after)

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
            with torch.cuda.device(self._index):
                found.synchronize()

    def synchronize(self) -> None:
        super().synchronize()
        torch.cuda.synchronize(self._index)

    def follow_stream(self) -> None:
        stream = torch.cuda.current_stream(self._index)
        if stream != self._computing:
            stream.wait_stream(self._computing)
            self._computing = stream

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._index))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    def register(self, memory: Tensor) -> Callable[[], None]:
        if not self._staged:
            with torch.cuda.device(self._index):
                code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
            if int(code) == 0:
                return partial(_unlock, self._index, memory)
            self._staged = True
            logger.warning(
                "could not page-lock %s of host memory (%s). Weights will pass through CUDA's own "
                "staging buffers, so steps take longer. Free memory, or raise the limit on locked "
                "memory (of the container, or of WSL), and offload the model again",
                *(gib(memory.nbytes), _describe(code)),
            )
        return lambda: None


def _unlock(device: int, memory: Tensor) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # a copy that is under way would go on in unlocked memory
        code = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    if int(code) != 0:
        raise RuntimeError(f"could not unlock host memory ({_describe(code)})")


def _describe(code: Any) -> str:
    """Return the text of a CUDA error that was returned, and forget that it occurred.

    Otherwise the next kernel launch, anybody's, would report it as its own.
    """
    clear_cuda_error()
    return f"CUDA error {int(code)}, {torch.cuda.cudart().cudaGetErrorString(code)}"
