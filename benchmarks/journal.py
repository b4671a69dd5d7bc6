"""What keeping a journal costs a step: records written and synced, beside a step of OPT-125M.

    python benchmarks/journal.py [--folder DIR] [--json FILE]

The folder is where runs would be kept: the sync is its disk's. A step is one of the streamed engine
on this machine's device, 1 x 128 tokens; see benchmarks/step.py.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import timing
import torch
from shapes import SHAPES, make_config
from transformers import AutoModelForCausalLM

import zo2ext
from zo2ext.journal.journal import Journal
from zo2ext.journal.records import StepResult
from zo2ext.ops import Update

RECORDS = 200


def append_seconds(folder: Path) -> list[float]:
    """Seconds of each of many appends, every one synced."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        journal = Journal(Path(name) / "journal.zo2", {"start": 0, "config": {"directions": 1}})
        seconds = []
        for number in range(RECORDS):
            record = StepResult(number, (number,), (1.0,), (2.0,), (Update(number, 1e-3),), 1e-6)
            begin = time.perf_counter()
            journal.append(record)
            seconds.append(time.perf_counter() - begin)
        journal.close()
    return seconds


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(), help="default: the current one")
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--runs", type=int, default=5, help="steps to time")
    arguments = parser.parse_args()
    device = timing.chosen_device(arguments)
    place = timing.environment(device)
    print(timing.headline(place))
    append = timing.summary(append_seconds(arguments.folder))
    model = AutoModelForCausalLM.from_config(make_config(arguments.shape)).eval()
    ids = torch.randint(5, 1000, (1, 128), device=device)
    with zo2ext.offload(model, zo2ext.ZOConfig(device=device)) as engine:
        work = partial(engine.step, lambda: model(input_ids=ids, labels=ids).loss)
        step = timing.summary(timing.measure(work, device, runs=arguments.runs, warmup=1))
    share = append["median"] / step["median"]
    print(
        f"append and sync {append['median'] * 1e3:.2f} ms (median of {RECORDS}), step "
        f"{step['median'] * 1e3:.0f} ms: {share:.2%}"
    )
    if arguments.json:
        row = {"shape": arguments.shape, "append": append, "step": step, "share": share}
        content = {"benchmark": "journal", "environment": place, "rows": [row]}
        timing.write_json(arguments.json, content)


if __name__ == "__main__":
    main()
