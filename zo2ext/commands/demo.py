"""``zo2ext demo``: a tiny language model learns a task by forward passes alone, offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zo2ext.commands.options import option
from zo2ext.demo import run


@dataclass(frozen=True)
class DemoArguments:
    """Fine-tune the tiny language model that ships with zo2ext on a small sentiment task, by
    forward passes alone: no download, no data, a minute on two cores."""

    out: str = option("New folder. Gets accuracy.csv and accuracy.png.", "demo-run")
    steps: int = option("Steps to train; each is two forward passes.", 400)
    seed: int = option("Of batches and directions.", 0)
    device: str | None = option("cuda or cpu. Default: cuda where there is one.", None)


def demo(arguments: DemoArguments) -> None:
    """Run ``zo2ext demo``; see `DemoArguments`."""
    run(
        Path(arguments.out),
        steps=arguments.steps,
        seed=arguments.seed,
        device=arguments.device,
    )
