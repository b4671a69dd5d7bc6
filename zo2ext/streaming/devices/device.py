"""Where work runs: queues (upload, gather, compute, offload, disk), and events that order them.

The pipeline says what each piece of work must come after; a device decides when it happens.
`CpuDevice` works at once and in place. `CudaDevice` has a stream a queue. Both have a thread for
the disk, and one that waits for other ranks. `simulated.SimulatedDevice` runs the same work in
random orders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

Buffer = Hashable  # names a piece of memory, such as ("slot", 2)
After = Mapping["Dependency", Sequence["object | None"]]


class Queue(Enum):
    """Work on one queue runs in the order it was submitted."""

    UPLOAD = auto()
    COMPUTE = auto()
    OFFLOAD = auto()
    DISK = auto()  # reads and writes of files
    GATHER = auto()  # what other ranks have; the order of submission is the same on all of them


class Dependency(Enum):
    """Every reason that work on one queue waits for work on another."""

    UPLOAD_AFTER_SLOT_WAS_READ = "a slot is filled after the forward that read it"
    UPLOAD_AFTER_SLOT_WAS_OFFLOADED = "a slot is filled after its weights are home"
    KERNEL_AFTER_UPLOAD = "weights are perturbed after they arrived"
    KERNEL_AFTER_SLOT_WAS_OFFLOADED = "weights are updated again after the last update is home"
    OFFLOAD_AFTER_KERNEL = "weights go home after they were updated"
    HOST_READ_AFTER_OFFLOAD = "the host reads weights after they are home"
    UPLOAD_AFTER_DISK_READ = "weights are uploaded after they were read"
    DISK_READ_AFTER_STAGING_WAS_UPLOADED = "staging memory is read into after its upload"
    OFFLOAD_AFTER_STAGING_WAS_UPLOADED = "weights go to staging memory after its upload"
    OFFLOAD_AFTER_STAGING_WAS_WRITTEN = "weights go to staging memory after it is in the file"
    DISK_WRITE_AFTER_OFFLOAD = "weights are written to a file after they are in staging memory"
    GATHER_AFTER_UPLOAD = "slices are gathered after this rank's own arrived"
    UPLOAD_AFTER_SLOT_WAS_GATHERED = "a slot is filled after its last gather"


class HazardError(RuntimeError):
    """Two pieces of work touch the same memory and nothing orders them."""


class Device(ABC):
    """A place to compute.

    Attributes:
        torch_device: What tensors of the forward pass live on.
        moves: Whether units move through slots; if not, they are computed on where they rest.
    """

    torch_device: torch.device
    moves: bool

    @abstractmethod
    def submit(
        self,
        queue: Queue,
        work: Callable[[], None],
        *,
        after: After | None = None,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
    ) -> object | None:
        """Do `work` in the order of `queue` and after all events in `after`; returns its event."""

    def computing(self, reads: Sequence[Buffer], after: After | None = None) -> object | None:
        """The host queues forward passes that read `reads`, from here or up to here."""
        return self.submit(Queue.COMPUTE, lambda: None, after=after, reads=reads)

    def finish(self, after: Mapping[Dependency, Sequence[object | None]]) -> None:
        """Block the host until the events in `after` are past."""

    def synchronize(self) -> None:
        """Block the host until all work is done."""

    def host_reads(self, buffer: Buffer) -> None:
        """The host is about to read `buffer`, or to write it, itself."""

    def empty(self, nbytes: int) -> Tensor:
        """Device memory: uint8, shape (nbytes,), not initialised."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def register(self, slab: Tensor) -> None:
        """Page-lock host memory that the device copies from and to."""

    def unregister(self, slab: Tensor) -> None:
        """Undo `register`."""


class Worker:
    """A thread that works in the order of submission.

    After a failure everything fails: an order is broken.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"zo2ext-{name}")
        self._failure: BaseException | None = None
        self._last: Future[Any] | None = None

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        def run() -> Any:
            if self._failure is not None:
                raise self._failure
            try:
                return work()
            except BaseException as error:
                self._failure = error
                raise

        self._last = self._pool.submit(run)
        return self._last

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()


def listed(after: After) -> list[object]:
    return [event for events in after.values() for event in events if event is not None]
