"""Micro-batches and output of each process of a run on several ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from zo2ext.parallel.parallel import Parallel


@dataclass(frozen=True)
class Batch:
    """This process's share of a step's batch.

    Attributes:
        losses: Closure per micro-batch that returns its loss.
        weights: Number of tokens or examples that each loss is a mean over; 0 to ignore a loss.
        tokens: Number of tokens in the batches of all processes.
    """

    losses: Sequence[Callable[[], Any]]
    weights: Sequence[float]
    tokens: int


def own_slices(count: int, micro_batch: int | None, parallel: Parallel | None) -> list[slice]:
    """Return the micro-batches of this process, as slices of a batch of `count` examples.

    The micro-batches are the same for any number of data ranks; each rank has consecutive ones.

    Args:
        count: Number of examples in the batch of all processes.
        micro_batch: Number of examples per forward pass; None divides the batch by the data ranks.
        parallel: Ranks of the run; None for a single process.
    """
    rank, ranks = (parallel.data_rank, parallel.data_ranks) if parallel else (0, 1)
    size = micro_batch or -(-count // ranks)
    slices = [slice(i, min(i + size, count)) for i in range(0, count, size)]
    return slices[len(slices) * rank // ranks : len(slices) * (rank + 1) // ranks]


def slices_to_run(
    count: int, micro_batch: int | None, parallel: Parallel | None
) -> tuple[list[slice], int]:
    """Return the slices that this process runs, and a factor for the weights of their losses.

    The factor is 1. A process without a micro-batch of its own runs one example with factor 0:
    ranks that share their weights must all visit every unit.
    """
    slices = own_slices(count, micro_batch, parallel)
    return (slices, 1) if slices else ([slice(0, 1)], 0)


@contextmanager
def printing_on_rank_0(parallel: Parallel | None) -> Iterator[None]:
    """Discard what ranks other than 0 print to standard output in this block."""
    if parallel is None or parallel.rank == 0:
        yield
        return
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def describe_ranks(parallel: Parallel | None) -> str:
    """Return a line on the axes of the ranks, for the description of a run; "" for one process."""
    if parallel is None:
        return ""
    mesh = parallel.mesh
    return (
        f"\nranks   {mesh.ranks}: {mesh.data} x data, {mesh.direction} x direction, "
        f"{mesh.perturb} x perturb"
    )
