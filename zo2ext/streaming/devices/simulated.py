"""A device that shows whether the declared order is enough, on any machine.

It holds work back and runs it in random orders that the declared dependencies allow, and reports
any two pieces that touch the same memory without an order between them.

Gathers begin when chance has it, on a thread. They end when other processes have begun theirs, so
they are waited for only where a dependency asks for that: there the others come, too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zo2ext.streaming.devices import observer
from zo2ext.streaming.devices.device import (
    After,
    Buffer,
    Dependency,
    Device,
    HazardError,
    Queue,
    Worker,
)


@dataclass(eq=False)
class _Work:
    """One piece of work in the simulation. `clock`: what is known to be past, a count a queue."""

    queue: Queue
    position: int
    run: Callable[[], None]
    waits: list[_Work]
    clock: dict[Queue, int]
    name: str
    begun: Future[Any] | None = None  # of a gather
    done: bool = False

    def precedes(self, other: _Work) -> bool:
        return other.clock[self.queue] >= self.position


@dataclass
class _Accesses:
    writer: _Work | None = None
    readers: list[_Work] = field(default_factory=list)


class SimulatedDevice(Device):
    """A GPU played on the CPU: the pipeline's own operations, in random legal orders.

    Args:
        seed: Of the orders.
        ignored: A dependency to take away, to see that it is missed.
        detect: Raise `HazardError` on unordered accesses; without it, let results change.
        capacity: Bytes of device memory; asking for more raises `torch.OutOfMemoryError`.
        moves: Whether it has memory of its own; if not, it computes in the host's, as a CPU does.
    """

    torch_device = torch.device("cpu")

    def __init__(
        self,
        seed: int = 0,
        *,
        ignored: Dependency | None = None,
        detect: bool = True,
        capacity: int | None = None,
        moves: bool = True,
    ) -> None:
        self.moves = moves
        self._random = random.Random(seed)
        self._ignored = ignored
        self._detect = detect
        self._capacity, self._allocated = capacity, 0
        self._waiting: dict[Queue, deque[_Work]] = {q: deque() for q in Queue}
        self._clocks = {q: dict.fromkeys(Queue, 0) for q in Queue}
        self._host = dict.fromkeys(Queue, 0)
        self._accesses: dict[Buffer, _Accesses] = {}
        self._gathers = Worker("gather")

    def submit(
        self,
        queue: Queue,
        work: Callable[[], None],
        *,
        after: After | None = None,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
    ) -> _Work:
        waits = [
            event
            for dependency, events in (after or {}).items()
            if dependency is not self._ignored
            for event in events
            if isinstance(event, _Work)
        ]
        clock = self._clocks[queue]  # of the queue's last work; from here on, of this one
        for known in (self._host, *(event.clock for event in waits)):
            for q, count in known.items():
                clock[q] = max(clock[q], count)
        clock[queue] += 1
        name = f"{queue.name.lower()} {clock[queue]} (reads {list(reads)}, writes {list(writes)})"
        run = observer.queued(queue, work, reads, writes)
        item = _Work(queue, clock[queue], run, waits, dict(clock), name)
        self._check(item, reads, writes)
        self._waiting[queue].append(item)
        self._run_some()
        return item

    def computing(self, reads: Sequence[Buffer], after: After | None = None) -> object | None:
        item = self.submit(Queue.COMPUTE, lambda: None, after=after, reads=reads)
        self._run_until(item)
        return item

    def finish(self, after: Mapping[Dependency, Sequence[object | None]]) -> None:
        for dependency, events in after.items():
            for event in events:
                if isinstance(event, _Work) and dependency is not self._ignored:
                    self._run_until(event)
                    for q, count in event.clock.items():
                        self._host[q] = max(self._host[q], count)

    def synchronize(self) -> None:
        while ready := self._ready():
            self._run(self._random.choice(ready))

    def empty(self, nbytes: int) -> Tensor:
        self._allocated += nbytes
        if self._capacity is not None and self._allocated > self._capacity:
            raise torch.OutOfMemoryError(
                f"simulated device has {self._capacity} bytes, {self._allocated} were asked for"
            )
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every float format

    def host_reads(self, buffer: Buffer) -> None:
        """Report work that might still be writing `buffer`."""
        writer = self._accesses.get(buffer, _Accesses()).writer
        if self._detect and writer is not None and self._host[writer.queue] < writer.position:
            raise HazardError(f"the host reads {buffer} while {writer.name} may still write it")

    def _check(self, item: _Work, reads: Sequence[Buffer], writes: Sequence[Buffer]) -> None:
        for buffer in (*reads, *writes):
            seen = self._accesses.setdefault(buffer, _Accesses())
            others = [seen.writer] if seen.writer else []
            others += seen.readers if buffer in writes else []
            for other in others:
                if self._detect and other is not item and not other.precedes(item):
                    raise HazardError(f"nothing orders {other.name} and {item.name} on {buffer}")
        for buffer in writes:
            self._accesses[buffer] = _Accesses(writer=item)
        for buffer in reads:
            readers = self._accesses[buffer].readers
            readers[:] = [r for r in readers if r.queue is not item.queue] + [item]

    def _ready(self) -> list[_Work]:
        heads = [waiting[0] for waiting in self._waiting.values() if waiting]
        return [item for item in heads if all(event.done for event in item.waits)]

    def _not_begun(self) -> list[_Work]:
        return [item for item in self._ready() if item.begun is None]

    def _run(self, item: _Work) -> None:
        """Do `item`; of a gather, one of its two halves."""
        if item.queue is Queue.GATHER and item.begun is None:
            item.begun = self._gathers.submit(item.run)
            return
        self._waiting[item.queue].popleft()
        if item.begun is None:
            item.run()
        else:
            item.begun.result()
        item.done = True
        item.waits = []

    def _run_some(self) -> None:
        while (ready := self._not_begun()) and self._random.random() < 0.5:
            self._run(self._random.choice(ready))

    def _run_until(self, item: _Work) -> None:
        """Run what `item` needs, and at random what else is ready."""
        while not item.done:
            needed = self._needed(item)
            ready = self._ready()
            chosen = self._random.choice(ready)
            if chosen in needed or (chosen.begun is None and self._random.random() < 0.3):
                self._run(chosen)

    def _needed(self, item: _Work) -> set[_Work]:
        needed, frontier = set[_Work](), [item]
        while frontier:
            work = frontier.pop()
            if work.done or work in needed:
                continue
            needed.add(work)
            frontier += work.waits
            for earlier in self._waiting[work.queue]:
                if earlier is work:
                    break
                frontier.append(earlier)
        return needed
