"""Options of the engine that several commands share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import torch

from zo2ext.commands.options import PLACE as PLACE
from zo2ext.commands.options import option
from zo2ext.config import WRITE_BACK, Granularity, Store, ZOConfig, as_count
from zo2ext.ops import Rounding
from zo2ext.ops.formats import Storage
from zo2ext.parallel.mesh import Mesh
from zo2ext.parallel.parallel import Parallel, rank_and_world_size

METHOD = "method"  # heading of options


class Compute(StrEnum):
    """Names on the command line of dtypes that models compute in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        return Storage(self.value).dtype


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Of whatever streams a model: where its weights are, and how they travel."""

    device: str | None = option(
        "Where the model runs: cuda, cuda:1, cpu or simulated (for tests). Default: cuda where "
        "there is one, otherwise cpu.",
        None,
        group=PLACE,
    )
    granularity: Granularity = option(
        "What is loaded at once: a decoder block, or a single module (least memory).",
        Granularity.BLOCK,
        group=PLACE,
    )
    resident: str = option(
        "Units that stay on the device: a count, 'all', or a size such as 8GiB.", "0", group=PLACE
    )
    slots: int = option("Device buffers that the other units pass through.", 3, group=PLACE)
    store: Store = option(
        "Where weights rest: host memory; memory that is shared by the ranks of a host; or disk, "
        "for models larger than that.",
        Store.HOST,
        group=PLACE,
    )
    host_memory: str = option(
        "With --store disk, what the store may take of host memory.", "4GiB", group=PLACE
    )
    one_copy: bool = option(
        "Perturb a unit's weights for one forward pass after the other, each over the one before: "
        "half the memory for copies, one more pass of noise.",
        False,
        group=PLACE,
    )

    def place(self) -> ZOConfig:
        """The engine's settings of where and how.

        Raises:
            ValueError: Naming the setting and what it got.
        """
        return ZOConfig(
            device=self.device,
            granularity=self.granularity,
            slots=self.slots,
            one_copy=self.one_copy,
            store=self.store,
            host_memory=self.host_memory,
            resident=as_count(self.resident),
        )

    def at_least(self, least: dict[str, int]) -> None:
        """Raise `ValueError` for an option below its bound; one that is None has none."""
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(PlaceOptions):
    """Of whatever runs a model through the engine as training does."""

    seed: int = option("Of samples, batches and directions.", 0, group=METHOD)
    storage: Storage | None = option(
        "Weights at rest. Default: as the model is saved.", None, group=METHOD
    )
    compute_dtype: Compute | None = option(
        "Weights in the forward pass. Default: as the model is saved.", None, group=METHOD
    )

    def config(self, trainable: int) -> ZOConfig:
        """The engine's settings, for a model with `trainable` weights.

        Raises:
            ValueError: Naming the setting and what it got.
        """
        return self.place().replace(
            seed=self.seed,
            storage=self.storage,
            compute_dtype=self.compute_dtype.dtype if self.compute_dtype else None,
        )


@dataclass(frozen=True, kw_only=True)
class MethodOptions(EngineOptions):
    """Of whatever trains."""

    steps: int = option("Steps to train.", 600, group=METHOD)
    lr: float | None = option(
        "Learning rate. Default: 0.05 / sqrt(trainable weights): 1e-4 for 260 thousand, 4e-7 for "
        "13 billion.",
        None,
        group=METHOD,
    )
    eps: float = option("Perturbation scale.", 1e-3, group=METHOD)
    weight_decay: float = option("Decoupled weight decay.", 0.0, group=METHOD)
    directions: int = option(
        "Directions that a step averages over; each is two forward passes.", 1, group=METHOD
    )
    write_back: str = option(WRITE_BACK, "1", group=METHOD)
    rounding: Rounding = option(
        "How weights are rounded to storage.", Rounding.STOCHASTIC, group=METHOD
    )
    journal_sync: int = option(
        "Steps between waits for the disk with the journal. More than 1 spares time where steps "
        "are short; only a power failure could then cost steps.",
        1,
        group=PLACE,
    )
    micro_batch: int | None = option(
        "Of a batch, what one forward pass has. With it, results are the same for any number of "
        "processes. Default: the batch divided by the data ranks.",
        None,
        group=METHOD,
    )
    perturb_parallel: int = option(
        "Under torchrun: 2 deals the forward passes at +eps and at -eps to different processes.",
        1,
        group=PLACE,
    )
    direction_parallel: int = option(
        "Under torchrun: processes that a step's directions are dealt over. Over what is left, "
        "the batch is.",
        1,
        group=PLACE,
    )
    deadline: float = option(
        "Under torchrun: seconds that processes wait for each other in a step, once they are done "
        "themselves.",
        Parallel.deadline,
        group=PLACE,
    )

    def parallel(self) -> Parallel | None:
        """This process's place among those that ``torchrun`` started; None for one alone.

        Raises:
            ValueError: The processes cannot be laid out as asked for.
        """
        self._check_ranks()
        if rank_and_world_size()[1] == 1:
            return None
        return Parallel.from_environment(
            perturb=self.perturb_parallel,
            direction=self.direction_parallel,
            deadline=self.deadline,
        )

    def _check_ranks(self) -> None:
        _, ranks = rank_and_world_size()
        each = self.perturb_parallel * self.direction_parallel
        Mesh(1, self.direction_parallel, self.perturb_parallel).check(self.directions)
        if ranks == 1 and each > 1:
            raise ValueError(
                f"perturb_parallel x direction_parallel is {each}, but this is a single process; "
                f"start with torchrun --nproc-per-node {each} -m zo2ext train ..."
            )
        if ranks % each:
            raise ValueError(
                f"perturb_parallel x direction_parallel is {each}, which does not divide the "
                f"{ranks} processes"
            )
        if not self.deadline > 0:
            raise ValueError(f"deadline must be above 0 seconds, got {self.deadline:g}")

    def config(self, trainable: int) -> ZOConfig:
        return (
            super()
            .config(trainable)
            .replace(
                eps=self.eps,
                lr=0.05 / math.sqrt(max(trainable, 1)) if self.lr is None else self.lr,
                weight_decay=self.weight_decay,
                directions=self.directions,
                write_back=as_count(self.write_back),
                rounding=self.rounding,
                journal_sync=self.journal_sync,
            )
        )


def defining(
    arguments: Any, settings: Mapping[str, Any], leave_out: Iterable[str]
) -> dict[str, Any]:
    """Those of `settings` that make a run what it is.

    Args:
        arguments: A dataclass of options. Those of memory and speed change no result.
        settings: Values of its options, by name.
        leave_out: Other options that do not: where things are, and when the run ends.
    """
    place = {entry.name for entry in fields(arguments) if entry.metadata["group"] == PLACE}
    out = {*place, *leave_out}
    if settings.get("micro_batch") is None:  # what it is then, depends on the ranks
        out.add("micro_batch")
    return {name: value for name, value in settings.items() if name not in out}
