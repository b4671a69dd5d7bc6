"""Device memory of known shapes, counted: slots, perturbed copies, and activations from shapes.

    python benchmarks/memory.py [--shapes opt-13b opt-30b] [--batch 1 --length 2048]

Needs no GPU and measures nothing: it says what a run asks torch for. The CUDA context and the
workspaces of libraries come on top. `step.py` measures the whole process.
"""

from __future__ import annotations

import argparse
from typing import Any

import timing
import torch
from random_models import hollow_model
from shapes import SHAPES, make_config

import zo2ext
from zo2ext.planning.activations import Activations, activation_counter
from zo2ext.planning.plan import make_plan
from zo2ext.planning.rates import Rates

WAYS: dict[str, dict[str, Any]] = {
    "blocks, 3 slots, both copies": {},
    "modules, 3 slots, both copies": {"granularity": "module"},
    "modules, 2 slots, both copies": {"granularity": "module", "slots": 2},
    "modules, 2 slots, W- over W+": {"granularity": "module", "slots": 2, "one_copy": True},
}


def rows(options: argparse.Namespace) -> list[timing.Json]:
    dtype = getattr(torch, options.dtype)
    rates = Rates(torch.device("cuda"), 1.0, 1.0, 1.0, {dtype: 1.0})  # time does not matter here
    found = []
    for shape in options.shapes:
        model = hollow_model(shape, dtype, length=options.length)
        config = make_config(shape, length=options.length)
        taken = activation_counter(config, batch_size=options.batch, seq_len=options.length)(dtype)
        assert isinstance(taken, Activations), f"{shape} cannot be counted"
        for name, way in WAYS.items():
            tokens = options.batch * options.length
            plan = make_plan(
                model,
                zo2ext.ZOConfig(write_back=1, **way),
                tokens=tokens,
                rates=rates,
                activations=taken,
            )
            found.append(
                {
                    "shape": shape,
                    "name": name,
                    "slot_bytes": plan.slots,
                    "copy_bytes": plan.copies,
                    "activation_bytes": plan.activations,
                    "device_bytes": plan.device,
                }
            )
    return found


def report(found: list[timing.Json]) -> str:
    parts = ("slot", "copy", "activation", "device")
    cells = [
        [row["shape"], row["name"], *(f"{row[f'{part}_bytes'] / 1e9:.2f}" for part in parts)]
        for row in found
    ]
    return timing.table(["shape", "way", "slots GB", "copies", "activations", "in all"], cells)


def main() -> None:
    parser = timing.argument_parser(__doc__)
    large = ["opt-13b", "opt-30b", "opt-66b", "opt-175b"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=large)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float16")
    options = parser.parse_args()
    found = rows(options)
    print(report(found))
    if options.json:
        settings = {"batch": options.batch, "length": options.length, "dtype": options.dtype}
        content = {"benchmark": "memory", "source": timing.source(), "settings": settings}
        timing.write_json(options.json, content | {"rows": found})


if __name__ == "__main__":
    main()
