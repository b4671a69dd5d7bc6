"""The processes of one host that share its weights: how they meet, and how they gather slices.

Two things cross between them. On the host's threads: *meetings*, at which all wait for all. And on
the gather queue: the slices of a unit. Each way has communicators of its own, so that neither gets
between the other's messages. Before the bytes of a unit move, the ranks compare which unit each of
them means, so that ranks which went different ways fail with its name, and mix no weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 300.0  # seconds
# Called all_gather_into_tensor before torch 2.13.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class HostRankError(RuntimeError):
    """Another rank of the host is gone, late, or doing something else; the message says which."""


class HostRanks(ABC):
    """The processes that share one host copy of the weights.

    Attributes:
        rank: This one's place among them, from 0.
        size: How many there are.
    """

    rank: int
    size: int

    @abstractmethod
    def meet(self, purpose: str, value: Any = None) -> list[Any]:
        """Wait until all ranks are here for the same `purpose`; returns each one's `value`.

        Raises:
            HostRankError: One is lost, late, or here for something else.
        """

    @abstractmethod
    def gather(self, unit: int, names: Sequence[str], target: Tensor) -> None:
        """Fill `target`, of which each rank has one of `size` equal slices, with those of all.

        Called in the same order on all ranks, by one thread each.

        Args:
            unit: Whose slab it is; an index of `names`.
            target: uint8, shape (size * bytes of a slice,), on the device.

        Raises:
            HostRankError: A rank is lost or late, or is to gather another unit.
        """


class OneRank(HostRanks):
    """A process that shares with nobody."""

    rank, size = 0, 1

    def meet(self, purpose: str, value: Any = None) -> list[Any]:
        return [value]

    def gather(self, unit: int, names: Sequence[str], target: Tensor) -> None:
        pass


class GroupRanks(HostRanks):
    """The ranks of a process group of torch.distributed, all on one host.

    Made by all of them together. Its communicators are its own: nothing else that goes over `group`
    can get between.

    Args:
        group: Says who belongs together, and its backend what gathers go over: NCCL on GPUs. With
            gloo they go through host memory, which serves several ranks on one GPU. None: all.
        timeout: Seconds that a rank waits for the others before it fails.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: float = TIMEOUT) -> None:
        self._members = dist.get_process_group_ranks(group)
        self.rank, self.size = self._members.index(dist.get_rank()), len(self._members)
        self._timeout = timeout
        self._through_host = dist.get_backend(group) == dist.Backend.GLOO
        self._meetings, self._headers = (self._made(dist.Backend.GLOO) for _ in range(2))
        self._link = self._headers if self._through_host else self._made(dist.get_backend(group))
        self._gathers = 0

    def _made(self, backend: str) -> dist.ProcessGroup:
        made: dist.ProcessGroup = dist.new_group(
            self._members,
            timeout=timedelta(seconds=self._timeout),
            backend=backend,
            use_local_synchronization=True,  # the ranks of other hosts need not be here
        )
        return made

    def meet(self, purpose: str, value: Any = None) -> list[Any]:
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, (purpose, value), group=self._meetings)
        except RuntimeError as error:
            raise self._lost(purpose, error) from error
        self._compare([reason for reason, _ in found])
        return [value for _, value in found]

    def gather(self, unit: int, names: Sequence[str], target: Tensor) -> None:
        self._gathers += 1
        purpose = f"gather unit {names[unit]} (its gather {self._gathers})"
        own = torch.tensor([unit, target.nbytes])
        headers = own.new_empty(self.size, 2)
        try:
            _gather_into(headers, own, group=self._headers)
            self._compare([f"gather unit {names[u]}, {n} bytes" for u, n in headers.tolist()])
            self._fill(target)
        except HostRankError:
            raise
        except RuntimeError as error:
            raise self._lost(purpose, error) from error

    def _fill(self, target: Tensor) -> None:
        own = target.view(self.size, -1)[self.rank]
        if target.is_cuda and self._through_host:
            gathered = torch.empty(target.shape, dtype=target.dtype)
            _gather_into(gathered, own.cpu(), group=self._link)
            target.copy_(gathered)
        else:
            _gather_into(target, own, group=self._link)

    def _compare(self, purposes: list[str]) -> None:
        """Raise, naming one that differs, unless all ranks have the same purpose."""
        own = purposes[self.rank]
        for rank, purpose in zip(self._members, purposes, strict=True):
            if purpose != own:
                raise HostRankError(
                    f"rank {self._members[self.rank]} is to {own}, but rank {rank} is to "
                    f"{purpose}: the ranks of a host have to do the same things in the same order"
                )

    def _lost(self, purpose: str, error: Exception) -> HostRankError:
        others = ", ".join(str(r) for r in self._members if r != self._members[self.rank])
        return HostRankError(
            f"rank {self._members[self.rank]} was to {purpose} and waited for the other ranks of "
            f"its host ({others}), but one of them ended or did not come within "
            f"{self._timeout:g} s: {error}"
        )
