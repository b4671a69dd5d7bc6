"""Options of ``zo2ext train`` that the Trainer brings: schedules, checkpoints, early stopping."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo2ext
from zo2ext.commands import main as cli
from zo2ext.runs.log import read_evaluations
from zo2ext.tasks.text import held_out_loss, load_text

Capture = pytest.CaptureFixture[str]
Train = Callable[..., Path]


@pytest.fixture
def train(model_folder: Path, text_file: Path, tmp_path: Path) -> Train:
    """Return a function that runs the command with small steps and returns the run's folder."""

    def run(*words: str, name: str = "run") -> Path:
        out = tmp_path / name
        small = ["--batch-size=2", "--seq-len=16", "--eval-windows=4", "--device=cpu"]
        paths = [f"--model={model_folder}", f"--text={text_file}", f"--out={out}"]
        assert cli.main(["train", *paths, *small, *words]) == 0
        return out

    return run


def column(run: Path, name: str) -> list[float]:
    with (run / "steps.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def scores(run: Path) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, _, value in read_evaluations(run).rows]


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def test_a_schedule_sets_the_rate_of_every_step(train: Train) -> None:
    run = train("--steps=4", "--lr=1e-3", "--lr-scheduler-type=linear")
    assert column(run, "lr") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    run = train(
        "--steps=4", "--lr=1e-3", "--lr-scheduler-type=linear", "--warmup-steps=2", name="w"
    )
    assert column(run, "lr") == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_a_schedule_belongs_to_its_number_of_steps(train: Train, capsys: Capture) -> None:
    train("--steps=2", "--lr-scheduler-type=linear")
    with pytest.raises(AssertionError):
        train("--steps=4", "--lr-scheduler-type=linear")
    assert "run.steps was 2 and is 4" in capsys.readouterr().err


def test_checkpoints_continue_to_the_same_bits(train: Train, capsys: Capture) -> None:
    options = ["--steps=6", "--eval-every=3", "--save-every=2", "--storage=bf16", "--write-back=4"]
    whole = train(*options)
    kept = {path.name for path in whole.glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(part / name)
    (part / "results.json").unlink()
    capsys.readouterr()
    train(*options, name="part")
    assert "journal 6 of 6 steps are already done" in capsys.readouterr().out
    assert weights(part) == weights(whole)
    assert scores(part) == scores(whole)
    assert json.loads((part / "results.json").read_text()) == json.loads(
        (whole / "results.json").read_text()
    )


def test_overwriting_begins_anew_and_keeps_the_old_journal(train: Train) -> None:
    run = train("--steps=4", "--save-every=2")
    old = (run / "journal.zo2").read_bytes()
    assert train("--steps=2", "--lr=1e-3", "--overwrite") == run
    assert weights(run) == weights(train("--steps=2", "--lr=1e-3", name="plain"))
    assert (run / "journal.zo2.before-1").read_bytes() == old
    assert not json.loads((run / "arguments.json").read_text())["overwrite"]
    assert column(run, "lr") == [1e-3] * 2


def test_old_checkpoints_are_deleted(train: Train) -> None:
    run = train("--steps=6", "--save-every=2", "--save-total-limit=1")
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]


def test_another_text_can_be_held_out(train: Train, model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the soup was delightful . we drove there on friday . " * 12)
    run = train("--steps=1", f"--validation={other}")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = load_text(
        other,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        seq_len=16,
        validation=other,
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    expected = held_out_loss(model, data, batch_size=2, windows=4, device=torch.device("cpu"))
    assert scores(run)[0] == (0, pytest.approx(expected, rel=1e-5))


def test_autocast_changes_losses_and_leaves_the_weights_dtype(train: Train) -> None:
    plain, autocast = train("--steps=2"), train("--steps=2", "--bf16", name="bf16")
    first, second = column(plain, "loss")[0], column(autocast, "loss")[0]
    assert first != second
    assert first == pytest.approx(second, rel=0.02)
    assert {t.dtype for t in load_file(autocast / "final" / "model.safetensors").values()} == {
        torch.float32
    }


def test_a_run_that_does_not_improve_stops_early(train: Train, capsys: Capture) -> None:
    options = ["--steps=40", "--eval-every=2", "--early-stopping=2", "--lr=0"]
    run = train(*options)
    assert [step for step, _ in scores(run)] == [0, 2, 4]
    assert len(column(run, "loss")) == 4
    capsys.readouterr()
    train(*options)
    assert "finished already: 4 steps" in capsys.readouterr().out


def test_a_tracker_that_is_not_there_is_refused(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = [f"--model={model_folder}", f"--text={text_file}", f"--out={tmp_path / 'run'}"]
    assert cli.main(["train", *words, "--seq-len=16", "--report-to", "nothing-such"]) == 1
    assert "report_to: nothing-such is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_final_weights_are_pushed(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    uploaded: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, exist_ok: bool) -> Any:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

        def upload_folder(self, **options: Any) -> None:
            uploaded.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    run = train("--steps=1", "--push-to-hub=tuned")
    assert uploaded == [{"repo_id": "someone/tuned", "folder_path": run / "final"}]
    assert "uploaded to the hub: someone/tuned" in capsys.readouterr().out


def test_a_trainer_trains_an_engine_that_is_open_already(
    model_folder: Path, tmp_path: Path
) -> None:
    """A model that is read from its files unit by unit, too large for memory perhaps."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in (tokenizer(f"the soup was {w} .")["input_ids"] for w in ("good", "bad", "odd"))
    ]
    found = {}
    for store in ("host", "disk"):
        config = zo2ext.ZOConfig(store=store, host_memory="1GiB", device="cpu", lr=1e-3)
        model, engine = zo2ext.load(model_folder, config)
        arguments = zo2ext.ZOTrainingArguments(
            str(tmp_path / store),
            max_steps=3,
            learning_rate=1e-3,
            per_device_train_batch_size=1,
            save_steps=2,
            use_cpu=True,
            report_to="none",
        )
        with engine:
            trainer = zo2ext.ZOTrainer(
                model=model, args=arguments, train_dataset=rows, engine=engine
            )
            trainer.train()
            assert engine.steps == 3
            engine.save_pretrained(tmp_path / store / "final")
        found[store] = load_file(tmp_path / store / "final" / "model.safetensors")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / store / "checkpoint-2")
        assert saved.num_parameters() == model.num_parameters()
    assert found["host"].keys() == found["disk"].keys()
    assert all(torch.equal(found["host"][name], found["disk"][name]) for name in found["host"])


def test_a_trainer_without_a_rate_uses_the_rule_and_reports_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("zo2ext.integrations.trainer.logger.warning", warned.append)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = list(range(5, 15))
    trainer = zo2ext.ZOTrainer(
        model=model,
        args=zo2ext.ZOTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none"),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 8,
    )
    trainer.train()
    assert trainer.args.learning_rate == 0.05 / 174_528**0.5
    assert column(tmp_path, "lr") == [trainer.args.learning_rate]
    assert warned == ["learning_rate is 0.00012, the default for 174,528 trained weights"]
