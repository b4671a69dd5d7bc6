"""Queues that work runs on, and the events that order work on different queues.

The pipeline declares what each piece of work has to wait for; a device decides when it runs.
`CpuDevice` runs it at once and in place. `CudaDevice` has one stream per queue. Both have a thread
for file access and one that waits for other ranks. `simulated.SimulatedDevice` runs the same work
in random orders.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Buffer = Hashable  # names a piece of memory, such as ("slot", 2)
After = Mapping["Dependency", Sequence["object | None"]]
Work = Callable[[], None]


class Region(NamedTuple):
    """A range of bytes of a memory, as the name of a buffer. Regions of one memory may overlap."""

    memory: Hashable
    begin: int
    end: int

    def overlaps(self, other: Buffer) -> bool:
        """Return whether `other` is a region that has a byte in common with this one."""
        if not isinstance(other, Region) or other.memory != self.memory:
            return False
        return other.begin < self.end and self.begin < other.end

    def contains(self, other: Buffer) -> bool:
        """Return whether `other` is a region inside this one."""
        if not isinstance(other, Region) or other.memory != self.memory:
            return False
        return self.begin <= other.begin and other.end <= self.end


class Queue(Enum):
    """Queues of a device. Work on one queue runs in the order of its submission."""

    UPLOAD = auto()
    COMPUTE = auto()
    OFFLOAD = auto()
    DISK = auto()  # reads and writes of files
    GATHER = auto()  # data of other ranks; all ranks submit in the same order


class Dependency(Enum):
    """Every reason for work on one queue to wait for work on another."""

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
    """Two pieces of work access the same memory, and nothing orders them."""


class Recorder(Protocol):
    """Wraps work to measure when it runs. The wrapper calls the work once and changes nothing."""

    def queued(self, queue: Queue, unit: int, work: Work) -> Work:
        """Return what to queue in place of `work`, which handles unit `unit`."""

    def forward(self, units: Sequence[Any], copy: int, work: Work) -> None:
        """Run `work`: the forward pass over perturbed copy `copy`, resumed at `units`."""


class Device(ABC):
    """A place to compute.

    To add a device, subclass this, set the two class attributes, and implement `enqueue` and
    `wait`. Override `synchronize` if the device has more to wait for than this class's threads,
    and `register` if it copies faster from page-locked memory. `devices/select.py` maps names to
    devices.

    Args:
        begin_thread: Called first on each thread of the device.

    Attributes:
        torch_device: Device of the forward pass's tensors.
        moves: Whether units pass through device memory of their own; if not, they are computed on
            where they rest.
        recorder: Measures work while a timeline is recorded; None otherwise.
    """

    torch_device: torch.device
    moves: bool

    def __init__(self, begin_thread: Callable[[], None] | None = None) -> None:
        self.recorder: Recorder | None = None
        self._begin_thread = begin_thread
        self.threads: dict[Queue, Worker] = {}
        self.add_threads(Queue.DISK, Queue.GATHER)

    def add_threads(self, *queues: Queue) -> None:
        """Make a thread for each of `queues`."""
        for queue in queues:
            self.threads[queue] = Worker(queue.name.lower(), self._begin_thread)

    def submit(
        self,
        queue: Queue,
        work: Work,
        *,
        after: After | None = None,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
        unit: int | None = None,
    ) -> object | None:
        """Run `work` in the order of `queue` and after all events in `after`.

        Args:
            queue: Queue to append the work to.
            work: Function without arguments. On a GPU it queues asynchronous work.
            after: Events to wait for, by the reason for waiting. None stands for a past event.
            reads, writes: Memory that the work accesses, checked by the simulated device.
            unit: Index of the unit that the work handles, for timelines; None: not recorded.

        Returns:
            The work's event, to be passed in another submission's `after` or to `finish`.
        """
        if self.recorder is not None and unit is not None:
            work = self.recorder.queued(queue, unit, work)
        return self.enqueue(queue, work, after or {}, reads, writes)

    @abstractmethod
    def enqueue(
        self,
        queue: Queue,
        work: Work,
        after: After,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
    ) -> object | None:
        """Implement `submit`; the arguments are the same."""

    @abstractmethod
    def wait(self, event: object) -> None:
        """Block the host until an event of this device is past."""

    def computing(self, reads: Sequence[Buffer], after: After | None = None) -> object | None:
        """Mark the place in the compute queue where forward passes read `reads`.

        Work that the host queues directly, before or after this call, is ordered by the mark.
        """
        return self.submit(Queue.COMPUTE, lambda: None, after=after, reads=reads)

    def finish(self, after: After) -> None:
        """Block the host until the events in `after` are past."""
        for events in after.values():
            for event in events:
                if event is not None:
                    self.wait(event)

    def synchronize(self) -> None:
        """Block the host until all work is done."""
        for thread in self.threads.values():
            thread.wait()

    def close(self) -> None:
        """End the threads once their work is done. Work that is submitted later starts them anew.

        They, and errors that they keep, would otherwise hold on to memory of the device.
        """
        for thread in self.threads.values():
            thread.close()

    def follow_stream(self) -> None:
        """Order the caller's current stream after the compute work so far, if it is another one."""

    def mark(self) -> Any:
        """Return a mark of the present on the current stream, for `seconds`."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks, both of which must be past."""
        return float(end - begin)

    def host_reads(self, buffer: Buffer) -> None:
        """Check that the host may read and write `buffer` now. Only the simulated device does."""

    def empty(self, nbytes: int) -> Tensor:
        """Return uninitialized device memory: uint8, shape (nbytes,)."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def register(self, memory: Tensor) -> Callable[[], None]:
        """Page-lock host memory that the device copies from and to, if the system allows it.

        Returns:
            A function that unlocks `memory` and keeps it mapped until then.
        """
        return lambda: None

    def on_thread(self, queue: Queue, work: Callable[[], Any], after: After) -> Future[Any]:
        """Run `work` on the thread of `queue`, which waits for the events in `after` first."""

        def run() -> Any:
            self.finish(after)
            return work()

        return self.threads[queue].submit(run)


class Worker:
    """A thread that runs functions in the order of submission.

    After a failure all later functions fail with the same error: they may depend on the failed one.

    Args:
        name: Name of the thread.
        begin: Called first on the thread.
    """

    def __init__(self, name: str, begin: Callable[[], None] | None = None) -> None:
        self._new_pool = partial(ThreadPoolExecutor, 1, f"zo2ext-{name}", begin)
        self._pool = self._new_pool()
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

    def close(self) -> None:
        """End the thread once its work is done, and forget a failure."""
        self._pool.shutdown()
        self._pool = self._new_pool()
        self._failure = self._last = None
