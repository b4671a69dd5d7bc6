"""A device that tests on any machine whether the declared dependencies are sufficient.

It delays work and runs it in random orders that the declared dependencies allow, and reports two
pieces of work that access the same memory without an order between them.

Gathers start at random times, on a thread. They end once other processes have started theirs, so
they are waited for only where a dependency requires it: there the other processes arrive as well.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zo2ext.streaming.devices.device import (
    After,
    Buffer,
    Dependency,
    Device,
    HazardError,
    Queue,
    Region,
    Work,
)


@dataclass(eq=False)
class _Item:
    """One piece of work. `clock` counts, per queue, the work that is known to be done before it."""

    queue: Queue
    position: int
    run: Work
    waits: list[_Item]
    clock: dict[Queue, int]
    name: str
    begun: Future[Any] | None = None  # of a gather
    done: bool = False

    def precedes(self, other: _Item) -> bool:
        return other.clock[self.queue] >= self.position


def _nothing() -> None:
    raise AssertionError("work was run twice")


@dataclass
class _Accesses:
    writer: _Item | None = None
    readers: list[_Item] = field(default_factory=list)


class SimulatedDevice(Device):
    """A GPU simulated on the CPU: the pipeline's own work, in random legal orders.

    Args:
        seed: Seed of the random orders.
        ignored: Dependency to ignore, to test that its absence is noticed.
        detect: Raise `HazardError` on unordered accesses; if False, results may change instead.
        capacity: Bytes of device memory; a larger request raises `torch.OutOfMemoryError`.
        moves: Whether it has memory of its own; if not, it computes in host memory, as a CPU does.
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
        super().__init__()
        self.moves = moves
        self._random = random.Random(seed)
        self._ignored = ignored
        self._detect = detect
        self._capacity, self._allocated = capacity, 0
        self._waiting: dict[Queue, deque[_Item]] = {q: deque() for q in Queue}
        self._clocks = {q: dict.fromkeys(Queue, 0) for q in Queue}
        self._host = dict.fromkeys(Queue, 0)
        self._accesses: dict[Buffer, _Accesses] = {}
        self._failure: BaseException | None = None  # of the last work that failed

    def enqueue(
        self,
        queue: Queue,
        work: Work,
        after: After,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
    ) -> _Item:
        waits = [
            event
            for dependency, events in after.items()
            if dependency is not self._ignored
            for event in events
            if isinstance(event, _Item)
        ]
        clock = self._clocks[queue]  # of the queue's last work; from here on, of this one
        for known in (self._host, *(event.clock for event in waits)):
            for q, count in known.items():
                clock[q] = max(clock[q], count)
        clock[queue] += 1
        name = f"{queue.name.lower()} {clock[queue]} (reads {list(reads)}, writes {list(writes)})"
        item = _Item(queue, clock[queue], work, waits, dict(clock), name)
        self._check(item, reads, writes)
        self._waiting[queue].append(item)
        self._run_some()
        return item

    def computing(self, reads: Sequence[Buffer], after: After | None = None) -> object | None:
        item = super().computing(reads, after)
        assert isinstance(item, _Item)
        self._run_until(item)
        return item

    def finish(self, after: After) -> None:
        super().finish({d: events for d, events in after.items() if d is not self._ignored})

    def wait(self, event: object) -> None:
        assert isinstance(event, _Item)
        self._run_until(event)
        for q, count in event.clock.items():
            self._host[q] = max(self._host[q], count)

    def synchronize(self) -> None:
        while ready := self._ready():
            self._run(self._random.choice(ready))
        self._host = {queue: clock[queue] for queue, clock in self._clocks.items()}

    def close(self) -> None:
        super().close()
        for waiting in self._waiting.values():  # for work that failed
            waiting.clear()
        self._accesses.clear()
        self._failure = None

    def empty(self, nbytes: int) -> Tensor:
        self._allocated += nbytes
        if self._capacity is not None and self._allocated > self._capacity:
            raise torch.OutOfMemoryError(
                f"simulated device has {self._capacity} bytes, {self._allocated} were requested"
            )
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every float format

    def host_reads(self, buffer: Buffer) -> None:
        """Raise HazardError if work may still be writing `buffer`."""
        writer = self._accesses.get(buffer, _Accesses()).writer
        if self._detect and writer is not None and self._host[writer.queue] < writer.position:
            raise HazardError(f"the host reads {buffer} while {writer.name} may still write it")

    def _check(self, item: _Item, reads: Sequence[Buffer], writes: Sequence[Buffer]) -> None:
        for buffer in (*reads, *writes):
            self._accesses.setdefault(buffer, _Accesses())
            others: list[_Item] = []
            for seen in self._of(buffer):
                others += [seen.writer] if seen.writer else []
                others += seen.readers if buffer in writes else []
            for other in others:
                if self._detect and other is not item and not other.precedes(item):
                    raise HazardError(f"nothing orders {other.name} and {item.name} on {buffer}")
        for buffer in writes:
            self._accesses[buffer] = _Accesses(writer=item)
            self._drop_inside(buffer)
        for buffer in reads:
            readers = self._accesses[buffer].readers
            readers[:] = [r for r in readers if r.queue is not item.queue] + [item]

    def _of(self, buffer: Buffer) -> list[_Accesses]:
        """Return the accesses to `buffer` and to regions that overlap it."""
        if not isinstance(buffer, Region):
            return [self._accesses[buffer]]
        return [seen for name, seen in self._accesses.items() if buffer.overlaps(name)]

    def _drop_inside(self, buffer: Buffer) -> None:
        """Forget accesses to smaller regions inside `buffer`: its write is ordered after them."""
        for name in list(self._accesses):
            if name != buffer and isinstance(buffer, Region) and buffer.contains(name):
                del self._accesses[name]

    def _ready(self) -> list[_Item]:
        heads = [waiting[0] for waiting in self._waiting.values() if waiting]
        return [item for item in heads if all(event.done for event in item.waits)]

    def _not_begun(self) -> list[_Item]:
        return [item for item in self._ready() if item.begun is None]

    def _run(self, item: _Item) -> None:
        """Run `item`, or one of the two halves of a gather: its start and its end."""
        if item.queue is Queue.GATHER and item.begun is None:
            item.begun = self.threads[Queue.GATHER].submit(item.run)
            return
        self._waiting[item.queue].popleft()
        try:
            if item.begun is None:
                item.run()
            else:
                item.begun.result()
        except BaseException as error:
            self._failure = error
            raise
        item.done = True
        item.waits, item.run = [], _nothing  # both hold on to memory

    def _run_some(self) -> None:
        while (ready := self._not_begun()) and self._random.random() < 0.5:
            self._run(self._random.choice(ready))

    def _run_until(self, item: _Item) -> None:
        """Run `item` and what it needs, and some other ready work at random."""
        while not item.done:
            needed = self._needed(item)
            ready = self._ready()
            if not ready:  # it waits for work that failed, as a stream does
                assert self._failure is not None
                raise self._failure
            chosen = self._random.choice(ready)
            if chosen in needed or (chosen.begun is None and self._random.random() < 0.3):
                self._run(chosen)

    def _needed(self, item: _Item) -> set[_Item]:
        needed, frontier = set[_Item](), [item]
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
