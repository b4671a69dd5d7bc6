"""The timeline of one step: uploads, kernels, forwards and offloads as the device did them.

    python benchmarks/timeline.py --shape opt-13b --out DIR

writes DIR/timeline.json, a trace for chrome://tracing or ui.perfetto.dev, and DIR/timeline.png.
Spans come from device events on a GPU and from the clock on a CPU. A unit's two forwards lie one
after the other; where nothing lies, that queue waits.
"""

from __future__ import annotations

from pathlib import Path

import random_models
import step
import timing
import torch
from shapes import SHAPES, make_config

import zo2ext
from zo2ext.runs.timeline import PICTURE_FILE, TRACE_FILE, Kind, Recorder, Span, draw, trace


def record(task: step.Task, config: zo2ext.ZOConfig, budget: int, warmup: int) -> list[Span]:
    """Spans of a step that follows others, so that it begins in full swing."""
    with random_models.random_store(budget), zo2ext.offload(task.model, config) as engine:
        for _ in range(warmup):
            engine.step(task.loss)
        recorder = Recorder(engine)
        with recorder.recording():
            engine.step(task.loss)
        return recorder.spans()


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="decoder blocks, if not the shape's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, help="tokens; default: 128 on a CPU, 2048 on a GPU")
    parser.add_argument("--granularity", choices=("block", "module"), default="block")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--host-budget", type=zo2ext.config.parse_size)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    device = timing.chosen_device(options)
    cuda = device.type == "cuda"
    place = timing.environment(device)
    length = options.length or (2048 if cuda else 128)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = random_models.hollow_model(options.shape, dtype, layers=options.layers, length=length)
    tokens = torch.randint(3, make_config(options.shape).vocab_size, (options.batch, length))
    task = step.Task(model, tokens.to(device), device, options)
    config = zo2ext.ZOConfig(
        lr=1e-7, granularity=zo2ext.Granularity(options.granularity), device=device
    )
    budget = options.host_budget or int(0.7 * step.free_host_nbytes())
    spans = record(task, config, budget, options.warmup)

    options.out.mkdir(parents=True, exist_ok=True)
    title = f"{options.shape}, batch {options.batch} x {length}, {timing.headline(place)}"
    (options.out / TRACE_FILE).write_bytes(trace(spans, title))
    (options.out / PICTURE_FILE).write_bytes(draw(spans, title))
    total = max(span.end for span in spans)
    rows = [
        {"kind": kind, "seconds": sum(s.end - s.begin for s in spans if s.kind == kind)}
        for kind in Kind
    ]
    print(title)
    cells = [
        [
            str(r["kind"]),
            timing.milliseconds(float(r["seconds"])),
            f"{float(r['seconds']) / total:.0%}",
        ]
        for r in rows
    ]
    print(timing.table(["kind", "ms", "of the step"], cells))
    if options.json:
        content = {"benchmark": "timeline", "environment": place, "rows": rows, "seconds": total}
        timing.write_json(options.json, content)


if __name__ == "__main__":
    main()
