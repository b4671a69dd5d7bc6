"""``learning_rate="auto"`` in the trainers: the run after the search, and one that continues."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny
from trainer_runs import DATA, arguments, assert_same_weights, trainer, weights

import zo2ext
from zo2ext.engine.engine import ZOEngine
from zo2ext.integrations import trainer as module
from zo2ext.journal.journal import read_journal
from zo2ext.runs import find_lr, plots


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of fewer steps."""
    monkeypatch.setattr(find_lr, "_FEWEST", 24)
    monkeypatch.setattr(find_lr, "_FORWARDS", 1)


def masked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that draws random numbers of all three kinds."""
    made = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
    drawn = torch.rand(made["labels"].shape) + float(np.random.rand()) + random.random()
    made["labels"] = made["labels"].masked_fill(drawn < 0.5, -100)
    return made


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 3}, {"data_collator": masked}],
    ids=["plain", "accumulated", "random"],
)
def test_the_run_has_the_bits_of_one_with_that_rate(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = trainer(tmp_path / "auto", learning_rate="auto", **changes)
    found.train()
    rate = found.args.learning_rate
    run = read_journal(tmp_path / "auto" / "journal.zo2").header["run"]
    assert run["learning_rate"] == run["lr_search"]["lr"] == rate
    settings = json.loads((tmp_path / "auto" / "arguments.json").read_text())
    assert settings["learning_rate"] == rate
    if plots.available():
        assert (tmp_path / "auto" / "lr.png").is_file()
    plain = trainer(tmp_path / "number", learning_rate=rate, **changes)
    plain.train()
    assert_same_weights(found.model, weights(plain.model))
    log = [{k: v for k, v in e.items() if "per_second" not in k} for e in plain.state.log_history]
    assert [e.get("loss") for e in found.state.log_history] == [e.get("loss") for e in log]


def test_a_continued_run_takes_the_recorded_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole", learning_rate="auto")
    whole.train()
    step = ZOEngine.step

    def stopped(self: ZOEngine, *args: Any, **kwargs: Any) -> float:
        if self.journal is not None and self.steps == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ZOEngine, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "run", learning_rate="auto").train()
    monkeypatch.setattr(module, "search", lambda *_: pytest.fail("searched again"))
    run = trainer(tmp_path / "run", learning_rate="auto")
    run.train()
    assert run.args.learning_rate == whole.args.learning_rate
    assert_same_weights(run.model, weights(whole.model))


def test_a_search_that_fails_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, learning_rate="auto")
    before, step = weights(run.model), ZOEngine.step

    def failing(self: ZOEngine, *args: Any, **kwargs: Any) -> float:
        if self.steps == 9:
            raise RuntimeError("in a step")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ZOEngine, "step", failing)
    with pytest.raises(RuntimeError, match="in a step"):
        run.train()
    assert run.engine is None
    assert_same_weights(run.model, before)
    assert not (tmp_path / "journal.zo2").exists()


def test_an_engine_of_the_callers_is_refused(tmp_path: Path) -> None:
    tiny("llama-tied").save_pretrained(tmp_path / "model")
    model, engine = zo2ext.load(tmp_path / "model", zo2ext.ZOConfig(device="cpu"))
    args = arguments(tmp_path / "run", learning_rate="auto")
    run = zo2ext.ZOTrainer(model=model, args=args, train_dataset=DATA, engine=engine)
    with engine, pytest.raises(ValueError, match="an engine of yours"):
        run.train()


def test_data_that_can_be_read_once_is_refused(tmp_path: Path) -> None:
    class Once(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return DATA[0]

    run = trainer(tmp_path, learning_rate="auto")
    run.train_dataset = Once()
    with pytest.raises(ValueError, match="Once can be read only once"):
        run.train()


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="lr must be a number >= 0 or 'auto', got 'best'"):
        zo2ext.ZOTrainingArguments("out", learning_rate="best", use_cpu=True)
    assert (
        zo2ext.ZOTrainingArguments("out", learning_rate="1e-3", use_cpu=True).learning_rate == 1e-3
    )
