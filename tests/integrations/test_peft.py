"""PEFT: only adapters are perturbed, a frozen base is uploaded and never written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import nn
from trainer_runs import (
    DATA,
    Recorder,
    assert_same_weights,
    hand_written,
    trainer,
    weights,
)

import zo2ext

peft = pytest.importorskip("peft")

ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def adapted(name: str, seed: int = 0) -> nn.Module:
    model = tiny("llama-tied")
    torch.manual_seed(seed)
    adapter = peft.get_peft_model(model, ADAPTERS[name])
    for parameter in adapter.parameters():
        if parameter.requires_grad:  # LoRA's B starts at zero; here everything matters
            nn.init.normal_(parameter, std=0.05)
    return adapter.eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_the_adapter_is_trained(tmp_path: Path, name: str) -> None:
    recorder = Recorder()
    run = trainer(
        tmp_path,
        adapted(name),
        simulate=True,
        callbacks=[recorder],
        eval_strategy="steps",
        eval_steps=4,
    )
    before = weights(run.model)
    run.train()
    expected = hand_written(tmp_path, model=adapted(name))
    trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert set(expected.weights) == trainable
    assert_same_weights(run.model, before | expected.weights)
    for parameter in trainable:
        assert not torch.equal(before[parameter], run.model.get_parameter(parameter)), parameter

    log = [log for log in recorder.logs if "loss" in log][-1]
    adapter_nbytes = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    base_nbytes = sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)
    padding = 128 * 4 * len(trainable)
    assert log["zo/offloaded_bytes_per_step"] <= adapter_nbytes + padding
    assert log["zo/uploaded_bytes_per_step"] >= base_nbytes / 2  # slots hold the rest

    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny("llama-tied"), tmp_path / "adapter").eval()
    batch = batches("llama-tied", 1)[0]
    with torch.no_grad():
        assert_same_bits(loaded(**batch).logits, run.model.eval()(**batch).logits)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_resume_to_the_same_bits(tmp_path: Path, name: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "simulate": True}
    whole = trainer(tmp_path, adapted(name), **saving)
    whole.train()
    resumed = trainer(tmp_path, adapted(name, seed=1), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(resumed.model, weights(whole.model))


def test_the_best_adapter_is_loaded(tmp_path: Path) -> None:
    scores = iter([1.0, 0.0, 2.0, 3.0])
    run = trainer(
        tmp_path,
        adapted("lora"),
        compute_metrics=lambda _: {"score": next(scores)},
        max_steps=4,
        lr_scheduler_type="constant",
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        simulate=True,
    )
    run.train()
    best = reference_weights(tmp_path, steps=2)
    assert_same_weights(run.model, weights(run.model) | best)
    run.compute_metrics = None
    assert run.evaluate(DATA[:2])["eval_loss"] > 0


def reference_weights(tmp_path: Path, steps: int) -> dict[str, torch.Tensor]:
    rate = {step: 3e-3 if step < steps else 0.0 for step in range(8)}
    return hand_written(tmp_path, model=adapted("lora"), lr=rate.__getitem__).weights


def test_trained_adapters_can_be_merged(tmp_path: Path) -> None:
    run = trainer(tmp_path, adapted("lora"), simulate=True)
    run.train()
    batch = batches("llama-tied", 1)[0]
    with torch.no_grad():
        logits = run.model.eval()(**batch).logits
        merged = run.model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, logits)


def test_adapters_in_a_plain_loop() -> None:
    data = batches("llama-tied", 5)
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "seed": 2}
    expected = reference.mezo(adapted("lora"), data, **settings)
    model = adapted("lora")
    with zo2ext.offload(model, zo2ext.ZOConfig(device="simulated", **settings)) as zo:
        for batch in data:
            zo.step(lambda batch=batch: model(**batch).loss)
    assert_same_weights(model, weights(model) | expected.weights)


def test_adapters_with_nothing_trainable_are_refused(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(tiny("llama-tied"), tmp_path / "adapter")
    run = trainer(tmp_path, model)
    message = r"PeftModelForCausalLM has nothing to train: .* \(adapters: default\); load an adap"
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.evaluate()["eval_loss"] > 0


def test_checkpoints_of_another_rank_are_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tmp_path, adapted("lora"), **saving).train()
    other = peft.get_peft_model(
        tiny("llama-tied"),
        peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    with pytest.raises(ValueError, match=r"lora_A.*shape \(4, 32\) there and .* \(8, 32\) in this"):
        trainer(tmp_path, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
