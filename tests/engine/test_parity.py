"""The project's foundation: a streamed run has the bits of the plain in-memory loop."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from engine_runs import assert_run_equals, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numeric import assert_same_bits
from tiny_models import CASES, batches, pretrained, tiny
from torch import nn

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.ops.formats import Storage
from zo2ext.streaming.devices.simulated import SimulatedDevice
from zo2ext.streaming.stores.planes import named_planes

STEPS = 20
SETTINGS = {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.1, "seed": 11}
MODELS = ["opt", "opt-untied", "llama", "qwen3", "gpt2", "mixtral"]
PLACES = {
    "cpu": {"device": "cpu"},
    "streamed": {"device": "simulated"},
    "2-slots": {"device": "simulated", "slots": 2},
    "9-slots": {"device": "simulated", "slots": 9},
    "resident-2": {"device": "simulated", "resident": 2},
    "resident-40KiB": {"device": "simulated", "resident": "40KiB"},
    "resident-all": {"device": "simulated", "resident": "all"},
    "one-copy": {"device": "simulated", "one_copy": True},
}


@cache
def reference_run(name: str, directions: int) -> reference.Result:
    return reference.mezo(tiny(name), batches(name, STEPS), directions=directions, **SETTINGS)


@pytest.mark.parametrize("directions", [1, 3], ids=lambda n: f"directions={n}")
@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_streamed_equals_in_memory(
    name: str, place: str, granularity: str, directions: int
) -> None:
    assert_run_equals(
        tiny(name),
        batches(name, STEPS),
        reference_run(name, directions),
        granularity=granularity,
        directions=directions,
        **PLACES[place],
        **SETTINGS,
    )


@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("place", ["cpu", "streamed", "resident-2"])
def test_pretrained_model_equals_in_memory(
    model_folder: Path, place: str, granularity: str
) -> None:
    model = pretrained(model_folder)
    generator = torch.Generator().manual_seed(3)
    data = []
    for _ in range(STEPS):
        ids = torch.randint(3, 512, (2, 32), generator=generator)
        data.append({"input_ids": ids, "labels": ids})
    expected = _pretrained_run(model_folder, data)
    assert_run_equals(model, data, expected, granularity=granularity, **PLACES[place], **SETTINGS)


_pretrained_runs: list[reference.Result] = []


def _pretrained_run(model_folder: Path, data: list[dict[str, Any]]) -> reference.Result:
    if not _pretrained_runs:
        _pretrained_runs.append(reference.mezo(pretrained(model_folder), data, **SETTINGS))
    return _pretrained_runs[0]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["opt", "llama-tied", "gpt2"]),
    directions=st.integers(1, 3),
    estimator=st.sampled_from([None, "two_sided"]),
    normalize=st.booleans(),
    clip=st.sampled_from([None, 1.0]),
    granularity=st.sampled_from(["block", "module"]),
    slots=st.integers(2, 6),
    resident=st.integers(0, 6),
    storage=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, "e4m3", "split"]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    write_back=st.one_of(st.integers(1, 4), st.just("never")),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
    seed=st.integers(0, 2**64 - 1),
    weight_decay=st.sampled_from([0.0, 0.5]),
    one_copy=st.booleans(),
)
def test_any_configuration_equals_in_memory(
    name: str, write_back: int | str, one_copy: bool, **config: Any
) -> None:
    place = {key: config.pop(key) for key in ("slots", "resident", "granularity")}
    config |= {"lr": 1e-2, "eps": 1e-3}
    data = batches(name, 5)
    period = None if write_back == "never" else write_back
    assert_run_equals(
        tiny(name),
        data,
        reference.mezo(tiny(name), data, write_back=period, **config),
        device="simulated",
        one_copy=one_copy,
        write_back=write_back,
        **place,
        **config,
    )


@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("place", ["cpu", "streamed", "resident-2", "one-copy"])
@pytest.mark.parametrize("write_back", [1, 3])
@pytest.mark.parametrize("storage", ["e4m3", "split"])
def test_eight_bits_equal_in_memory(
    storage: str, write_back: int, place: str, granularity: str
) -> None:
    """Experts are not visited at each step: with `module` they are written back late."""
    config = {**SETTINGS, "lr": 1e-2, "storage": storage, "write_back": write_back}
    assert_run_equals(
        tiny("mixtral"),
        batches("mixtral", 8),
        scaled_run(storage, write_back),
        granularity=granularity,
        **PLACES[place],
        **config,
    )


@cache
def scaled_run(storage: str, write_back: int) -> reference.Result:
    config = {**SETTINGS, "lr": 1e-2, "storage": storage, "write_back": write_back}
    return reference.mezo(tiny("mixtral"), batches("mixtral", 8), **config)


def test_half_precision_models_equal_in_memory() -> None:
    """Weights stored and computed with in bfloat16, and stored in it but computed with in fp32."""
    for compute, storage in itertools.product([torch.bfloat16, torch.float32], [torch.bfloat16]):
        model = tiny("llama").to(compute)
        data = batches("llama", 6)
        expected = reference.mezo(copy.deepcopy(model), data, storage=storage, **SETTINGS)
        assert_run_equals(model, data, expected, device="simulated", storage=storage, **SETTINGS)


def test_frozen_weights_stay() -> None:
    for device in ("cpu", "simulated"):
        model = tiny("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name or name == "lm_head.weight")
        before = {n: p.data.clone() for n, p in model.named_parameters() if not p.requires_grad}
        data = batches("llama", 6)
        expected = reference.mezo(copy.deepcopy(model), data, **SETTINGS)
        traffic = [zo.traffic.offloaded for zo in run(copy.deepcopy(model), data, device=device)]
        assert_run_equals(model, data, expected, device=device, **SETTINGS)
        after = dict(model.named_parameters())
        for name, weights in before.items():
            assert_same_bits(after[name].data, weights, name)
        trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert traffic[-1] <= 6 * 1.5 * trainable, "frozen weights were written back"


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_dropout_masks_agree(name: str) -> None:
    rate = {"opt": {"dropout": 0.3}, "mixtral": {"attention_dropout": 0.3}}[name]
    model, plain = tiny(name, **rate), tiny(name, **rate)
    model.train(), plain.train()
    data = batches(name, 5)
    torch.manual_seed(5)
    expected = reference.mezo(plain, data, **SETTINGS)
    torch.manual_seed(5)
    assert_run_equals(model, data, expected, device="simulated", **SETTINGS)


@pytest.mark.parametrize(
    ("storage", "write_back"), [*((storage, 1) for storage in Storage), (Storage.SPLIT, 7)]
)
def test_nothing_drifts_without_learning(storage: Storage, write_back: int) -> None:
    """Not one bit in 2,000 steps, in any format: updates of 0 are rounded with each."""
    model = nn.Sequential(nn.Linear(33, 3), nn.Linear(3, 1))
    config = {"lr": 0.0, "device": "cpu", "storage": storage, "write_back": write_back}
    with zo2ext.offload(model, zo2ext.ZOConfig(**config)) as zo:
        before = {n: w.clone() for n, w in model.state_dict().items()}
        planes = {n: p.clone() for n, p in _planes(zo).items()}
        x = torch.randn(2, 33)
        for _ in range(2_000):
            zo.step(lambda: model(x).square().mean())
        zo.flush()
        for name, plane in _planes(zo).items():
            assert torch.equal(plane.view(torch.uint8), planes[name].view(torch.uint8)), name
        for name, weights in model.state_dict().items():
            assert_same_bits(weights, before[name], name)


def _planes(zo: ZOEngine) -> dict[str, torch.Tensor]:
    store = zo._weights.store
    return named_planes(store, [(x, t) for x in zo.layouts for t in x.tensors])


def test_seed_of_the_simulation_does_not_matter() -> None:
    finals = []
    for seed in range(5):
        model = tiny("llama-tied")
        engine = ZOEngine(model, zo2ext.ZOConfig(**SETTINGS), SimulatedDevice(seed))
        with engine as zo:
            for batch in batches("llama-tied", 5):
                zo.step(lambda batch=batch: model(**batch).loss)
        finals.append({n: p.data.clone() for n, p in model.named_parameters()})
    for final in finals[1:]:
        for name, weights in final.items():
            assert_same_bits(weights, finals[0][name], name)


def test_every_family_gives_the_losses_of_plain_perturbed_forwards() -> None:
    for name in CASES:
        data = batches(name, 2)
        expected = reference.mezo(tiny(name), data, **SETTINGS)
        assert_run_equals(tiny(name), data, expected, device="simulated", **SETTINGS)
