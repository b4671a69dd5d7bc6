"""What a step spends its time on: spans of the engine's own work, by clock or by device events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from zo2ext import ZOEngine, lockstep
from zo2ext.devices import Queue

PARTS = {Queue.UPLOAD: "upload", Queue.COMPUTE: "fused pass", Queue.OFFLOAD: "offload"}


@dataclass
class Span:
    """One piece of work. Seconds since the recording began."""

    part: str  # "upload", "fused pass", "forward", "offload"
    begin: float
    end: float


class Recorder:
    """Spans of what `engine` does while recording, forward passes included.

    On a GPU the begin and the end are events on the stream that does the work, so that they say
    when the device did it. On a CPU they are read off `clock`.
    """

    def __init__(self, engine: ZOEngine, clock: Callable[[], float] = time.perf_counter) -> None:
        self._engine = engine
        self._clock = clock
        self._cuda = engine.device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._origin: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        device = self._engine._device
        submit, resume = device.submit, lockstep.Coroutine.resume

        def submit_timed(queue: Queue, work: Callable[[], None], **order: Any) -> Any:
            if queue is Queue.COMPUTE and not order.get("writes"):
                return submit(queue, work, **order)  # only marks a place in the order
            return submit(queue, lambda: self._timed(PARTS[queue], work), **order)

        def resume_timed(coroutine: lockstep.Coroutine) -> None:
            self._timed("forward", lambda: resume(coroutine))

        self._marks.clear()
        if self._cuda:
            torch.cuda.synchronize()
        self._origin = self._now()
        with (
            patch.object(device, "submit", submit_timed),
            patch.object(lockstep.Coroutine, "resume", resume_timed),
        ):
            yield

    def spans(self) -> list[Span]:
        if self._cuda:
            torch.cuda.synchronize()
        return [Span(part, self._since(a), self._since(b)) for part, a, b in self._marks]

    def totals(self) -> dict[str, float]:
        """Seconds a part, over the whole recording."""
        totals = dict.fromkeys((*PARTS.values(), "forward"), 0.0)
        for span in self.spans():
            totals[span.part] += span.end - span.begin
        return totals

    def _timed(self, part: str, work: Callable[[], None]) -> None:
        begin = self._now()
        with torch.profiler.record_function(f"zo2ext: {part}"):
            work()
        self._marks.append((part, begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, mark: Any) -> float:
        if not self._cuda:
            return float(mark - self._origin)
        return float(self._origin.elapsed_time(mark)) / 1e3
