"""The Trainer's journal: the same script, given again after any kill, ends with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import killed_trainer
import pytest
import torch
from numeric import assert_same_bits
from tiny_models import tiny
from torch import Tensor
from trainer_runs import (
    LR,
    StopAt,
    arguments,
    assert_same_weights,
    no_loss,
    trainer,
    weights,
)
from transformers import TrainerCallback

from zo2ext.errors import JournalError
from zo2ext.integrations.describe import describe_run
from zo2ext.integrations.trainer import ZOTrainer
from zo2ext.journal.journal import read_journal
from zo2ext.runs.checkpoint_state import RunState, is_complete, last_complete

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
JOURNAL = "journal.zo2"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the trainer warns of."""
    warnings: list[str] = []
    monkeypatch.setattr("zo2ext.integrations.trainer.logger.warning", warnings.append)
    return warnings


def stop(out: Path, step: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(out, callbacks=[StopAt(step)], **options).train()


def test_a_finished_run_is_not_made_again(tmp_path: Path, said: list[str]) -> None:
    first = trainer(tmp_path, **SAVING)
    first.train()
    assert said == []
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = trainer(tmp_path, compute_loss_func=no_loss, **SAVING)
    again.train()
    assert_same_weights(again.model, weights(first.model))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert len(said) == 1
    assert "has 8 more steps, whose losses are not computed again. This run is fin" in said[0]
    assert again.state.global_step == 8
    kept = ("loss", "learning_rate", "epoch", "zo/loss_plus", "zo/projected_grad")
    logs = [[{k: log.get(k) for k in kept} for log in r.state.log_history] for r in (first, again)]
    assert logs[0] == logs[1]
    said.clear()
    last = trainer(tmp_path, compute_loss_func=no_loss, **SAVING)
    last.train(resume_from_checkpoint=True)
    assert_same_weights(last.model, weights(first.model))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert "has 0 more steps" in said[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"storage": "bf16", "write_back": "never", "directions": 2},
        {"compute_dtype": "bf16", "simulate": True, "gradient_accumulation_steps": 3},
    ],
    ids=["fp32", "never", "bf16-compute"],
)
def test_the_same_script_continues_where_it_was_stopped(
    tmp_path: Path, said: list[str], options: dict[str, Any]
) -> None:
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    for at in (1, 3, 6):
        stop(tmp_path / "parts", at, **options)
    parts = trainer(tmp_path / "parts", **options)
    parts.train()
    assert_same_weights(parts.model, weights(whole.model))
    assert [text.split()[2] for text in said] == ["1", "3", "6"]
    journals = [(tmp_path / f / JOURNAL).read_bytes() for f in ("whole", "parts")]
    assert journals[0] == journals[1]


def test_random_numbers_of_a_loss_are_the_same_again(tmp_path: Path) -> None:
    """They come from the generator that also shuffles the second epoch's data."""

    def noisy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return (outputs.logits.square() * torch.rand(outputs.logits.shape)).mean()

    options: dict[str, Any] = {"compute_loss_func": noisy, "per_device_train_batch_size": 8}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    stop(tmp_path / "parts", 6, **options)
    parts = trainer(tmp_path / "parts", **options)
    parts.train()
    assert_same_weights(parts.model, weights(whole.model))


@pytest.mark.parametrize("write_back", ["3", "never"])
def test_saving_and_evaluating_between_write_backs_change_nothing(
    tmp_path: Path, write_back: str
) -> None:
    options = {"storage": "bf16", "write_back": write_back, "simulate": True}
    plain = trainer(tmp_path / "plain", **options)
    plain.train()
    busy = trainer(
        tmp_path / "busy",
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    busy.train()
    assert_same_weights(busy.model, weights(plain.model))
    steps = [read_journal(tmp_path / f / JOURNAL) for f in ("plain", "busy")]
    assert steps[0].steps == steps[1].steps
    assert steps[1].write_backs == []
    for step in (1, 4, 7):  # and each checkpoint goes on to the same bits
        resumed = trainer(tmp_path / f"from-{step}", tiny("llama-tied", seed=4), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "busy" / f"checkpoint-{step}"))
        assert_same_weights(resumed.model, weights(plain.model))


# -- other runs


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"learning_rate": 1e-3}, "run.learning_rate was 0.003 and is 0.001"),
        ({"seed": 4}, "config.seed was 3 and is 4"),
        ({"lr_scheduler_type": "cosine"}, "run.lr_scheduler_type was 'linear' and is 'cosine'"),
        ({"max_steps": 9}, "run.max_steps was 8 and is 9"),
        ({"gradient_accumulation_steps": 2}, "run.gradient_accumulation_steps was 1 and is 2"),
        ({"per_device_train_batch_size": 4}, "run.per_device_train_batch_size was 2 and is 4"),
        ({"data_seed": 1}, "run.data_seed was None and is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    stop(tmp_path, 1)
    before = (tmp_path / JOURNAL).read_bytes()
    run = trainer(tmp_path, **change)
    start = weights(run.model)
    with pytest.raises(JournalError, match=f"another run: .*{complaint}.* or a new folder"):
        run.train()
    assert_same_weights(run.model, start)
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_more_steps_extend_a_run_of_constant_rate(tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant", **SAVING}
    whole = trainer(tmp_path / "whole", max_steps=8, **constant)
    whole.train()
    trainer(tmp_path / "parts", max_steps=4, **constant).train()
    for steps, resume in ((6, None), (8, True)):
        longer = trainer(tmp_path / "parts", max_steps=steps, **constant)
        longer.train(resume_from_checkpoint=resume)
    assert_same_weights(longer.model, weights(whole.model))
    assert read_journal(tmp_path / "parts" / JOURNAL).next_step == 8


def test_other_data_weights_and_schedules_are_refused(tmp_path: Path) -> None:
    stop(tmp_path, 2)
    other = trainer(tmp_path)
    other.train_dataset = [{k: v.clone() for k, v in row.items()} for row in other.train_dataset]
    other.train_dataset[-1]["input_ids"][0] = 5
    with pytest.raises(JournalError, match=r"run.data was \[26, '\w+'\] and is \[26, '\w+'\]"):
        other.train()
    with pytest.raises(JournalError, match="fingerprint was"):
        trainer(tmp_path, tiny("llama-tied", seed=9)).train()

    class Slower(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            kw["optimizer"].param_groups[0]["lr"] = 0.5 * LR

    with pytest.raises(
        JournalError, match=r"learning rate of step 0 was 0.003 and is 0.0015\. Use"
    ):
        trainer(tmp_path, callbacks=[Slower()]).train()


def a_loss(factor: float) -> Any:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs.logits.float().square().mean() * factor

    return loss


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


FUNCTIONS: list[tuple[dict[str, Any], str]] = [
    ({"compute_loss_func": a_loss(1.0)}, r"functions\.compute_loss_func was None and is "),
    ({"data_collator": collate}, r"functions\.data_collator\.name was 'transformers\..* and is '"),
    ({"data_collator": partial(collate)}, r"functions\.data_collator\.name was 'transformers\."),
]


@pytest.mark.parametrize(("change", "complaint"), FUNCTIONS, ids=["loss", "collator", "partial"])
def test_other_functions_are_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    stop(tmp_path, 1)
    with pytest.raises(JournalError, match=complaint):
        trainer(tmp_path, **change).train()


def test_a_function_is_known_by_its_source_and_the_values_it_closes_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[StopAt(1)], compute_loss_func=a_loss(1.0)).train()
    with pytest.raises(
        JournalError, match=r"compute_loss_func\.values\.factor was 1\.0 and is 2\.0"
    ):
        trainer(tmp_path, compute_loss_func=a_loss(2.0)).train()
    trainer(tmp_path, compute_loss_func=a_loss(1.0)).train()


def test_every_row_in_memory_counts(tmp_path: Path) -> None:
    stop(tmp_path, 2)
    other = trainer(tmp_path)
    other.train_dataset = [{k: v.clone() for k, v in row.items()} for row in other.train_dataset]
    other.train_dataset[1]["input_ids"][0] += 1  # none of the eight
    with pytest.raises(JournalError, match=r"run\.rows was '\w+' and is '\w+'\. Use the settings"):
        other.train()


def test_rows_of_arrow_data_count_however_they_are_stored(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": [i, 5, 6], "text": f"row {i}"} for i in range(2500)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data")
    first, *others = (
        describe_run(arguments(tmp_path), d)["rows"]
        for d in (
            data,
            datasets.load_from_disk(tmp_path / "data"),
            data.select([*range(1000, 2500), *range(1000)]).select(
                [*range(1500, 2500), *range(1500)]
            ),
            data.with_format("torch"),
            datasets.Dataset.from_list([*rows[:77], {"input_ids": [0], "text": ""}, *rows[78:]]),
        )
    )
    assert [other == first for other in others] == [True, True, True, False]
    both = describe_run(arguments(tmp_path), {"a": data, "b": data})
    assert both["rows"] == {"a": first, "b": first}


def test_what_cannot_be_compared_is_said(tmp_path: Path, said: list[str]) -> None:
    space: dict[str, Any] = {}
    exec("def loss(o, l, num_items_in_batch=None): return o.logits.mean()", space)  # no source
    for _ in range(2):
        run = trainer(tmp_path, compute_loss_func=space["loss"], max_steps=2)
        run.train_dataset = torch.utils.data.Subset(
            run.train_dataset, range(20)
        )  # rows of unknown cost
        run.train()
    (text,) = [text for text in said if "cannot be compared with this run's" in text]
    assert "the source of compute_loss_func and most rows of train_dataset" in text


def test_overwriting_begins_anew_and_keeps_the_old_journal(tmp_path: Path, said: list[str]) -> None:
    trainer(tmp_path, **SAVING).train()
    old = (tmp_path / JOURNAL).read_bytes()
    options = {"learning_rate": 1e-3, "overwrite_output_dir": True}
    with pytest.raises(ValueError, match="begins a new run and resume_from_checkpoint continues"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    former = {folder.name for folder in tmp_path.glob("checkpoint-*")}
    anew = trainer(tmp_path, **options)
    anew.train()
    # No later run continues from the former one's checkpoints.
    assert not list(tmp_path.glob("checkpoint-*"))
    assert {folder.name for folder in tmp_path.glob("before-1.*")} == {
        f"before-1.{name}" for name in former
    }
    plain = trainer(tmp_path / "plain", learning_rate=1e-3)
    plain.train()
    assert_same_weights(anew.model, weights(plain.model))
    assert (tmp_path / f"{JOURNAL}.before-1").read_bytes() == old
    assert any("journal of the former one is" in text for text in said)
    trainer(tmp_path, **options).train()
    assert read_journal(tmp_path / f"{JOURNAL}.before-2").next_step == 8
    assert read_journal(tmp_path / f"{JOURNAL}.before-1").next_step == 8


def masking(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = collate(rows)
    hidden = torch.rand(batch["labels"].shape) < 0.5
    return {**batch, "labels": batch["labels"].masked_fill(hidden, -100)}


def test_data_that_draws_random_numbers_resumes_from_the_journal(
    tmp_path: Path, said: list[str]
) -> None:
    options = {"data_collator": masking, **SAVING}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", callbacks=[StopAt(5)], **options).train()
    assert RunState.load(tmp_path / "parts" / "checkpoint-4").random_data
    said.clear()
    parts = trainer(tmp_path / "parts", **options)
    parts.train(resume_from_checkpoint=True)
    assert_same_weights(parts.model, weights(whole.model))
    assert "the data draws random numbers, which" in said[0]
    assert "this run continues from" in said[0]
    elsewhere = trainer(tmp_path / "elsewhere", **options)
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert any("batches from here on differ from those" in text for text in said)
    trainer(tmp_path / "plain", **SAVING).train()
    assert not RunState.load(tmp_path / "plain" / "checkpoint-4").random_data


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "a", max_steps=4, **SAVING).train()
    trainer(tmp_path / "b", tiny("llama-tied", seed=5), max_steps=4, **SAVING).train()
    run = trainer(tmp_path / "a", tiny("llama-tied", seed=5), max_steps=4, **SAVING)
    with pytest.raises(JournalError, match="another run's than the weights': its first 2 steps di"):
        run.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))


def test_a_second_run_of_a_trainer_has_its_own_journal(tmp_path: Path) -> None:
    """From the weights that the first left; the script that makes both continues in both."""

    def both(out: Path, at: int | None = None) -> ZOTrainer:
        run = trainer(out, max_steps=3, lr_scheduler_type="constant", **SAVING)
        run.train()
        if at is not None:
            run.add_callback(StopAt(at))
            with pytest.raises(KeyboardInterrupt):
                run.train()
            return run
        run.train()
        return run

    whole = both(tmp_path / "whole")
    both(tmp_path / "parts", at=2)
    parts = both(tmp_path / "parts")
    assert_same_weights(parts.model, weights(whole.model))
    journals = [read_journal(tmp_path / "parts" / name) for name in (JOURNAL, "journal-3.zo2")]
    assert [(j.start, j.next_step) for j in journals] == [(0, 3), (3, 6)]
    state = RunState.load(tmp_path / "parts" / "checkpoint-2")
    assert (state.steps, state.journal_file) == (5, "journal-3.zo2")
    resumed = trainer(tmp_path / "parts", max_steps=3, lr_scheduler_type="constant", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, weights(whole.model))


# -- kills


@pytest.mark.parametrize("asked", [True, "path"])
def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, said: list[str], asked: bool | str
) -> None:
    whole = trainer(tmp_path / "whole", **SAVING)
    whole.train()
    for torn, left in (([8], 6), ([8, 6, 4, 2], None)):
        out = tmp_path / f"out-{len(torn)}"
        shutil.copytree(tmp_path / "whole", out)
        for step in torn:
            (out / f"checkpoint-{step}" / "trainer_state.json").write_text("{")
        assert last_complete(out) == (out / f"checkpoint-{left}" if left else None)
        said.clear()
        run = trainer(out, compute_loss_func=no_loss, **SAVING)
        run.train(resume_from_checkpoint=True if asked is True else str(out / "checkpoint-8"))
        assert_same_weights(run.model, weights(whole.model))
        assert last_complete(out) == out / "checkpoint-8"
        told = [
            text for text in said if "is not a complete checkpoint; this run continues from" in text
        ]
        assert len(told) == (asked != True or left is None)  # noqa: E712


KILLS = 10


@pytest.mark.parametrize("settings", [{}, {"save_strategy": "steps", "save_steps": 3}], ids=str)
def test_killed_runs_lose_no_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_trainer", "killed_run"])
    # Without a lock, which a process that is killed may hold for good.
    reached, out = context.Value("q", 0, lock=False), tmp_path / "run"
    rng = random.Random(1)
    seen, torn = [], 0
    for kill in range(KILLS):
        before = reached.value
        args = (out, settings, reached, bool(kill % 2))
        process = context.Process(target=killed_trainer.process, args=args)
        process.start()
        deadline = time.monotonic() + 60
        while kill % 5 and reached.value == before:  # else it may be killed while it starts
            assert process.is_alive(), process.exitcode
            assert time.monotonic() < deadline, seen
            time.sleep(0.0005)
        if settings and kill > KILLS // 2:
            while not any(not is_complete(folder) for folder in out.glob("checkpoint-*")):
                assert process.is_alive(), process.exitcode
        else:
            time.sleep(rng.uniform(0.0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if (out / JOURNAL).exists() and (out / JOURNAL).stat().st_size:
            content = read_journal(out / JOURNAL)
            assert content.torn or content.damage is None, content.damage
            assert content.next_step >= reached.value, "a finished step was lost"
        seen.append(reached.value)
        torn += any(not is_complete(folder) for folder in out.glob("checkpoint-*"))
    assert 0 < seen[-1] < 60, seen
    assert bool(torn) == bool(settings)
    model = killed_trainer.run(out, settings, resume=True)
    expected = killed_trainer.run(tmp_path / "whole", settings)
    for name, tensor in weights(expected).items():
        assert_same_bits(model.get_parameter(name).data, tensor, name)
    assert read_journal(out / JOURNAL).next_step == 60
    if settings:
        assert last_complete(out) == out / "checkpoint-60"
