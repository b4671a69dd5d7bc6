"""How the forward passes of a step are divided among ranks, and how their losses are combined.

Ranks are processes, each with the whole model, in a mesh of three axes (DistZO2, arXiv:2507.03211).
*Data* ranks have batches of their own. The forward passes of one batch are divided among
*direction* ranks (each has some of the directions) and *perturb* ranks (one has +eps, the other
-eps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zo2ext.config import ZOConfig
from zo2ext.errors import UserError
from zo2ext.streaming.unit_loader import Perturbation


@dataclass(frozen=True)
class Mesh:
    """Number of ranks along each axis. Ranks are numbered along perturb first, then direction."""

    data: int = 1
    direction: int = 1
    perturb: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.direction * self.perturb

    def data_rank(self, rank: int) -> int:
        """Return the data rank whose batch `rank` runs."""
        return rank // (self.direction * self.perturb)

    def sharing(self, data_rank: int) -> range:
        """Return the ranks that run the batch of `data_rank`."""
        size = self.direction * self.perturb
        return range(data_rank * size, (data_rank + 1) * size)

    def forwards(self, rank: int, config: ZOConfig) -> list[int]:
        """Return the forward passes of `rank`.

        With two sides, 2k is at +eps and 2k + 1 at -eps along direction k; with one, k is at +eps.
        """
        direction, perturb = divmod(rank % (self.direction * self.perturb), self.perturb)
        sides = config.slopes.sides
        return [
            i
            for i in range(config.forwards)
            if i // sides % self.direction == direction and i % self.perturb == perturb
        ]

    def check(self, config: ZOConfig) -> None:
        """Raise an error if an axis would leave ranks without work.

        Raises:
            UserError: Names the axis.
        """
        if self.perturb not in (1, 2):
            raise UserError(f"perturb must be 1 or 2, +eps and -eps, got {self.perturb}")
        if self.perturb > config.slopes.sides:
            raise UserError(
                f"perturb must be 1 with estimator='{config.slopes}', which has no forward passes "
                "at -eps, got 2; divide the directions instead"
            )
        if config.joined and self.perturb * self.direction > 1:
            raise UserError(
                "joined must be False where ranks share out the forward passes of a step: how many "
                "run as one batch changes the last bits of their losses"
            )
        if config.directions == "auto" and self.ranks > 1:
            raise UserError(
                "directions must be a number with several processes, which must agree on it, got "
                "'auto'; zo2ext plan recommends one"
            )
        if config.directions != "auto" and not 1 <= self.direction <= config.count:
            raise UserError(
                f"direction ranks must be 1 to {config.count}, the directions of a step, got "
                f"{self.direction}"
            )
        if not 1 <= self.data <= 64:
            raise UserError(f"data ranks must be 1 to 64, got {self.data}")


@dataclass(frozen=True)
class RankLosses:
    """The losses that one rank computed in a step.

    Attributes:
        values: A row per micro-batch with the loss of each of the rank's forward passes, as float32
            values. Rows of weight 0 are zeros: those micro-batches need not run.
        weights: Weights of the micro-batches, such as token counts; None to sum them.
        total: Whether losses are summed over data ranks instead of averaged, without weights.
    """

    values: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] | None = None
    total: bool = False

    @property
    def empty(self) -> bool:
        """Whether the step is the same without them: no micro-batch, or only ones of weight 0."""
        return not self.values or (self.weights is not None and not any(self.weights))

    @property
    def finite(self) -> bool:
        return all(abs(loss) < math.inf for row in self.values for loss in row)


def perturbations(
    forwards: Sequence[int], keys: Sequence[int], config: ZOConfig
) -> list[Perturbation]:
    """Return how the weights are perturbed in each of `forwards`; see `Mesh.forwards`."""
    sides = config.slopes.sides
    return [
        Perturbation(keys[i // sides], (-1) ** (i % sides) * config.eps, i // sides)
        for i in forwards
    ]


def combine(
    mesh: Mesh, losses: Mapping[int, RankLosses], config: ZOConfig, data_ranks: Sequence[int]
) -> list[float]:
    """Return the losses of a step, one per forward pass, in order.

    With weights, this is the weighted mean over all micro-batches of all data ranks. Without, it is
    each data rank's sum over its micro-batches, averaged over the data ranks that have any, or, for
    `RankLosses.total`, summed. Products of losses and weights, in float64, are summed exactly and
    rounded once, so with weights and for totals the result does not depend on how micro-batches are
    divided among data ranks. If all weights are 0, the losses are NaN.

    Args:
        losses: Losses by rank; all ranks of each of `data_ranks` must be there.
        data_ranks: Data ranks to include, in order.

    Raises:
        UserError: No rank has a micro-batch, or ranks that share a batch have different ones.
    """
    terms: list[list[float]] = [[] for _ in range(config.forwards)]
    weights, nonempty = [], 0
    firsts = [losses[mesh.sharing(data_rank)[0]] for data_rank in data_ranks]
    for data_rank, first in zip(data_ranks, firsts, strict=True):
        sharing = mesh.sharing(data_rank)
        for rank in sharing:
            mine = losses[rank]
            if (mine.weights, len(mine.values)) != (first.weights, len(first.values)):
                raise UserError(
                    f"rank {rank} ran {len(mine.values)} micro-batches with weights "
                    f"{mine.weights}, rank {sharing[0]}, which shares its batch, "
                    f"{len(first.values)} with weights {first.weights}"
                )
        nonempty += bool(first.values)
        for m in range(len(first.values)):
            factor = 1.0 if first.weights is None else first.weights[m]
            weights.append(factor)
            if not factor:
                continue
            for rank in sharing:
                row = losses[rank].values[m]
                for i, loss in zip(mesh.forwards(rank, config), row, strict=True):
                    terms[i].append(factor * loss)
    kinds = {(first.weights is not None, first.total) for first in firsts if first.values}
    if len(kinds) > 1:
        raise UserError("weights must be given by all data ranks or by none, and so must total")
    weighted, total = next(iter(kinds), (False, False))
    if not nonempty:
        raise UserError("loss is missing: no rank had a batch")
    if not any(weights):
        return [math.nan] * len(terms)
    divisor = math.fsum(weights) if weighted else 1 if total else nonempty
    means = [exact_sum(row) / divisor for row in terms]
    return [float(torch.tensor(mean, dtype=torch.float32)) for mean in means]


def exact_sum(terms: Sequence[float]) -> float:
    """Return the same sum in any order; NaN or an infinity if a term is."""
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
