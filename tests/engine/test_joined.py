"""Joined passes: all forward passes of a step as one batch over the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_runs import run, whole_run
from numeric import assert_same_bits
from tiny_models import batches, tiny

import zo2ext
from zo2ext.parallel.mesh import Mesh

SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "seed": 11, "rank": 2}
STEPS = 4
WAYS: dict[str, dict[str, Any]] = {
    "one": {"directions": 1, "write_back": 3},
    "several": {"directions": 3, "write_back": 1},
    "two-sided": {"directions": 2, "write_back": 1, "estimator": "two_sided"},
    "never": {"directions": 1, "write_back": "never", "distribution": "rademacher"},
}


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama-tied"])
@pytest.mark.parametrize("way", WAYS)
def test_joined_passes_have_the_losses_of_separate_ones(way: str, name: str) -> None:
    data, settings = batches(name, STEPS), SETTINGS | WAYS[way] | {"device": "cpu", "lr": 0.0}
    expected = whole_run(tiny(name), data, **settings)
    found = whole_run(tiny(name), data, **settings, joined=True)
    for ours, theirs in zip(found, expected, strict=True):
        # Products of other shapes: some hundred roundings of float32, losses of about 4.
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "place",
    [{"device": "simulated"}, {"device": "simulated", "granularity": "module", "slots": 2}],
    ids=str,
)
def test_the_place_changes_no_bit(place: dict[str, Any], way: str) -> None:
    data, settings = batches("opt", STEPS), SETTINGS | WAYS[way] | {"joined": True}
    settings |= {"storage": "bf16", "compute_dtype": "fp32"}
    expected_model, model = tiny("opt"), tiny("opt")
    expected = whole_run(expected_model, data, device="cpu", **settings)
    assert whole_run(model, data, **settings | place) == expected
    for (name, found), wanted in zip(
        model.named_parameters(), expected_model.parameters(), strict=True
    ):
        assert_same_bits(found.data, wanted.data, name)


def test_passes_share_dropout_masks_and_micro_batches_work() -> None:
    losses = []
    for joined in (False, True):
        model = tiny("opt", dropout=0.3).train()
        config = zo2ext.ZOConfig(**SETTINGS, device="cpu", joined=joined)
        torch.manual_seed(7)
        with zo2ext.offload(model, config) as zo:
            parts = [lambda b=b: model(**b).loss for b in batches("opt", 2)]
            zo.step(parts, lr=0.0)
            assert zo.last is not None
            losses.append((*zo.last.losses_plus, *zo.last.losses_minus))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_evaluation_between_steps_reads_the_weights() -> None:
    data = batches("opt", 3)
    for zo in run(model := tiny("opt"), data, **SETTINGS, device="cpu", joined=True):
        state = {n: w.clone() for n, w in model.state_dict().items()}
        dense = tiny("opt")
        dense.load_state_dict(state)
        with torch.no_grad():
            assert_same_bits(model(**data[0]).loss, dense(**data[0]).loss)
        assert zo.steps


@pytest.mark.parametrize(
    "closure",
    [
        lambda loss: float(loss),
        lambda loss: loss if loss > 0 else -loss,
    ],
    ids=["number", "branch"],
)
def test_a_loss_that_cannot_be_joined_is_refused_and_the_model_is_whole(closure: Any) -> None:
    model, (batch,) = tiny("opt"), batches("opt", 1)
    config = zo2ext.ZOConfig(rank=1, device="cpu", joined=True)
    with zo2ext.offload(model, config) as zo:
        with pytest.raises(zo2ext.UnsupportedModel, match=r"as one batch .*joined=False"):
            zo.step(lambda: closure(model(**batch).loss))
        zo.step(lambda: model(**batch).loss)
        assert zo.steps == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"joined": True}, "joined=True needs factored directions"),
        ({"joined": 1, "rank": 1}, "joined must be True or False, got 1"),
        (
            {"joined": True, "rank": 1, "directions": 2, "write_back": 3},
            "write_back must be 1 with joined=True and several directions, got 3",
        ),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(zo2ext.UserError, match=message):
        zo2ext.ZOConfig(**settings)


def test_ranks_that_share_out_passes_are_refused() -> None:
    config = zo2ext.ZOConfig(rank=1, directions=2, joined=True)
    with pytest.raises(zo2ext.UserError, match="joined must be False where ranks"):
        Mesh(1, 2, 1).check(config)
