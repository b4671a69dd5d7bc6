"""What the ranks of tests/test_sliced.py do, each in a process of its own.

Importing this once, before they start, makes their start quick.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_models import batches, tiny
from torch import Tensor, nn

from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.host_weights import return_freed_memory
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.devices.cuda import CudaDevice
from zo2ext.streaming.devices.device import Dependency, Device
from zo2ext.streaming.devices.simulated import SimulatedDevice
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.shared import SlicedStore

MODEL = "llama-tied"
STEPS = 5

tiny(MODEL)  # transformers imports a family with its first model


def on_cpu(rank: int) -> Device:
    return CpuDevice()


def on_gpu(rank: int) -> Device:
    """Ranks may outnumber GPUs."""
    return CudaDevice(torch.device("cuda", rank % torch.cuda.device_count()))


@dataclass(frozen=True)
class Simulated:
    """On each rank in another order."""

    seed: int
    ignored: Dependency | None = None

    def __call__(self, rank: int) -> Device:
        seed = self.seed + 100 * rank
        return SimulatedDevice(seed, ignored=self.ignored, detect=self.ignored is None)


@dataclass(frozen=True)
class Case:
    """A run: its device, by rank, and settings."""

    place: Callable[[int], Device] = on_cpu
    config: dict[str, Any] = field(default_factory=dict)


def model_to_train() -> nn.Module:
    """Tied, with a frozen block and another that is frozen in part."""
    model = tiny(MODEL)
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].mlp.requires_grad_(False)
    return model


@contextmanager
def engine(ranks: HostRanks | None, case: Case) -> Iterator[tuple[nn.Module, ZOEngine]]:
    """Shared by `ranks`; on the host's memory where there are none."""
    model = model_to_train()
    place = {"store": "shared"} if ranks else {}
    config = ZOConfig(**({"lr": 1e-2, "eps": 1e-3, "seed": 5} | case.config | place))
    device = case.place(ranks.rank if ranks else 0)
    with ZOEngine(model, config, device, ranks=ranks) as zo:
        yield model, zo


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def train(ranks: HostRanks | None, case: Case) -> dict[str, Any]:
    """Losses, weights amid and after a run that evaluates in between, as plain values."""
    seen: dict[str, Any] = {}
    with engine(ranks, case) as (model, zo):
        for step, inputs in enumerate(batches(MODEL, STEPS)):
            batch = {name: values.to(zo.device) for name, values in inputs.items()}
            zo.step(lambda batch=batch: model(**batch).loss)
            assert zo.last is not None
            seen[f"losses {step}"] = (zo.last.losses_plus, zo.last.losses_minus)
            if step == 2:
                seen |= {f"amid, {n}": as_bytes(w) for n, w in model.state_dict().items()}
                seen["evaluated"] = float(model(**batch).loss.detach())
    return seen | {n: as_bytes(p.data) for n, p in model.named_parameters()}


def replace_weights(ranks: HostRanks | None, case: Case) -> dict[str, Any]:
    """`load_state_dict` and `resume` amid a run."""
    with engine(ranks, case) as (model, zo):
        data = batches(MODEL, 4)
        for batch in data[:2]:
            zo.step(lambda batch=batch: model(**batch).loss)
        masters = {name: values.clone() for name, values in zo.exact_weights().items()}
        model.load_state_dict(tiny(MODEL, seed=9).state_dict())
        zo.step(lambda: model(**data[2]).loss)
        replaced = {f"replaced {n}": as_bytes(w) for n, w in model.state_dict().items()}
        zo.resume(steps=2, exact_weights=masters, pending=zo.pending())
        zo.step(lambda: model(**data[3]).loss)
    return replaced | {n: as_bytes(p.data) for n, p in model.named_parameters()}


@dataclass(frozen=True)
class Moves:
    """What crossed in one step, and what every unit takes: bytes, bytes trained."""

    uploaded: int
    gathered: int
    offloaded: int
    units: list[tuple[int, int]]


def traffic(ranks: HostRanks, case: Case) -> Moves:
    with engine(ranks, case) as (model, zo):
        for batch in batches(MODEL, 3):
            t = zo.traffic
            before = t.uploaded, t.gathered, t.offloaded
            zo.step(lambda batch=batch: model(**batch).loss)
        deltas = [now - then for now, then in zip(_moved(zo), before, strict=True)]
        return Moves(*deltas, [(x.nbytes, x.trainable_nbytes) for x in zo.layouts])


def _moved(zo: ZOEngine) -> tuple[int, int, int]:
    return zo.traffic.uploaded, zo.traffic.gathered, zo.traffic.offloaded


def writes_after_closing(ranks: HostRanks, case: Case) -> tuple[bool, float]:
    """Rank 0 changes a weight of its own; each rank's view of it then."""
    with engine(ranks, case) as (model, _):
        pass
    weight = model.model.layers[0].mlp.up_proj.weight.data
    ranks.meet("have closed")
    if ranks.rank == 0:
        weight.fill_(7.0)
    ranks.meet("have written")
    return bool((weight == 7.0).all()), float(weight.sum())


@dataclass(frozen=True)
class Memory:
    """Bytes of this process, its share of what it shares with others; and of the weights."""

    shared: int
    own: int
    weights: int


def memory(ranks: HostRanks, sizes: dict[str, int]) -> Memory:
    """What holding a larger model takes, beside what the process takes in any case."""
    gc.collect()  # what cases before have left
    before = _pss("Pss_Anon"), _pss("Pss_Shmem")
    ranks.meet("have measured what is there")
    model = tiny("llama", **sizes)
    with ZOEngine(model, ZOConfig(store="shared", slots=2), CpuDevice(), ranks=ranks) as zo:
        zo._device.synchronize()
        model.state_dict()  # reads nothing by itself
        gc.collect()
        return_freed_memory()
        ranks.meet("have filled the weights")
        found = Memory(_pss("Pss_Shmem") - before[1], _pss("Pss_Anon") - before[0], zo.host_nbytes)
        ranks.meet("have measured")
    return found


def _pss(name: str) -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":"))


# -- going wrong


def other_unit(ranks: HostRanks) -> None:
    """Rank 1 takes the units in another order."""
    target = torch.zeros(ranks.size * 256, dtype=torch.uint8)
    names = ["first", "second"]
    for unit in (0, 1) if ranks.rank != 1 else (1, 0):
        ranks.gather(unit, names, target)


def other_model(ranks: HostRanks) -> None:
    """Rank 1 trains a part of the model only."""
    model = tiny(MODEL)
    model.model.layers[1].requires_grad_(ranks.rank != 1)
    ZOEngine(model, ZOConfig(store="shared"), CpuDevice(), ranks=ranks)


def reads_alone(ranks: HostRanks, case: Case) -> None:
    """Rank 1 saves while the others step."""
    with engine(ranks, case) as (model, zo):
        batch = batches(MODEL, 1)[0]
        for _ in range(2):
            zo.step(lambda: model(**batch).loss)
        if ranks.rank == 1:
            model.state_dict()
        else:
            zo.step(lambda: model(**batch).loss)
            zo.step(lambda: model(**batch).loss)


def stops_in_a_gather(ranks: HostRanks, case: Case, who: int, how: signal.Signals) -> None:
    """Rank `who` is killed or stopped where the others are in a gather."""
    gather, count = ranks.gather, 0

    def gather_or_stop(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 20 and ranks.rank == who:
            os.kill(os.getpid(), how)
        gather(*args)

    ranks.gather = gather_or_stop  # type: ignore[method-assign]
    with engine(ranks, case) as (model, zo):
        batch = batches(MODEL, 1)[0]
        for _ in range(10):
            zo.step(lambda: model(**batch).loss)


_held: list[ZOEngine] = []


def hold(ranks: HostRanks) -> int:
    """Weights that are there until the process ends; returns the inode of their memory."""
    zo = ZOEngine(tiny(MODEL), ZOConfig(store="shared"), CpuDevice(), ranks=ranks)
    zo._device.synchronize()
    _held.append(zo)
    assert isinstance(zo._weights.store, SlicedStore)
    return os.fstat(zo._weights.store._shared._handles[-1]).st_ino
