"""Steps of a tiny model that are logged as the commands log theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tiny_models import batches, tiny

import zo2ext
from zo2ext.runs.log import RunLog
from zo2ext.runs.meter import Meter
from zo2ext.runs.timeline import StepTimeline

MODEL = "llama-tied"


def run(
    folder: Path,
    steps: int = 4,
    *,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
    device: str = "simulated",
) -> list[zo2ext.StepRecord]:
    """Steps `start` to `steps` of a run that is logged as the commands do it."""
    model, records = tiny(MODEL), []
    config = zo2ext.ZOConfig(lr=3e-3, directions=2, estimator="two_sided", device=device)
    with zo2ext.offload(model, config) as zo:
        zo.resume(steps=start)
        meter = Meter(zo)
        log = RunLog(folder, zo, meter, start=start)
        timeline = StepTimeline(zo, folder, step=1)
        log.evaluations(start, {"held_out_loss": 5.0})
        for batch in batches(MODEL, steps)[start:]:
            with timeline.watch(), meter.measure(batch["input_ids"].numel()):
                zo.step(lambda: model(**batch).loss * factor(zo.steps))
            log.step()
            assert zo.last is not None
            records.append(zo.last)
        log.evaluations(steps, {"held_out_loss": 4.5, "dev_accuracy": 0.75})
    (folder / "arguments.json").write_text(json.dumps({"steps": steps, "text": "<b>&\"'"}))
    return records
