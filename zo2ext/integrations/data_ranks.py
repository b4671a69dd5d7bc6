"""A Trainer's data among several ranks: the batches that one process would have, dealt in turn.

Ranks that share a batch get the same one. Where a pass over the data ends, some data ranks have
fewer batches than others; they are given one more, so that all go on together, which does not
count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler

from zo2ext.errors import UserError
from zo2ext.parallel.parallel import Parallel


class DealtBatches(BatchSampler):
    """Every `ranks`-th batch of a sampler, from the one of `rank` on; as many for each rank.

    Args:
        batches: Of one process: a sampler of batches that has a length.
    """

    def __init__(self, batches: Any, *, rank: int, ranks: int) -> None:
        self.batch_sampler, self._rank, self._ranks = batches, rank, ranks
        self.sampler = batches.sampler  # of the examples; accelerate sets its epoch

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index, batch in enumerate(self.batch_sampler):
            if index % self._ranks == self._rank:
                yield batch
        if 0 < len(self.batch_sampler) % self._ranks <= self._rank:
            yield batch  # does not count

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // self._ranks)

    def set_epoch(self, epoch: int) -> None:
        for sampler in (self.batch_sampler, self.sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


def counted(step: int, batches: int, given: int, accumulation: int, parallel: Parallel) -> int:
    """Of the micro-batches that this rank is given in a step, how many count: the first ones.

    Args:
        step: Its number, from 0.
        batches: Of a whole pass over the data, as one process would have them.
        given: To each rank, in this step.
        accumulation: Of a rank, in a step that is not a pass's last.
    """
    rank, ranks = parallel.data_rank, parallel.data_ranks
    each = -(-batches // ranks)
    first = step % -(-each // accumulation) * accumulation
    return sum((first + i) * ranks + rank < batches for i in range(given))


def deal(loader: Any, parallel: Parallel, processes: int) -> int:
    """Have a loader that accelerate made for this process give the batches of its data rank.

    Args:
        processes: That accelerate knows of.

    Returns:
        How many batches one process would have in a pass over the data.

    Raises:
        ValueError: The data are a stream, or are dealt over all processes already.
    """
    from accelerate.data_loader import BatchSamplerShard

    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.num_processes != processes:
        raise UserError(
            "train_dataset is a stream, or has a sampler that knows of ranks: neither can be dealt "
            "over several ranks; give a data set with a length and an index"
        )
    batches = shard.batch_sampler
    # From here on it passes everything on, whole.
    shard.num_processes, shard.process_index = 1, 0
    shard.even_batches, shard.batch_size = False, None
    shard.batch_sampler = DealtBatches(batches, rank=parallel.data_rank, ranks=parallel.data_ranks)
    return len(batches)
