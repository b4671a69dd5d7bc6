"""Several processes that train one model together (DistZO2, arXiv:2507.03211)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from zo2ext import ops
from zo2ext._version import __version__
from zo2ext.errors import LaunchError, UserError
from zo2ext.parallel.agreement import Alone, Team
from zo2ext.parallel.exchange import Exchange
from zo2ext.parallel.joining import roll_call
from zo2ext.parallel.mesh import Mesh
from zo2ext.streaming.stores.host_group import GroupRanks, HostRanks, OneRank

logger = logging.getLogger(__name__)
dist: Any = torch.distributed  # much of it is not annotated
_runs = 0  # runs that this process joined: each has keys of its own in the store


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This process among several that train one model together.

    Attributes:
        rank: This process. Rank 0 coordinates and keeps the journal.
        ranks: Number of processes.
        perturb: 2 divides the forward passes at +eps and -eps between different ranks.
        direction: Number of ranks that the directions of a step are divided among.
        deadline: Seconds that ranks wait for each other within a step.
        startup: Seconds that they wait for each other to load the model and begin.
        tolerant: Continue without data ranks that are late, dead or have losses that are not
            finite; they may come back. If False, any of that ends the run on all ranks.
        store: A `torch.distributed.Store` that all ranks share.
        connect_again: Makes a new connection to the store; None if a broken one ends the run.

    Example:
        >>> parallel = zo2ext.Parallel.from_environment(perturb=2)  # started by torchrun
        >>> with parallel.reporting_errors():
        ...     model = AutoModelForCausalLM.from_pretrained(name)
        >>> with zo2ext.offload(model, config, parallel=parallel) as zo:
        ...     loss = zo.step(lambda: model(**batches[parallel.data_rank]).loss)
    """

    rank: int
    ranks: int
    perturb: int = 1
    direction: int = 1
    deadline: float = 120.0
    startup: float = 900.0
    tolerant: bool = False
    store: Any = field(repr=False)
    connect_again: Callable[[], Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise UserError(f"rank must be 0 to {self.ranks - 1}, got {self.rank}")
        for name in ("deadline", "startup"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        for name in ("perturb", "direction"):
            if getattr(self, name) < 1 or self.ranks % getattr(self, name):
                raise UserError(f"{name} must divide the {self.ranks} ranks, got {self}")
        if self.ranks % (self.perturb * self.direction):
            raise UserError(
                f"perturb x direction, {self.perturb} x {self.direction}, must divide the "
                f"{self.ranks} ranks"
            )

    @classmethod
    def from_environment(cls, **settings: Any) -> Parallel:
        """Return this process's place as ``torchrun`` set it in the environment.

        Args:
            settings: Other attributes.

        Raises:
            LaunchError: The process was not started by ``torchrun`` or the like.
        """
        missing = [
            n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
        ]
        if missing:
            raise LaunchError(
                f"{', '.join(missing)} is not set: start with torchrun --nproc-per-node N script.py"
            )
        startup = timedelta(seconds=settings.get("startup", cls.startup))
        store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=startup)))
        return cls(rank=rank, ranks=ranks, store=store, **settings)

    @classmethod
    def connect(cls, address: str, *, rank: int, ranks: int, **settings: Any) -> Parallel:
        """Connect over a network; a rank may join, and come back, at any time.

        Args:
            address: "host:port" of rank 0, which listens there.
            rank, ranks: This process, and the number of processes.
            settings: Other attributes.

        Raises:
            UserError: `address` has no port.
            torch.distributed.DistNetworkError: Nobody listens there.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"address must be host:port, got {address!r}")
        startup = timedelta(seconds=settings.get("startup", cls.startup))
        place = {"host_name": host, "port": int(port), "timeout": startup}

        def connect() -> Any:
            return dist.TCPStore(**place, is_master=False, wait_for_workers=False)

        def connect_first() -> Any:
            end = time.monotonic() + startup.total_seconds()
            while True:  # rank 0 may start later, behind a network that is up
                try:
                    return connect()
                except dist.DistNetworkError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.05)

        if rank == 0:
            store = dist.TCPStore(**place, is_master=True, wait_for_workers=False)
            return cls(rank=rank, ranks=ranks, store=store, **settings)
        return cls(rank=rank, ranks=ranks, store=connect_first(), connect_again=connect, **settings)

    @property
    def mesh(self) -> Mesh:
        """Number of ranks along each axis."""
        size = self.perturb * self.direction
        return Mesh(self.ranks // size, self.direction, self.perturb)

    @property
    def data_rank(self) -> int:
        """Number of the batch that this process runs, ``0 <= data_rank < data_ranks``."""
        return self.mesh.data_rank(self.rank)

    @property
    def data_ranks(self) -> int:
        """Number of batches per step."""
        return self.mesh.data

    def device_mesh(self, device_type: str = "cpu") -> Any:
        """Return the ranks as torch's `DeviceMesh`; needs an initialized process group."""
        mesh = self.mesh
        return dist.init_device_mesh(
            device_type,
            (mesh.data, mesh.direction, mesh.perturb),
            mesh_dim_names=("data", "direction", "perturb"),
        )

    def device(self, name: str | torch.device | None) -> str | torch.device | None:
        """Return the device that `name` means on this rank: one GPU per rank of a host.

        That GPU becomes the current CUDA device.
        """
        wanted = None if name is None else str(name)
        local = os.environ.get("LOCAL_RANK")
        if local is None or not torch.cuda.is_available() or wanted not in (None, "cuda"):
            return name
        own = torch.device("cuda", int(local) % torch.cuda.device_count())
        torch.cuda.set_device(own)
        return own

    def host_ranks(self, device: torch.device) -> HostRanks:
        """Return the ranks of this host, as ``torchrun`` started them; all ranks must call this.

        Raises:
            LaunchError: ``LOCAL_WORLD_SIZE`` is not set.
            RankFailure: Another rank failed, or did not call this in time.
        """
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        if not 0 < local <= self.ranks or self.ranks % local:
            raise LaunchError(
                "LOCAL_WORLD_SIZE, the ranks of a host, is not set: store='shared' needs torchrun"
            )
        roll_call(self._exchange())
        backend = "nccl" if device.type == "cuda" and self._have_own_gpus(device) else "gloo"
        if not dist.is_initialized():
            store = dist.PrefixStore("zo2ext/group", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.ranks)
        group, _ = dist.new_subgroups(local, backend=backend)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return GroupRanks(group, timeout=self.startup)

    def _have_own_gpus(self, device: torch.device) -> bool:
        """Return whether no two ranks share a GPU, which NCCL refuses; all ranks must call this."""
        gpus = dist.PrefixStore(f"zo2ext/{_runs}/gpus", self.store)
        gpus.set(str(self.rank), str(torch.cuda.get_device_properties(device).uuid))
        found = [gpus.get(str(rank)) for rank in range(self.ranks)]
        if len(set(found)) == self.ranks:
            return True
        logger.warning(
            "ranks %s share a GPU, so slices of the weights pass through host memory (gloo), which "
            "takes longer; give each rank a GPU of its own, as torchrun --nproc-per-node=gpu does",
            ", ".join(str(r) for r, gpu in enumerate(found) if found.count(gpu) > 1),
        )
        return False

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Report an exception raised in this block to the ranks that wait for this one to join.

        Wrap whatever runs before `offload` or `load`, such as loading the model. Those two, and the
        engine that they return, report their own exceptions.
        """
        runs = _runs
        try:
            yield
        except BaseException as error:
            if _runs == runs:  # otherwise an engine has reported it
                team = self.team()
                team.fail(0, error)
                team.leave()
            raise

    def team(self) -> Team | Alone:
        """Return the next engine's connection to the other ranks."""
        global _runs
        exchange = self._exchange()
        _runs += 1
        return Team(exchange)

    def agree(self, value: Any) -> Any:
        """Return rank 0's `value`, a JSON value, on all ranks, which must all call this between
        one engine and the next."""
        return json.loads(self.team().broadcast(json.dumps(value).encode()))

    def _exchange(self) -> Exchange:
        return Exchange(
            self.store,
            self.rank,
            self.mesh,
            run=f"zo2ext/{_runs}",
            deadline=self.deadline,
            startup=self.startup,
            tolerant=self.tolerant,
            connect=self.connect_again,
        )


@dataclass(frozen=True, kw_only=True)
class SingleProcess(Parallel):
    """A process that trains alone: it has no other ranks to meet or to inform."""

    rank: int = 0
    ranks: int = 1
    store: Any = field(default=None, repr=False)

    def device(self, name: str | torch.device | None) -> str | torch.device | None:
        return name

    def host_ranks(self, device: torch.device) -> HostRanks:
        return OneRank()

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        yield

    def team(self) -> Team | Alone:
        return Alone()


def reporting_errors(parallel: Parallel | None) -> AbstractContextManager[None]:
    """Return `Parallel.reporting_errors()`; None stands for a single process."""
    return (parallel or SingleProcess()).reporting_errors()


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as ``torchrun`` started them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def build() -> str:
    """Return this build's version and a digest of the bits that its kernels compute."""
    weights = ops.normal(4099, key=2**40 + 7, tensor_id=3)
    ops.update_(weights, key=5, tensor_id=3, lr=0.3, projected_grad=0.7)
    results = [weights]
    for dtype in (torch.bfloat16, torch.float16):
        results.append(
            ops.pack(weights, dtype, rounding=ops.Rounding.STOCHASTIC, key=11, tensor_id=3)
        )
    results.append(ops.rademacher(257, key=13, tensor_id=1))
    digest = hashlib.blake2b(digest_size=8)
    for result in results:
        digest.update(result.view(torch.uint8).numpy().tobytes())
    return f"{__version__} {digest.hexdigest()}"
