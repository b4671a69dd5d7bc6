"""The spans of a step: all of its work, under the right names, at no cost to its bits."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from numeric import assert_same_bits
from tiny_models import batches, tiny

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.runs import plots
from zo2ext.runs.timeline import LANES, Kind, Recorder, Span, StepTimeline, draw, load_trace, trace

MODEL = "llama-tied"
PLACES = {
    "cpu": {"device": "cpu"},
    "streamed": {"device": "simulated"},
    "matrices": {"device": "simulated", "granularity": "module", "slots": 2},
    "resident": {"device": "simulated", "resident": 2},
    "all-in-slots": {"device": "simulated", "slots": 9},
}
CUDA = pytest.param({"device": "cuda"}, marks=pytest.mark.gpu, id="cuda")
everywhere = pytest.mark.parametrize(
    "place", [*(pytest.param(place, id=name) for name, place in PLACES.items()), CUDA]
)


def engine(model: Any, place: dict[str, Any]) -> ZOEngine:
    return zo2ext.offload(model, zo2ext.ZOConfig(lr=3e-3, weight_decay=0.1, **place))


def step(zo: ZOEngine, model: Any, batch: dict[str, Any]) -> float:
    moved = {name: tensor.to(zo.device) for name, tensor in batch.items()}
    return zo.step(lambda: model(**moved).loss)


@everywhere
def test_recording_changes_no_bit(place: dict[str, Any]) -> None:
    seen = []
    for recorded in (False, True):
        model, losses = tiny(MODEL), []
        with engine(model, place) as zo:
            recorder = Recorder(zo)
            for batch in batches(MODEL, 5):
                if recorded:
                    with recorder.recording():
                        losses.append(step(zo, model, batch))
                    assert recorder.spans()
                else:
                    losses.append(step(zo, model, batch))
        seen.append((losses, {n: p.data for n, p in model.named_parameters()}))
    (plain, expected), (watched, weights) = seen
    assert watched == plain
    for name, tensor in weights.items():
        assert_same_bits(tensor, expected[name], name)


@everywhere
def test_spans_are_the_work_of_a_step(place: dict[str, Any]) -> None:
    """Kernels, forwards, and exactly the bytes that moved, each under its unit's name."""
    model = tiny(MODEL)
    *before, batch = batches(MODEL, 4)
    with engine(model, place) as zo:
        for other in before:
            step(zo, model, other)
        recorder = Recorder(zo)
        moved = (zo.traffic.uploaded, zo.traffic.offloaded)
        with recorder.recording():
            step(zo, model, batch)
        zo._device.synchronize()  # the simulation holds work back
        moved = (zo.traffic.uploaded - moved[0], zo.traffic.offloaded - moved[1])
        spans = recorder.spans()
        layouts = {layout.unit.name: layout for layout in zo.layouts}

    def of(kind: Kind) -> list[Span]:
        return [span for span in spans if span.kind is kind]

    once = dict.fromkeys(layouts, 1)
    expected = once | {"model.embed_tokens": 2}  # the embedding's and the head's, tied
    assert Counter(span.unit for span in of(Kind.KERNEL)) == expected
    assert sum(layouts[span.unit].nbytes for span in of(Kind.UPLOAD)) == moved[0]
    assert sum(layouts[span.unit].trainable_nbytes for span in of(Kind.OFFLOAD)) == moved[1]
    for copy in (0, 1):
        visited = {u for s in of(Kind.FORWARD) if s.copy == copy for u in s.unit.split(", ")}
        assert visited == {"", *layouts}, "the pass begins before its first unit, and visits all"
    assert min(span.begin for span in spans) == 0
    assert all(span.begin <= span.end for span in spans)
    for kinds in LANES.values():
        lane = sorted((s for s in spans if s.kind in kinds), key=lambda s: (s.begin, s.end))
        assert all(a.end <= b.begin for a, b in pairwise(lane))


def test_a_kernel_precedes_the_forwards_of_its_unit() -> None:
    model = tiny(MODEL)
    with engine(model, PLACES["cpu"]) as zo:
        recorder = Recorder(zo)
        with recorder.recording():
            step(zo, model, batches(MODEL, 1)[0])
        spans = sorted(recorder.spans(), key=lambda span: span.begin)
        for unit in (layout.unit.name for layout in zo.layouts):
            kinds = [span.kind for span in spans if unit in span.unit.split(", ")]
            assert kinds[0] is Kind.KERNEL
            assert kinds.count(Kind.FORWARD) >= 2
        assert recorder.totals()[Kind.FORWARD] > 0
        assert recorder.totals()[Kind.UPLOAD] == 0


def test_nothing_is_recorded_after_a_recording_even_one_that_failed() -> None:
    class Broken(Exception):
        pass

    def broken() -> float:
        raise Broken

    model = tiny(MODEL)
    with engine(model, PLACES["streamed"]) as zo:
        recorder = Recorder(zo)
        with pytest.raises(Broken), recorder.recording():
            zo.step(broken)
        zo._device.synchronize()
        count = len(recorder.spans())
        step(zo, model, batches(MODEL, 1)[0])
        assert len(recorder.spans()) == count
        assert zo._device.recorder is None


# -- files

SPANS = [
    Span(Kind.UPLOAD, "model.layers.0", 0.0, 0.25),
    Span(Kind.KERNEL, "model.layers.0", 0.25, 0.5),
    Span(Kind.FORWARD, "", 0.5, 0.625, copy=0),
    Span(Kind.FORWARD, 'a, "b"', 0.625, 1.0, copy=1),
    Span(Kind.OFFLOAD, "model.layers.0", 0.5, 0.75),
]


def test_a_trace_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    path.write_bytes(trace(SPANS, "a step"))
    assert load_trace(path) == (SPANS, "a step")
    events = json.loads(path.read_bytes())["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == dict(enumerate(LANES))
    work = [event for event in events if event["ph"] == "X"]
    assert [threads[e["tid"]] for e in work] == [
        "upload",
        "compute",
        "compute",
        "compute",
        "offload",
    ]
    assert (work[0]["name"], work[0]["ts"], work[0]["dur"]) == ("model.layers.0", 0, 250_000)


@pytest.mark.parametrize("content", ["", "[]", '{"traceEvents": [{"ph": "X"}]}', "{}"])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "timeline.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"timeline\.json is not a timeline of zo2ext"):
        load_trace(path)


def test_one_step_of_a_run_leaves_a_trace_and_a_picture(tmp_path: Path) -> None:
    model = tiny(MODEL)
    with engine(model, PLACES["streamed"]) as zo:
        timeline = StepTimeline(zo, tmp_path / "run", step=2)
        for count, batch in enumerate(batches(MODEL, 4)):
            with timeline.watch():
                step(zo, model, batch)
            assert (tmp_path / "run").exists() == (count >= 2)
    spans, title = load_trace(tmp_path / "run" / "timeline.json")
    assert title == "step 2 on simulated"
    assert {span.kind for span in spans} == set(Kind)
    assert (tmp_path / "run" / "timeline.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_there_is_the_trace_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    model = tiny(MODEL)
    with engine(model, PLACES["cpu"]) as zo, StepTimeline(zo, tmp_path, step=0).watch():
        step(zo, model, batches(MODEL, 1)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.json"]


@pytest.mark.parametrize("spans", [[], SPANS[:1], SPANS], ids=len)
def test_pictures_of_any_number_of_spans(spans: list[Span]) -> None:
    assert draw(spans, "a title " * 40).startswith(b"\x89PNG\r\n\x1a\n")


def test_events_are_read_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a recording waits for a GPU; reading the spans does."""
    world = FakeCuda().install(monkeypatch)
    model = tiny(MODEL)
    with ZOEngine(model, zo2ext.ZOConfig(lr=1e-3), world.gpu(1)) as zo:
        recorder = Recorder(zo)
        world.synchronized.clear()
        with recorder.recording():
            step(zo, model, batches(MODEL, 1)[0])
        assert not world.synchronized
        spans = recorder.spans()
        assert world.synchronized.keys() == {torch.device("cuda", 1)}
    assert spans[0].begin == 0
    assert all(span.end > span.begin for span in spans)
