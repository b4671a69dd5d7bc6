"""Storage formats in the engine: where their planes lie, what conversions cost, what travels."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_same_bits
from safetensors.torch import load_file
from tiny_models import batches, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import zo2ext
from zo2ext.model.layout import lay_out
from zo2ext.model.units import find_units
from zo2ext.ops.formats import Planes, Storage
from zo2ext.streaming.stores.rounding import RoundingError, read_rounded, rounding_error
from zo2ext.streaming.stores.sources import PIECE_NBYTES, HeldTensor
from zo2ext.streaming.stores.store import HUGE_PAGE, map_arena

SCALED = [storage for storage in Storage if storage.scaled]


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("split", Storage.SPLIT),
        (Storage.E4M3, Storage.E4M3),
        (torch.bfloat16, Storage.BF16),
        ("float16", Storage.FP16),
        ("torch.float32", Storage.FP32),
        (torch.float8_e4m3fn, Storage.E4M3),
    ],
)
def test_formats_have_names_and_dtypes(name: Any, storage: Storage) -> None:
    assert Storage.of(name) is storage
    assert zo2ext.ZOConfig(storage=name).storage is storage


@pytest.mark.parametrize("name", ["fp8", torch.float64, torch.int8, 3])
def test_other_formats_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"storage must be one of fp32, .*, split, .*got"):
        zo2ext.ZOConfig(storage=name)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    storage=st.sampled_from(SCALED),
    shape=st.one_of(
        st.tuples(st.integers(1, 200)), st.tuples(st.integers(1, 9), st.integers(1, 40))
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.integers(-60, 60),
    seed=st.integers(0, 99),
)
def test_sources_are_rounded_as_the_reference_does(
    storage: Storage, shape: tuple[int, ...], dtype: torch.dtype, scale: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).mul(2.0 ** (scale // 4)).to(dtype)
    planes = Planes.empty(storage, values.numel())
    error = read_rounded(HeldTensor(values), 0, planes)
    expected = reference.round_scaled(values, reference.SCALED[storage])
    assert np.array_equal(planes.stored.view(torch.uint8).numpy(), expected.top)
    assert planes.scales is not None
    assert np.array_equal(planes.scales.view(torch.uint8).numpy(), expected.scales)
    if storage.has_low:
        assert planes.low is not None
        assert np.array_equal(planes.low.numpy(), expected.low)
    # Half a unit in the last place of the largest of each 32, at most.
    mantissa = reference.SCALED[storage].mantissa
    assert error.beyond == 0
    assert error.relative <= 2.0 ** -(mantissa + 1) * 32**0.5


def test_long_sources_are_rounded_piece_by_piece() -> None:
    values = torch.randn(2 * PIECE_NBYTES // 4 + 77)
    whole = zo2ext.ops.pack_scaled(values, split=True)
    planes = Planes.empty(Storage.SPLIT, values.numel())
    read_rounded(HeldTensor(values), 0, planes)
    for plane, expected in zip(planes.named().values(), whole_planes(whole), strict=True):
        assert torch.equal(plane.view(torch.uint8), expected.view(torch.uint8))


def whole_planes(packed: zo2ext.ops.Packed) -> list[torch.Tensor]:
    return [t for t in (packed.stored, packed.scales, packed.low) if t is not None]


def test_the_error_of_rounding_is_counted() -> None:
    before = torch.tensor([3.0, 4.0, 1e30, float("inf"), float("nan")])
    after = torch.tensor([3.5, 4.0, float("inf"), float("inf"), float("nan")])
    error = rounding_error(before, after)
    assert error == RoundingError(beyond=1, squares=25.0, error_squares=0.25)
    assert error.relative == 0.1
    assert str(error) == "relative error 0.1, 1 weights beyond its range"


@pytest.mark.parametrize("storage", SCALED)
def test_planes_that_are_not_always_needed_lie_first(storage: Storage) -> None:
    model = tiny("llama")
    units, _ = find_units(model, zo2ext.Granularity.BLOCK)
    for unit in units:
        layout = lay_out(unit, zo2ext.ZOConfig(storage=storage))
        (part,) = layout.parts
        taken = sorted((r.begin, r.begin + r.nbytes) for t in part.tensors for r in part.ranges(t))
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))
        assert taken[-1][1] <= layout.trainable_nbytes <= layout.nbytes
        lows = [r for t in part.tensors for r in part.ranges(t) if r.name == "low"]
        assert all(r.begin + r.nbytes <= layout.low_nbytes for r in lows)
        assert bool(layout.low_nbytes) == bool(lows) == storage.has_low


@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("write_back", [1, 4, "never"])
@pytest.mark.parametrize("storage", [Storage.BF16, *SCALED])
def test_what_travels(storage: Storage, write_back: int | str, store: str) -> None:
    """The low planes only at write-back steps; then they come home, too."""
    config = zo2ext.ZOConfig(
        device="simulated", storage=storage, write_back=write_back, store=store, lr=1e-3
    )
    model = tiny("llama")
    first, *others = batches("llama", 10)
    with zo2ext.offload(model, config) as zo:
        zo.step(lambda: model(**first).loss)  # which runs a pass more than the others
        zo._loader.settle()
        before = dataclasses.replace(zo.traffic)
        for batch in others:
            zo.step(lambda batch=batch: model(**batch).loss)
        whole = sum(layout.nbytes for layout in zo.layouts)
        low = sum(layout.low_nbytes for layout in zo.layouts)
        home = sum(layout.trainable_nbytes for layout in zo.layouts)
        largest = max(layout.low_nbytes for layout in zo.layouts)
        due = len([s for s in range(1, 10) if write_back != "never" and s % write_back == 0])
        floor = 9 * (whole - low) + due * low
        # Units that are uploaded ahead have their low planes or lack them as the step before had.
        ahead = zo._pipeline.device_nbytes
        assert abs(zo.traffic.uploaded - before.uploaded - floor) <= (
            ahead + 2 * due * config.slots * largest
        )
        assert zo.traffic.offloaded - before.offloaded == due * home


def test_weights_beyond_a_format_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(8, 2)
    with torch.no_grad():
        model.weight[0, :3] = 1e6
        model.bias[0] = 3.4e38
    with (
        caplog.at_level(logging.WARNING),
        zo2ext.offload(model, zo2ext.ZOConfig(device="cpu", storage="fp16"), train=True),
    ):
        pass
    assert "weight: 3 of 16 weights are beyond the range of fp16" in caplog.text
    assert "bias: 1 of 2 weights are beyond the range of fp16" in caplog.text
    caplog.clear()
    model = nn.Linear(8, 2)
    with torch.no_grad():
        model.bias[0] = 3.4e38
    with (
        caplog.at_level(logging.WARNING),
        zo2ext.offload(model, zo2ext.ZOConfig(device="cpu", storage="e4m3")),
    ):
        pass
    assert "bias: 1 of 2 weights are beyond the range of e4m3" in caplog.text
    assert model.bias.isfinite().all()


def test_the_error_of_storing_is_known() -> None:
    errors = {}
    for storage in Storage:
        with zo2ext.offload(tiny("llama"), zo2ext.ZOConfig(device="cpu", storage=storage)) as zo:
            errors[storage] = zo.rounding_error.relative
    assert errors[Storage.FP32] == 0
    in_order = [errors[Storage(name)] for name in ("split", "fp16", "bf16", "e4m3")]
    assert in_order[0] > 0
    assert in_order == sorted(in_order)


@pytest.mark.parametrize("lost", ["missing", "not-finite"])
def test_damaged_masters_are_refused(lost: str) -> None:
    model = tiny("opt")
    config = zo2ext.ZOConfig(device="cpu", storage="split", compute_dtype=torch.bfloat16)
    with zo2ext.offload(model, config) as zo:
        masters = {name: plane.clone() for name, plane in zo.exact_weights().items()}
        name = "model.decoder.final_layer_norm.weight:scales"
        if lost == "missing":
            del masters[name]
            message = rf"they differ in {name}"
        else:
            masters[name].view(torch.uint8)[0] = 0xFF
            message = rf"1 of \d+ scales in {name} are not finite"
        before = {n: p.clone() for n, p in zo.exact_weights().items()}
        with pytest.raises(ValueError, match=message):
            zo.resume(steps=0, exact_weights=masters)
        for plane, bytes_ in zo.exact_weights().items():
            assert torch.equal(bytes_.view(torch.uint8), before[plane].view(torch.uint8))


@pytest.mark.parametrize("storage", ["e4m3", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_checkpoints_in_any_dtype(tmp_path: Path, storage: str, dtype: torch.dtype) -> None:
    model = tiny("llama-tied")
    with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-2, device="cpu", storage=storage)) as zo:
        for batch in batches("llama-tied", 3):
            zo.step(lambda batch=batch: model(**batch).loss)
        error = zo.save_pretrained(tmp_path / "saved", dtype=dtype)
        now = {name: values.clone() for name, values in model.state_dict().items()}
    for name, values in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert_same_bits(values, now[name].to(dtype), name)
    whole = torch.cat([w.flatten() for n, w in now.items() if n != "lm_head.weight"]).double()
    moved = whole - whole.to(dtype).double()
    assert error.relative == pytest.approx(float(moved.norm() / whole.norm()), rel=1e-9)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] in str(dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == dtype


def test_a_model_card_says_which_format_a_run_used(tmp_path: Path) -> None:
    model = tiny("llama")
    config = zo2ext.ZOConfig(device="cpu", storage="split", write_back=16)
    with zo2ext.offload(model, config) as zo:
        zo.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "stored in split (rounding stochastic, write-back 16) and computed" in card
    assert "base_model" not in card, "a folder of this machine"


def test_arenas_get_huge_pages_and_are_not_copied_by_a_fork() -> None:
    """Linux gives shared memory no huge pages by default, however it is advised."""
    arena = map_arena(4 * HUGE_PAGE)
    address = torch.frombuffer(arena, dtype=torch.uint8).data_ptr()
    flags, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert "sh" not in flags  # shared
    assert "dc" in flags  # not copied by fork
    assert "hg" in flags  # huge pages are advised
