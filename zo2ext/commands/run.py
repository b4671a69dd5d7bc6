"""The run folder and the loop of training, on a text and on a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zo2ext._version import __version__
from zo2ext.commands.arguments import TrainOptions
from zo2ext.engine.engine import ZOEngine
from zo2ext.errors import UserError
from zo2ext.integrations.closures import ClosureTrainer
from zo2ext.journal.journal import JOURNAL_FILE, set_aside
from zo2ext.parallel.micro_batches import Batch
from zo2ext.parallel.parallel import rank_and_world_size
from zo2ext.runs.checkpoint_state import last_complete
from zo2ext.runs.find_lr import RateCurve, described
from zo2ext.runs.folder import FINAL, RunFolder, identifying

# Options that older journals lack: they identify a run only if they differ from the default.
_NEW = ("lr_scheduler_type", "warmup_steps", "bf16", "validation")
_ENDING = (
    "overwrite",
    "save_every",
    "save_total_limit",
    "early_stopping",
    "report_to",
    "push_to_hub",
)


def run_folder(
    engine: ZOEngine,
    arguments: Any,
    *,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    curve: RateCurve | None,
    watched: tuple[str, ...],
    ending: Mapping[str, Any],
    checkpoint: Path | None,
) -> RunFolder:
    """Return the folder of a run, which records everything that defines the run.

    Args:
        engine: Engine of the run.
        arguments: Options of the command.
        settings: Values of options that replace those in `arguments`.
        data: Description of the training data.
        curve: Result of the search for the learning rate; None without one.
        watched: Names of the values that evaluations measure, the main score first.
        ending: Options that only affect how the run ends, besides its steps.
        checkpoint: Checkpoint whose weights the engine has.
    """
    if arguments.overwrite:
        if engine.is_coordinator:
            set_aside(Path(arguments.out) / JOURNAL_FILE)
        arguments.overwrite = False  # once: from here on it is this run that continues
    chosen = {
        **asdict(arguments),
        **engine.config.words(),
        "device": str(engine.config.device or engine.device.type),
        **settings,
    }
    where = ["model", "data", "out", "text", *ending, *_ENDING]
    where += [name for name in _NEW if chosen.get(name) == getattr(type(arguments), name, None)]
    if arguments.lr_scheduler_type == "constant" and not arguments.warmup_steps:
        where.append("steps")  # more of them continue the run
    return RunFolder(
        engine,
        Path(arguments.out),
        settings={"zo2ext": __version__, **chosen},
        identity={**identifying(arguments, chosen, where), **data, **described(curve)},
        ending={"steps": arguments.steps, "early_stopping": arguments.early_stopping, **ending},
        every=arguments.eval_every,
        watched=watched,
        checkpoint=checkpoint,
    )


def train_in(
    run: RunFolder,
    model: Any,
    arguments: TrainOptions,
    batch: Callable[[int], Batch],
    evaluate: Callable[[], Mapping[str, float]],
    checkpoint: Path | None,
) -> list[tuple[int, float]]:
    """Make all steps of a run and return its main scores, as (steps done, value)."""
    device = run.engine.device
    _check_trackers(arguments.report_to or [])

    def measure() -> Mapping[str, float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            return evaluate()

    save = arguments.save_every
    trainer = ClosureTrainer(
        model,
        run.engine,
        run,
        batch=lambda step: autocast(batch(step), device, enabled=arguments.bf16),
        evaluate=measure,
        options={
            "lr_scheduler_type": arguments.lr_scheduler_type,
            "warmup_steps": arguments.warmup_steps,
            "report_to": arguments.report_to or "none",
            "save_strategy": "no" if save is None else "steps",
            "save_steps": save or 500,
            "save_total_limit": arguments.save_total_limit,
            "logging_steps": 10,
            "eval_on_start": checkpoint is None,
        },
        early_stopping=arguments.early_stopping,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.scores[-1][0] != run.engine.steps:
        trainer.evaluate()
    return trainer.scores


def autocast(batch: Batch, device: torch.device, *, enabled: bool) -> Batch:
    """Return `batch` with losses that are computed under bfloat16 autocast, if `enabled`."""
    if not enabled:
        return batch

    def run(loss: Callable[[], Any]) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return loss()

    return replace(batch, losses=[partial(run, loss) for loss in batch.losses])


def _check_trackers(names: Sequence[str]) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    there = [*get_available_reporting_integrations(), "all", "none"]
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"report_to: {', '.join(missing)} is not installed; expected some of {', '.join(there)}"
        )


def push(run: RunFolder, repository: str | None) -> None:
    """Upload the final weights to `repository` on the Hugging Face hub, if it is not None."""
    if repository is None or run.log is None:
        return
    from huggingface_hub import HfApi

    hub = HfApi()
    name = hub.create_repo(repository, exist_ok=True).repo_id
    hub.upload_folder(repo_id=name, folder_path=run.folder / FINAL)
    print(f"uploaded to the hub: {name}")


def check_first_loss(model: str, loss: float, what: str) -> None:
    """Raise an error if the loss of the untrained model is not finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"model {model!r} has a loss of {loss}{what} before any training: its weights are "
            "damaged, or overflow in their dtype"
        )


def checkpoint_of(arguments: Any) -> Path | None:
    """Return the newest complete checkpoint of the run; None if there is none, for a new run, and
    with several processes, which start from the journal that rank 0 shares."""
    folder = Path(arguments.out)
    if arguments.overwrite:
        return None
    return last_complete(folder) if rank_and_world_size()[1] == 1 and folder.is_dir() else None
