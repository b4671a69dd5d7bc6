"""Several processes on one run (DistZO2, arXiv:2507.03211): what each is, and how they meet."""

from __future__ import annotations

import hashlib
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
from zo2ext.parallel.agreement import Coordination
from zo2ext.parallel.mesh import Mesh
from zo2ext.streaming.stores.host_group import GroupRanks

dist: Any = torch.distributed  # much of it is not annotated
_met = 0  # runs that this process took part in: each has keys of its own in the store


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This process's place among those that train one model together.

    Attributes:
        rank, ranks: This one, and how many there are. Rank 0 coordinates and keeps the journal.
        perturb: 2 deals the forward passes at +eps and at -eps to different ranks.
        direction: Ranks that a step's directions are dealt over.
        deadline: Seconds that ranks wait for each other in a step, once they are done themselves.
        startup: Seconds that they wait for each other to load the model and begin.
        tolerant: Go on without data ranks that are late, dead or have losses that are not finite;
            they may come back. False: any of that ends the run on all ranks.
        store: A `torch.distributed.Store` that all ranks share.
        connect_again: Makes a connection to it that broke anew; None: then the rank cannot go on.
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
            raise ValueError(f"rank must be 0 to {self.ranks - 1}, got {self.rank}")
        for name in ("deadline", "startup"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        for name in ("perturb", "direction"):
            if getattr(self, name) < 1 or self.ranks % getattr(self, name):
                raise ValueError(f"{name} must divide the {self.ranks} ranks, got {self}")
        if self.ranks % (self.perturb * self.direction):
            raise ValueError(
                f"perturb x direction, {self.perturb} x {self.direction}, must divide the "
                f"{self.ranks} ranks"
            )

    @classmethod
    def from_environment(cls, **settings: Any) -> Parallel:
        """As ``torchrun`` started this process.

        Args:
            settings: Other attributes.

        Raises:
            RuntimeError: It was not started by ``torchrun``, nor with its environment.
        """
        missing = [
            n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
        ]
        if missing:
            raise RuntimeError(
                f"{', '.join(missing)} is not set: start with torchrun --nproc-per-node N script.py"
            )
        startup = timedelta(seconds=settings.get("startup", cls.startup))
        store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=startup)))
        return cls(rank=rank, ranks=ranks, store=store, **settings)

    @classmethod
    def connect(cls, address: str, *, rank: int, ranks: int, **settings: Any) -> Parallel:
        """Meet over a network; a rank may come, and come back, at any time.

        Args:
            address: "host:port" of rank 0, which listens there.

        Raises:
            ValueError: `address` has no port.
            torch.distributed.DistNetworkError: Nobody listens there.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"address must be host:port, got {address!r}")
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
        """The axes."""
        each = self.perturb * self.direction
        return Mesh(self.ranks // each, self.direction, self.perturb)

    @property
    def data_rank(self) -> int:
        """Whose batch this process runs, ``0 <= data_rank < data_ranks``."""
        return self.mesh.data_rank(self.rank)

    @property
    def data_ranks(self) -> int:
        """Batches of a step."""
        return self.mesh.data

    def device_mesh(self, device_type: str = "cpu") -> Any:
        """The axes as torch's `DeviceMesh`; a process group has to be there."""
        mesh = self.mesh
        return dist.init_device_mesh(
            device_type,
            (mesh.data, mesh.direction, mesh.perturb),
            mesh_dim_names=("data", "direction", "perturb"),
        )

    def device(self, name: str | torch.device | None) -> str | torch.device | None:
        """The device that `name` means on this rank: of several GPUs, one for each of the host.

        It becomes the current one of CUDA.
        """
        wanted = None if name is None else str(name)
        local = os.environ.get("LOCAL_RANK")
        if local is None or not torch.cuda.is_available() or wanted not in (None, "cuda"):
            return name
        own = torch.device("cuda", int(local) % torch.cuda.device_count())
        torch.cuda.set_device(own)
        return own

    def host_ranks(self, device: torch.device) -> GroupRanks:
        """The ranks of this host, as ``torchrun`` started them; called by all ranks alike.

        Raises:
            RuntimeError: ``LOCAL_WORLD_SIZE`` is not set.
            RankFailure: Another rank failed before it came here, or did not come in time.
        """
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        if not 0 < local <= self.ranks or self.ranks % local:
            raise RuntimeError(
                "LOCAL_WORLD_SIZE, the ranks of a host, is not set: store='shared' needs torchrun"
            )
        self._next_team().roll_call()
        own_gpu = device.type == "cuda" and local <= torch.cuda.device_count()
        if not dist.is_initialized():
            store = dist.PrefixStore("zo2ext/group", self.store)
            backend = "nccl" if own_gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.ranks)
        group, _ = dist.new_subgroups(local, backend="nccl" if own_gpu else "gloo")
        return GroupRanks(group, timeout=self.startup)

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Tell the other ranks at once of an error inside, while they wait for this one to begin.

        For what comes before `offload` or `load`, which do so themselves; the engine that they
        return tells of what comes after. ::

            with parallel.reporting_errors():
                model = AutoModelForCausalLM.from_pretrained(name)
        """
        met = _met
        try:
            yield
        except BaseException as error:
            if _met == met:  # else there is an engine, whose part it is
                team = self.team()
                team.fail(0, error)
                team.leave()
            raise

    def team(self) -> Coordination:
        """What the next engine talks to the others through."""
        global _met
        team = self._next_team()
        _met += 1
        return team

    def _next_team(self) -> Coordination:
        return Coordination(
            self.store,
            self.rank,
            self.mesh,
            run=f"zo2ext/{_met}",
            deadline=self.deadline,
            startup=self.startup,
            tolerant=self.tolerant,
            connect=self.connect_again,
        )


def reporting_errors(parallel: Parallel | None) -> AbstractContextManager[None]:
    """`Parallel.reporting_errors`, where there are others."""
    return nullcontext() if parallel is None else parallel.reporting_errors()


def own_device(
    name: str | torch.device | None, parallel: Parallel | None
) -> str | torch.device | None:
    """`Parallel.device`, where there are others."""
    return name if parallel is None else parallel.device(name)


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and how many there are, as ``torchrun`` or the like started them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def build() -> str:
    """What this build is: its version, and a digest of the bits that its kernels make."""
    weights = ops.normal(4099, key=2**40 + 7, tensor_id=3)
    ops.update_(weights, key=5, tensor_id=3, lr=0.3, projected_grad=0.7)
    parts = [weights.view(torch.uint8)]
    for dtype in (torch.bfloat16, torch.float16):
        rounded = ops.pack(weights, dtype, rounding=ops.Rounding.STOCHASTIC, key=11, tensor_id=3)
        parts.append(rounded.view(torch.uint8))
    signs = ops.rademacher(257, key=13, tensor_id=1)
    digest = hashlib.blake2b(digest_size=8)
    for part in (*parts, signs.view(torch.uint8)):
        digest.update(part.numpy().tobytes())
    return f"{__version__} {digest.hexdigest()}"
