"""The Trainer: the plain loop's bits, and everything that people expect of a Trainer."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from trainer_runs import (
    DATA,
    LR,
    SEED,
    STEPS,
    Recorder,
    arguments,
    assert_same_weights,
    hand_written,
    linear,
    model_loss,
    no_loss,
    trainer,
    weights,
)
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import zo2ext
from zo2ext.integrations.refusals import check_loss
from zo2ext.integrations.trainer import ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
from zo2ext.journal.journal import read_journal

# -- the same bits


@pytest.mark.parametrize(
    "place",
    [
        {},
        {"simulate": True, "granularity": "module"},
        {"simulate": True, "resident": 2, "slots": 2},
    ],
    ids=["cpu", "streamed", "resident"],
)
def test_the_trainer_is_the_plain_loop(tmp_path: Path, place: dict[str, Any]) -> None:
    recorder = Recorder()
    run = trainer(tmp_path, callbacks=[recorder], **place)
    run.train()
    expected = hand_written(tmp_path)
    assert_same_weights(run.model, expected.weights)
    logs = [log for log in recorder.logs if "loss" in log]
    assert [log["learning_rate"] for log in logs] == [linear(step) for step in range(STEPS)]
    pairs = [(log["zo/loss_plus"], log["zo/loss_minus"]) for log in logs]
    assert pairs == [losses[0] for losses in expected.losses]
    assert [log["zo/projected_grad"] for log in logs] == [g[0] for g in expected.projected_grads]
    assert logs[0]["loss"] == pytest.approx(sum(expected.losses[0][0]) / 2)
    assert logs[0]["zo/tokens_per_second"] > 0
    uploaded = logs[-1]["zo/uploaded_bytes_per_step"]
    assert uploaded > 0 if place else uploaded == 0


@pytest.mark.parametrize("schedule", ["cosine_with_restarts", "constant_with_warmup"])
def test_every_step_has_the_learning_rate_of_the_schedule(tmp_path: Path, schedule: str) -> None:
    recorder = Recorder()
    options = {"lr_scheduler_type": schedule, "warmup_steps": 3, "callbacks": [recorder]}
    run = trainer(tmp_path, **options)
    run.train()
    rates = [log["learning_rate"] for log in recorder.logs if "loss" in log]
    assert len(set(rates)) > 3
    assert_same_weights(run.model, hand_written(tmp_path, lr=rates.__getitem__).weights)


def test_micro_batches_of_a_step_share_one_sweep(tmp_path: Path) -> None:
    """With 26 examples in batches of 2 an epoch ends in a step of one micro-batch."""
    whole = {"callbacks": [Recorder()], "simulate": True}
    recorder = Recorder()
    run = trainer(tmp_path, gradient_accumulation_steps=3, simulate=True, callbacks=[recorder])
    run.train()
    expected = hand_written(tmp_path, micro=3)
    assert_same_weights(run.model, expected.weights)
    log = [log for log in recorder.logs if "loss" in log]
    assert log[0]["loss"] == pytest.approx(sum(expected.losses[0][0]) / 2)

    trainer(tmp_path / "whole", **whole).train()
    once = [r for r in whole["callbacks"][0].logs if "loss" in r]
    assert log[-1]["zo/uploaded_bytes_per_step"] == once[-1]["zo/uploaded_bytes_per_step"]


def test_losses_that_do_not_count_items_are_averaged_over_micro_batches(tmp_path: Path) -> None:
    def mean(model: nn.Module, batch: dict[str, Any], items: Tensor) -> Tensor:
        return model(**batch, use_cache=False).loss / 2

    run = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=6)
    run.model_accepts_loss_kwargs = False
    run.train()

    def rate(step: int) -> float:
        return LR * (6 - step) / 6 if step < 6 else 0.0

    expected = hand_written(tmp_path, micro=2, lr=rate, loss=mean, weight_decay=0.1)
    assert len(expected.losses) == STEPS  # steps 6 and 7 at rate 0 change nothing
    assert_same_weights(run.model, expected.weights)


@pytest.mark.parametrize("by_model", [True, False], ids=["summed", "averaged"])
def test_a_micro_batch_without_labels_adds_nothing(tmp_path: Path, by_model: bool) -> None:
    """Its loss is 0 where losses are shares of the step's, and NaN where they are means."""
    rows = [row | {"labels": row["labels"].clone()} for row in DATA]
    for row in rows[::2]:
        row["labels"][:] = -100
    one = {"per_device_train_batch_size": 1, "max_steps": 4}
    some = trainer(tmp_path / "some", gradient_accumulation_steps=2, **one)
    others = trainer(tmp_path / "others", **one)
    for run, data in ((some, rows), (others, rows[1::2])):
        run.train_dataset, run.model_accepts_loss_kwargs = data, by_model
        run._get_train_sampler = lambda data: SequentialSampler(data)
        run.train()
    assert_same_weights(some.model, weights(others.model))
    assert not any(s.skipped for s in read_journal(tmp_path / "some" / "journal.zo2").steps)


def test_label_smoothing_and_losses_of_ones_own(tmp_path: Path) -> None:
    def squared(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        assert labels is not None
        return outputs.logits.square().sum() / num_items_in_batch

    def plain(model: nn.Module, batch: dict[str, Any], items: Tensor) -> Tensor:
        batch.pop("labels")
        return model(**batch, use_cache=False).logits.square().sum() / items

    run = trainer(tmp_path, compute_loss_func=squared, gradient_accumulation_steps=2)
    run.train()
    assert_same_weights(run.model, hand_written(tmp_path, micro=2, loss=plain).weights)

    smooth = trainer(tmp_path / "smooth", label_smoothing_factor=0.1)
    smoother = smooth.label_smoother

    def smoothed(model: nn.Module, batch: dict[str, Any], items: Tensor) -> Tensor:
        labels = batch.pop("labels")
        outputs = model(**batch, num_items_in_batch=items, use_cache=False)
        return smoother(outputs, labels, shift_labels=True, num_items_in_batch=items)

    smooth.train()
    assert_same_weights(smooth.model, hand_written(tmp_path, loss=smoothed).weights)


def test_bf16_autocast(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: dict[str, Any], items: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model_loss(model, batch, items)

    run = trainer(tmp_path, bf16=True, simulate=True)
    run.train()
    assert_same_weights(run.model, hand_written(tmp_path, loss=loss).weights)


def test_dropout_is_off(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny("opt", dropout=0.5, pad_token_id=1))
    plain = hand_written(tmp_path, model=tiny("opt", dropout=0.5, pad_token_id=1).eval())
    run.train()
    assert_same_weights(run.model, plain.weights)


# -- stopping and resuming


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"storage": "bf16", "write_back": 3, "directions": 2},
        {"storage": "bf16", "write_back": "never"},
        {"compute_dtype": "bfloat16"},
        {"gradient_accumulation_steps": 3},
    ],
    ids=["fp32", "bf16-at-rest", "never", "bf16-compute", "accumulation"],
)
def test_resuming_continues_to_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    options |= {"save_strategy": "steps", "save_steps": 4, "simulate": True}
    whole = trainer(tmp_path, **options)
    whole.train()
    expected = weights(whole.model)
    checkpoint = tmp_path / "checkpoint-4"
    assert json.loads((checkpoint / "zo_state.json").read_text())["steps"] == 4
    exact = options.keys() & {"compute_dtype", "write_back"}  # more than the model can hold
    assert (checkpoint / "zo_masters.safetensors").exists() == bool(exact)

    taken_up = trainer(tmp_path, tiny("llama-tied", seed=9), compute_loss_func=no_loss, **options)
    taken_up.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(taken_up.model, expected)
    computed = trainer(tmp_path / "other", tiny("llama-tied", seed=9), **options)
    computed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(computed.model, expected)
    journals = [read_journal(folder / "journal.zo2") for folder in (tmp_path, tmp_path / "other")]
    assert [(j.start, j.next_step) for j in journals] == [(0, 8), (4, 8)]
    assert journals[0].steps[4:] == journals[1].steps
    if "compute_dtype" not in options:  # a model given back has its weights rounded
        whole.train(resume_from_checkpoint=str(checkpoint))  # a trainer that ran on already
        assert_same_weights(whole.model, expected)


def test_a_stopped_run_leaves_its_weights(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    run = trainer(tmp_path, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    four = hand_written(tmp_path, lr=lambda step: linear(step) if step < 4 else 0.0)
    assert_same_weights(run.model, four.weights)


def test_checkpoints_of_other_models_and_runs_are_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, **saving).train()
    checkpoint = tmp_path / "checkpoint-2"
    for other, message in (
        (tiny("opt"), "is a checkpoint of another model"),
        (tiny("llama-tied", vocab_size=198), r"embed_tokens.weight is .* shape \(199, 32\) there"),
    ):
        before = weights(other)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, other).train(resume_from_checkpoint=str(checkpoint))
        assert_same_weights(other, before)
    frozen = tiny("llama-tied")
    frozen.model.norm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model.norm.weight is trainable .* not a trainable para"):
        trainer(tmp_path, frozen).train(resume_from_checkpoint=str(checkpoint))

    (checkpoint / "zo_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"zo_state.json cannot be read: Expecting"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "zo_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"has no zo_state.json: it is not a checkpoint of a zeroth"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_another_eps_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("zo2ext.integrations.trainer.logger.warning", said.append)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, max_steps=2, **saving).train()
    run = trainer(tmp_path / "other", eps=1e-2, max_steps=3)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [text.partition(": ")[2] for text in said] == ["eps was 0.001 and is 0.01."]


# -- evaluation, saving, callbacks


def test_evaluation_before_between_and_after_steps(tmp_path: Path) -> None:
    recorder = Recorder()
    options = {"eval_strategy": "steps", "eval_steps": 4, "callbacks": [recorder]}
    run = trainer(tmp_path, simulate=True, **options)
    plain = run.evaluate()["eval_loss"]
    with torch.no_grad():
        rows = [run.model.eval()(**{k: v[None] for k, v in row.items()}) for row in DATA[:6]]
    logits = torch.cat([row.logits for row in rows])
    torch.testing.assert_close(torch.from_numpy(run.predict(DATA[:6]).predictions), logits)
    assert run.model.get_parameter("model.norm.weight").isfinite().all()
    run.train()
    after = run.evaluate()["eval_loss"]
    losses = [log["eval_loss"] for log in recorder.logs if "eval_loss" in log]
    assert losses[0] == plain
    assert losses[2] == losses[3] == after
    assert len({plain, losses[1], after}) == 3
    without = trainer(tmp_path)
    without.train()
    assert_same_weights(run.model, weights(without.model))


def test_a_saved_model_is_the_current_one(tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.save_model(str(tmp_path / f"step-{state.global_step}"))

    run = trainer(tmp_path, callbacks=[Save()], max_steps=3, simulate=True)
    run.train()
    run.save_model(str(tmp_path / "after"))
    for folder in ("step-3", "after"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert_same_weights(loaded, weights(run.model))
    (tmp_path / "plain").mkdir()
    run.model.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / f / "model.safetensors") for f in ("step-3", "plain")]
    assert files[0].keys() == files[1].keys()
    prompt = torch.tensor([[5, 6, 7]])
    tokens = run.model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, loaded.generate(prompt, max_new_tokens=4, do_sample=False))


def test_the_best_model_is_loaded_and_stopping_early_works(tmp_path: Path) -> None:
    scores = iter([3.0, 1.0, 2.0, 2.5, 0.0, 0.0, 0.0])

    def metric(prediction: Any) -> dict[str, float]:
        return {"score": next(scores)}

    run = trainer(
        tmp_path,
        compute_metrics=metric,
        callbacks=[EarlyStoppingCallback(2)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        simulate=True,
    )
    run.train()
    assert run.state.global_step == 4
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    two = hand_written(tmp_path, lr=lambda step: linear(step) if step < 2 else 0.0)
    assert_same_weights(run.model, two.weights)


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    """A second train() draws new directions."""
    run = trainer(tmp_path, max_steps=2, lr_scheduler_type="constant", callbacks=[Recorder()])
    run.train(), run.train()
    pairs = {r["zo/loss_plus"] for r in run.state.log_history if "zo/loss_plus" in r}
    assert len(pairs) == 2
    assert run._steps == 4


def test_losses_that_are_not_finite_skip_their_step(tmp_path: Path) -> None:
    def sometimes(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return outputs.logits.sum() * (math.nan if run.state.global_step else 1.0)

    run = trainer(tmp_path, compute_loss_func=sometimes, max_steps=3)
    run.train()
    assert run.state.log_history[2]["zo/skipped_steps"] == 2
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_loss_is_nan_where_every_step_is_skipped(tmp_path: Path) -> None:
    def never(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return outputs.logits.sum() * math.nan

    run = trainer(tmp_path, compute_loss_func=never, max_steps=4, logging_steps=2)
    assert math.isnan(run.train().training_loss)
    assert all(math.isnan(log["loss"]) for log in run.state.log_history if "loss" in log)
    assert math.isnan(run.state.log_history[-1]["train_loss"])


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(DATA)

    def __len__(self) -> int:
        return len(DATA)


def test_a_stream_may_have_a_length(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_dataset = Stream()
    run.train()
    header = read_journal(tmp_path / "journal.zo2").header
    assert header["run"]["data"] == ["Stream"]
    assert "rows" not in header["run"]


def test_arguments_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama-tied")
    for run in (ZOTrainer(model), ZOTrainer(model, None), ZOTrainer(model=model, args=None)):
        assert type(run.args) is ZOTrainingArguments


# -- refusals


class Own(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


class Below(ZOTrainerMixin, Own):
    pass


class Above(ZOTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return super().training_step(*args, **kwargs)


def test_a_training_step_of_ones_own_is_kept_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Own has a training_step of its own, which ZOTrainerMix"):
        Below(model=tiny("llama-tied"), args=arguments(tmp_path), train_dataset=DATA)
    run = Above(model=tiny("llama-tied"), args=arguments(tmp_path), train_dataset=DATA)
    run.train()
    assert run.seen == STEPS


class Owner(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.classifier = model, nn.Linear(2, 2)


def test_parts_of_a_loss_that_would_not_be_trained_are_named() -> None:
    model = tiny("llama-tied")
    check_loss({"a": nn.Sequential(model), "b": 1}, model)
    check_loss(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), model)
    with pytest.raises(ValueError, match=r"Owner has parameters of its own \(classifier\.weight, "):
        check_loss(Owner(model), model)
    patching = type("MatryoshkaLoss", (nn.Module,), {})()
    with pytest.raises(ValueError, match="MatryoshkaLoss cannot be used: it replaces the model's"):
        check_loss({"a": patching}, model)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fp16": True}, "fp16=True cannot be used: fp16 mixed precision scales gradients"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True cannot be used: .* set compute_dtype"),
        ({"deepspeed": {"zero_optimization": {}}}, "deepspeed=.* cannot be used: zo2ext streams"),
        ({"fsdp": True}, "fsdp=True cannot be used: zo2ext streams"),
        ({"torch_compile": True}, "torch_compile=True cannot be used: .* compile its blocks"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 cannot be used: there is no gradient to clip"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 cannot be used"),
        ({"torch_compile_mode": "default"}, "torch_compile_mode='default' cannot be used"),
        (
            {"auto_find_batch_size": True},
            "auto_find_batch_size=True .* the batch size defines the run",
        ),
        (
            {"write_back": "often"},
            "write_back must be an integer from 1, 'never' or 'auto', got",
        ),
        ({"eps": 0.0}, "eps must be a positive number, finite, got 0.0"),
        ({"storage": "int8"}, "storage must be one of fp32, .* got 'int8'"),
        ({"resident": "much"}, "resident must be a count, 'all', or a size"),
        ({"granularity": "layer"}, "granularity must be one of 'block', 'module', got 'layer'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_without_a_meaning_are_refused(
    tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **option)


def test_trainers_that_cannot_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be ZOTrainingArguments, got TrainingArguments"):
        ZOTrainer(model=tiny("opt"), args=TrainingArguments(str(tmp_path), report_to=[]))
    model = tiny("opt")
    with pytest.raises(ValueError, match="an optimizer or scheduler of your own cannot be used"):
        trainer(tmp_path, model, optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None))
    frozen = trainer(tmp_path, tiny("llama-tied").requires_grad_(False))
    with pytest.raises(ValueError, match=r"has nothing to train: all of its \d+ parameters are fr"):
        frozen.train()
    assert frozen.evaluate()["eval_loss"] > 0


ROWS: dict[str, Any] = {
    "without labels": [{"input_ids": torch.arange(3, 9)}] * 4,
    "without ids": [{"text": "w1 w2"}] * 4,
    "float labels": [{"input_ids": torch.arange(3, 9), "labels": torch.rand(6)}] * 4,
    "one label a row": [{"input_ids": torch.arange(3, 9), "labels": 1}] * 4,
    "too large ids": [{"input_ids": torch.arange(500, 506), "labels": torch.arange(6)}] * 4,
    "nothing": [],
    "splits": {"train": DATA, "test": DATA},
}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("without labels", r"received input_ids: torch.int64 of shape \(2, 6\) from 3 to 8;"),
        ("without ids", "contains keys expected by the model: input_ids,"),
        ("float labels", r"labels: torch.float32 of shape \(2, 6\) .* expects .* torch.int64"),
        ("one label a row", r"labels: torch.int64 of shape \(2,\) from 1 to 1; .* same shape"),
        ("too large ids", "input_ids: torch.int64 .* from 500 to 505"),
        ("nothing", "train_dataset is empty"),
        ("splits", r"train_dataset has splits \(train, test\); expected one data set: pass one"),
    ],
    ids=list(ROWS),
)
def test_data_that_cannot_be_used_is_named(tmp_path: Path, rows: str, message: str) -> None:
    run = trainer(tmp_path)
    run.train_dataset = ROWS[rows]
    before = weights(run.model)
    with pytest.raises((ValueError, RuntimeError, IndexError)) as caught:
        run.train()
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(message, said), said
    assert_same_weights(run.model, before)


def test_weights_of_several_dtypes(tmp_path: Path) -> None:
    """A model that cannot run is named with its dtypes; one dtype of the forward pass heals it."""
    mixed = tiny("llama-tied")
    mixed.model.layers[0].to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype") as caught:
        trainer(tmp_path, mixed).train()
    assert "torch.bfloat16 and torch.float32; compute_dtype sets" in caught.value.__notes__[0]
    trainer(tmp_path / "other", mixed, compute_dtype="float32").train()
    assert all(p.isfinite().all() for p in mixed.parameters())


def test_the_timeline_of_a_step_is_kept(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=10, simulate=True).train()
    assert not (tmp_path / "timeline.json").exists()
    trainer(tmp_path / "longer", max_steps=11, simulate=True).train()
    assert json.loads((tmp_path / "longer" / "timeline.json").read_text())["traceEvents"]


def test_the_package_has_the_trainers_without_importing_them() -> None:
    names = ("ZOTrainer", "ZOTrainerMixin", "ZOTrainingArguments", "ZOSFTTrainer", "ZOSFTConfig")
    assert set(names) <= set(dir(zo2ext))
    assert zo2ext.ZOTrainer is ZOTrainer
    assert zo2ext.ZOTrainingArguments is ZOTrainingArguments
    with pytest.raises(AttributeError, match="module 'zo2ext' has no attribute 'ZOTrainre'"):
        zo2ext.ZOTrainre  # noqa: B018
    code = "import sys, zo2ext; print(sorted({'transformers.trainer', 'trl'} & {*sys.modules}))"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert done.stdout.strip() == "[]", done.stderr


def test_arguments_become_the_configuration(tmp_path: Path) -> None:
    given = {
        "eps": 2e-3,
        "directions": 2,
        "estimator": "centered",
        "normalize": True,
        "clip": 2.0,
        "distribution": "rademacher",
        "rank": 2,
        "joined": True,
        "storage": "bfloat16",
        "compute_dtype": "fp32",
        "rounding": "nearest",
        "write_back": 1,
        "granularity": "module",
        "slots": 5,
        "resident": "2",
        "one_copy": True,
        "journal_sync": 7,
        "store": "disk",
        "host_memory": "1GiB",
    }
    dtypes = {"storage": torch.bfloat16, "compute_dtype": torch.float32, "resident": 2}
    expected = {"lr": LR, "weight_decay": 0.1, "seed": SEED, "device": "cpu"}
    config = arguments(tmp_path, **given).zo_config("cpu")
    assert config == zo2ext.ZOConfig(**given | dtypes | expected)
    fields = {"lr", "weight_decay", "seed", "device"}
    assert set(given) | fields == set(zo2ext.ZOConfig.__dataclass_fields__)
