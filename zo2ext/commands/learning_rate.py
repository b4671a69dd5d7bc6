"""``--lr auto``: the learning rate that a run has recorded, or one found before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from zo2ext.commands.arguments import TrainOptions
from zo2ext.commands.run import autocast
from zo2ext.config import FIND, ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.journal.journal import JOURNAL_FILE, read_journal
from zo2ext.parallel.micro_batches import Batch
from zo2ext.parallel.parallel import Parallel, SingleProcess
from zo2ext.runs.find_lr import RATE_PICTURE, RateCurve, Step, search

Open = Callable[[ZOConfig], AbstractContextManager[tuple[Any, ZOEngine]]]


def with_rate(
    config: ZOConfig,
    arguments: TrainOptions,
    opened: Open,
    batch: Callable[[ZOEngine, Any, int], Batch],
    parallel: Parallel | None,
) -> tuple[ZOConfig, RateCurve | None]:
    """Return `config` with a number as its learning rate, and the curve if that was found now.

    Args:
        config: Settings of the run.
        arguments: Options of the command.
        opened: Opens the model and its engine with other settings.
        batch: Returns this process's share of a step's batch of training data.
        parallel: This process's place among several, which find the same rate.
    """
    if config.lr != FIND:
        return config, None
    process = parallel or SingleProcess()
    recorded = process.agree(_recorded(arguments) if process.rank == 0 else None)
    if recorded is not None:
        print(f"lr      {recorded:.3g}, as recorded in the run", flush=True)
        return config.replace(lr=recorded), None

    @contextmanager
    def stepping(config: ZOConfig) -> Iterator[tuple[ZOEngine, Step]]:
        with opened(config) as (model, zo):

            def step(index: int, lr: float) -> None:
                made = autocast(batch(zo, model, index), zo.device, enabled=arguments.bf16)
                zo.step(made.losses, lr=lr, weights=made.weights)

            yield zo, step

    print("lr      is searched for: steps at a rising rate, which leave no trace", flush=True)
    curve = search(config, stepping)
    steps = len(curve.rates)
    print(f"lr      {curve.lr:.3g}, found in {steps} steps; see {RATE_PICTURE}", flush=True)
    return config.replace(lr=curve.lr, directions=curve.directions), curve


def _recorded(arguments: Any) -> float | None:
    """Return the learning rate of the run that is in the folder; None if a new one begins."""
    journal = Path(arguments.out) / JOURNAL_FILE
    if arguments.overwrite or not journal.is_file():
        return None
    rate = read_journal(journal).header["run"].get("lr")
    return None if rate is None else float(rate)
