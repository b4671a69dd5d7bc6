"""Steps of a Trainer that find the learning rate, before its run, and leave no trace in it."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.errors import UserError
from zo2ext.runs.find_lr import Step, offloaded_for_search

_COUNTS = ("_metrics", "_total_train_tokens")  # of TRL's trainers, which losses add to


@contextmanager
def rehearsal(trainer: Any, config: ZOConfig) -> Iterator[tuple[ZOEngine, Step]]:
    """Offload the model of a `ZOTrainerMixin`, and make steps with its training data.

    The batches are those that the run is going to have in its first steps.

    Raises:
        UserError: The training data can be read only once.
    """
    data = trainer.train_dataset
    if isinstance(data, Iterator):
        raise UserError(
            f"learning_rate='auto' reads training data before the run, but {type(data).__name__} "
            "can be read only once; pass a data set that begins anew with each iter(), or a number"
        )
    kept = {
        name: copy.deepcopy(getattr(trainer, name)) for name in _COUNTS if hasattr(trainer, name)
    }
    sync = trainer.accelerator.sync_gradients
    place = trainer.state.global_step, trainer._recorded_until
    with offloaded_for_search(trainer.model, config, trainer._parallel) as engine:
        trainer.engine, trainer._recorded_until = engine, 0
        batches = _batches(trainer)

        def step(index: int, lr: float) -> None:
            trainer.state.global_step, trainer._rehearsed = index, lr
            samples, items = next(batches)
            for number, inputs in enumerate(samples, start=1):
                trainer.accelerator.gradient_state._set_sync_gradients(number == len(samples))
                trainer.training_step(trainer.model, inputs, items)

        try:
            yield engine, step
        finally:
            batches.close()
            trainer.engine = trainer._rehearsed = None
            trainer.state.global_step, trainer._recorded_until = place
            trainer.accelerator.gradient_state._set_sync_gradients(sync)
            trainer._micro_batches.clear()
            trainer._random_data.forget()
            for name, value in kept.items():
                setattr(trainer, name, value)


def _batches(trainer: Any) -> Generator[tuple[list[Any], torch.Tensor | int | None]]:
    """Yield the micro-batches of each step, and the number of labels in them, epoch by epoch."""
    loader, epoch = trainer.get_train_dataloader(), 0
    each = trainer.args.gradient_accumulation_steps
    while True:
        sampler: Any = getattr(loader, "batch_sampler", None)
        for part in (loader, getattr(sampler, "batch_sampler", None)):  # as Trainer does
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches = iter(loader)
        while (found := trainer.get_batch_samples(batches, each, trainer.args.device))[0]:
            yield found
        epoch += 1
