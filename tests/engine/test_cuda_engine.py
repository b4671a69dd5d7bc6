"""The engine on a GPU: the bits of the plain loop there, whatever the streams do meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import Tensor, nn
from waits import waits

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.streaming.devices.cuda import CudaDevice
from zo2ext.streaming.devices.device import Queue

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "seed": 5}
STEPS = 8
PLACES: dict[str, dict[str, Any]] = {
    "streamed": {},
    "2-slots": {"slots": 2},
    "resident-2": {"resident": 2},
    "resident-all": {"resident": "all"},
    "one-copy": {"one_copy": True},
    "disk": {"store": "disk", "host_memory": "1GiB"},
}
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"storage": torch.bfloat16},
    "every-third": {"storage": torch.bfloat16, "write_back": 3},
    "nearest": {"storage": torch.float16, "rounding": "nearest"},
}


@pytest.fixture(autouse=True)
def _on_a_gpu() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor.cuda() for name, tensor in batch.items()} for batch in data]


def assert_equals_plain(
    engine: Callable[[nn.Module], ZOEngine], name: str, plain: dict[str, Any]
) -> None:
    """Losses and weights of a run are those of the plain loop with the whole model on the GPU."""
    data = on_gpu(batches(name, STEPS))
    expected = reference.mezo(tiny(name).cuda(), data, **SETTINGS, **plain)
    model = tiny(name)
    with engine(model) as zo:
        for step, batch in enumerate(data):
            zo.step(lambda batch=batch: model(**batch).loss)
            assert zo.last is not None
            losses = list(zip(zo.last.losses_plus, zo.last.losses_minus, strict=True))
            assert losses == expected.losses[step], f"losses of step {step}"
        zo.flush()
    for key, weights in expected.weights.items():
        found = model.get_parameter(key).data
        assert_same_bits(found, weights.to(found.dtype), key)


@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["opt", "llama-tied", "gpt2"])
def test_streamed_equals_in_memory(name: str, place: str, granularity: str) -> None:
    config = zo2ext.ZOConfig(device="cuda", granularity=granularity, **SETTINGS, **PLACES[place])
    assert_equals_plain(lambda model: zo2ext.offload(model, config), name, {})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", ["streamed", "one-copy", "resident-2", "disk"])
def test_formats_equal_in_memory(place: str, format: str) -> None:
    options = FORMATS[format]
    config = zo2ext.ZOConfig(device="cuda", **SETTINGS, **PLACES[place], **options)
    assert_equals_plain(lambda model: zo2ext.offload(model, config), "opt", options)


class Delayed(CudaDevice):
    """A GPU whose streams stall at random, so that work overlaps that seldom would."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.device("cuda"))
        self._random = random.Random(seed)

    def submit(self, queue: Queue, work: Callable[[], None], **order: Any) -> Any:
        cycles = self._random.choice([0, 0, 10**5, 10**6]) if queue is not Queue.DISK else 0

        def delayed() -> None:
            if cycles:
                torch.cuda._sleep(cycles)
            work()

        return super().submit(queue, delayed, **order)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("place", ["streamed", "2-slots", "one-copy", "resident-2", "disk"])
def test_stalls_of_any_stream_change_nothing(place: str, seed: int) -> None:
    config = zo2ext.ZOConfig(device="cuda", **SETTINGS, **PLACES[place])
    assert_equals_plain(lambda model: ZOEngine(model, config, Delayed(seed)), "opt", {})


def test_memory_of_an_engine_before_is_not_written_too_early() -> None:
    """Slots may lie where tensors of the caller were, whose last kernels still run."""
    weights = torch.randn(2**24, device="cuda")
    expected = weights.double().sum()
    for _ in range(5):
        scratch = weights.clone()
        torch.cuda._sleep(10**8)
        total = scratch.double().sum()
        del scratch
        zo2ext.offload(tiny("opt"), zo2ext.ZOConfig(device="cuda", **SETTINGS)).close()
        assert_same_bits(total.cpu(), expected.cpu())


def test_closures_on_streams_of_their_own_change_nothing() -> None:
    config = zo2ext.ZOConfig(device="cuda", slots=2, **SETTINGS)
    data = on_gpu(batches("opt", STEPS))
    expected = reference.mezo(tiny("opt").cuda(), data, **SETTINGS)
    model = tiny("opt")

    def loss(batch: dict[str, Tensor]) -> Tensor:
        own = torch.cuda.Stream()
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            torch.cuda._sleep(10**6)
            value: Tensor = model(**batch).loss
        torch.cuda.current_stream().wait_stream(own)
        return value

    with zo2ext.offload(model, config) as zo:
        for step, batch in enumerate(data):
            zo.step(lambda batch=batch: loss(batch))
            assert zo.last is not None
            losses = list(zip(zo.last.losses_plus, zo.last.losses_minus, strict=True))
            assert losses == expected.losses[step], f"losses of step {step}"


@pytest.mark.parametrize("place", PLACES)
def test_no_memory_is_held_after_close(place: str) -> None:
    before = torch.cuda.memory_allocated()
    data = on_gpu(batches("opt", 2))
    held = torch.cuda.memory_allocated()
    model = tiny("opt")
    zo = zo2ext.offload(model, zo2ext.ZOConfig(device="cuda", **SETTINGS, **PLACES[place]))
    for batch in data:
        zo.step(lambda batch=batch: model(**batch).loss)
    zo.close()
    assert torch.cuda.memory_allocated() == held >= before


def test_a_step_waits_once() -> None:
    """Beside what its two forward passes wait for themselves, to look at a mask, say."""
    (batch,) = on_gpu(batches("opt", 1))
    plain, model = tiny("opt").cuda(), tiny("opt")
    with torch.no_grad():
        plain(**batch)
        own = waits(lambda: plain(**batch).loss)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cuda", **SETTINGS)) as zo:
        for _ in range(3):
            zo.step(lambda: model(**batch).loss)
        found = waits(lambda: zo.step(lambda: model(**batch).loss))
    assert len(found) <= 2 * len(own) + 1, found


def test_evaluation_and_generation() -> None:
    model, plain = tiny("llama"), tiny("llama").cuda()
    ids = torch.randint(3, 90, (2, 6), device="cuda")
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cuda", **SETTINGS)), torch.no_grad():
        assert_same_bits(model(input_ids=ids).logits.cpu(), plain(input_ids=ids).logits.cpu())
        options = {"max_new_tokens": 8, "do_sample": False}
        assert_same_bits(model.generate(ids, **options).cpu(), plain.generate(ids, **options).cpu())
