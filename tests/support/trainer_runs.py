"""Tiny runs of ZOTrainer, the plain loop over the same batches, and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from numeric import assert_same_bits
from tiny_models import tiny
from torch import Tensor, nn
from transformers import TrainerCallback

import zo2ext
from zo2ext.integrations.trainer import ZOTrainer, ZOTrainingArguments

LR, EPS, SEED, STEPS = 3e-3, 1e-3, 3, 8


def examples(count: int = 26, length: int = 10) -> list[dict[str, Tensor]]:
    """Sequences with labels of which a varying number is masked."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 199, (length,), generator=generator)
        labels = ids.clone()
        labels[: i % 4] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


DATA = examples()


def arguments(out: Path, **changes: Any) -> ZOTrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "eps": EPS,
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return ZOTrainingArguments(str(out), **settings | changes)


def trainer(out: Path, model: nn.Module | None = None, **changes: Any) -> ZOTrainer:
    keywords = ("callbacks", "compute_loss_func", "compute_metrics", "data_collator", "optimizers")
    chosen = {k: changes.pop(k) for k in keywords if k in changes}
    fails = chosen.get("compute_loss_func") is no_loss
    if fails:  # in the model: another loss function would be another run
        del chosen["compute_loss_func"]
    run = ZOTrainer(
        model=model or tiny("llama-tied"),
        args=arguments(out, **changes),
        train_dataset=DATA,
        eval_dataset=DATA[:6],
        **chosen,
    )
    if fails:
        run.model.forward = no_loss
    return run


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.data.clone() for n, p in model.named_parameters()}


def no_loss(*_: Any, **__: Any) -> Tensor:
    pytest.fail("a recorded step computed its loss")


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.data, expected[name], name)


def linear(step: int) -> float:
    """The learning rate of `step` under the linear schedule."""
    return LR * (STEPS - step) / STEPS


Loss = Callable[[nn.Module, dict[str, Any], Tensor], Tensor]


def model_loss(model: nn.Module, batch: dict[str, Any], items: Tensor) -> Tensor:
    return model(**batch, num_items_in_batch=items, use_cache=False).loss


def hand_written(
    out: Path,
    *,
    micro: int = 1,
    lr: Callable[[int], float] = linear,
    loss: Loss = model_loss,
    model: nn.Module | None = None,
    **settings: Any,
) -> reference.Result:
    """The plain loop, over the batches in the order that a Trainer makes them."""
    loader = trainer(out).get_train_dataloader()

    def steps() -> Iterator[dict[str, Any]]:
        count = 0
        while True:
            epoch = list(loader)
            for start in range(0, len(epoch), micro):
                if count == STEPS:
                    return
                yield {"micro": epoch[start : start + micro]}
                count += 1

    def summed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        items = sum((b["labels"][..., 1:] != -100).sum() for b in batch["micro"])
        return sum(loss(model, dict(b), items).double() for b in batch["micro"])  # type: ignore

    settings = {"weight_decay": 0.1, "eps": EPS, "seed": SEED} | settings
    model = model or tiny("llama-tied").eval()
    zo2ext.chunk_loss(model)  # as the Trainer does
    return reference.mezo(model, steps(), lr=lr, loss=summed, **settings)


class Recorder(TrainerCallback):
    """Everything that was logged, and the engine's records."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
