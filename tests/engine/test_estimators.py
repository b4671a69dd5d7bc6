"""Estimators: from losses to slopes, normalized or not, and steps that are shortened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import assert_same_bits
from tiny_models import batches, tiny

import zo2ext
from zo2ext._choices import Estimator
from zo2ext.commands.arguments import TrainArguments
from zo2ext.commands.options import parse
from zo2ext.config import config_from
from zo2ext.engine.update_rule import Guard, StepRecord, decide, root_mean_square, slopes
from zo2ext.journal.journal import read_journal
from zo2ext.journal.records import FORMAT, RECORD_NBYTES

SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "directions": 4}
CENTERED: dict[str, Any] = {"estimator": "centered", "normalize": False}
WAYS: dict[str, dict[str, Any]] = {
    "two_sided": {"estimator": "two_sided"},
    "two_sided-normalized": {"estimator": "two_sided", "normalize": True},
    "centered": CENTERED,
    "centered-normalized": {**CENTERED, "normalize": True, "distribution": "rademacher"},
    "centered-clipped": {**CENTERED, "clip": 1.0},
    "centered-normalized-clipped": {**CENTERED, "normalize": True, "clip": 1.0},
}
ways = pytest.mark.parametrize("way", WAYS)
losses = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12)


def train(data: Any, config: zo2ext.ZOConfig, journal: Path | None = None) -> Any:
    """Train on what the journal lacks; return all recorded losses, the weights and the engine."""
    model, found = tiny("opt"), list[tuple[float, ...]]()
    zo = zo2ext.offload(model, config)
    done = 0 if journal is None else zo.keep_journal(journal)
    for batch in data[done:]:
        zo.step(lambda batch=batch: model(**batch).loss)
        assert zo.last is not None
        found.append(zo.last.losses_plus)
    zo.close()
    return found, dict(model.named_parameters()), zo


# -- the same bits as the reference


@ways
@pytest.mark.parametrize(
    "place", [{}, {"device": "simulated", "write_back": 3}, {"one_copy": True}]
)
def test_runs_equal_the_reference(way: str, place: dict[str, Any]) -> None:
    data, settings = batches("opt", 9), SETTINGS | WAYS[way]
    period = place.get("write_back", 1)
    expected = reference.mezo(tiny("opt"), data, **settings, write_back=period)
    config = zo2ext.ZOConfig(**{"device": "cpu", "write_back": 1, **place}, **settings)
    found, weights, zo = train(data, config)
    assert found == [tuple(pair[0] for pair in step) for step in expected.losses]
    for name, tensor in expected.weights.items():
        assert_same_bits(weights[name].data, tensor)
    if "clip" in WAYS[way]:
        assert 0 < zo.clipped < 9, "some steps, not all"


@ways
def test_a_run_continues_from_its_journal(way: str, tmp_path: Path) -> None:
    """The guard judges by the steps before, which are in the journal."""
    data = batches("opt", 11)
    config = zo2ext.ZOConfig(**SETTINGS, **WAYS[way], device="cpu")
    _, whole, once = train(data, config, tmp_path / "whole")
    train(data[:8], config, tmp_path / "half")
    _, weights, twice = train(data, config, tmp_path / "half")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "half").read_bytes()
    assert (once.clipped, once.equal, once.skipped) == (twice.clipped, twice.equal, twice.skipped)
    assert once.slope_sizes() == twice.slope_sizes()
    for name, tensor in whole.items():
        assert_same_bits(weights[name].data, tensor.data)


def test_many_directions_need_no_more_memory_with_one_copy() -> None:
    (batch,), taken = batches("opt", 1), []
    for directions in (2, 64):
        model = tiny("opt")
        config = zo2ext.ZOConfig(device="simulated", one_copy=True, directions=directions)
        with zo2ext.offload(model, config) as zo:
            zo.step(lambda model=model: model(**batch).loss)
            taken.append(zo.device_nbytes)
            assert zo.last is not None
            assert len(zo.last.losses_plus) == directions
    assert taken[0] == taken[1]


# -- numbers


@given(plus=losses, eps=st.floats(1e-4, 1))
def test_centered_slopes_are_distances_to_the_mean_of_the_others(
    plus: list[float], eps: float
) -> None:
    n = len(plus)
    found = slopes(plus, (), eps)
    for k, slope in enumerate(found):
        others = math.fsum(plus[:k] + plus[k + 1 :]) / (n - 1)
        # Six roundings of numbers up to 200 / eps * n / (n - 1).
        assert abs(slope - (plus[k] - others) / eps) <= 8 * 2.0**-53 * 400 / eps


def test_slopes_of_a_linear_loss() -> None:
    """Loss 3 a + b along z = (1, 0), (0, 1), (1, 1): 3, 1, 4, less the mean, 8/3, times 3/2."""
    eps = 2.0**-10
    plus = [5 + 3 * eps, 5 + eps, 5 + 4 * eps]
    assert slopes(plus, (), eps) == pytest.approx((0.5, -2.5, 2.0), abs=1e-9)
    minus = [5 - 3 * eps, 5 - eps, 5 - 4 * eps]
    assert slopes(plus, minus, eps) == (3.0, 1.0, 4.0)


@given(plus=losses, lr=st.floats(1e-6, 1))
def test_normalized_steps_have_one_length(plus: list[float], lr: float) -> None:
    config = zo2ext.ZOConfig(directions=len(plus), normalize=True)
    result = decide(config, 3, plus, lr, 1, Guard(None))
    if len(set(plus)) == 1:
        assert result.skipped
        return
    coefficients = [update.coefficient for update in result.updates]
    assert root_mean_square(coefficients) == pytest.approx(lr / len(plus), rel=1e-12)
    spread = math.sqrt(math.fsum((x - math.fsum(plus) / len(plus)) ** 2 for x in plus) / len(plus))
    if spread > 1e-3:  # (loss - mean) / std, as evolution strategies have it
        mean = math.fsum(plus) / len(plus)
        for loss, found in zip(plus, coefficients, strict=True):
            assert found == pytest.approx(lr * (loss - mean) / spread / len(plus), abs=1e-9 * lr)


def record(size: float) -> StepRecord:
    return StepRecord(0, (), (), (size, -size), 1.0, False)


def test_the_guard_shortens_to_a_multiple_of_the_median() -> None:
    guard = Guard(2.0)
    for size in (1.0, 3.0, 2.0, math.nan, 0.0, math.inf, 100.0):
        guard.add(record(size))
        assert guard.factor(1e9) == 1, "too few steps to judge by"
    guard.add(record(2.5))
    assert list(guard.sizes) == [1.0, 3.0, 2.0, 100.0, 2.5]
    assert guard.factor(5.0) == 1.0
    assert guard.factor(10.0) == 0.5
    assert Guard(None, guard.sizes).factor(1e9) == 1.0
    for _ in range(40):
        guard.add(record(1.0))
    assert list(guard.sizes) == [1.0] * 33


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@ways
def test_a_loss_that_is_not_finite_changes_nothing(way: str, bad: float) -> None:
    config = zo2ext.ZOConfig(**SETTINGS, **WAYS[way])
    measured = [float(i) for i in range(config.forwards)]
    guard = Guard(config.clip, [1.0] * 9)
    assert not decide(config, 0, measured, 1e-2, 1, guard).skipped
    assert decide(config, 0, [*measured[:-1], bad], 1e-2, 1, guard).skipped


# -- steps whose losses are equal


def test_equal_losses_are_counted_and_learn_nothing() -> None:
    for normalize in (False, True):
        model = tiny("opt")
        before = {name: p.data.clone() for name, p in model.named_parameters()}
        config = zo2ext.ZOConfig(directions=3, normalize=normalize, device="cpu")
        (batch,) = batches("opt", 1)
        with zo2ext.offload(model, config) as zo:
            assert zo.step(lambda: (model(**batch), 1.5)[1]) == 1.5
            assert (zo.equal, zo.skipped, zo.clipped) == (1, int(normalize), 0)
        for name, p in model.named_parameters():
            assert_same_bits(p.data, before[name])


# -- settings and records


def test_the_default_estimator() -> None:
    for directions, expected, forwards in ((1, Estimator.TWO_SIDED, 2), (8, Estimator.CENTERED, 8)):
        config = zo2ext.ZOConfig(directions=directions)
        assert (config.slopes, config.forwards) == (expected, forwards)
    assert zo2ext.ZOConfig(directions=8, estimator="two_sided").forwards == 16
    with pytest.raises(ValueError, match="directions must be at least 2 with estimator='centered'"):
        zo2ext.ZOConfig(estimator="centered")
    with pytest.raises(ValueError, match="estimator must be one of 'two_sided', 'centered'"):
        zo2ext.ZOConfig(estimator="one_sided")
    with pytest.raises(ValueError, match="clip must be a number >= 1"):
        zo2ext.ZOConfig(clip=0.5)
    with pytest.raises(ValueError, match="normalize must be True, False or None"):
        zo2ext.ZOConfig(normalize=1)


def test_the_default_learning_rate_follows_the_directions() -> None:
    for settings, expected in (
        ({}, 1e-4),
        ({"directions": 8, "normalize": False}, 4e-4),
        ({"directions": 8, "estimator": "two_sided"}, 4e-4),
        ({"directions": 8}, 8e-3),
        ({"directions": 32}, 16e-3),
    ):
        found = zo2ext.ZOConfig(**settings).with_learning_rate(250_000).lr
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", zo2ext.PRESETS)
def test_presets_are_settings_that_options_override(name: str) -> None:
    config = zo2ext.ZOConfig(**zo2ext.PRESETS[name])
    assert config.eps == 1e-3
    words = ["--model=m", "--text=t", "--out=o", f"--preset={name}"]
    for more in ([], ["--directions=5"]):
        options = parse(TrainArguments, [*words, *more], prog="zo2ext train")
        expected = config.replace(directions=5) if more else config
        assert config_from(options) == expected


def test_journals_of_two_sided_runs_are_those_of_before(tmp_path: Path) -> None:
    """Older versions read them, and a run that began with one continues."""
    data = batches("opt", 2)
    for name, more in (("one", {}), ("four", {"directions": 4, "estimator": "two_sided"})):
        train(data, zo2ext.ZOConfig(device="cpu", lr=1e-3, **more), tmp_path / name)
        content = read_journal(tmp_path / name)
        assert not {"estimator", "normalize", "clip"} & content.header["config"].keys()
        assert (tmp_path / name).read_bytes()[8:12] == (1).to_bytes(4, "little")


def test_records_of_centered_steps(tmp_path: Path) -> None:
    train(batches("opt", 2), zo2ext.ZOConfig(device="cpu", lr=1e-3, directions=3), tmp_path / "j")
    content = read_journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes()[8:12] == FORMAT.to_bytes(4, "little")
    assert content.header["config"]["estimator"] == "centered"
    assert len((tmp_path / "j").read_bytes()) == content.nbytes
    for step in content.steps:
        assert (len(step.losses_plus), step.losses_minus, step.clipped) == (3, (), False)
        assert len(step.updates) == 3
    assert RECORD_NBYTES == 64
    assert torch.isfinite(torch.tensor(content.steps[0].losses_plus)).all()
