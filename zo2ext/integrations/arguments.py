"""Arguments of zeroth-order training with transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from zo2ext.config import WRITE_BACK, Granularity, Store, ZOConfig, as_count
from zo2ext.ops import Distribution, Rounding
from zo2ext.parallel.mesh import Mesh
from zo2ext.parallel.parallel import Parallel

_DTYPES: dict[str, torch.dtype] = {
    **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")},
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
}
_REFUSED = {  # argument: why a forward-only run has no use for it, and what to do
    "fp16": "fp16 mixed precision scales gradients, and there are none; use bf16=True, or load "
    "the model in float16",
    "fp16_full_eval": "evaluation reads the weights in the dtype they are trained in; "
    "set compute_dtype",
    "bf16_full_eval": "evaluation reads the weights in the dtype they are trained in; "
    "set compute_dtype",
    "deepspeed": "weights are streamed by zo2ext itself",
    "fsdp": "weights are streamed by zo2ext itself",
    "torch_compile": "a compiled whole model cannot pause for its weights; compile its blocks: "
    "zo2ext.compile_blocks(model)",
    "torch_compile_backend": "a compiled whole model cannot pause for its weights; compile blocks",
    "torch_compile_mode": "a compiled whole model cannot pause for its weights; compile blocks",
    "neftune_noise_alpha": "NEFTune acts in training mode, and forwards run in evaluation mode",
    "max_grad_norm": "there is no gradient to clip",
    "auto_find_batch_size": "the batch size is a part of what a run is, and of its journal; set "
    "per_device_train_batch_size, or granularity='module' to need less memory",
}

_Base: Any = TrainingArguments if TYPE_CHECKING else object


def _argument(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ZOArguments(_Base):  # type: ignore[misc]
    """What zeroth-order training adds to any ``TrainingArguments``; see `ZOConfig` for reasons.

    ``learning_rate``, ``weight_decay``, ``seed``, the schedule and everything else keep their
    names. The optimizer's own arguments (``optim``, ``adam_beta1``, ...) have no effect.
    Gradient accumulation runs all micro-batches in one sweep over the weights; their activations
    between blocks are held together.
    """

    learning_rate: float = _argument(1e-6, "Initial learning rate; 1e-6 suits billions of weights.")
    max_grad_norm: float = _argument(0.0, "Must be 0: there is no gradient to clip.")
    gradient_checkpointing: bool = _argument(False, "No effect: nothing is kept for a backward.")

    eps: float = _argument(1e-3, "Perturbation scale.")
    directions: int = _argument(1, "Directions a step averages over; each is two forward passes.")
    distribution: Distribution = _argument(Distribution.GAUSSIAN, "Of the directions.")
    storage: str | None = _argument(
        None,
        "Format of the weights at rest: fp32, bf16, fp16, e4m3 or split. Default: their own.",
    )
    compute_dtype: str | None = _argument(
        None, "Dtype of the weights in the forward pass. Default: each its own."
    )
    rounding: Rounding = _argument(Rounding.STOCHASTIC, "How weights are rounded to storage.")
    write_back: str = _argument("1", WRITE_BACK)
    granularity: Granularity = _argument(
        Granularity.BLOCK, "What is loaded at once: a block, or a single module (least memory)."
    )
    slots: int = _argument(3, "Device buffers that streamed units pass through.")
    resident: str = _argument(
        "0", "Units kept on the device: a count, 'all', or a size such as 8GiB."
    )
    one_copy: bool = _argument(
        False, "Perturb a unit's weights for one forward pass after the other: less memory."
    )
    journal_sync: int = _argument(1, "Steps between waits for the disk with the journal.")
    store: Store = _argument(Store.HOST, "Where weights rest: host memory, or disk.")
    host_memory: str = _argument("4GiB", "With store=disk, what the store may take of host memory.")
    perturb_parallel: int = _argument(
        1, "Under torchrun: 2 deals the forward passes at +eps and at -eps to different processes."
    )
    direction_parallel: int = _argument(
        1, "Under torchrun: processes that a step's directions are dealt over."
    )
    deadline: float = _argument(
        Parallel.deadline,
        "Under torchrun: seconds that processes wait for each other in a step, once they are done "
        "themselves.",
    )
    simulate: bool = _argument(
        False, "Stream through the simulated device (on the CPU, for tests), not a real one."
    )

    def __post_init__(self) -> None:
        for name, reason in _REFUSED.items():
            value = getattr(self, name, None)
            if value:
                raise ValueError(f"{name}={value!r} cannot be used: {reason}")
        self.gradient_checkpointing = False
        if hasattr(self, "activation_checkpointing"):  # its newer name
            self.activation_checkpointing = False
        if self.store == Store.SHARED:
            raise ValueError(
                "store='shared' needs all ranks to read weights together, which the Trainer's own "
                "saving does not; use zo2ext train, or a loop of your own"
            )
        super().__post_init__()
        self.zo_config(device=None)
        self._check_ranks()

    def _check_ranks(self) -> None:
        each = self.perturb_parallel * self.direction_parallel
        Mesh(1, self.direction_parallel, self.perturb_parallel).check(self.directions)
        if self.world_size % each:
            raise ValueError(
                f"perturb_parallel x direction_parallel is {each}, but there are "
                f"{self.world_size} processes; start with torchrun --nproc-per-node {each} "
                "script.py, or a multiple"
            )
        if self.world_size > 1:
            # The loss is that of the joined batch in any case: the engine adds it up.
            self.average_tokens_across_devices = False
            if self.ignore_data_skip:
                raise ValueError("ignore_data_skip=True cannot be used by several processes")

    @property
    def data_ranks(self) -> int:
        """Processes, or groups of them, that have batches of their own."""
        return int(self.world_size) // (self.perturb_parallel * self.direction_parallel)

    def parallel(self) -> Parallel | None:
        """This process's place among those that ``torchrun`` started; None for one alone."""
        if self.world_size == 1:
            return None
        return Parallel.from_environment(
            perturb=self.perturb_parallel,
            direction=self.direction_parallel,
            deadline=self.deadline,
        )

    @property
    def n_gpu(self) -> int:
        """At most 1: further GPUs are left alone."""
        return min(int(super().n_gpu), 1)

    def zo_config(self, device: str | torch.device | None = None) -> ZOConfig:
        """The engine's settings.

        Raises:
            ValueError: One of them is wrong.
        """
        return ZOConfig(
            eps=self.eps,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            directions=self.directions,
            seed=self.seed,
            distribution=self.distribution,
            storage=self.storage,
            compute_dtype=_dtype("compute_dtype", self.compute_dtype),
            rounding=self.rounding,
            write_back=as_count(str(self.write_back)),
            device="simulated" if self.simulate else device,
            granularity=self.granularity,
            slots=self.slots,
            resident=as_count(str(self.resident)),
            one_copy=self.one_copy,
            journal_sync=self.journal_sync,
            store=self.store,
            host_memory=self.host_memory,
        )


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):  # type: ignore[misc]
    """``TrainingArguments`` of a zeroth-order run, for `zo2ext.trainer.ZOTrainer`."""


def _dtype(argument: str, name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in _DTYPES:
        raise ValueError(f"{argument} must be one of {', '.join(_DTYPES)} or None, got {name!r}")
    return _DTYPES[name]
