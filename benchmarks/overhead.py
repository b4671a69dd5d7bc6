"""What the engine costs the host: a step of a deep model of tiny layers, less its forward passes.

    python benchmarks/overhead.py [--layers 24] [--json FILE]

Layers so small that their arithmetic counts for nothing: what a step takes longer than two plain
forward passes is the engine's own work, and what a unit of any model costs the host. Where the
device needs less than that for a unit, steps are as long as the host takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timing
import torch
from shapes import make_config

import zo2ext

WIDTH = 8


def seconds(work: Callable[[], object], device: torch.device, runs: int) -> timing.Json:
    """Of `work` by the wall clock, up to its end on the device."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(5):
        finished()
    return timing.summary([timing.clocked(finished)[0] for _ in range(runs)])


def measure(layers: int, device: torch.device, runs: int) -> list[timing.Json]:
    from transformers import AutoModelForCausalLM

    config = make_config("tiny", layers=layers)
    sizes = ("hidden_size", "ffn_dim", "word_embed_proj_dim")
    config.update(dict.fromkeys(sizes, WIDTH))
    make: Any = AutoModelForCausalLM.from_config
    model: Any = make(config).eval()
    tokens = torch.randint(3, config.vocab_size, (1, 8), device=device)

    def loss() -> Any:
        return model(input_ids=tokens, labels=tokens).loss

    model.to(device)
    with torch.no_grad():
        plain = seconds(loss, device, runs)
    model.to("cpu")
    rows = []
    for granularity in zo2ext.Granularity:
        for resident in ("all", 0) if device.type == "cuda" else (0,):
            options = {"granularity": granularity, "resident": resident, "device": device}
            with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-6, **options)) as zo:
                taken = seconds(lambda zo=zo: zo.step(loss), device, runs)
                units = len(zo.layouts)
            added = taken["minimum"] - 2 * plain["minimum"]
            rows.append(
                {
                    "name": f"{granularity.value}, {'resident' if resident else 'streamed'}",
                    "units": units,
                    "seconds": taken,
                    "forward_seconds": plain,
                    "unit_seconds": added / units,  # less than 0 where noise is more than that
                }
            )
    return rows


def report(rows: list[timing.Json]) -> str:
    ms = timing.milliseconds
    cells = [
        [
            row["name"],
            str(row["units"]),
            ms(row["forward_seconds"]["minimum"]),
            ms(row["seconds"]["minimum"]),
            f"{1e6 * row['unit_seconds']:.0f}",
        ]
        for row in rows
    ]
    headings = ["granularity", "units", "forward, min ms", "step, min ms", "added us a unit"]
    return timing.table(headings, cells)


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    device = timing.chosen_device(options)
    place = timing.environment(device)
    print(timing.headline(place))
    rows = measure(options.layers, device, options.runs)
    print(report(rows))
    if options.json:
        settings = {"layers": options.layers, "runs": options.runs}
        timing.write_json(
            options.json,
            {"benchmark": "overhead", "environment": place, "settings": settings, "rows": rows},
        )


if __name__ == "__main__":
    main()
