"""A Trainer's run for processes that are to be killed. Importing this once makes starts quick."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny
from torch import Tensor, nn
from transformers import TrainerCallback

from zo2ext.integrations.trainer import ZOTrainer, ZOTrainingArguments

torch.set_num_threads(1)
MODEL = tiny("llama-tied")


def rows(count: int = 26) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 199, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


class Count(TrainerCallback):
    """Tells another process how many steps are finished."""

    def __init__(self, reached: Any) -> None:
        self.reached = reached

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reached.value = max(self.reached.value, state.global_step)


def run(
    out: Path, settings: dict[str, Any], reached: Any = None, *, resume: bool = False
) -> nn.Module:
    """The same command each time. `resume`: as users do who ask for the last checkpoint."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 60,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
        "storage": "bfloat16",
        "write_back": "3",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    trainer = ZOTrainer(
        model=copy.deepcopy(MODEL),
        args=ZOTrainingArguments(str(out), **options | settings),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[] if reached is None else [Count(reached)],
    )
    begun = resume and any(p.name.startswith("checkpoint-") for p in out.glob("*"))
    trainer.train(resume_from_checkpoint=begun)
    return trainer.model


def process(out: Path, settings: dict[str, Any], reached: Any, resume: bool) -> None:
    """`run`, quietly."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    run(out, settings, reached, resume=resume)
