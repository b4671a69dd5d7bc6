"""Record the timeline of one step: spans of uploads, kernels, forward passes and offloads.

On a GPU a span begins and ends at events on the stream that does the work, so it shows when the
device did it; on a CPU a clock is read. Nothing waits during the step: events are read afterwards.

torch.profiler is not used: it records every operator, and a process can run only one at a time,
which may be the user's. In a user's profile, recorded work appears as "zo2ext: upload" etc.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from zo2ext._files import write_atomically
from zo2ext.engine.engine import ZOEngine
from zo2ext.errors import UserError
from zo2ext.model.units import Unit
from zo2ext.runs import plots
from zo2ext.streaming.devices.device import Queue, Work

TRACE_FILE, PICTURE_FILE = "timeline.json", "timeline.png"


class Kind(StrEnum):
    """Kinds of work."""

    UPLOAD = "upload"
    KERNEL = "kernel"
    FORWARD = "forward"
    OFFLOAD = "offload"


_KINDS = {Queue.UPLOAD: Kind.UPLOAD, Queue.COMPUTE: Kind.KERNEL, Queue.OFFLOAD: Kind.OFFLOAD}
LANES: dict[str, tuple[Kind, ...]] = {  # work of one lane, a queue of the device, cannot overlap
    "upload": (Kind.UPLOAD,),
    "compute": (Kind.KERNEL, Kind.FORWARD),
    "offload": (Kind.OFFLOAD,),
}
_COLORS = {  # of alternate units, so that neighbors differ
    Kind.UPLOAD: ("#4c78a8", "#7ba3cc"),
    Kind.KERNEL: ("#d9534f", "#e88f8c"),
    Kind.FORWARD: ("#3f8f4a", "#7bbf83"),
    Kind.OFFLOAD: ("#8f5f9f", "#b795c4"),
}


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Attributes:
        kind: Kind of work.
        unit: Name of the unit; "" for work of a forward pass before its first unit.
        begin, end: Seconds since the first span began.
        copy: Copy that a forward pass reads: 2k at +eps and 2k + 1 at -eps along direction k.
    """

    kind: Kind
    unit: str
    begin: float
    end: float
    copy: int | None = None


class Recorder:
    """Records the spans of an engine's work; a `streaming.devices.device.Recorder`.

    Args:
        engine: Engine to record. Its results do not change.
        clock: Clock in seconds to use instead of the device's.
    """

    def __init__(self, engine: ZOEngine, clock: Callable[[], float] | None = None) -> None:
        self._engine, device = engine, engine._device
        self._now: Callable[[], Any] = clock or device.mark
        self._seconds = (lambda begin, end: end - begin) if clock else device.seconds
        self._marks: list[tuple[Kind, str, int | None, Any, Any]] = []
        self._origin: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the work in this block; earlier recordings are dropped."""
        self._marks.clear()
        self._origin = self._now()
        device = self._engine._device
        device.recorder, before = self, device.recorder
        try:
            yield
        finally:
            device.recorder = before

    def spans(self) -> list[Span]:
        """Return the recorded work in the order in which it ran. Waits for the device."""
        self._engine._device.synchronize()  # threads add marks, too
        times = [
            (self._seconds(self._origin, begin), self._seconds(self._origin, end))
            for *_, begin, end in self._marks
        ]
        first = min((begin for begin, _ in times), default=0.0)
        return [
            Span(kind, unit, begin - first, end - first, copy)
            for (kind, unit, copy, *_), (begin, end) in zip(self._marks, times, strict=True)
        ]

    def totals(self) -> dict[Kind, float]:
        """Return the seconds of each kind of work, over the whole recording."""
        totals = dict.fromkeys(Kind, 0.0)
        for span in self.spans():
            totals[span.kind] += span.end - span.begin
        return totals

    # -- called by the device and the scheduler

    def queued(self, queue: Queue, unit: int, work: Work) -> Work:
        kind = _KINDS.get(queue)
        if kind is None:  # files and gathers have threads of their own, without device events
            return work
        name = self._engine.layouts[unit].unit.name
        return lambda: self._run(kind, name, None, work)

    def forward(self, units: Sequence[Unit], copy: int, work: Work) -> None:
        self._run(Kind.FORWARD, ", ".join(unit.name for unit in units), copy, work)

    def _run(self, kind: Kind, unit: str, copy: int | None, work: Work) -> None:
        begin = self._now()
        with torch.profiler.record_function(f"zo2ext: {kind}"):
            work()
        self._marks.append((kind, unit, copy, begin, self._now()))


class StepTimeline:
    """Records one step of a run, and writes its trace and picture to the run's folder.

    Args:
        engine: Engine of the run.
        folder: Folder for timeline.json and, if matplotlib is installed, timeline.png.
        step: Step to record. Not the first, so that uploads are under way when it begins.
    """

    def __init__(self, engine: ZOEngine, folder: Path, *, step: int) -> None:
        self._engine, self._folder, self._step = engine, folder, step

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the step in this block if it is the one to record."""
        if self._engine.steps != self._step:
            yield
            return
        recorder = Recorder(self._engine)
        with recorder.recording():
            yield
        device = self._engine.config.device or self._engine.device
        spans, title = recorder.spans(), f"step {self._step} on {device}"
        self._folder.mkdir(parents=True, exist_ok=True)
        if plots.available():
            write_atomically(self._folder / PICTURE_FILE, draw(spans, title))
        # Last: a folder with a trace is not recorded again.
        write_atomically(self._folder / TRACE_FILE, trace(spans, title))


def trace(spans: Sequence[Span], title: str) -> bytes:
    """Return JSON for chrome://tracing and ui.perfetto.dev: one thread per lane, microseconds."""
    lane_of = {kind: lane for lane, kinds in enumerate(LANES.values()) for kind in kinds}
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
                "cat": str(span.kind),
                "ph": "X",
                "pid": 0,
                "tid": lane_of[span.kind],
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "args": {"unit": span.unit, **copy},
            }
        )
    content = {"displayTimeUnit": "ms", "otherData": {"title": title}, "traceEvents": events}
    return json.dumps(content, indent=0).encode()


def load_trace(path: Path) -> tuple[list[Span], str]:
    """Return the spans and the title of a file that `trace` wrote.

    Raises:
        ValueError: The file is not such a trace.
    """
    try:
        content = json.loads(path.read_bytes())
        spans = [
            Span(
                Kind(event["cat"]),
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
        raise UserError(f"{path} is not a timeline of zo2ext ({error!r})") from error


def draw(spans: Sequence[Span], title: str) -> bytes:
    """Draw the work of each queue over time as PNG, with one lane per queue.

    Args:
        spans: Spans of one step.
        title: Title above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    canvas = Figure(figsize=(12.0, 3.2), layout="constrained")
    axes = canvas.subplots()
    total = max((span.end for span in spans), default=0.0)
    scale, unit = (1.0, "s") if total >= 10 else (1e3, "ms") if total >= 1e-2 else (1e6, "µs")
    names = []
    for place, (lane, kinds) in enumerate(LANES.items()):
        own = [span for span in spans if span.kind in kinds]
        for kind in kinds:
            same = [span for span in own if span.kind == kind]
            turns = {name: i for i, name in enumerate(dict.fromkeys(s.unit for s in same))}
            axes.broken_barh(
                [(s.begin * scale, (s.end - s.begin) * scale) for s in same],
                (place - 0.4, 0.8),
                facecolors=[_COLORS[kind][turns[s.unit] % 2] for s in same],
                lw=0,
            )
        for span in own:
            name = _short(span.unit)
            if span.end - span.begin > 0.005 * total * len(name):
                middle = (span.begin + span.end) / 2 * scale
                axes.text(middle, place, name, ha="center", va="center", color="w", fontsize=7)
        busy = sum(span.end - span.begin for span in own) / total if total else 0.0
        names.append(f"{lane}\n{busy:.0%} busy")
        if not own:
            text, across = f"no {lane} in this step", axes.get_yaxis_transform()
            axes.text(0.5, place, text, color="0.4", ha="center", va="center", transform=across)
    axes.set_yticks(range(len(LANES)), names)
    axes.set(xlabel=f"time, {unit}", xlim=(0, total * scale or 1), ylim=(len(LANES) - 0.5, -0.5))
    axes.set_title("\n".join(textwrap.wrap(title, 130)), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    shown = [Patch(color=pair[0], label=str(kind)) for kind, pair in _COLORS.items()]
    canvas.legend(handles=shown, loc="outside upper right", ncols=len(shown), frameon=False)
    return plots.png(canvas)


def _short(unit: str) -> str:
    """Return a unit's name for a small space: "layers.0" for "model.layers.0"."""
    words = unit.partition(",")[0].split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])
