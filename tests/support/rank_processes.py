"""Ranks of one run as real processes, that train, are hurt, and say what came of it.

Importing this once makes the start of all of them quick.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny
from torch import nn

import zo2ext
from zo2ext.parallel.mesh import Mesh
from zo2ext.parallel.parallel import reporting_errors

torch.set_num_threads(1)  # before a fork there must be no other thread
tiny("opt")  # imports what making a model imports

Fault = Callable[[int, zo2ext.ZOEngine], None]


def none(rank: int, zo: zo2ext.ZOEngine) -> None:
    """No fault."""


def as_it_is(rank: int, step: int, loss: torch.Tensor) -> Any:
    """No fault."""
    return loss


def all_of_it(step: int, number: int, batch: dict[str, torch.Tensor]) -> Any:
    """No change."""
    return batch


def unchanged(rank: int, model: nn.Module) -> None:
    """No fault."""


def not_given(rank: int, step: int) -> None:
    """The config's learning rate."""


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        mesh: None: one process without `Parallel`.
        micro_batches: Of each step, on all data ranks together; of differing sizes.
        weighted: By the number of their labels.
        fault: Called on each rank before each step.
        of_batch: What a micro-batch is instead; None leaves it out.
        of_loss: What a loss function returns, from what the model did.
        prepare: Called on each rank before anything else.
        loaded: Told of the model on each rank, before it is offloaded.
        overrides, models: Of the config and of the model, by rank.
        lr: What a step is given, by rank and step; None: the config's.
        steps: Until when, unless `until` of `Ranks` says otherwise.
    """

    mesh: Mesh | None = None
    steps: int = 8
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[int, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    models: dict[int, dict[str, Any]] = field(default_factory=dict)
    train: bool = False
    micro_batches: int = 1
    weighted: bool = False
    journal: Path | None = None
    port: int = 0
    host_port: int | None = None  # of rank 0, where the others come through a proxy
    deadline: float = 20.0
    startup: float = 20.0
    tolerant: bool = False
    fault: Fault = none
    of_batch: Callable[[int, int, dict[str, torch.Tensor]], Any] = all_of_it
    of_loss: Callable[[int, int, torch.Tensor], Any] = as_it_is
    prepare: Callable[[int], object] = int
    loaded: Callable[[int, nn.Module], None] = unchanged
    lr: Callable[[int, int], float | None] = not_given

    def parallel(self, rank: int) -> zo2ext.Parallel | None:
        if self.mesh is None:
            return None
        port = self.host_port if rank == 0 and self.host_port else self.port
        return zo2ext.Parallel.connect(
            f"127.0.0.1:{port}",
            rank=rank,
            ranks=self.mesh.ranks,
            perturb=self.mesh.perturb,
            direction=self.mesh.direction,
            deadline=self.deadline,
            startup=self.startup,
            tolerant=self.tolerant,
        )


@dataclass
class Outcome:
    """What came of one rank."""

    rank: int
    digest: str = ""
    losses: list[float] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    sent: int = 0  # bytes, to agree on steps
    device_nbytes: int = 0
    failure: str = ""  # as the rank's RankFailure says it
    cause: str = ""  # what that came from
    error: str = ""  # any other
    ended: float = 0.0  # time.monotonic()


def micro_batch(step: int, number: int) -> dict[str, torch.Tensor]:
    """Of differing lengths."""
    generator = torch.Generator().manual_seed(100 * step + number)
    ids = torch.randint(5, 90, (2, 8 + number), generator=generator)
    return {"input_ids": ids, "labels": ids}


def digest(model: nn.Module) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        whole.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def train(job: Job, rank: int, reached: Any = None, until: Any = None) -> Outcome:
    """Run a job, in this process."""
    job.prepare(rank)
    outcome = Outcome(rank)
    config = {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.1, "seed": 11, "device": "cpu"}
    settings = zo2ext.ZOConfig(**(config | job.config | job.overrides.get(rank, {})))
    data_rank, data_ranks = (0, 1)
    if job.mesh is not None:
        data_rank, data_ranks = job.mesh.data_rank(rank), job.mesh.data
    share = range(
        *(job.micro_batches * k // data_ranks for k in (data_rank, data_rank + 1)),
    )
    parallel = job.parallel(rank)
    try:
        with reporting_errors(parallel):
            model = tiny("opt", **(job.model | job.models.get(rank, {}))).train(job.train)
            job.loaded(rank, model)
        with zo2ext.offload(model, settings, journal=job.journal, parallel=parallel) as zo:
            while zo.steps < (until.value if until is not None else job.steps):
                job.fault(rank, zo)
                step = zo.steps
                batches = [job.of_batch(step, m, micro_batch(step, m)) for m in share]
                data = [
                    {name: tensor.to(zo.device) for name, tensor in batch.items()}
                    for batch in batches
                    if batch is not None
                ]
                weights = [float((b["labels"] != -100).sum()) for b in data]
                losses: list[Callable[[], Any]] = [
                    lambda b=b: job.of_loss(rank, step, model(**b).loss) for b in data
                ]
                lr = job.lr(rank, step)
                loss = zo.step(losses, lr=lr, weights=weights if job.weighted else None)
                outcome.losses.append(loss)
                if reached is not None:
                    reached.value = zo.steps
            outcome.device_nbytes = zo.device_nbytes
            outcome.sent = zo.sent_nbytes
    except zo2ext.RankFailure as failure:
        outcome.failure = str(failure)
        outcome.cause = repr(failure.__cause__)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
    else:
        outcome.digest = digest(model)
    outcome.ended = time.monotonic()
    return outcome


def _work(job: Job, rank: int, reached: Any, until: Any, said: Connection) -> None:
    said.send(train(job, rank, reached, until))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The processes of one job. A context manager that leaves none of them behind."""

    def __init__(self, job: Job, *, start: bool = True) -> None:
        assert job.mesh is not None
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the server finds this module
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["rank_processes"])
        self.job = job if job.port else replace(job, port=free_port())
        ranks = range(job.mesh.ranks)
        # Without locks, which a process that is killed may hold for good.
        self.reached = [self._context.Value("q", 0, lock=False) for _ in ranks]
        self.until = self._context.Value("q", job.steps, lock=False)
        self.processes: dict[int, Any] = {}
        self._said: dict[int, Connection] = {}
        for rank in ranks if start else ():
            self.start(rank)

    def start(self, rank: int, job: Job | None = None) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work, args=(job or self.job, rank, self.reached[rank], self.until, theirs)
        )
        process.start()
        theirs.close()
        self.processes[rank], self._said[rank] = process, ours

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].join()

    def outcomes(self, seconds: float = 60.0) -> dict[int, Outcome]:
        """Of all ranks that say something before they end."""
        end, found = time.monotonic() + seconds, {}
        waiting = {said: rank for rank, said in self._said.items()}
        while waiting:
            ready = wait(list(waiting), timeout=max(end - time.monotonic(), 0))
            assert ready, f"no word of ranks {sorted(waiting.values())} in {seconds} s"
            for said in ready:
                rank = waiting.pop(said)
                with suppress(EOFError):  # it was killed
                    found[rank] = said.recv()
        return dict(sorted(found.items()))

    def outcome(self, rank: int, seconds: float = 60.0) -> Outcome:
        """Of one rank, which is not asked again."""
        assert self._said[rank].poll(seconds), f"no word of rank {rank} in {seconds} s"
        outcome: Outcome = self._said.pop(rank).recv()
        return outcome

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.join()


def run(job: Job) -> dict[int, Outcome]:
    """Run a job to its end, on as many processes as its mesh has ranks."""
    with Ranks(job) as ranks:
        return ranks.outcomes()


def agreed(outcomes: dict[int, Outcome]) -> Outcome:
    """The outcome that all ranks have alike."""
    for rank, outcome in outcomes.items():
        assert not outcome.error, f"rank {rank}: {outcome.error}"
        assert not outcome.failure, f"rank {rank}: {outcome.failure}"
        assert outcome.digest == outcomes[0].digest, f"rank {rank} has other weights than rank 0"
        assert outcome.losses == outcomes[0].losses
    return outcomes[0]
