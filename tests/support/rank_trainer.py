"""A process of a Trainer's run, for `test_ranks_train`: python rank_trainer.py OUT JSON.

JSON has arguments, and "resume": a checkpoint; "kill": [rank, step]. Rank 0 leaves the weights in
OUT.safetensors, each rank its losses in OUT.RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import tiny
from transformers import TrainerCallback

from zo2ext import ZOTrainer, ZOTrainingArguments

torch.set_num_threads(1)


def examples(count: int = 26, length: int = 10) -> list[dict[str, torch.Tensor]]:
    """Sequences with labels of which a varying number is masked."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 199, (length,), generator=generator)
        labels = ids.clone()
        labels[: i % 4] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


class Losses(TrainerCallback):
    """What was logged; kills the process before a step."""

    def __init__(self, kill: list[int] | None) -> None:
        self.rows: list[list[float]] = []
        self._kill = kill

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._kill == [args.process_index, state.global_step]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.rows.append([logs["zo/loss_plus"], logs["zo/loss_minus"]])


def main(out: str, given: str) -> None:
    options = json.loads(given)
    resume, kill = options.pop("resume", None), options.pop("kill", None)
    custom = options.pop("loss", None)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "seed": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": torch.accelerator.is_available(),  # without a GPU it is set for several ranks
        "dataloader_pin_memory": False,
    }
    args = ZOTrainingArguments(out, **settings | options)
    losses, rows = Losses(kill), examples()
    trainer = ZOTrainer(
        model=tiny("llama-tied"),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:5],
        callbacks=[losses],
        compute_loss_func=_mean if custom else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    Path(f"{out}.{args.process_index}.json").write_text(json.dumps(losses.rows))
    if args.process_index == 0:
        parameters = trainer.model.named_parameters()
        save_file({n: p.data.clone() for n, p in parameters}, f"{out}.safetensors")


def _mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    return outputs.logits[..., :4].square().sum() / num_items_in_batch


if __name__ == "__main__":
    main(*sys.argv[1:])
