"""TRL's SFTTrainer, whose loss reads ``lm_head.weight`` outside of its module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from numeric import assert_same_bits
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from trainer_runs import Recorder, StopAt, weights
from transformers import PreTrainedTokenizerFast

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

import zo2ext  # noqa: E402
from zo2ext.errors import JournalError  # noqa: E402
from zo2ext.integrations.arguments import ZOArguments  # noqa: E402
from zo2ext.integrations.sft import ZOSFTConfig, ZOSFTTrainer  # noqa: E402
from zo2ext.integrations.trainer import ZOTrainerMixin  # noqa: E402
from zo2ext.runs import find_lr  # noqa: E402

STEPS = 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(190))]
    words_to_ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def texts() -> Dataset:
    rows = [
        {"text": " ".join(f"w{(i * 7 + j) % 190}" for j in range(5 + i % 8))} for i in range(24)
    ]
    return Dataset.from_list(rows)


def make(out: Path, model: nn.Module, tokenizer: Any, texts: Dataset, **changes: Any) -> Any:
    recorder = changes.pop("recorder", Recorder())
    peft_config = changes.pop("peft_config", None)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "seed": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "simulate": True,
    }
    return ZOSFTTrainer(
        model=model,
        args=ZOSFTConfig(str(out), **settings | changes),
        train_dataset=texts,
        eval_dataset=texts.select(range(4)),
        processing_class=tokenizer,
        callbacks=[recorder],
        peft_config=peft_config,
    )


@pytest.mark.parametrize("name", ["llama-tied", "llama", "qwen3_moe"])
def test_losses_are_those_of_plain_perturbed_forwards(
    tmp_path: Path, tokenizer: Any, texts: Dataset, name: str
) -> None:
    recorder = Recorder()
    run = make(
        tmp_path, tiny(name), tokenizer, texts, recorder=recorder, gradient_accumulation_steps=2
    )
    assert run.evaluate()["eval_loss"] > 0
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] > 0
    assert after["eval_mean_token_accuracy"] >= 0

    plain = make(tmp_path, tiny(name), tokenizer, texts)
    plain.current_gradient_accumulation_steps = 2
    loader = plain.get_train_dataloader()
    batches = [batch for _ in range(1) for batch in loader]
    pairs = [{"micro": batches[i : i + 2]} for i in range(0, 2 * STEPS, 2)]

    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        items = sum((b["labels"][..., 1:] != -100).sum() for b in batch["micro"])
        losses = [
            plain.compute_loss(model, dict(b), num_items_in_batch=items) for b in batch["micro"]
        ]
        return sum(part.double() for part in losses)  # type: ignore[return-value]

    plain.model.eval()
    expected = reference.mezo(plain.model, pairs, lr=3e-3, eps=1e-3, seed=3, loss=loss)
    logs = [log for log in recorder.logs if "loss" in log]
    found = [(log["zo/loss_plus"], log["zo/loss_minus"]) for log in logs]
    assert found == [losses[0] for losses in expected.losses]
    for parameter, tensor in expected.weights.items():
        assert_same_bits(run.model.get_parameter(parameter).data, tensor, parameter)
    seen = sum(int(b["attention_mask"].sum()) for pair in pairs for b in pair["micro"])
    assert logs[-1]["num_tokens"] == seen
    assert 0 <= logs[-1]["mean_token_accuracy"] <= 1


def test_the_same_script_continues_where_it_was_stopped(
    tmp_path: Path, tokenizer: Any, texts: Dataset
) -> None:
    whole = make(tmp_path / "whole", tiny("llama-tied"), tokenizer, texts)
    whole.train()
    stopped = make(tmp_path / "parts", tiny("llama-tied"), tokenizer, texts)
    stopped.add_callback(StopAt(2))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    parts = make(tmp_path / "parts", tiny("llama-tied"), tokenizer, texts)
    parts.train()
    for name, tensor in weights(parts.model).items():
        assert_same_bits(tensor, whole.model.get_parameter(name).data, name)
    journals = [(tmp_path / f / "journal.zo2").read_bytes() for f in ("whole", "parts")]
    assert journals[0] == journals[1]
    longer = make(tmp_path / "parts", tiny("llama-tied"), tokenizer, texts, max_length=4)
    with pytest.raises(JournalError, match=r"run.data was .* and is .*; run.max_length was "):
        longer.train()
    assert zo2ext.ZOSFTTrainer is ZOSFTTrainer


def test_sft_with_an_adapter_that_resumes(tmp_path: Path, tokenizer: Any, texts: Dataset) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options: dict[str, Any] = {"peft_config": adapter, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path, tiny("llama-tied"), tokenizer, texts, **options)
    before = weights(whole.model)
    whole.train()
    after = weights(whole.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)

    resumed = make(tmp_path, tiny("llama-tied"), tokenizer, texts, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in weights(resumed.model).items():
        assert_same_bits(tensor, after[name], name)


@dataclass
class RewardArguments(ZOArguments, trl.RewardConfig):
    pass


class ZORewardTrainer(ZOTrainerMixin, trl.RewardTrainer):
    pass


def rewards(out: Path, tokenizer: Any, steps: int) -> list[dict[str, float]]:
    """Return the log of a trainer that learns nothing, evaluated once at the end."""
    pairs = [{"chosen": f"w{i} w{i + 1}", "rejected": f"w{i + 5} w{i}"} for i in range(8)]
    recorder, data = Recorder(), Dataset.from_list(pairs)
    ZORewardTrainer(
        model=tiny("llama-seqcls", num_labels=1),
        args=RewardArguments(
            str(out),
            per_device_train_batch_size=2,
            max_steps=4,
            learning_rate=0.0,
            logging_steps=steps,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=tokenizer,
        callbacks=[recorder],
    ).train()
    return recorder.logs


def test_training_metrics_are_not_logged_as_evaluations(tmp_path: Path, tokenizer: Any) -> None:
    often, once = (rewards(tmp_path / str(n), tokenizer, n) for n in (1, 100))
    training = [log for log in often if "loss" in log]
    assert not [name for log in training for name in log if name.startswith("eval_")]
    assert {"margin", "accuracy", "num_tokens"} <= training[-1].keys()
    assert training[-1]["num_tokens"] > 0
    evaluated = [
        [log for log in logs if "eval_loss" in log][-1]["eval_margin"] for logs in (often, once)
    ]
    assert evaluated[0] == evaluated[1]


def test_a_loss_of_constant_value_is_refused(tokenizer: Any) -> None:
    class ZOGRPOTrainer(ZOTrainerMixin, trl.GRPOTrainer):
        pass

    with pytest.raises(ValueError, match="GRPOTrainer cannot be used: the value of its loss is co"):
        ZOGRPOTrainer(model=tiny("llama"), reward_funcs=len, processing_class=tokenizer)


def test_sft_without_arguments(
    tmp_path: Path, tokenizer: Any, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = partial(ZOSFTConfig, bf16=False, use_cpu=True)  # its defaults need a GPU
    monkeypatch.setattr(ZOSFTTrainer, "arguments_class", here)
    run = ZOSFTTrainer(tiny("llama"), train_dataset=texts, processing_class=tokenizer)
    assert type(run.args) is ZOSFTConfig


def test_a_rate_that_is_found_leaves_no_trace(
    tmp_path: Path, tokenizer: Any, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in TRL's counts of tokens either."""
    monkeypatch.setattr(find_lr, "_FEWEST", 24)
    monkeypatch.setattr(find_lr, "_FORWARDS", 1)
    found = make(tmp_path / "auto", tiny("llama-tied"), tokenizer, texts, learning_rate="auto")
    found.train()
    rate = found.args.learning_rate
    plain = make(tmp_path / "number", tiny("llama-tied"), tokenizer, texts, learning_rate=rate)
    plain.train()
    for name, value in weights(plain.model).items():
        assert_same_bits(weights(found.model)[name], value, name)
    logs = [
        [{k: v for k, v in entry.items() if "_per_second" not in k} for entry in log]
        for log in (found.state.log_history, plain.state.log_history)
    ]
    assert [entry.get("num_tokens") for entry in logs[0]] == [e.get("num_tokens") for e in logs[1]]
    assert [entry.get("loss") for entry in logs[0]] == [entry.get("loss") for entry in logs[1]]
