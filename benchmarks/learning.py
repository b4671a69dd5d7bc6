"""How fast each method learns: held-out loss after as many forward passes, and as many loads.

    python benchmarks/learning.py run [--tasks demo ...] [--methods mezo ...] [--seeds 0 1 2]
    python benchmarks/learning.py show [--picture docs/learning.png]

A load is one passage of the weights through the device: one step, however many directions it has.
`run` searches the learning rate of each method on each task, twice or half as large at a time, by
the loss at the end of the runs of the first seeds, and then runs the other seeds. Each finished run
is a line of benchmarks/results/learning-TASK.jsonl at once, and is not run again, so that several
commands may run at the same time if their tasks or methods differ. `show` prints the tables and
draws the picture; tables.py writes the tables into docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import learning_tables
import timing
import torch
from learning_tasks import TASKS, Task

import zo2ext

DATA = Path(os.environ.get("ZO2EXT_TEST_DATA", timing.ROOT.parent / "shared" / "data"))
BACKWARD = 2  # forward passes that a backward pass costs about as much as
WEIGHTS = 260_032  # of the model that rates below are written for
Settings = dict[str, Any]
Steps = Iterator[tuple[int, Any]]  # forward passes so far, and the model, after each step

# -- methods


def zeroth_order(task: Task, lr: float, seed: int, settings: Settings) -> Steps:
    """Train with the engine."""
    model, passes = task.start(), 0
    config = zo2ext.ZOConfig(lr=lr, seed=seed, device="cpu", resident="all", **settings)
    with zo2ext.offload(model, config) as zo:
        while True:
            batch = task.batch(zo.steps, seed)
            zo.step(lambda batch=batch: task.loss(model, batch))
            passes += len(zo.last.losses_plus) + len(zo.last.losses_minus)
            yield passes, model


def first_order(task: Task, lr: float, seed: int, settings: Settings) -> Steps:
    """Train with AdamW: all weights, or LoRA's of the `rank` in `settings`."""
    model = task.start()
    if settings:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        matrices = r".*\.(q_proj|v_proj|query|value)"
        lora = LoraConfig(r=settings["rank"], target_modules=matrices)
        model = inject_adapter_in_model(lora, model).eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for step in range(task.passes):
        task.loss(model, task.batch(step, seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield (1 + BACKWARD) * (step + 1), model


def found_rate(task: Task, seed: int, settings: Settings) -> float:
    """Return the learning rate that the finder finds on the training data, from the start."""
    model = task.start()
    config = zo2ext.ZOConfig(seed=seed, device="cpu", resident="all", **settings)
    random.seed(seed)

    def loss() -> torch.Tensor:
        # Python's generator is in the same state in all calls of a step: they share the batch.
        return task.loss(model, task.batch(random.randrange(2**31), seed))

    return zo2ext.find_lr(model, config, loss).lr


def probe(task: Task, lr: float, seed: int, settings: Settings) -> Steps:
    """Fit a linear head to the frozen encoder's features of all training examples."""
    assert task.probed is not None
    yield task.every, task.probed()


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        title: Name in tables.
        train: Function that trains for longer than any budget.
        rate: Learning rate that the search begins with, for a model of `WEIGHTS` weights; it falls
            with the square root of the weights. "auto": the rate finder's, for each seed anew.
            None: there is nothing to search.
        settings: Settings of `train`; for methods of zeroth order, those of `zo2ext.ZOConfig`.
    """

    title: str
    train: Callable[[Task, float, int, Settings], Steps]
    rate: float | str | None
    settings: Settings = field(default_factory=dict)


SLOPE_RATE, NORMALIZED_RATE = 4e-4, 8e-3


def _centered(title: str, directions: int, distribution: str, **settings: Any) -> Method:
    rate = NORMALIZED_RATE if settings.get("normalize") else SLOPE_RATE
    settings |= {"directions": directions, "distribution": distribution, "estimator": "centered"}
    return Method(title, zeroth_order, rate, {"normalize": False, **settings})


def _preset(name: str) -> Settings:
    return {"estimator": "centered", **zo2ext.PRESETS[name]}


METHODS = {
    "mezo": Method("MeZO: two-sided, 1 direction", zeroth_order, 1e-4),
    "centered-8": _centered("centered, 8", 8, "rademacher"),
    "fzoo": Method(
        "centered, 8, normalized (FZOO)", zeroth_order, NORMALIZED_RATE, _preset("fzoo")
    ),
    "two-sided-8": Method(
        "two-sided, 8", zeroth_order, SLOPE_RATE, {"estimator": "two_sided", "directions": 8}
    ),
    "adamw": Method("first order: AdamW", first_order, 1e-3),
    "lora": Method("first order: AdamW on LoRA of rank 8", first_order, 4e-3, {"rank": 8}),
    "probe": Method("first order: linear probing", probe, None),
    "gaussian-8": _centered("centered, 8, Gaussian", 8, "gaussian"),
    "normalized-gaussian-8": _centered(
        "centered, 8, normalized, Gaussian", 8, "gaussian", normalize=True
    ),
    "centered-4": _centered("centered, 4", 4, "rademacher"),
    "normalized-4": _centered("centered, 4, normalized", 4, "rademacher", normalize=True),
    "centered-16": _centered("centered, 16", 16, "rademacher"),
    "normalized-16": _centered("centered, 16, normalized", 16, "rademacher", normalize=True),
    "es": Method(
        "centered, 30, normalized, Gaussian (ES)", zeroth_order, NORMALIZED_RATE, _preset("es")
    ),
    "mezo-auto": Method("MeZO, rate from the finder", zeroth_order, "auto"),
    "centered-8-auto": replace(
        _centered("centered, 8, rate from the finder", 8, "rademacher"), rate="auto"
    ),
    "fzoo-auto": Method(
        "centered, 8, normalized, rate from the finder", zeroth_order, "auto", _preset("fzoo")
    ),
    "gaussian-8-auto": replace(
        _centered(
            "centered, 8, normalized, Gaussian, rate from the finder", 8, "gaussian", normalize=True
        ),
        rate="auto",
    ),
    "gaussian-16-auto": replace(
        _centered(
            "centered, 16, normalized, Gaussian, rate from the finder",
            *(16, "gaussian"),
            normalize=True,
        ),
        rate="auto",
    ),
    "rank-4": Method(
        "MeZO, rank 4 for 50 steps", zeroth_order, 1e-4, {"rank": 4, "write_back": 50}
    ),
    "lozo": Method(
        "MeZO, rank 2 for 50 steps (LOZO)", zeroth_order, 1e-4, dict(zo2ext.PRESETS["lozo"])
    ),
    "eggroll": Method(
        "centered, 32, normalized, rank 1 (EGGROLL)",
        zeroth_order,
        NORMALIZED_RATE,
        _preset("eggroll"),
    ),
    "rank-1": Method(
        "MeZO, rank 1 for 50 steps", zeroth_order, 1e-4, {"rank": 1, "write_back": 50}
    ),
    "rank-4-8": _centered(
        *("centered, 8, normalized, Gaussian, rank 4", 8, "gaussian"),
        normalize=True,
        rank=4,
        write_back=1,
    ),
    "rank-1-8": _centered(
        *("centered, 8, normalized, Gaussian, rank 1", 8, "gaussian"),
        normalize=True,
        rank=1,
        write_back=1,
    ),
    "guarded-mezo": Method("MeZO, guard at 2", zeroth_order, 1e-4, {"clip": 2.0}),
    "guarded-8": _centered("centered, 8, guard at 2", 8, "rademacher", clip=2.0),
}

# -- runs


def learning_curve(task: Task, steps: Steps) -> tuple[list[list[float]], bool]:
    """Return points of passes, loads, held-out loss and perhaps accuracy, and whether it diverged.

    A run ends where its loss is not finite, or more than twice that of the start plus one.
    """
    start = task.judge(task.model)
    due, points = task.every, [[0, 0, *start.values()]]
    for loads, (passes, model) in enumerate(steps, 1):
        if passes > task.passes:
            break
        if passes >= due:
            due = passes - passes % task.every + task.every
            values = task.judge(model)
            if not values["loss"] <= 2 * start["loss"] + 1:
                return points, True
            points.append([passes, loads, *(round(value, 5) for value in values.values())])
    return points, False


class Results:
    """Finished runs of one task, in a file with one JSON line per run.

    The first line describes the task. A line with an environment has an "id", which the runs that
    were made there name.
    """

    KEY = ("settings", "lr", "seed", "passes")

    def __init__(self, folder: Path, task: Task) -> None:
        self.path, self.task = folder / f"learning-{task.name}.jsonl", task
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        if not lines:
            weights = sum(weight.numel() for weight in task.model.parameters())
            head = {"benchmark": "learning", "task": task.name, "title": task.title}
            head |= {"weights": weights, "passes": task.passes, "target": task.target}
            self._append(head)
        place = timing.environment(torch.device("cpu"))
        changed = "+" if place["dirty"] else ""
        self.place = f"{str(place['commit'])[:10]}{changed} {place['date']}"
        if all(line.get("id") != self.place for line in lines):
            self._append({"id": self.place, "environment": place})

    def _read(self) -> list[dict[str, Any]]:
        """Return all lines, also those that other processes have written since."""
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps([row["method"], *(row[name] for name in self.KEY)], sort_keys=True)

    def run(self, name: str, lr: float | str | None, seed: int) -> dict[str, Any]:
        """Return the run of a method; it is made and recorded unless it was before."""
        method, task = METHODS[name], self.task
        row: dict[str, Any] = {"method": name, "title": method.title, "settings": method.settings}
        row |= {"lr": float(f"{lr:.3g}") if isinstance(lr, float) else lr}
        row |= {"seed": seed, "passes": task.passes}
        runs = {self._key(line): line for line in self._read() if "curve" in line}
        if self._key(row) in runs:
            return runs[self._key(row)]
        begin, rate = time.perf_counter(), row["lr"]
        if rate == "auto":
            rate = row["found"] = found_rate(task, seed, method.settings)
        with closing(method.train(task, rate, seed, method.settings)) as steps:
            curve, diverged = learning_curve(task, steps)
        row |= {"seconds": round(time.perf_counter() - begin, 1), "environment": self.place}
        row |= {"diverged": diverged, "curve": curve}
        self._append(row)
        end = "diverged" if diverged else f"loss {curve[-1][2]:.3f}"
        print(f"{task.name}, {method.title}, {rate}, seed {seed}: {end}", flush=True)
        return row

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def best_rate(score: Callable[[float], float], start: float) -> float:
    """Return the rate, a power of two times `start`, whose neighbors both have larger scores."""
    scores = {start: score(start)}
    for factor in (2.0, 0.5):
        rate = min(scores, key=scores.__getitem__)
        while (after := rate * factor) not in scores:
            scores[after] = score(after)
            if scores[after] < scores[rate]:
                rate = after
    return min(scores, key=scores.__getitem__)


def run_method(results: Results, name: str, seeds: Sequence[int], search: bool) -> None:
    """Search the learning rate of a method, unless told otherwise, and run it with all seeds."""
    method, task = METHODS[name], results.task
    if method.train is probe and task.probed is None:
        return
    if not isinstance(method.rate, float):
        for seed in seeds if method.rate else seeds[:1]:
            results.run(name, method.rate, seed)
        return

    def score(lr: float) -> float:
        rows = [results.run(name, lr, seed) for seed in seeds[: task.search_seeds]]
        return fmean(math.inf if row["diverged"] else row["curve"][-1][2] for row in rows)

    weights = sum(weight.numel() for weight in task.model.parameters())
    lr = method.rate * task.rate_scale * math.sqrt(WEIGHTS / weights)
    if search:
        lr = best_rate(score, lr)
    for seed in seeds:
        results.run(name, lr, seed)


# -- the command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--passes", type=int, help="forward passes per run; default: the task's")
    parser.add_argument(
        "--no-search", action="store_true", help="run with the rate that the search would begin at"
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument("--results", type=Path, default=timing.ROOT / "benchmarks" / "results")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    if arguments.command == "run":
        torch.set_num_threads(1)  # models this small gain nothing from a second one
        for name in arguments.tasks:
            task = TASKS[name](arguments.data)
            task = replace(task, passes=arguments.passes or task.passes)
            results = Results(arguments.results, task)
            for method in arguments.methods:
                run_method(results, method, arguments.seeds, not arguments.no_search)
        return
    found = learning_tables.read(arguments.results)
    for content in found:
        print("\n".join(learning_tables.table(content)), end="\n\n")
    if arguments.picture:
        learning_tables.picture(found, arguments.picture)


if __name__ == "__main__":
    main()
