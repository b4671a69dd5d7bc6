"""Which forward passes of a step are whose, and what the losses of all of them say together.

Ranks are processes, each with the whole model. They lie in a mesh of three axes (DistZO2,
arXiv:2507.03211): *data* ranks have batches of their own; the forward passes of one batch are dealt
over *direction* ranks (each has some of the directions) and *perturb* ranks (one has +eps, the
other -eps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zo2ext.streaming.unit_loader import Perturbation


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis. Rank numbers run over perturb ranks first, then directions, data."""

    data: int = 1
    direction: int = 1
    perturb: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.direction * self.perturb

    def data_rank(self, rank: int) -> int:
        """Whose batch `rank` runs."""
        return rank // (self.direction * self.perturb)

    def sharing(self, data_rank: int) -> range:
        """The ranks that run the batch of `data_rank`."""
        each = self.direction * self.perturb
        return range(data_rank * each, (data_rank + 1) * each)

    def forwards(self, rank: int, directions: int) -> list[int]:
        """The forward passes of `rank`: 2k at +eps and 2k + 1 at -eps along direction k."""
        direction, perturb = divmod(rank % (self.direction * self.perturb), self.perturb)
        return [
            i
            for i in range(2 * directions)
            if i // 2 % self.direction == direction and i % self.perturb == perturb
        ]

    def check(self, directions: int) -> None:
        """Refuse an axis that would leave ranks without work.

        Raises:
            ValueError: Naming the axis.
        """
        if self.perturb not in (1, 2):
            raise ValueError(f"perturb must be 1 or 2, +eps and -eps, got {self.perturb}")
        if not 1 <= self.direction <= directions:
            raise ValueError(
                f"direction ranks must be 1 to {directions}, the directions of a step, got "
                f"{self.direction}"
            )
        if not 1 <= self.data <= 64:
            raise ValueError(f"data ranks must be 1 to 64, got {self.data}")


@dataclass(frozen=True)
class RankLosses:
    """What one rank measured in a step.

    Attributes:
        losses: Of each micro-batch, at each of its forward passes; float32 values. Zeros for one of
            weight 0, which need not run.
        weights: Of the micro-batches, tokens perhaps; None where they are summed.
        total: Whether the sum is over all data ranks, not their mean; without weights.
    """

    losses: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] | None = None
    total: bool = False

    @property
    def empty(self) -> bool:
        """Whether a step is the same without it: no micro-batch, or all of weight 0."""
        return not self.losses or (self.weights is not None and not any(self.weights))

    @property
    def finite(self) -> bool:
        return all(abs(loss) < float("inf") for row in self.losses for loss in row)


def perturbations(forwards: Sequence[int], keys: Sequence[int], eps: float) -> list[Perturbation]:
    """What the weights of some forward passes are; see `Mesh.forwards`."""
    return [Perturbation(keys[i // 2], -eps if i % 2 else eps) for i in forwards]


def combine(
    mesh: Mesh, measured: Mapping[int, RankLosses], directions: int, counted: Sequence[int]
) -> list[float]:
    """The losses of a step, one a forward pass: plus, minus, plus, minus, ...

    With weights, the weighted mean over all micro-batches of all data ranks; without, each data
    rank's sum over its micro-batches, and their mean over the data ranks that have any, or, as
    `RankLosses.total`, their sum. The products of losses and weights, in float64, are added up
    exactly and rounded once: so with weights, and for totals, it does not matter how micro-batches
    are dealt over data ranks. Where all weights are 0, the losses are NaN: a mean over nothing.

    Args:
        measured: By rank; of all ranks of each data rank in `counted`.
        counted: Data ranks, in order.

    Raises:
        ValueError: No rank had a micro-batch, or ranks of one batch had different ones.
    """
    terms: list[list[float]] = [[] for _ in range(2 * directions)]
    weights, having = [], 0
    firsts = [measured[mesh.sharing(data_rank)[0]] for data_rank in counted]
    for data_rank, first in zip(counted, firsts, strict=True):
        sharing = mesh.sharing(data_rank)
        for rank in sharing:
            mine = measured[rank]
            if (mine.weights, len(mine.losses)) != (first.weights, len(first.losses)):
                raise ValueError(
                    f"rank {rank} ran {len(mine.losses)} micro-batches with weights "
                    f"{mine.weights}, rank {sharing[0]}, which shares its batch, "
                    f"{len(first.losses)} with weights {first.weights}"
                )
        having += bool(first.losses)
        for m in range(len(first.losses)):
            factor = 1.0 if first.weights is None else first.weights[m]
            weights.append(factor)
            if not factor:
                continue
            for rank in sharing:
                for i, loss in zip(
                    mesh.forwards(rank, directions), measured[rank].losses[m], strict=True
                ):
                    terms[i].append(factor * loss)
    given = {(first.weights is not None, first.total) for first in firsts if first.losses}
    if len(given) > 1:
        raise ValueError("weights must be given by all data ranks or by none, and so must total")
    weighted, total = next(iter(given), (False, False))
    if not having:
        raise ValueError("loss is missing: no rank had a batch")
    if not any(weights):
        return [math.nan] * len(terms)
    divisor = math.fsum(weights) if weighted else 1 if total else having
    means = [_sum(losses) / divisor for losses in terms]
    return [float(torch.tensor(mean, dtype=torch.float32)) for mean in means]


def _sum(terms: list[float]) -> float:
    """In any order the same; NaN or an infinity where a term is."""
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
