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

from zo2ext import observer, ops

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


def listed(after: After) -> list[object]:
    return [event for events in after.values() for event in events if event is not None]


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


def make_device(name: str | torch.device | None) -> Device:
    """The device called `name`; None takes CUDA where there is one.

    Raises:
        ValueError: The name is unknown, or the machine or this build cannot drive it.
    """
    from zo2ext.simulated import SimulatedDevice

    if name is None:
        name = "cuda" if torch.cuda.is_available() and ops.cuda_built() else "cpu"
    if name == "simulated":
        return SimulatedDevice()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cuda', 'cpu' or 'simulated', got {name!r}") from error
    if device.type == "cpu":
        return CpuDevice()
    if device.type != "cuda":
        raise ValueError(f"device must be 'cuda', 'cpu' or 'simulated', got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA GPU; use device='cpu'")
    if not ops.cuda_built():
        raise ValueError(
            f"device is {name!r}, but zo2ext was built without CUDA; "
            "reinstall it with ZO2EXT_CUDA=1 and the CUDA toolkit, or use device='cpu'"
        )
    return CudaDevice(device)
