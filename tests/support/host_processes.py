"""Processes that share a host's weights, kept for many cases: each start costs more than a case."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from zo2ext.streaming.stores.host_group import GroupRanks

JOIN_SECONDS = 60


class Failed(Exception):
    """What a process raised: its type, message and trace, as text."""


class HostProcesses:
    """`size` processes, and groups of the first so many of them.

    Args:
        size: How many.
        folder: Where they find each other; empty.
        timeout: Of their groups, in seconds.
        groups: Sizes of the groups to make.
        backend: That gathers go over.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        *,
        timeout: float,
        groups: tuple[int, ...],
        backend: str = "gloo",
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where preloads are looked for
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["host_processes", "sliced_cases"])
            pipes = [context.Pipe() for _ in range(size)]
            self.processes = [
                context.Process(
                    target=_serve,
                    args=(theirs, rank, size, folder / "store", timeout, groups, backend),
                )
                for rank, (_, theirs) in enumerate(pipes)
            ]
            for process in self.processes:
                process.start()
        self._pipes = [ours for ours, _ in pipes]
        for _, theirs in pipes:
            theirs.close()

    def outcomes(self, ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """``work(ranks, *args)`` in a group of `ranks` processes; what each returned or raised."""
        self.start(ranks, work, *args)
        return [self.answer(rank) for rank in range(ranks)]

    def start(self, ranks: int, work: Callable[..., Any], *args: Any) -> None:
        """Begin on ``work(ranks, *args)``; each process has to be asked for its `answer`."""
        for pipe in self._pipes[:ranks]:
            pipe.send((ranks, work, args))

    def run(self, ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """The same; what a process raised is raised."""
        outcomes = self.outcomes(ranks, work, *args)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def answer(self, rank: int) -> Any:
        """What a process returned or raised."""
        try:
            return self._pipes[rank].recv()
        except EOFError as error:
            return error  # it was killed

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(JOIN_SECONDS)
            process.kill()
            process.join()


def _serve(
    pipe: Connection,
    rank: int,
    size: int,
    store: Path,
    timeout: float,
    sizes: tuple[int, ...],
    backend: str,
) -> None:
    torch.set_num_threads(1)
    if backend == dist.Backend.NCCL:
        torch.cuda.set_device(rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        *("gloo", f"file://{store}"),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=JOIN_SECONDS),
    )
    groups = {}
    for n in sizes:
        limit = timedelta(seconds=timeout)
        group = dist.new_group(list(range(n)), backend=backend, timeout=limit)
        if rank < n:
            groups[n] = GroupRanks(group, timeout=timeout)
    while True:
        try:
            ranks, work, args = pipe.recv()
        except EOFError:
            os._exit(0)  # without waiting for peers that may be gone
        try:
            answer = work(groups[ranks], *args)
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            answer = Failed(text)
        pipe.send(answer)
