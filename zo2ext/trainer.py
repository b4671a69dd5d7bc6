"""transformers' Trainer with zeroth-order steps; whatever it does besides is the Trainer's own.

    trainer = ZOTrainer(model=model, args=ZOTrainingArguments("out"), train_dataset=data)
    trainer.train()

While it trains, evaluates or predicts, the model's weights are streamed by a `ZOEngine`;
otherwise the model is an ordinary one on the CPU, with all updates. The forward passes of a step
run in evaluation mode, without dropout, as in MeZO (arXiv:2305.17333).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from zo2ext.engine import StepRecord, ZOEngine, offload
from zo2ext.pipeline import Traffic
from zo2ext.run_state import RunState
from zo2ext.trainer_arguments import ZOArguments, ZOTrainingArguments

__all__ = ["ZOTrainer", "ZOTrainerMixin", "ZOTrainingArguments"]

logger = logging.get_logger(__name__)

_Base: Any = Trainer if TYPE_CHECKING else object


class ZOOptimizer(torch.optim.Optimizer):
    """Where schedulers put the learning rate. The engine makes the steps."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the engine's step, which measured the losses, knows the update already."""


@dataclass
class _Window:
    """Steps since the last log, to report rates of."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    uploaded: int = 0  # bytes
    offloaded: int = 0

    def add(self, tokens: int, seconds: float, before: Traffic, after: Traffic) -> None:
        self.steps += 1
        self.seconds += seconds
        self.tokens += tokens
        self.uploaded += after.uploaded - before.uploaded
        self.offloaded += after.offloaded - before.offloaded

    def metrics(self, last: StepRecord, skipped: int) -> dict[str, float]:
        """Losses and projected gradient of the last step (means over its directions), and rates."""
        return {
            "zo/projected_grad": fmean(last.projected_grads),
            "zo/loss_plus": fmean(last.losses_plus),
            "zo/loss_minus": fmean(last.losses_minus),
            "zo/tokens_per_second": self.tokens / self.seconds,
            "zo/uploaded_bytes_per_step": self.uploaded / self.steps,
            "zo/offloaded_bytes_per_step": self.offloaded / self.steps,
            "zo/skipped_steps": skipped,
        }


class ZOTrainerMixin(_Base):  # type: ignore[misc]
    """Turns a ``Trainer`` subclass into one of zeroth-order steps: ``class X(ZOTrainerMixin, Y)``.

    ``args`` must be a `ZOArguments`. Overridden are: the optimizer, the training step, where the
    model's weights are, what a checkpoint holds, and logging.

    Attributes:
        engine: While training, evaluating or predicting; None otherwise.
    """

    engine: ZOEngine | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window = _Window()
        self._micro_batches: list[tuple[int, Callable[[], Any]]] = []
        self._steps = self._skipped = 0  # of the engine, when there is none
        if not isinstance(self.args, ZOArguments):
            raise TypeError(f"args must be ZOTrainingArguments, got {type(self.args).__name__}")
        if self.optimizer or self.lr_scheduler or self.optimizer_cls_and_kwargs:
            raise ValueError(
                "an optimizer or scheduler of your own cannot be used: the engine makes the steps; "
                "set learning_rate, lr_scheduler_type and lr_scheduler_kwargs"
            )
        for refused, what in (
            (self.is_deepspeed_enabled, "DeepSpeed"),
            (self.is_fsdp_enabled, "FSDP"),
            (self.accelerator.scaler is not None, "the fp16 gradient scaler"),
            (self.is_model_parallel, "a model spread over devices (device_map)"),
        ):
            if refused:
                raise ValueError(
                    f"{what} cannot be used: zo2ext streams the weights itself, to one device"
                )

    # -- where the weights are

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: weights stay on the host, and are streamed."""

    def _open(self, *, train: bool) -> ZOEngine:
        if self.engine is None:
            config = self.args.zo_config(self.args.device)
            engine = offload(self.model, config, train=train)
            if engine.device.type != self.args.device.type:
                engine.close()
                raise ValueError(
                    f"simulate=True computes on the CPU, but args.device is {self.args.device}; "
                    "set use_cpu=True"
                )
            engine.resume(steps=self._steps, skipped=self._skipped)
            self.engine = engine
        return self.engine

    def _close(self) -> None:
        if self.engine is not None:
            self._steps, self._skipped = self.engine.steps, self.engine.skipped
            self.engine.close()
            self.engine = None

    @contextmanager
    def _offloaded(self, *, train: bool) -> Iterator[ZOEngine]:
        """Streamed weights inside; what was there before, an engine or none, afterwards."""
        if self.engine is not None:
            yield self.engine
            return
        try:
            yield self._open(train=train)
        finally:
            self._close()

    # -- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batches.clear()
        self._window = _Window()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._close()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(
                f"{type(self.model).__name__} has nothing to train: all of its "
                f"{sum(1 for _ in self.model.parameters())} parameters are frozen"
                + _adapters(self.model)
            )
        self._open(train=True)
        self.optimizer: Any = ZOOptimizer(trainable, self.args.learning_rate)
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Queue a micro-batch; with the last of a step, run them all in one sweep."""
        inputs = self._prepare_inputs(inputs)
        loss = self._loss_of(model, inputs, num_items_in_batch)
        self._micro_batches.append((self._tokens(inputs), loss))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        assert self.engine is not None
        tokens, losses = zip(*self._micro_batches, strict=True)
        self._micro_batches.clear()
        self._set_mode(model)
        lr = float(self.optimizer.param_groups[0]["lr"])
        start, before = time.perf_counter(), replace(self.engine.traffic)
        mean = self.engine.step(losses, lr=lr)
        seconds = time.perf_counter() - start
        self._window.add(sum(tokens), seconds, before, self.engine.traffic)
        return torch.tensor(mean, device=self.args.device)

    def _loss_of(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Callable[[], Any]:
        """A micro-batch's share of its step's loss, scaled as ``Trainer.training_step`` does."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        share = 1 if scaled else self.current_gradient_accumulation_steps

        def loss() -> Any:
            with self.compute_loss_context_manager():
                # compute_loss takes keys out of its inputs, so each call gets its own dict.
                value = self.compute_loss(model, {**inputs}, num_items_in_batch=num_items_in_batch)
            return value if share == 1 else value / share

        return loss

    def _set_mode(self, model: nn.Module) -> None:
        model.eval()

    def _tokens(self, inputs: dict[str, Any]) -> int:
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return main.numel() if isinstance(main, Tensor) else 0

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: there is no gradient."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """None: it is not logged; ``zo/projected_grad`` is."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        forward = super().floating_point_ops(inputs) // 3  # the Trainer counts backward as two
        return int(2 * self.args.directions * forward)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        engine = self.engine
        if "loss" in logs and self._window.steps and engine is not None and engine.last:
            logs.update(self._window.metrics(engine.last, engine.skipped))
            self._window = _Window()
        super().log(logs, start_time)

    # -- evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._offloaded(train=False):
            return super().evaluation_loop(*args, **kwargs)

    # -- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.engine is not None and self.args.should_save:
            state = RunState.of(self.engine, self.model)
            state.save(Path(output_dir), self.engine.masters())

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        state = RunState.load(folder)
        state.check_model(self.model, folder)
        for difference in state.differences(self.args.zo_config()):
            logger.warning(f"This run does not continue that of {folder}: {difference}.")
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            assert self.engine is not None
            RunState.load(Path(checkpoint)).resume(self.engine, Path(checkpoint))


def _adapters(model: nn.Module) -> str:
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return "; set requires_grad_(True) on what is to be trained"
    return f" (adapters: {', '.join(adapters)}); load an adapter with is_trainable=True"


class ZOTrainer(ZOTrainerMixin, Trainer):
    """``Trainer`` with zeroth-order steps. ``args``: `ZOTrainingArguments`."""
