"""A Trainer's progress on the terminal."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from zo2ext.runs.progress import Progress


class ProgressReport(TrainerCallback):
    """Shows steps, loss, learning rate and throughput; see `Progress`.

    Args:
        trainer: `ZOTrainerMixin` whose steps are shown.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        silent = args.disable_tqdm or not state.is_local_process_zero
        self._progress = Progress(state.max_steps, done=state.global_step, silent=silent)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = self._trainer.engine.last
        if self._progress is not None and last is not None:
            status = f"loss {last.loss:.3f}, lr {last.lr:.3g}, {self._trainer.rates}"
            self._progress.update(status, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._progress is not None and state.is_local_process_zero:
            shown = {k: v for k, v in (logs or {}).items() if k != "total_flos"}
            self._progress.write(str({k: float(f"{v:.4g}") for k, v in shown.items()}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.close()
