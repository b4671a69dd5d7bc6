"""One place where the work of a step can be watched: queues and forward passes pass by here.

Nobody watches by default, and then nothing is added but the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from zo2ext.model.units import Unit
    from zo2ext.streaming.devices.device import Buffer, Queue

Work = Callable[[], None]


class Observer(Protocol):
    """Told of every piece of work before it is done; gives back what is done in its place.

    What it gives back must do the work, once, and must leave its order and its results alone.
    """

    def queued(
        self, queue: Queue, work: Work, reads: Sequence[Buffer], writes: Sequence[Buffer]
    ) -> Work:
        """`work`, about to be queued. Without `writes` it only marks a place in the order."""

    def resumed(self, units: Sequence[Unit], copy: int, work: Work) -> Work:
        """`work`, the forward pass over perturbed copy `copy` from the pause at `units` on."""


_observer: ContextVar[Observer | None] = ContextVar("zo2ext observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Let `observer` watch what this thread does inside."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def queued(queue: Queue, work: Work, reads: Sequence[Buffer], writes: Sequence[Buffer]) -> Work:
    """What to queue in the place of `work`: `work` itself where nobody watches."""
    observer = _observer.get()
    return work if observer is None else observer.queued(queue, work, reads, writes)


def resumed(units: Sequence[Unit], copy: int, work: Work) -> Work:
    """What to do in the place of `work`, a stretch of a forward pass."""
    observer = _observer.get()
    return work if observer is None else observer.resumed(units, copy, work)
