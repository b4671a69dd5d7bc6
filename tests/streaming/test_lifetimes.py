"""After `close`, nobody holds device memory, without a garbage collection."""

from __future__ import annotations

import gc
import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import batches, tiny
from torch import Tensor, nn

import zo2ext
from zo2ext import ops
from zo2ext.engine import placeholders
from zo2ext.engine.engine import ZOEngine
from zo2ext.streaming.devices.simulated import SimulatedDevice

MODEL = "llama-tied"


class _Memory(np.ndarray[Any, Any]):
    """Memory that can be referenced weakly."""


class Tracking(SimulatedDevice):
    """Knows which of its memory is still held."""

    def __init__(self) -> None:
        super().__init__()
        self._memories: list[weakref.ref[_Memory]] = []
        self.closing = False

    def own(self, values: Tensor) -> Tensor:
        """Return `values` in tracked memory."""
        memory = values.numpy().copy().view(_Memory)
        self._memories.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    def empty(self, nbytes: int) -> Tensor:
        return self.own(super().empty(nbytes))

    @property
    def held(self) -> list[int]:
        found = [memory() for memory in self._memories]
        return [memory.nbytes for memory in found if memory is not None]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Tracking:
    """A device that tracks all memory which the engine takes of it."""
    device = Tracking()
    for owner, name in ((ops, "segment_table"), (ops, "update_table")):
        made = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, made=made: device.own(made(*args)))
    full = torch.full

    def scalar(size: Any, value: Any, **options: Any) -> Tensor:
        made = full(size, value, **options)
        return device.own(made) if size == () and not device.closing else made

    monkeypatch.setattr(placeholders.torch, "full", scalar)
    return device


@pytest.fixture(autouse=True)
def _without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


PLACES: list[dict[str, Any]] = [
    {},
    {"storage": "split", "write_back": 3},
    {"resident": "all"},
    {"one_copy": True, "granularity": "module", "slots": 2},
    {"store": "disk", "host_memory": "4MiB"},
    {"store": "shared"},
]


def use(zo: ZOEngine, model: Any, steps: int = 4) -> None:
    data = batches(MODEL, steps)
    for batch in data:
        zo.step(lambda b=batch: model(**b).loss)
    with torch.no_grad():
        model(**data[0])
    model.state_dict()


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_no_device_memory_is_held_after_close(
    place: dict[str, Any], keep_weights: bool, device: Tracking
) -> None:
    model = tiny(MODEL)
    zo = ZOEngine(model, zo2ext.ZOConfig(lr=1e-3, **place), device)
    use(zo, model)
    assert len(device.held) > 3
    device.closing = True  # placeholders are in host memory from now on
    zo.close(keep_weights=keep_weights)
    assert device.held == []
    assert zo.device_nbytes == 0
    assert zo.steps == 4


def failing_loss(model: Any) -> Callable[[], Any]:
    def loss() -> Any:
        model(**batches(MODEL, 1)[0])
        raise ValueError("no")

    return loss


@pytest.mark.parametrize("place", PLACES)
def test_none_is_held_after_a_failed_step_either(place: dict[str, Any], device: Tracking) -> None:
    model = tiny(MODEL)
    zo = ZOEngine(model, zo2ext.ZOConfig(lr=1e-3, **place), device)
    use(zo, model, 2)
    with pytest.raises(ValueError, match="no") as caught:
        zo.step(failing_loss(model))
    caught.value.__traceback__ = None
    del caught
    device.closing = True  # placeholders are in host memory from now on
    zo.close()
    assert device.held == []


def test_none_is_held_after_a_failure_on_a_thread(
    device: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(MODEL)
    zo = ZOEngine(model, zo2ext.ZOConfig(lr=1e-3, store="shared"), device)
    use(zo, model, 2)

    def fail(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(zo._weights.store._ranks, "gather", fail)
    with pytest.raises(ValueError, match="no") as caught:
        use(zo, model, 1)
    caught.value.__traceback__ = None
    del caught
    monkeypatch.undo()
    device.closing = True
    zo.close(keep_weights=False)
    assert device.held == []


def test_none_is_held_after_a_failed_offload(device: Tracking) -> None:
    model = tiny(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zo2ext.parallel.parallel.SingleProcess, "team", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            ZOEngine(model, zo2ext.ZOConfig(lr=1e-3), device)
    caught.value.__traceback__ = None
    del caught
    assert device.held == []


def test_the_store_frees_host_memory_whose_weights_are_not_kept() -> None:
    model = tiny(MODEL)
    zo = ZOEngine(model, zo2ext.ZOConfig(lr=1e-3), SimulatedDevice())
    slab = weakref.ref(zo._weights.store.slabs[0])  # type: ignore[attr-defined]
    use(zo, model, 1)
    zo.close(keep_weights=False)
    assert slab() is None


def test_a_closed_model_may_be_used_in_a_forked_process() -> None:
    model = nn.Linear(64, 64)
    zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")).close()
    child = os.fork()
    if child == 0:
        os._exit(int(not math.isfinite(sum(model.weight.data.view(-1).tolist()))))
    _, status = os.waitpid(child, 0)
    assert status == 0
