"""The loss of a text: what training reports, without training."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from zo2ext.commands import main as cli
from zo2ext.commands.arguments import EvalTextArguments
from zo2ext.commands.eval_text import evaluate_text

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def text(text_file: Path) -> Path:
    return text_file


@pytest.fixture
def words(model_folder: Path, text: Path) -> list[str]:
    return [f"--model={model_folder}", f"--text={text}", "--seq-len=64", "--batch-size=3"]


@pytest.mark.parametrize(
    "place", [["--device=cpu"], ["--device=simulated"], ["--device=simulated", "--storage=bf16"]]
)
def test_it_is_what_training_reports(
    place: list[str], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert cli.main(["eval", *words, *place]) == 0
    said = re.match(
        r"held-out loss (\S+) nats per token, perplexity (\S+); (\d+) windows of 64 .*, of (\d+)\n",
        capsys.readouterr().out,
    )
    assert said
    assert said[3] == said[4]
    assert float(said[2]) == pytest.approx(math.exp(float(said[1])), rel=1e-3)
    out = f"--out={tmp_path / 'run'}"
    assert cli.main(["train", *words, *place, out, "--steps=1"]) == 0
    assert f"step      0: held-out loss {said[1]}\n" in capsys.readouterr().out


def test_batches_and_places_change_nothing(model_folder: Path, text: Path, capsys: Capture) -> None:
    def loss(**options: Any) -> float:
        model = str(model_folder)
        return evaluate_text(EvalTextArguments(model=model, text=str(text), **options))

    assert loss(device="cpu") == loss(device="simulated", resident="2")
    assert loss(device="cpu") == pytest.approx(loss(device="cpu", batch_size=2), rel=1e-5)
    assert loss(device="cpu", eval_windows=1) != loss(device="cpu")
    assert "1 windows of 128 tokens, of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--batch-size=0", "batch_size must be at least 1, got 0"),
        ("--seq-len=1", "seq_len must be at least 2, got 1"),
        ("--eval-windows=0", "eval_windows must be at least 1, got 0"),
        ("--text=missing.txt", "text is 'missing.txt', which is not a file"),
        ("--slots=1", "slots must be an integer from 2"),
        ("--seq-len=513", "seq_len is 513, but model "),
    ],
)
def test_wrong_values_are_refused(
    word: str, message: str, words: list[str], capsys: Capture
) -> None:
    assert cli.main(["eval", *words, word]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"zo2ext eval: error: {message}")
    assert said.out == ""
