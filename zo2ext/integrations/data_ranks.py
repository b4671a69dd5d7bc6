"""Distribution of a Trainer's batches over data ranks: batch i of one process goes to rank i mod n.

Ranks that share a batch get the same one. At the end of a pass over the data some data ranks have
one batch less than others; they repeat their last one with weight 0, so that all make the same
number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler

from zo2ext.errors import UserError
from zo2ext.parallel.parallel import Parallel


class RankBatches(BatchSampler):
    """Every `ranks`-th batch of a sampler, starting at `rank`; the same number for each rank.

    Args:
        batches: Batch sampler of one process, with a length.
        rank: Data rank of this process.
        ranks: Number of data ranks.
    """

    def __init__(self, batches: Any, *, rank: int, ranks: int) -> None:
        self.batch_sampler, self._rank, self._ranks = batches, rank, ranks
        self.sampler = batches.sampler  # accelerate sets its epoch

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index, batch in enumerate(self.batch_sampler):
            if index % self._ranks == self._rank:
                yield batch
        if 0 < len(self.batch_sampler) % self._ranks <= self._rank:
            yield batch  # has weight 0

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self._ranks)

    def set_epoch(self, epoch: int) -> None:
        for sampler in (self.batch_sampler, self.sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


def weighted_batches(
    step: int, batches: int, received: int, accumulation: int, parallel: Parallel
) -> int:
    """Return how many of this rank's micro-batches of a step have weight; they are the first ones.

    Args:
        step: Number of the step, from 0.
        batches: Batches in a pass over the data, as one process has them.
        received: Micro-batches that each rank receives in this step.
        accumulation: Micro-batches per rank and step, except in the last step of a pass.
        parallel: This process's place.
    """
    rank, ranks = parallel.data_rank, parallel.data_ranks
    each = -(-batches // ranks)
    first = step % -(-each // accumulation) * accumulation
    return sum((first + i) * ranks + rank < batches for i in range(received))


def distribute(loader: Any, parallel: Parallel, processes: int) -> int:
    """Change a loader that accelerate prepared, so that it yields the batches of this data rank.

    Args:
        loader: Loader of this process.
        parallel: This process's place.
        processes: Number of processes that accelerate knows.

    Returns:
        Number of batches that one process would have in a pass over the data.

    Raises:
        ValueError: The data set is a stream, or its sampler distributes over ranks already.
    """
    from accelerate.data_loader import BatchSamplerShard

    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.num_processes != processes:
        raise UserError(
            "train_dataset is a stream, or its sampler distributes over ranks already, and cannot "
            "be distributed over several ranks; use a data set with a length and an index"
        )
    batches = shard.batch_sampler
    # With these settings accelerate's sampler passes on all batches.
    shard.num_processes, shard.process_index = 1, 0
    shard.even_batches, shard.batch_size = False, None
    shard.batch_sampler = RankBatches(batches, rank=parallel.data_rank, ranks=parallel.data_ranks)
    return len(batches)
