"""One step of a run as a picture and as a trace, in the run's folder."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from zo2ext._files import write_atomically
from zo2ext.engine.engine import ZOEngine
from zo2ext.runs import plots
from zo2ext.runs.timeline import LANES, Part, Recorder, Span, trace

TRACE_FILE, PICTURE_FILE = "timeline.json", "timeline.png"


_COLOURS = {  # of units in turn, so that neighbours differ
    Part.UPLOAD: ("#4c78a8", "#7ba3cc"),
    Part.KERNEL: ("#d9534f", "#e88f8c"),
    Part.FORWARD: ("#3f8f4a", "#7bbf83"),
    Part.OFFLOAD: ("#8f5f9f", "#b795c4"),
}


class StepTimeline:
    """Records one step of a run, and leaves its trace and picture in the run's folder.

    Args:
        engine: Of the run.
        folder: Gets timeline.json and, where matplotlib is, timeline.png.
        step: To record. A later one than the first, so that it begins in full swing.
    """

    def __init__(self, engine: ZOEngine, folder: Path, *, step: int) -> None:
        self._engine, self._folder, self._step = engine, folder, step

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around a step; does nothing but at the step to record."""
        if self._engine.steps != self._step:
            yield
            return
        recorder = Recorder(self._engine)
        with recorder.recording():
            yield
        spans, title = recorder.spans(), f"step {self._step} on {self._device()}"
        self._folder.mkdir(parents=True, exist_ok=True)
        if plots.available():
            write_atomically(self._folder / PICTURE_FILE, draw(spans, title))
        write_atomically(self._folder / TRACE_FILE, trace(spans, title))  # once there, both are

    def _device(self) -> str:
        return str(self._engine.config.device or self._engine.device)


def draw(spans: Sequence[Span], title: str) -> bytes:
    """What each queue did when, as PNG: a lane each; where nothing lies, it waits.

    Args:
        spans: Of one step.
        title: Above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    canvas = Figure(figsize=(12.0, 3.2), layout="constrained")
    axes = canvas.subplots()
    total = max((span.end for span in spans), default=0.0)
    scale, unit = (1.0, "s") if total >= 10 else (1e3, "ms") if total >= 1e-2 else (1e6, "µs")
    names = []
    for place, (lane, parts) in enumerate(LANES.items()):
        own = [span for span in spans if span.part in parts]
        for part in parts:
            of_part = [span for span in own if span.part == part]
            turns = {name: i for i, name in enumerate(dict.fromkeys(s.unit for s in of_part))}
            axes.broken_barh(
                [(s.begin * scale, (s.end - s.begin) * scale) for s in of_part],
                (place - 0.4, 0.8),
                facecolors=[_COLOURS[part][turns[s.unit] % 2] for s in of_part],
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
            axes.text(
                0.5,
                place,
                f"no {lane} in this step",
                color="0.4",
                ha="center",
                va="center",
                transform=axes.get_yaxis_transform(),
            )
    axes.set_yticks(range(len(LANES)), names)
    axes.set(xlabel=f"time, {unit}", xlim=(0, total * scale or 1), ylim=(len(LANES) - 0.5, -0.5))
    axes.set_title("\n".join(textwrap.wrap(title, 130)), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    shown = [Patch(color=pair[0], label=str(part)) for part, pair in _COLOURS.items()]
    canvas.legend(handles=shown, loc="outside upper right", ncols=len(shown), frameon=False)
    return plots.png(canvas)


def _short(unit: str) -> str:
    """A unit's name for a small place: "layers.0" of "model.layers.0"."""
    words = unit.partition(",")[0].split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])
