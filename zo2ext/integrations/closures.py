"""The training loop of ``zo2ext train``: a `ZOTrainer` whose batches are closures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback

from zo2ext.engine.engine import ZOEngine
from zo2ext.integrations.arguments import ZOTrainingArguments
from zo2ext.integrations.progress import ProgressReport
from zo2ext.integrations.trainer import TIMELINE_STEP, ZOTrainer
from zo2ext.parallel.micro_batches import Batch
from zo2ext.parallel.parallel import rank_and_world_size
from zo2ext.runs.find_lr import RateCurve
from zo2ext.runs.folder import RunFolder, never
from zo2ext.runs.timeline import TRACE_FILE, StepTimeline

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Arguments(ZOTrainingArguments):
    """Arguments of a Trainer that accelerate regards as one process; the index is the rank's."""

    @property
    def process_index(self) -> int:
        return rank_and_world_size()[0]

    local_process_index = process_index


class _Report(ProgressReport):
    """Prints one line per evaluation instead of a dictionary per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print nothing; trackers get the values."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        run: RunFolder = self._trainer.run
        value = (metrics or {})[f"eval_{run.watched[0]}"]
        shown = f"{value:.4f}" if run.score.endswith("loss") else f"{value:.1%}"
        if self._progress is not None:
            self._progress.write(f"step {state.global_step:>6}: {run.score} {shown}")


class ClosureTrainer(ZOTrainer):
    """Trains with the loop of transformers' Trainer and an engine that the caller opened.

    Each of several ranks has such a trainer; the engine joins their losses.

    Args:
        model: Model of the engine.
        engine: Engine, which the caller closes.
        run: Folder of the run, with the journal of the steps made so far.
        batch: Function that returns this process's share of a step's batch.
        evaluate: Function that returns the values of `RunFolder.watched` for the current weights.
        options: Further arguments of ``TrainingArguments``.
        early_stopping: Evaluations without a better score after which the run ends; None: never.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: ZOEngine,
        run: RunFolder,
        *,
        batch: Callable[[int], Batch],
        evaluate: Callable[[], Mapping[str, float]],
        options: Mapping[str, Any],
        early_stopping: int | None = None,
    ) -> None:
        self.run, self._batch, self._measure = run, batch, evaluate
        score = run.watched[0]
        with _one_process():
            arguments = _Arguments(
                str(run.folder),
                max_steps=run.steps,
                learning_rate=engine.config.lr,
                weight_decay=engine.config.weight_decay,
                seed=engine.config.seed % 2**32,  # Trainer's generators accept 32 bits
                use_cpu=True,  # closures move their batches to the engine's device
                eval_strategy="steps",
                eval_steps=run.every,
                metric_for_best_model=f"eval_{score}",
                greater_is_better=not score.endswith("loss"),
                disable_tqdm=not engine.is_coordinator,
                **options,
            )
            stop = [] if early_stopping is None else [EarlyStoppingCallback(early_stopping)]
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=range(run.steps),
                eval_dataset=range(1),  # required, but unused
                engine=engine,
                callbacks=stop,
            )

    def _progress(self) -> ProgressReport:
        return _Report(self)

    @property
    def _parallel(self) -> None:
        """None: the engine joins the ranks, and the closures are this rank's."""

    def get_train_dataloader(self) -> Any:
        steps: Any = self.train_dataset
        return DataLoader(steps, collate_fn=lambda rows: {"step": rows[0]})

    def _begin(self, engine: ZOEngine, curve: RateCurve | None) -> None:
        run = self.run
        self._recorded_until, self._meter, self._log = run.recorded, run.meter, run.log
        self._journal_path = run.folder
        there = not engine.is_coordinator or (run.folder / TRACE_FILE).exists()
        step = min(max(TIMELINE_STEP, run.recorded + 1), run.steps - 1)
        self._timeline = StepTimeline(engine, run.folder, step=-1 if there else step)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        step = int(inputs["step"])
        if step < self._recorded_until:
            return self._make_step(model, [never], None, 0)
        batch = self._batch(step)
        loss = self._make_step(model, batch.losses, batch.weights, batch.tokens)
        if step == self._recorded_until:
            self.run.write_settings()
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = self.run.measure(self.run.watched, self._measure)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.state.best_metric is None:  # the score before the first step is one to improve on
            self._determine_best_metric(metrics, None)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    @property
    def scores(self) -> list[tuple[int, float]]:
        """Main score of each evaluation, as (steps done, value)."""
        name = f"eval_{self.run.watched[0]}"
        log = self.state.log_history
        return sorted({int(e["step"]): float(e[name]) for e in log if name in e}.items())


@contextmanager
def _one_process() -> Iterator[None]:
    """Hide the launcher from accelerate, which would initialize the process group again."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
