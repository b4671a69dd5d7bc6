"""Predict known models on known GPUs, as the page docs/plans.md. Needs no GPU; takes some minutes.

Nothing of it is measured: zo2ext/planning/clock.py runs the order of a step with the rates of data
sheets, as `zo2ext plan --gpu` does.
"""

# ruff: noqa: E501 - the page's text is as wide as the other pages

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timing
import torch
from random_models import hollow_model
from shapes import SHAPES, make_config

import zo2ext
from zo2ext.ops.formats import Storage
from zo2ext.planning import clock, gpus, period, step
from zo2ext.planning.activations import Activations, activation_counter
from zo2ext.planning.plan import DRIVER, Plan, make_plan, recommend

LENGTH = 2048
PAGE = timing.ROOT / "docs" / "plans.md"
MODELS = ["opt-13b", "opt-30b", "opt-66b", "opt-175b", "llama-3-8b", "llama-3-70b"]
PLACES = ["RTX 3090", "RTX 4090", "A100 80GB", "H200"]
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "`write_back=1`": {"write_back": 1},
    "modules, 2 slots, one copy": {"granularity": "module", "slots": 2, "one_copy": True},
}

INTRODUCTION = """# Plans

`zo2ext plan --model NAME` predicts memory and speed before any weights are downloaded, says whether a run
fits, and recommends settings. Without more options it measures the rates of this machine. For hardware that is
not here, name it, or give its rates:

```bash
zo2ext plan --model facebook/opt-13b --gpu "RTX 4090" --ram 64
zo2ext plan --model facebook/opt-13b --upload 25 --download 25 --matmul 130 --gpu-memory 24
```

Known names are {names}.

The prediction is a run without weights: the unit loader and the pipeline of a real run, on a device whose
queues have a virtual clock. So the order of uploads, passes and write-backs is the product's own, and so are
slots, copies and bytes. Activations and the work of a forward pass are counted from the shapes in the model's
own code.

## Predicted, not measured

**Every number below is a prediction.** It was made by `python benchmarks/plans.py` under these assumptions:

- bfloat16 weights and computation; one direction; a batch of 1 x {length:,} tokens; the chunked loss of the
  commands; weights in page-locked host memory that serves the link at full rate.
- The link is PCIe with 16 lanes: 25 GB/s each way for generation 4 and 55 for 5. While both directions are busy,
  each keeps {both:.0%} of its rate. A copy begins {transfer:.0f} us after its turn.
- Matrix products and attention reach {multiply:.0%} of the data sheet's dense rate with sums in float32; all other
  operations of a forward pass reach {memory:.0%} of the memory's bandwidth. Attention counts without its causal half.
- The fused pass takes 11.4 instructions per weight, 29.5 per value of noise and 13.4 for stochastic rounding, from
  the compiled machine code; a multiprocessor issues 128 per clock at {clock:.0%} of the boost clock. It takes at
  least as long as its memory.
- The host takes {submission:.0f} us to queue a kernel or copy, {operation:.0f} us per operation of a forward pass,
  {visit:.0f} us per unit and {step} ms between steps. The journal's disk takes no time.
- Memory is slots, copies and activations; the driver and libraries take about {driver:.1f} GiB more.

In the tables, "floor" is the longest of the transfers, both ways at once, and of the computation: no order of the
work can be faster. "Default" is blocks in three slots, with the `write_back` that `"auto"` chooses. "Recommended"
is what `zo2ext plan` recommends. A dash means that the GPU's memory is too small.
"""


def page(models: list[str], places: list[str]) -> str:
    text = INTRODUCTION.format(
        names=", ".join(gpus.GPUS),
        length=LENGTH,
        both=gpus.BOTH_WAYS,
        transfer=clock.TRANSFER * 1e6,
        multiply=gpus.MULTIPLY_SHARE,
        memory=gpus.MEMORY_SHARE,
        clock=gpus.CLOCK_SHARE,
        submission=clock.SUBMISSION * 1e6,
        operation=step.OPERATION * 1e6,
        visit=step.VISIT * 1e6,
        step=step.STEP * 1e3,
        driver=DRIVER / 2**30,
    )
    return "\n".join([text, *(section(name, places) for name in models)])


def section(name: str, places: list[str]) -> str:
    """Return the tables of one model."""
    model = hollow_model(name, torch.bfloat16, length=LENGTH)
    config = make_config(name, length=LENGTH)
    taken = activation_counter(config, batch_size=1, seq_len=LENGTH)(torch.bfloat16)
    assert isinstance(taken, Activations), f"{name} cannot be counted"
    rows = []
    for place in places:
        rates = gpus.named_rates(place)
        own = {"write_back": period.choose_period(model, zo2ext.ZOConfig(), rates, taken.stages)}
        ways = {
            way: make_plan(
                model,
                zo2ext.ZOConfig(**(own | settings)),
                tokens=LENGTH,
                rates=rates,
                activations=taken,
            )
            for way, settings in WAYS.items()
        }
        best = recommend(
            model,
            zo2ext.ZOConfig(),
            Storage.BF16,
            tokens=LENGTH,
            rates=rates,
            activations=lambda _: taken,
        )
        rows += [[place, way, *cells(plan, rates.memory)] for way, plan in ways.items()]
        rows.append([place, "recommended", *cells(best, rates.memory)])
        print(name, place, "done", flush=True)
    host = next(iter(ways.values())).host
    head = ["predicted for", "way", "settings", "GPU memory", "floor", "step", "tokens/s"]
    lines = [head, ["---", "---", "---", *["---:"] * 4], *rows]
    count = sum(p.numel() for p in model.parameters())
    return (
        f"## {name}\n\n{count:,} parameters, {host / 2**30:.0f} GiB of host memory.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + "\n"
    )


def cells(plan: Plan | None, memory: int | None) -> list[str]:
    if plan is None or not plan.fits(memory):
        return ["—"] * 5
    config = plan.config
    settings = f"{config.granularity.value}, {config.slots} slots, K={config.write_back}"
    if config.resident == "all":
        settings = f'resident="all", K={config.write_back}'
    return [
        settings,
        f"{plan.device / 2**30:.1f} GiB",
        f"{plan.step.floor:.3g} s",
        f"{plan.step.seconds:.3g} s",
        f"{plan.tokens_per_second:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=MODELS)
    parser.add_argument("--gpus", nargs="+", choices=gpus.GPUS, default=PLACES)
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write")
    options = parser.parse_args()
    options.out.write_text(page(options.shapes, options.gpus))


if __name__ == "__main__":
    main()
