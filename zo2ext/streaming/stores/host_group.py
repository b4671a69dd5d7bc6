"""Communication between the processes of one host that share its weights.

There are *meetings*, at which all processes wait for each other, called from the host's threads,
and gathers of a unit's slices, called from the gather queue. Each kind has connections of its own,
so their messages cannot mix. Before the bytes of a unit move, the ranks compare the unit that each
of them is about to gather. Ranks that disagree fail with its name instead of mixing weights.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zo2ext.errors import HostRankError

TIMEOUT = 300.0  # seconds
_untyped: Any = dist  # torch's annotations leave some of its public names out
# Called all_gather_into_tensor before torch 2.13.
_gather_into = getattr(_untyped, "all_gather_single", None) or _untyped.all_gather_into_tensor


class HostRanks(ABC):
    """The processes that share one host copy of the weights.

    Attributes:
        rank: Index of this process among them, from 0.
        size: Number of processes.
    """

    rank: int
    size: int

    @abstractmethod
    def meet(self, purpose: str, value: Any = None) -> list[Any]:
        """Wait until all ranks meet for the same `purpose`.

        Args:
            purpose: Description of what the ranks are about to do.
            value: Value to exchange, sent as JSON: tuples become lists.

        Returns:
            The values of all ranks.

        Raises:
            HostRankError: A rank is lost, late, or meets for another purpose.
        """

    @abstractmethod
    def gather(self, unit: int, names: Sequence[str], target: Tensor) -> None:
        """Fill `target` with the slices of all ranks. This rank's own slice is in it already.

        All ranks make these calls in the same order, from one thread each.

        Args:
            unit: Index of the unit in `names`.
            names: Names of all units.
            target: Slab, uint8, shape (size * bytes per slice,), on the device.

        Raises:
            HostRankError: A rank is lost or late, or is about to gather another unit.
        """


class OneRank(HostRanks):
    """A single process."""

    rank, size = 0, 1

    def meet(self, purpose: str, value: Any = None) -> list[Any]:
        return [value]

    def gather(self, unit: int, names: Sequence[str], target: Tensor) -> None:
        pass


class GroupRanks(HostRanks):
    """The ranks of a process group of torch.distributed, all on one host.

    All of them construct it together. After a failure every call fails with the same error.

    Args:
        group: Process group for gathers, used for nothing else. With NCCL, each rank must have made
            its GPU the current one. With gloo, slices pass through host memory, which also supports
            several ranks per GPU.
        timeout: Seconds that a rank waits for the others.
    """

    def __init__(self, group: dist.ProcessGroup, *, timeout: float = TIMEOUT) -> None:
        self._group, self._timeout = group, timeout
        self._members = dist.get_process_group_ranks(group)
        self.rank, self.size = self._members.index(dist.get_rank()), len(self._members)
        self._through_host = dist.get_backend(group) == dist.Backend.GLOO
        self._store = self._make_store()
        self._headers = _untyped.ProcessGroupGloo(
            _untyped.PrefixStore("headers", self._store), self.rank, self.size, self._limit
        )
        self._meetings = self._gathers = 0
        self._failure: HostRankError | None = None

    @property
    def _limit(self) -> timedelta:
        return timedelta(seconds=self._timeout)

    def _make_store(self) -> Any:
        """Make the store on rank 0 and connect the others, which get its port from the group."""
        first = self.rank == 0
        here = "127.0.0.1"
        made = _untyped.TCPStore(here, 0, is_master=True, timeout=self._limit) if first else None
        port = torch.tensor([made.port if made else 0], device=self._device)
        dist.broadcast(port, self._members[0], group=self._group)
        return made or _untyped.TCPStore(here, int(port), is_master=False, timeout=self._limit)

    @property
    def _device(self) -> str:
        """Device of the tensors that the group communicates."""
        return "cpu" if self._through_host else "cuda"

    def meet(self, purpose: str, value: Any = None) -> list[Any]:
        self._check_well()
        self._meetings += 1
        key = f"meeting {self._meetings}, rank "
        found = []
        self._store.set(key + str(self.rank), json.dumps([purpose, value]))
        for rank, member in enumerate(self._members):
            try:
                found.append(json.loads(self._store.get(key + str(rank))))
            except RuntimeError as error:
                raise self._lost(purpose, f"rank {member}", error) from error
        # Every rank that is here has left the meeting before.
        self._store.delete_key(f"meeting {self._meetings - 1}, rank {self.rank}")
        self._compare([reason for reason, _ in found])
        return [value for _, value in found]

    def gather(self, unit: int, names: Sequence[str], target: Tensor) -> None:
        self._check_well()
        self._gathers += 1
        purpose = f"gather unit {names[unit]} (its gather {self._gathers})"
        own = torch.tensor([unit, target.nbytes])
        headers = [torch.empty_like(own) for _ in self._members]
        try:
            self._headers.allgather([headers], [own]).wait()
            found = [header.tolist() for header in headers]
            self._compare([f"gather unit {names[u]}, {nbytes} bytes" for u, nbytes in found])
            self._fill(target)
        except HostRankError:
            raise
        except RuntimeError as error:
            others = [str(r) for r in self._members if r != self._members[self.rank]]
            raise self._lost(purpose, f"one of ranks {', '.join(others)}", error) from error

    def _fill(self, target: Tensor) -> None:
        own = target.view(self.size, -1)[self.rank]
        if target.is_cuda and self._through_host:
            gathered = torch.empty(target.shape, dtype=target.dtype)
            _gather_into(gathered, own.cpu(), group=self._group)
            target.copy_(gathered)
        else:
            _gather_into(target, own, group=self._group)

    def _compare(self, purposes: list[str]) -> None:
        """Raise unless all ranks have the same purpose, and name one that differs."""
        own = purposes[self.rank]
        for rank, purpose in zip(self._members, purposes, strict=True):
            if purpose != own:
                raise self._failed(
                    f"rank {self._members[self.rank]} is to {own}, but rank {rank} is to "
                    f"{purpose}: the ranks of a host have to do the same things in the same order"
                )

    def _lost(self, purpose: str, whom: str, error: Exception) -> HostRankError:
        return self._failed(
            f"rank {self._members[self.rank]} was to {purpose}, but {whom} on its host ended, or "
            f"did not come within {self._timeout:g} s: {error}"
        )

    def _failed(self, text: str) -> HostRankError:
        self._failure = HostRankError(text)
        return self._failure

    def _check_well(self) -> None:
        if self._failure is not None:
            raise self._failure
