"""What would go wrong in silence is said, or refused: nothing learned, buffers lost, freezing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_models import batches, tiny
from torch import nn

import zo2ext
from zo2ext.errors import UserError

CONFIG = zo2ext.ZOConfig(device="cpu", lr=1e-2)


@pytest.mark.parametrize("constant", [True, False])
def test_a_loss_of_constant_value_is_warned_of(
    constant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, (batch,) = tiny("llama"), batches("llama", 1)
    with zo2ext.offload(model, CONFIG) as zo:
        for _ in range(12):
            zo.step(lambda: model(**batch).loss * (0 if constant else 1) + 1)
    said = [r.message for r in caplog.records if "nothing is being learned" in r.message]
    assert len(said) == constant


def test_skipped_steps_are_no_equal_losses(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    with zo2ext.offload(model, CONFIG) as zo:
        for _ in range(12):
            zo.step(lambda: float("inf"))
    assert "nothing is being learned" not in caplog.text


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x)).square().mean()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("journal", [True, False])
def test_buffers_that_the_journal_lacks_are_named(
    mode: str, journal: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Normalized().train(mode == "train")
    with zo2ext.offload(model, CONFIG, journal=tmp_path / "j" if journal else None) as zo:
        for _ in range(2):
            zo.step(lambda: model(torch.rand(3, 4)))
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    if mode == "train" and journal:
        assert len(said) == 1
        assert "forward passes change buffers (norm.running_mean, norm.running_var, " in said[0]
    else:
        assert said == []


@pytest.mark.parametrize("trained", [True, False])
def test_freezing_on_the_way_is_refused_and_changes_nothing(trained: bool) -> None:
    model, (batch,) = tiny("llama"), batches("llama", 1)
    model.model.layers.requires_grad_(trained)
    with zo2ext.offload(model, CONFIG) as zo:
        zo.step(lambda: model(**batch).loss)
        model.model.layers.requires_grad_(not trained)
        with pytest.raises(UserError, match=rf"layers\.0\..*requires_grad is {not trained}, but w"):
            zo.step(lambda: model(**batch).loss)
        assert zo.steps == 1
        model.model.layers.requires_grad_(trained)
        zo.step(lambda: model(**batch).loss)
