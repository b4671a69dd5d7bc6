"""One run of the command line in several processes: what each computes, and who speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from zo2ext.parallel.parallel import Parallel


@dataclass(frozen=True)
class Batch:
    """What this process computes of a step's batch.

    Attributes:
        losses: Of its micro-batches.
        weights: Of the same: how many tokens or examples each is a mean over; 0: it does not count.
        tokens: Of the whole batch.
    """

    losses: Sequence[Callable[[], Any]]
    weights: Sequence[float]
    tokens: int


def dealt(count: int, micro_batch: int | None, parallel: Parallel | None) -> list[slice]:
    """The micro-batches of this process, of a batch of `count` windows or examples.

    They are the same for any number of data ranks, each of which gets some that lie side by side.

    Args:
        count: Of the whole batch.
        micro_batch: Of one forward pass; None divides the batch by the data ranks.
        parallel: This process's place among several; None where it is alone.
    """
    rank, ranks = (parallel.data_rank, parallel.data_ranks) if parallel else (0, 1)
    size = micro_batch or -(-count // ranks)
    pieces = [slice(i, min(i + size, count)) for i in range(0, count, size)]
    return pieces[len(pieces) * rank // ranks : len(pieces) * (rank + 1) // ranks]


@dataclass(frozen=True)
class Share:
    """What this process runs of a batch.

    Attributes:
        parts: Its micro-batches, at least one.
        counts: Whether they count. Where a batch has none for this process, it has one of weight 0:
            where ranks share their weights, all of them have to visit every unit.
    """

    parts: list[slice]
    counts: bool


def share(count: int, micro_batch: int | None, parallel: Parallel | None) -> Share:
    """The part of this process in a batch of `count`, as `dealt` deals it."""
    parts = dealt(count, micro_batch, parallel)
    return Share(parts, True) if parts else Share([slice(0, 1)], False)


@contextmanager
def speaking(parallel: Parallel | None) -> Iterator[None]:
    """Rank 0 speaks; what the others would print goes nowhere inside. Errors are not silenced."""
    if parallel is None or parallel.rank == 0:
        yield
        return
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def ranks_line(parallel: Parallel | None) -> str:
    """How the work is dealt, for a run's greeting."""
    if parallel is None:
        return ""
    mesh = parallel.mesh
    return (
        f"\nranks   {mesh.ranks}: {mesh.data} x data, {mesh.direction} x direction, "
        f"{mesh.perturb} x perturb"
    )
