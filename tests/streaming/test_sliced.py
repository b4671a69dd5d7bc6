"""Ranks of one host: one copy of the weights, each byte moved once, the bits of one process."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sliced_cases as cases
import torch
from host_processes import Failed, HostProcesses
from sliced_cases import Case, Simulated, on_cpu, on_gpu
from tiny_models import batches, tiny

from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.devices.device import Dependency, Device
from zo2ext.streaming.stores.host_group import OneRank
from zo2ext.streaming.stores.shared import slice_of
from zo2ext.streaming.stores.shared_memory import SharedMemory

Place = Callable[[int], Device]
PLACES = ["cpu", "simulated"]
TIMEOUT = 3.0  # seconds, where ranks go wrong
LARGER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcesses]:
    """Four processes that stay well."""
    processes = HostProcesses(4, tmp_path_factory.mktemp("host"), timeout=60.0, groups=(1, 2, 4))
    yield processes
    processes.close()


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[HostProcesses]:
    """Three that go wrong."""
    processes = HostProcesses(3, tmp_path, timeout=TIMEOUT, groups=(3,))
    yield processes
    for process in processes.processes:
        process.kill()
    processes.close()


@cache
def alone(
    work: Callable[..., Any], place: Callable[[int], Device], *config: tuple[str, Any]
) -> dict[str, Any]:
    """What `work` comes to in one process, with one thread, as the others have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: dict[str, Any] = work(None, Case(place, dict(config)))
    finally:
        torch.set_num_threads(threads)
    return found


def assert_alike(
    host: HostProcesses, size: int, work: Callable[..., Any], case: Case, **defining: Any
) -> None:
    where = on_gpu if case.place is on_gpu else on_cpu
    expected = alone(work, where, *defining.items())
    case = Case(case.place, case.config | defining)
    for rank, found in enumerate(host.run(size, work, case)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == value, f"{name} on rank {rank} of {size}"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("place", [on_cpu, Simulated(1)], ids=PLACES)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, "split"], ids=str)
@pytest.mark.parametrize("write_back", [1, 4])
def test_ranks_have_the_bits_of_one_process(
    host: HostProcesses, size: int, place: Place, storage: torch.dtype, write_back: int
) -> None:
    for granularity, resident in (("block", 0), ("module", 3)):
        case = Case(place, {"granularity": granularity, "resident": resident, "slots": size})
        assert_alike(host, size, cases.train, case, storage=storage, write_back=write_back)


@pytest.mark.parametrize("resident", [2, "all"])
@pytest.mark.parametrize("write_back", [1, "never"])
def test_residents_and_pending_updates(
    host: HostProcesses, resident: int | str, write_back: int | str
) -> None:
    case = Case(Simulated(3), {"resident": resident})
    assert_alike(host, 2, cases.train, case, write_back=write_back)


@pytest.mark.parametrize("place", [on_cpu, Simulated(2)], ids=PLACES)
@pytest.mark.parametrize("resident", [0, 2])
def test_weights_that_are_replaced(host: HostProcesses, place: Place, resident: int) -> None:
    case = Case(place, {"resident": resident})
    assert_alike(host, 4, cases.replace_weights, case, storage=torch.bfloat16)


@pytest.mark.parametrize(
    "dependency", [Dependency.GATHER_AFTER_UPLOAD, Dependency.KERNEL_AFTER_UPLOAD]
)
def test_wrong_orders_give_wrong_weights(host: HostProcesses, dependency: Dependency) -> None:
    expected = alone(cases.train, on_cpu)
    for seed in range(10):
        case = Case(Simulated(seed, dependency))
        if any(found != expected for found in host.run(2, cases.train, case)):
            return
    pytest.fail(f"without {dependency.name} every order gave the same weights")


class Waiting(OneRank):
    """Gathers one unit only once the block before it computes."""

    def __init__(self) -> None:
        self.computing = threading.Event()
        self.waited: list[bool] = []

    def gather(self, unit: int, names: Sequence[str], target: torch.Tensor) -> None:
        if names[unit] == "model.layers.2":
            self.waited.append(self.computing.wait(TIMEOUT))


def test_a_gather_goes_on_while_a_block_computes() -> None:
    model, ranks = tiny(cases.MODEL), Waiting()
    model.model.layers[1].register_forward_pre_hook(lambda *_: ranks.computing.set())
    batch = batches(cases.MODEL, 1)[0]
    with ZOEngine(model, ZOConfig(store="shared", slots=2), CpuDevice(), ranks=ranks) as zo:
        zo.step(lambda: model(**batch).loss)
    assert ranks.waited
    assert all(ranks.waited)


# -- on GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("write_back", [1, 4])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_on_one_gpu(host: HostProcesses, storage: torch.dtype, write_back: int) -> None:
    """Through host memory: NCCL serves one rank a GPU."""
    case = Case(on_gpu, {"resident": 1})
    assert_alike(host, 2, cases.train, case, storage=storage, write_back=write_back)


@pytest.mark.gpu
def test_ranks_on_a_gpu_each(tmp_path: Path) -> None:
    count = min(torch.cuda.device_count(), 4)
    if count < 2:
        pytest.skip("one CUDA device only")
    nccl = HostProcesses(count, tmp_path, timeout=60.0, groups=(count,), backend="nccl")
    try:
        for granularity in ("block", "module"):
            case = Case(on_gpu, {"granularity": granularity, "resident": 1})
            assert_alike(nccl, count, cases.train, case, storage=torch.bfloat16, write_back=1)
    finally:
        nccl.close()


# -- bytes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_traffic_of_a_rank(host: HostProcesses, size: int) -> None:
    """Uploads and offloads are shared, and each rank gathers what the others uploaded."""
    found = host.run(size, cases.traffic, Case())
    for rank, moves in enumerate(found):
        slices = [slice_of(nbytes, rank, size) for nbytes, _ in moves.units]
        assert moves.uploaded == sum(s.end - s.begin for s in slices)
        assert moves.gathered == sum((size - 1) * s.nbytes for s in slices)
        heads = [s.of_head(head) for s, (_, head) in zip(slices, moves.units, strict=True)]
        assert moves.offloaded == sum(h.stop - h.start for h in heads)
    units = found[0].units
    assert sum(moves.uploaded for moves in found) == sum(nbytes for nbytes, _ in units)
    assert sum(moves.offloaded for moves in found) == sum(head for _, head in units)


@pytest.mark.parametrize("nbytes", [0, 1, 256, 257, 1024, 4096, 100_000])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_slices_are_a_partition(nbytes: int, size: int) -> None:
    slices = [slice_of(nbytes, rank, size) for rank in range(size)]
    assert slices[0].begin == 0
    assert slices[-1].end == nbytes
    for one, next_one in itertools.pairwise(slices):
        assert one.end == next_one.begin
    assert len({s.nbytes for s in slices}) == 1
    assert slices[0].nbytes % 256 == 0
    assert all(s.end - s.begin <= s.nbytes for s in slices)
    assert size * slices[0].nbytes - nbytes <= size * 256


def test_host_memory_is_one_copy(host: HostProcesses) -> None:
    found = host.run(4, cases.memory, LARGER)
    weights = found[0].weights
    assert weights > 25e6
    shared = sum(m.shared for m in found)
    assert 0.95 * weights < shared < 1.02 * weights
    # Of their own: slots and perturbed copies, the same in a single process.
    for m in found:
        assert m.own < 0.7 * weights, "a rank holds a copy of its own"


def test_after_closing_each_rank_has_its_own_weights(host: HostProcesses) -> None:
    found = host.run(2, cases.writes_after_closing, Case())
    assert [changed for changed, _ in found] == [True, False]


def test_views_of_weights_are_unmapped_and_private() -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:zo2ext")

    gc.collect()
    before = mappings()
    model = tiny(cases.MODEL)
    with ZOEngine(model, ZOConfig(store="shared"), CpuDevice(), ranks=OneRank()) as zo:
        one, other = model.state_dict(), model.state_dict()
        assert mappings() > before + len(one)
        for weights in one.values():
            weights.zero_()
        assert all(weights.any() for weights in other.values())
        del one, other, weights
        assert mappings() == before + 1
    del zo, model
    gc.collect()
    assert mappings() == before


def test_too_little_memory() -> None:
    with pytest.raises(MemoryError, match=r"2.00 MiB of host memory, and 1.00 MiB .* store='disk'"):
        SharedMemory(2**21, OneRank(), 2**20)


class Elsewhere(OneRank):
    """Gets offers of a file that is not there."""

    def meet(self, purpose: str, value: Any = None) -> list[Any]:
        return [value if isinstance(value, str) else value._replace(path="/proc/self/fd/none")]


def test_memory_that_cannot_be_opened() -> None:
    with pytest.raises(OSError, match="one user on one host, in one container"):
        SharedMemory(2**12, Elsewhere(), 2**20)


# -- going wrong


def assert_failed(outcomes: list[Any], *texts: str) -> None:
    """Each process raised `HostRankError` with its text."""
    for outcome, text in zip(outcomes, texts, strict=True):
        assert isinstance(outcome, Failed), outcome
        assert str(outcome).startswith("HostRankError"), outcome
        assert text in str(outcome).splitlines()[0], outcome


def test_units_in_another_order(doomed: HostProcesses) -> None:
    here = "is to gather unit first, 768 bytes, but rank 1 is to gather unit second, 768 bytes"
    assert_failed(
        doomed.outcomes(3, cases.other_unit),
        f"rank 0 {here}",
        "rank 1 is to gather unit second, 768 bytes, but rank 0 is to gather unit first",
        f"rank 2 {here}",
    )


def test_another_model(doomed: HostProcesses) -> None:
    text = "the ranks of this host have different models or settings: ('model.layers.1', "
    assert_failed(doomed.outcomes(3, cases.other_model), text, text, text)


def test_a_rank_that_reads_alone(doomed: HostProcesses) -> None:
    begin = time.monotonic()
    outcomes = doomed.outcomes(3, cases.reads_alone, Case())
    assert time.monotonic() - begin < 4 * TIMEOUT
    step = "rank {} was to gather unit "
    assert_failed(outcomes, step.format(0), "rank 1 was to read the host's weights", step.format(2))


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("place", [on_cpu, Simulated(1)], ids=PLACES)
def test_a_rank_that_ends_in_a_gather(
    doomed: HostProcesses, place: Place, how: signal.Signals, who: int
) -> None:
    begin = time.monotonic()
    others = [rank for rank in range(3) if rank != who]
    doomed.start(3, cases.stops_in_a_gather, Case(place), who, how)
    outcomes = [doomed.answer(rank) for rank in others]
    assert time.monotonic() - begin < 4 * TIMEOUT
    assert_failed(outcomes, *(f"rank {rank} was to gather unit model." for rank in others))


def holders(inode: int) -> list[str]:
    """Processes that map the shared memory with this inode, or have it open."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if f" {inode} " in (process / "maps").read_text():
                found.append(process.name)
            found += [h.name for h in (process / "fd").iterdir() if h.stat().st_ino == inode]
        except OSError:  # no process, one that has just ended, or another user's
            continue
    return found


def shared_files() -> set[str]:
    """Files in shared memory, without the semaphores of other tests' processes."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def test_nothing_stays_when_all_are_killed(doomed: HostProcesses) -> None:
    files = shared_files()
    inodes = doomed.run(3, cases.hold)
    assert len(set(inodes)) == 1, "one memory for all"
    assert holders(inodes[0])
    assert shared_files() == files
    for process in doomed.processes:
        process.kill()
        process.join()
    assert not holders(inodes[0])
    assert shared_files() == files
