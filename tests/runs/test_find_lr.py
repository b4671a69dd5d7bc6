"""The learning-rate finder: what it finds, and that it leaves everything as it was, to the bit."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from quantized_models import NAME, SIZES, adapted, repack, wrap
from tiny_models import batch, tiny
from torch import Tensor, nn

import zo2ext
from zo2ext._random_state import RandomState
from zo2ext.runs import find_lr, plots
from zo2ext.runs.find_lr import RateCurve

CPU = torch.device("cpu")
CONFIG = zo2ext.ZOConfig(device="cpu", seed=3)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of fewer steps, for tests of what it leaves."""
    monkeypatch.setattr(find_lr, "_FEWEST", 24)
    monkeypatch.setattr(find_lr, "_FORWARDS", 1)


class Bowl(nn.Module):
    """A loss of known shape: steepness / 2 times the square of its distance from 0."""

    def __init__(self, steepness: float, size: int = 64) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.ones(size))
        self.steepness = steepness

    def forward(self) -> Tensor:
        return self.steepness / 2 * self.place.square().sum()


class Worn(nn.Module):
    """Has what a forward pass changes, draws on and switches off: buffers, dropout, modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 4).requires_grad_(False)
        self.drop = nn.Dropout(0.2)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


def drawn_loss(model: nn.Module) -> Callable[[], Any]:
    """A loss whose batch is drawn with each of the three generators."""

    def loss() -> Any:
        drawn = np.random.randn(6, 8) + random.random() + torch.randn(6, 8).numpy()
        return model(torch.from_numpy(drawn).float()).square().mean()

    return loss


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the process that a search could leave changed."""
    return {
        "bits": {n: v.clone() for n, v in model.state_dict().items() if isinstance(v, Tensor)},
        "ids": [id(p) for p in model.parameters()],
        "dtypes": [(p.dtype, p.device, p.requires_grad) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), type(m._parameters))
            for m in model.modules()
        ],
        "random": RandomState.current(CPU, host=True).encode(),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = state(model)
    assert before["bits"].keys() == after["bits"].keys()
    for name, value in before.pop("bits").items():
        assert torch.equal(value, after["bits"][name]), name
        assert value.dtype == after["bits"][name].dtype
    assert before == {name: value for name, value in after.items() if name != "bits"}


# -- what it finds


@pytest.mark.parametrize("size", [16, 256])
def test_a_bowl_ends_the_search_where_theory_says(size: int) -> None:
    """Distances shrink on average below a rate of 2 / (steepness (size + 2)), and grow above."""
    found = zo2ext.find_lr(model := Bowl(1.0, size), CONFIG, model)
    turning = 2 / (size + 2)
    assert turning < found.rates[-1] < 16 * turning
    assert found.lr == found.rates[-1] / 16


def test_a_steeper_loss_has_a_lower_rate() -> None:
    flat, steep = (zo2ext.find_lr(m := Bowl(k), CONFIG, m) for k in (1.0, 100.0))
    assert 50 < flat.lr / steep.lr < 200


@pytest.mark.parametrize("steepness", [1e-3, 1e6])
def test_a_rate_far_from_the_default_is_found_as_well(steepness: float) -> None:
    """Too high, the search goes on; too low, it begins lower."""
    usual, far = (zo2ext.find_lr(m := Bowl(k), CONFIG, m) for k in (1.0, steepness))
    assert steepness / 8 < usual.lr / far.lr < steepness * 8


def test_a_loss_with_bounds_has_a_rate_as_well() -> None:
    """It never exceeds the limit; the search sees where it begins to stay worse.

    This one, from -1 to 0, is 128 times flatter than the bowl where both begin.
    """
    model = Bowl(1.0)
    free = zo2ext.find_lr(model, CONFIG, model)
    bound = zo2ext.find_lr(model, CONFIG, lambda: -1 / (1 + model() / 32))
    assert max(bound.losses) <= 0
    assert 128 / 4 < bound.lr / free.lr < 128 * 4


def test_the_curve_rises_from_below_to_its_end() -> None:
    found = zo2ext.find_lr(model := Bowl(1.0), CONFIG, model)
    assert len(found.rates) == len(found.losses)
    assert list(found.rates) == sorted(found.rates)
    assert found.rates[0] < found.lr < found.rates[-1]
    first, *middle, last = found.losses
    assert last > 2 * first + 1 >= max(middle)
    assert min(middle) < first


def test_the_search_is_the_same_each_time() -> None:
    model = Worn()
    found = [zo2ext.find_lr(model, CONFIG, drawn_loss(model)) for _ in range(2)]
    assert found[0] == found[1]
    other = zo2ext.find_lr(model, CONFIG.replace(seed=4), drawn_loss(model))
    assert other.losses != found[0].losses


def test_settings_of_storage_and_rate_do_not_matter() -> None:
    model = Worn()
    found = zo2ext.find_lr(model, CONFIG, drawn_loss(model))
    changed = CONFIG.replace(lr=3.0, storage="e4m3", write_back=1)
    assert zo2ext.find_lr(model, changed, drawn_loss(model)) == found


def test_all_calls_of_a_step_draw_the_same_batch() -> None:
    model, calls = Worn().eval(), []

    def loss() -> Any:
        calls.append((random.random(), np.random.rand(), torch.rand(1).item()))
        return model(torch.full((2, 8), calls[-1][0])).square().mean()

    found = zo2ext.find_lr(model, CONFIG, loss)
    assert len(set(calls)) == len(found.rates)
    assert len(calls) > 2 * len(found.rates)


def test_batches_from_an_iterator_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = Worn().eval()
    batches = iter(torch.randn(10_000, 6, 8))
    with caplog.at_level(logging.WARNING):
        zo2ext.find_lr(model, CONFIG, lambda: model(next(batches)).square().mean())
    assert "the loss differs from call to call" in caplog.text


def test_a_batch_without_a_loss_does_not_end_the_search() -> None:
    model, calls = Bowl(1.0), [0]

    def loss() -> Any:
        calls[0] += 1
        return model() * (float("nan") if 41 <= calls[0] <= 42 else 1.0)

    found, whole = zo2ext.find_lr(model, CONFIG, loss), zo2ext.find_lr(model, CONFIG, model)
    assert sum(np.isnan(found.losses)) == 1
    assert 1 / 2 < found.lr / whole.lr < 2


@pytest.mark.parametrize("settings", [{}, {"normalize": True}], ids=["centered", "normalized"])
def test_the_steps_are_those_of_the_runs_estimator(settings: dict[str, Any]) -> None:
    model, calls = Bowl(1.0), []
    config = CONFIG.replace(directions=8, **settings)
    found = zo2ext.find_lr(model, config, lambda: calls.append(0) or model())
    assert found.directions == 8
    assert len(calls) == 8 * len(found.rates) + 1  # the first step makes one more
    assert 15 < len(found.rates) <= 80
    with zo2ext.offload(model, config.replace(lr=found.lr)) as zo:
        losses = [zo.step(model) for _ in range(60)]
    assert losses[-1] < losses[0] / 2, "it learns"


def test_the_number_of_directions_is_decided_with_the_rate() -> None:
    found = zo2ext.find_lr(model := Bowl(1.0), CONFIG.replace(directions="auto"), model)
    assert found == zo2ext.find_lr(model, CONFIG.replace(directions=found.directions), model)


# -- what it refuses


def test_a_step_needs_a_number() -> None:
    model = Bowl(1.0)
    with zo2ext.offload(model, CONFIG.replace(lr="auto")) as zo:
        with pytest.raises(
            ValueError, match=r"lr is 'auto'.*zo2ext\.find_lr\(model, config, loss\)"
        ):
            zo.step(model)
        assert zo.step(model, lr=1e-3) > 0


def test_a_loss_that_no_rate_makes_worse_is_refused() -> None:
    model = Bowl(1.0)
    with pytest.raises(ValueError, match="the loss, 1 at first, is 1 at a rate of"):
        zo2ext.find_lr(model, CONFIG, lambda: (model() / model()).nan_to_num(1.0, 1.0))


def test_a_loss_that_is_nan_at_first_is_refused() -> None:
    model = Bowl(1.0)
    with pytest.raises(ValueError, match="the loss is nan before any training"):
        zo2ext.find_lr(model, CONFIG, lambda: model() * float("nan"))


def test_a_loss_that_jumps_at_any_rate_is_refused() -> None:
    model, generator = Bowl(1e-9), np.random.default_rng(0)
    with pytest.raises(ValueError, match="differ too much from batch to batch"):
        zo2ext.find_lr(model, CONFIG, lambda: model() + generator.pareto(0.2))


# -- what it leaves


@pytest.mark.usefixtures("short")
def test_everything_is_as_before() -> None:
    model = Worn()
    before = state(model)
    zo2ext.find_lr(model, CONFIG, drawn_loss(model))
    assert_unchanged(before, model)


def test_everything_is_as_before_after_an_error() -> None:
    model, calls = Worn(), []
    before = state(model)

    def loss() -> Any:
        calls.append(model.eval())
        if len(calls) > 50:
            raise RuntimeError("in the loss")
        return drawn_loss(model)()

    with pytest.raises(RuntimeError, match="in the loss"):
        zo2ext.find_lr(model, CONFIG, loss)
    assert_unchanged(before, model)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("own", "compute", "resident"),
    [(torch.float32, "bf16", 0), (torch.bfloat16, "fp32", 0), (torch.float32, None, "all")],
)
def test_weights_are_as_before_in_any_dtype(
    own: torch.dtype, compute: str | None, resident: int | str
) -> None:
    model, data = tiny("llama-tied").to(own), batch("llama-tied")
    model.model.layers[1].requires_grad_(False)
    before = state(model)
    config = CONFIG.replace(compute_dtype=compute, resident=resident, device="simulated")
    zo2ext.find_lr(model, config, lambda: model(**data).loss)
    assert_unchanged(before, model)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("quantize", [wrap, repack])
def test_adapters_on_a_quantized_base_are_as_before(
    quantize: Callable[[nn.Module], nn.Module],
) -> None:
    model, data = adapted(quantize(tiny(NAME, **SIZES))), batch(NAME)
    trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        data["labels"] = model(**data).logits.argmax(-1).roll(1, -1)  # what it can unlearn
        loss = model(**data).loss
    zo2ext.find_lr(model, CONFIG, lambda: model(**data).loss)
    for name, value in trained.items():
        assert torch.equal(value, model.get_parameter(name)), name
    with torch.no_grad():
        assert torch.equal(model(**data).loss, loss)


# -- its picture


def test_a_curve_is_a_picture_and_json(tmp_path: Any) -> None:
    curve = RateCurve(1e-3, (1e-4, 1e-3, 1e-2), (2.0, 1.5, float("inf")), 1)
    again = RateCurve.from_json(curve.as_json())
    assert (again.lr, again.rates, again.losses[:2]) == (curve.lr, curve.rates, curve.losses[:2])
    assert curve.as_json()["losses"] == again.as_json()["losses"] == [2.0, 1.5, None]
    if plots.available():
        curve.save(tmp_path / "lr.png")
        assert (tmp_path / "lr.png").read_bytes() == curve.png()
        assert curve.png().startswith(b"\x89PNG")
