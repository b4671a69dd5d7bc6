"""What a step spends its time on: spans of uploads, kernels, forward passes and offloads.

On a GPU the begin and the end of a span are events on the stream that does the work, so that they
say when the device did it; on a CPU they are read off a clock. Nothing waits inside a step: events
are read after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from zo2ext.engine.engine import ZOEngine
from zo2ext.model.units import Unit
from zo2ext.streaming.devices.device import Buffer, Queue
from zo2ext.streaming.devices.observer import Work, observing


class Part(StrEnum):
    """Kinds of work."""

    UPLOAD = "upload"
    KERNEL = "kernel"
    FORWARD = "forward"
    OFFLOAD = "offload"


_OF_QUEUE = {Queue.UPLOAD: Part.UPLOAD, Queue.COMPUTE: Part.KERNEL, Queue.OFFLOAD: Part.OFFLOAD}
LANES: dict[str, tuple[Part, ...]] = {  # what cannot overlap, each a queue of the device
    "upload": (Part.UPLOAD,),
    "compute": (Part.KERNEL, Part.FORWARD),
    "offload": (Part.OFFLOAD,),
}


@dataclass(frozen=True)
class Span:
    """One piece of work. Seconds since the first span began.

    `unit` names what was worked on: "" for what a forward pass does before its first unit.
    `copy`, of a forward pass: 2k at +eps and 2k + 1 at -eps along direction k; None of others.
    """

    part: Part
    unit: str
    begin: float
    end: float
    copy: int | None = None


@dataclass(frozen=True)
class _Mark:
    part: Part
    unit: str
    copy: int | None
    begin: Any
    end: Any


class Recorder:
    """Spans of what `engine` does while recording. Changes no bit of it.

    Args:
        engine: To watch.
        clock: Seconds, where there are no device events.
    """

    def __init__(self, engine: ZOEngine, clock: Callable[[], float] = time.perf_counter) -> None:
        self._engine, self._clock = engine, clock
        self._cuda = engine.device.type == "cuda"
        self._units: dict[Buffer, int] = {}  # slot -> the unit in it
        self._marks: list[_Mark] = []
        self._origin: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens inside, and forget what was recorded before."""
        slots = self._engine._pipeline._slots
        self._units = {slot.name: slot.unit for slot in slots if slot.unit is not None}
        self._marks.clear()
        self._origin = self._now()
        with observing(self):
            yield

    def spans(self) -> list[Span]:
        """What was recorded, in the order of submission. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._engine.device)
        times = [(self._since(mark.begin), self._since(mark.end)) for mark in self._marks]
        first = min((begin for begin, _ in times), default=0.0)
        return [
            Span(mark.part, mark.unit, begin - first, end - first, mark.copy)
            for mark, (begin, end) in zip(self._marks, times, strict=True)
        ]

    def totals(self) -> dict[Part, float]:
        """Seconds a part, over the whole recording."""
        totals = dict.fromkeys(Part, 0.0)
        for span in self.spans():
            totals[span.part] += span.end - span.begin
        return totals

    # -- as an observer

    def queued(
        self, queue: Queue, work: Work, reads: Sequence[Buffer], writes: Sequence[Buffer]
    ) -> Work:
        if not writes:
            return work
        known = [unit for buffer in (*reads, *writes) if (unit := self._unit(buffer)) is not None]
        assert known, f"no unit is known in {[*reads]} and {[*writes]}"
        unit = known[0]
        if queue in (Queue.UPLOAD, Queue.DISK):
            self._units.update(dict.fromkeys(writes, unit))
        if queue not in _OF_QUEUE:  # on a thread of its own, which the device's clock does not see
            return work
        return self._timed(_OF_QUEUE[queue], self._engine.layouts[unit].unit.name, None, work)

    def resumed(self, units: Sequence[Unit], copy: int, work: Work) -> Work:
        return self._timed(Part.FORWARD, ", ".join(unit.name for unit in units), copy, work)

    # --

    def _unit(self, buffer: Buffer) -> int | None:
        match buffer:
            case ("host" | "disk" | "resident", int(unit)):
                return unit
        return self._units.get(buffer)

    def _timed(self, part: Part, unit: str, copy: int | None, work: Work) -> Work:
        def timed() -> None:
            begin = self._now()
            with torch.profiler.record_function(f"zo2ext: {part}"):
                work()
            self._marks.append(_Mark(part, unit, copy, begin, self._now()))

        return timed

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


def trace(spans: Sequence[Span], title: str) -> bytes:
    """As JSON for chrome://tracing and ui.perfetto.dev: a thread a lane, microseconds."""
    lane_of = {part: lane for lane, parts in enumerate(LANES.values()) for part in parts}
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": title}}
    ]
    for lane, name in enumerate(LANES):
        about = {"ph": "M", "pid": 0, "tid": lane}
        events.append(about | {"name": "thread_name", "args": {"name": name}})
        events.append(about | {"name": "thread_sort_index", "args": {"sort_index": lane}})
    for span in spans:
        copy = {} if span.copy is None else {"copy": span.copy}
        events.append(
            {
                "name": span.unit or "(before the first unit)",
                "cat": str(span.part),
                "ph": "X",
                "pid": 0,
                "tid": lane_of[span.part],
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "args": {"part": str(span.part), "unit": span.unit, **copy},
            }
        )
    content = {"displayTimeUnit": "ms", "otherData": {"title": title}, "traceEvents": events}
    return json.dumps(content, indent=0).encode()


def load_trace(path: Path) -> tuple[list[Span], str]:
    """Spans and title that `trace` wrote.

    Raises:
        ValueError: The file is no such trace.
    """
    try:
        content = json.loads(path.read_bytes())
        spans = [
            Span(
                Part(event["cat"]),
                str(event["args"]["unit"]),
                float(event["ts"]) / 1e6,
                (float(event["ts"]) + float(event["dur"])) / 1e6,
                event["args"].get("copy"),
            )
            for event in content["traceEvents"]
            if event["ph"] == "X"
        ]
        return spans, str(content["otherData"]["title"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no timeline of zo2ext ({error!r})") from error
