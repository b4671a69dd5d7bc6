"""Every dependency that the pipeline declares is needed, and they suffice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numeric import assert_same_bits
from tiny_models import batches, tiny

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.streaming import pipeline
from zo2ext.streaming.devices.device import Dependency, HazardError, Queue
from zo2ext.streaming.devices.simulated import SimulatedDevice
from zo2ext.streaming.pipeline import spread
from zo2ext.streaming.stores.host import HostStore


class NotFiniteError(Exception):
    """Weights were read that had not arrived."""


DISK = {"store": "disk", "host_memory": "4MiB"}
TIGHT = DISK | {"host_memory": "400KiB"}  # for one unit in staging memory
SHARED = {"store": "shared"}
PLACES = [{}, {"resident": 2}, DISK, {"resident": 2, **DISK}, SHARED, {"resident": 2, **SHARED}]


def train(device: SimulatedDevice, steps: int = 6, **config: object) -> dict[str, torch.Tensor]:
    """Weights amid and after a run that streams, freezes one block and evaluates in between."""
    seen = {}
    model = tiny("llama-tied")
    model.model.layers[1].requires_grad_(False)
    settings = zo2ext.ZOConfig(**{"lr": 1e-2, "slots": 2, **config})
    with ZOEngine(model, settings, device) as zo:
        for step, batch in enumerate(batches("llama-tied", steps)):
            zo.step(lambda batch=batch: model(**batch).loss)
            if step == 3:
                seen = {f"amid, {n}": w.clone() for n, w in model.state_dict().items()}
                model(**batch)
        if zo.skipped:
            raise NotFiniteError
    return seen | {n: p.data.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_declared_dependencies_suffice(slots: int, place: dict[str, object]) -> None:
    expected = train(SimulatedDevice(0))
    for seed in range(6):
        # Without memory of its own, units of a disk are read into slots, and others rest in place.
        device = SimulatedDevice(seed, moves=seed % 3 > 0)
        for name, weights in train(device, slots=slots, **place).items():
            assert_same_bits(weights, expected[name], f"{name}, order {seed}")


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_planes_that_come_later_are_ordered_too(place: dict[str, object]) -> None:
    """The low planes of the split format are brought to slots that hold the rest already."""
    split = {"storage": "split", "write_back": 2}
    expected = train(SimulatedDevice(0, moves=False), **split)
    for seed in range(6):
        for name, weights in train(
            SimulatedDevice(seed), slots=2 + seed % 3, **place, **split
        ).items():
            assert_same_bits(weights, expected[name], f"{name}, order {seed}")


@pytest.mark.parametrize("piece", [256, 2**25])
def test_units_of_many_sizes_in_one_memory(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload into the places of several units waits for all of them, whole or in pieces."""
    monkeypatch.setattr(pipeline, "PIECE_NBYTES", piece)
    split = {"storage": "split", "write_back": 2}
    bring = HostStore.bring

    def counted(store: HostStore, unit: int, *arguments: Any) -> object | None:
        nonlocal pieces
        layout, end = store.layouts[unit], arguments[-1].stop
        pieces += end not in (layout.low_nbytes, layout.nbytes)
        return bring(store, unit, *arguments)

    monkeypatch.setattr(HostStore, "bring", counted)
    for settings in ({}, split):
        expected, pieces = train(SimulatedDevice(0, moves=False), **settings), 0
        for seed in range(6):
            options = {"granularity": "module", "slots": 2 + seed % 2, **settings}
            for name, weights in train(SimulatedDevice(seed), **options).items():
                assert_same_bits(weights, expected[name], f"{name}, order {seed}")
        assert (pieces > 20) == (piece == 256)


@pytest.mark.parametrize("dependency", Dependency, ids=lambda d: d.name)
def test_each_dependency_is_missed(dependency: Dependency) -> None:
    def train_in_many_ways() -> None:
        for slots in (2, 3, 4):
            for place in PLACES:
                train(SimulatedDevice(1, ignored=dependency), slots=slots, **place)

    with pytest.raises(HazardError):
        train_in_many_ways()


@pytest.mark.parametrize(
    ("dependency", "place"),
    [
        (Dependency.KERNEL_AFTER_UPLOAD, {}),
        (Dependency.OFFLOAD_AFTER_KERNEL, {}),
        (Dependency.UPLOAD_AFTER_SLOT_WAS_OFFLOADED, {}),
        (Dependency.HOST_READ_AFTER_OFFLOAD, {}),
        (Dependency.UPLOAD_AFTER_DISK_READ, DISK),
        (Dependency.DISK_READ_AFTER_STAGING_WAS_UPLOADED, TIGHT),
        (Dependency.DISK_WRITE_AFTER_OFFLOAD, DISK),
    ],
    ids=str,
)
def test_wrong_orders_give_wrong_weights(dependency: Dependency, place: dict[str, object]) -> None:
    """The detector is not the only witness, where the simulation can put work off for long."""
    expected = train(SimulatedDevice(0))
    for seed in range(20):
        device = SimulatedDevice(seed, ignored=dependency, detect=False)
        try:
            final = train(device, **place)
        except NotFiniteError:
            return
        if any(not torch.equal(final[name], expected[name]) for name in expected):
            return
    pytest.fail(f"without {dependency.name} every order gave the same weights")


def test_unordered_writes_are_reported() -> None:
    device = SimulatedDevice()
    device.submit(Queue.UPLOAD, lambda: None, writes=["slot"])
    with pytest.raises(HazardError, match="slot"):
        device.submit(Queue.COMPUTE, lambda: None, reads=["slot"])


def test_an_event_orders_all_that_came_before_it() -> None:
    device = SimulatedDevice()
    first = device.submit(Queue.UPLOAD, lambda: None, writes=["slot"])
    second = device.submit(
        Queue.COMPUTE, lambda: None, after={Dependency.KERNEL_AFTER_UPLOAD: [first]}
    )
    device.submit(
        Queue.OFFLOAD,
        lambda: None,
        after={Dependency.OFFLOAD_AFTER_KERNEL: [second]},
        reads=["slot"],
    )


def test_traffic_is_the_bytes_of_the_units() -> None:
    model = tiny("llama")
    with ZOEngine(model, zo2ext.ZOConfig(slots=2), SimulatedDevice()) as zo:
        per_step = []
        for batch in batches("llama", 4):
            before = zo.traffic.uploaded, zo.traffic.offloaded
            zo.step(lambda batch=batch: model(**batch).loss)
            after = zo.traffic.uploaded, zo.traffic.offloaded
            per_step.append((after[0] - before[0], after[1] - before[1]))
        assert per_step[0][1] == 0, "nothing to write back in the first step"
        assert set(per_step[1:]) == {(zo.host_nbytes, zo.host_nbytes)}


def test_residents_are_spread_over_the_order() -> None:
    assert spread([1] * 8, 4) == {0, 2, 4, 6}
    assert spread([1] * 8, "all") == set(range(8))
    assert spread([1] * 3, 10) == {0, 1, 2}
    assert spread([10, 10, 10, 10], 0, budget=25) == {0, 2}
    assert spread([10, 10], 0, budget=5) == frozenset()


def test_what_waits_for_failed_work_fails_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    monkeypatch.setattr(device, "_run_some", lambda: None)  # work begins when it is waited for

    def fail() -> None:
        raise OSError("the disk is gone")

    failed = device.submit(Queue.UPLOAD, fail)
    after = {Dependency.KERNEL_AFTER_UPLOAD: [failed]}
    kernel = device.submit(Queue.COMPUTE, lambda: None, after=after)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            device.wait(kernel)
    with pytest.raises(OSError, match="the disk is gone"):
        device.computing(["slot"], after)
