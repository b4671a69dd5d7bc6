"""A step that an exception interrupts at any point can be made again, with the same bits."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_same_bits
from tiny_models import batches, tiny

import zo2ext
from zo2ext import ops
from zo2ext.engine.engine import ZOEngine
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.devices.device import Queue, Work
from zo2ext.streaming.devices.simulated import SimulatedDevice

MODEL = "llama-tied"
DISK = {"store": "disk", "host_memory": "4MiB"}
SPLIT = {"storage": "split", "write_back": 2}
PLACES = {
    "streamed": {},
    "one-copy": {"one_copy": True},
    "resident": {"resident": 2},
    "split": SPLIT,
    "disk": DISK,
    "disk-split": DISK | SPLIT,
    "shared": {"store": "shared"},
}


class FragileDevice(SimulatedDevice):
    """Raises KeyboardInterrupt at one submission: instead of queuing the work, or after it."""

    def __init__(self, *, moves: bool = True) -> None:
        super().__init__(moves=moves)
        self.count = 0
        self.fails_at, self.queues_first = -1, False

    def submit(self, queue: Queue, work: Work, **order: Any) -> object | None:
        self.count += 1
        fails = self.count - 1 == self.fails_at
        if fails and not self.queues_first:
            raise KeyboardInterrupt
        event = super().submit(queue, work, **order)
        if fails:
            self.synchronize()  # a GPU's submission calls the work as well
            raise KeyboardInterrupt
        return event


def train(
    device: FragileDevice, place: dict[str, Any], fails_at: int = -1
) -> tuple[dict[str, torch.Tensor], int]:
    """Train three steps or more, one of them again if it fails at submission `fails_at`.

    Return the weights, and the submissions of that step. No weights if the engine refuses to go on.
    """
    fragile = place.get("write_back", 1)
    model = tiny(MODEL)
    model.model.layers[1].requires_grad_(False)
    settings = zo2ext.ZOConfig(**{"lr": 1e-2, "slots": 2, **place})
    with ZOEngine(model, settings, device) as zo:
        for step, batch in enumerate(batches(MODEL, fragile + 2)):

            def loss(batch: Any = batch) -> Any:
                return model(**batch).loss

            if step != fragile:
                zo.step(loss)
                continue
            device.count, device.fails_at = 0, fails_at
            if fails_at >= 0:
                with pytest.raises(KeyboardInterrupt):
                    zo.step(loss)
                assert_nothing_is_held(zo)
            else:
                zo.step(loss)
            count, device.fails_at = device.count, -1
            if fails_at >= 0:
                try:
                    zo.step(loss)
                except RuntimeError as error:
                    if "may be updated in part" not in str(error):
                        raise
                    zo.close(keep_weights=False)
                    return {}, count
    return {n: p.data.clone() for n, p in model.named_parameters()}, count


def assert_nothing_is_held(zo: ZOEngine) -> None:
    loader = zo._loader
    assert not zo._pipeline._held()
    assert len(loader._buffers) == len(loader._all_buffers)


@pytest.mark.parametrize(
    ("place_name", "queues_first"),
    [(place, False) for place in PLACES]
    + [(place, True) for place in ("streamed", "resident", "disk-split", "shared")],
)
def test_interrupted_at_each_submission(place_name: str, queues_first: bool) -> None:
    place = PLACES[place_name]
    expected, count = train(FragileDevice(), place)
    assert count > 20
    refused = 0
    for fails_at in range(count):
        device = FragileDevice()
        device.queues_first = queues_first
        weights, _ = train(device, place, fails_at)
        refused += not weights
        for name, tensor in weights.items():
            assert_same_bits(tensor, expected[name], f"{name}, submission {fails_at} failed")
    # The trained one of two resident units is updated in place: its kernel may have run.
    assert refused == (queues_first and "resident" in place)


def interrupted(kernel: Callable[..., None], call: int) -> Callable[..., None]:
    """Return `kernel` with a KeyboardInterrupt after its `call`-th call."""
    calls = 0

    def run(*args: Any, **options: Any) -> None:
        nonlocal calls
        kernel(*args, **options)
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    return run


@pytest.mark.parametrize("call", [1, 2, 4])
def test_weights_interrupted_in_place_are_not_used(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the kernel updates the stored weights themselves: nothing has the old ones."""
    model = tiny(MODEL)
    first, second = batches(MODEL, 2)
    zo = ZOEngine(model, zo2ext.ZOConfig(lr=1e-2), CpuDevice())
    zo.step(lambda: model(**first).loss)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "update_perturb", interrupted(ops.update_perturb, call))
        with pytest.raises(KeyboardInterrupt):
            zo.step(lambda: model(**second).loss)
    with pytest.raises(RuntimeError, match="may be updated in part"):
        zo.step(lambda: model(**second).loss)
    with pytest.raises(RuntimeError, match="may be updated in part"):
        model.state_dict()
    zo.close()


def test_a_failure_before_a_kernel_in_place_does_no_harm() -> None:
    expected, count = train(FragileDevice(moves=False), {})
    for fails_at in range(count):
        weights, _ = train(FragileDevice(moves=False), {}, fails_at)
        for name, tensor in weights.items():
            assert_same_bits(tensor, expected[name], f"{name}, submission {fails_at} failed")


class Interrupter:
    """Raises KeyboardInterrupt at one line of the modules that move weights, as Ctrl-C may.

    Args:
        at: Line to raise at, as file and number, when it runs for the `time`-th time; None: count
            how often each line runs.
    """

    def __init__(self, at: tuple[str, int] | None = None, time: int = 1) -> None:
        self.at, self.time = at, time
        self.runs = Counter[tuple[str, int]]()
        self.raised = False

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.endswith(("streaming/unit_loader.py", "streaming/pipeline.py")):
            return None
        if "work" in (frame.f_code.co_name, frame.f_back.f_code.co_name):
            return None  # the simulated device runs it later, as a GPU does
        if event == "line":
            line = name, frame.f_lineno
            self.runs[line] += 1
            if line == self.at and self.runs[line] == self.time:
                sys.settrace(None)
                self.raised = True
                raise KeyboardInterrupt
        return self


def train_traced(place: dict[str, Any], interrupter: Interrupter) -> dict[str, torch.Tensor]:
    """Train three steps, the second of them again if it is interrupted; return the weights."""
    model = tiny(MODEL)
    model.model.layers[1].requires_grad_(False)
    settings = zo2ext.ZOConfig(**{"lr": 1e-2, "slots": 2, **place})
    with ZOEngine(model, settings, SimulatedDevice()) as zo:
        for step, batch in enumerate(batches(MODEL, 3)):

            def loss(batch: Any = batch) -> Any:
                return model(**batch).loss

            if step == 1:
                sys.settrace(interrupter)
                try:
                    zo.step(loss)
                    continue  # the simulated device's order is random: fewer units were loaded
                except KeyboardInterrupt:
                    assert_nothing_is_held(zo)
                finally:
                    sys.settrace(None)
            zo.step(loss)
    return {n: p.data.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("place", [{}, {"storage": "split", "one_copy": True}], ids=["bf16", "one"])
def test_interrupted_at_each_line(place: dict[str, Any]) -> None:
    counted = Interrupter()
    expected = train_traced(place, counted)
    assert len(counted.runs) > 80
    raised = 0
    for line, runs in counted.runs.items():
        interrupter = Interrupter(line, (runs + 1) // 2)
        weights = train_traced(place, interrupter)
        raised += interrupter.raised
        for name, tensor in weights.items():
            assert_same_bits(tensor, expected[name], f"{name}, interrupted at {line}")
    assert raised > 80
