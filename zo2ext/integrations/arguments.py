"""Arguments of zeroth-order training with transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from zo2ext.config import RankSettings, Store, ZOConfig, config_from, inherit_settings
from zo2ext.errors import UserError
from zo2ext.parallel.mesh import Mesh
from zo2ext.parallel.parallel import Parallel, rank_and_world_size

_EVALUATION = "evaluation uses the weights in the dtype of training; set compute_dtype"
_COMPILE = (
    "a model that is compiled as one graph cannot pause for its weights; compile its blocks: "
    "zo2ext.compile_blocks(model)"
)
_REFUSED = {  # argument: why forward-only training cannot use it, and what to do instead
    "fp16": "fp16 mixed precision scales gradients, and there are none; use bf16=True, or load "
    "the model in float16",
    "fp16_full_eval": _EVALUATION,
    "bf16_full_eval": _EVALUATION,
    "deepspeed": "zo2ext streams the weights itself",
    "fsdp": "zo2ext streams the weights itself",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "neftune_noise_alpha": "NEFTune needs training mode, and forward passes run in evaluation mode",
    "max_grad_norm": "there is no gradient to clip",
    "auto_find_batch_size": "the batch size defines the run and is recorded in its journal; set "
    "per_device_train_batch_size, or granularity='module' to use less memory",
}

_Base: Any = TrainingArguments if TYPE_CHECKING else object


@dataclass
@inherit_settings(leave_out=("lr", "weight_decay", "seed", "device"))
class ZOArguments(RankSettings, _Base):  # type: ignore[misc]
    """Arguments that zeroth-order training adds to any ``TrainingArguments``: the settings of
    `ZOConfig`, with its help texts and defaults.

    ``learning_rate``, ``weight_decay``, ``seed``, the schedule and all others keep their names.
    Arguments of the optimizer (``optim``, ``adam_beta1``, ...) have no effect. Gradient
    accumulation runs all micro-batches while each unit is loaded once, and holds the hidden states
    of all of them at the same time.
    """

    learning_rate: float | str | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate: a number, or auto, which finds one before the run. "
            "Default: 0.05 / sqrt(trained weights) with one direction; see lr of ZOConfig."
        },
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Must be 0: there is no gradient to clip."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "No effect: there is no backward pass."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Begin a new run in output_dir, and keep the journal of the former one beside "
            "it, as journal.zo2.before-1. Default: continue the run that is there."
        },
    )
    simulate: bool = field(
        default=False, metadata={"help": "Use the simulated device (on the CPU, for tests)."}
    )

    def __post_init__(self) -> None:
        for name, reason in _REFUSED.items():
            value = getattr(self, name, None)
            if value:
                raise UserError(f"{name}={value!r} cannot be used: {reason}")
        self.gradient_checkpointing = False
        if hasattr(self, "activation_checkpointing"):  # the new name in transformers
            self.activation_checkpointing = False
        if self.store == Store.SHARED:
            raise UserError(
                "store='shared' needs all ranks to read weights together, and the Trainer saves on "
                "one; use zo2ext train, or a loop of your own"
            )
        if rank_and_world_size()[1] > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise accelerate takes each process for a single one
        super().__post_init__()
        self.learning_rate = self.zo_config(device=None).lr
        self._check_ranks()

    def _check_ranks(self) -> None:
        each = self.perturb_parallel * self.direction_parallel
        Mesh(1, self.direction_parallel, self.perturb_parallel).check(self.zo_config())
        if self.world_size % each:
            raise UserError(
                f"perturb_parallel x direction_parallel is {each}, but there are "
                f"{self.world_size} processes; start with torchrun --nproc-per-node {each} "
                "script.py, or a multiple"
            )
        if self.world_size > 1:
            # The engine joins the losses of all ranks itself.
            self.average_tokens_across_devices = False
            if self.ignore_data_skip:
                raise UserError("ignore_data_skip=True cannot be used by several processes")

    @property
    def data_ranks(self) -> int:
        """Number of processes, or groups of processes, with different batches."""
        return int(self.world_size) // (self.perturb_parallel * self.direction_parallel)

    def parallel(self) -> Parallel | None:
        """Return this process's place among those that ``torchrun`` started; None if it is the only
        one."""
        if self.world_size == 1:
            return None
        return Parallel.from_environment(
            perturb=self.perturb_parallel, direction=self.direction_parallel, deadline=self.deadline
        )

    @property
    def n_gpu(self) -> int:
        """Number of GPUs in use, at most 1."""
        return min(int(super().n_gpu), 1)

    def zo_config(self, device: str | torch.device | None = None) -> ZOConfig:
        """Return the engine's settings.

        Raises:
            ValueError: A setting is invalid.
        """
        return config_from(
            self, lr=self.learning_rate, device="simulated" if self.simulate else device
        )


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):  # type: ignore[misc]
    """``TrainingArguments`` for `ZOTrainer`."""
