"""``zo2ext check``: equal models pass, and a difference is found and located."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zo2ext.commands import main as cli
from zo2ext.engine import check as comparison

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "words", ["", "--tiny --attention=eager", "--tiny --kind=classification --seq-len=9"]
)
def test_equal_models_pass(words: str, model_folder: Path, capsys: Capture) -> None:
    assert cli.main(["check", str(model_folder), "--device=simulated", *words.split()]) == 0
    out = capsys.readouterr().out
    kind = "SequenceClassification" if "classification" in words else "CausalLM"
    assert out.startswith(f"LlamaFor{kind}, ")
    assert ("174,528 parameters" in out) == ("--tiny" not in words)
    assert [line.split() for line in out.splitlines()[2:]] == [
        [granularity, where, "equal"]
        for granularity in ("block", "module")
        for where in ("streamed", "resident")
    ]


def test_factored_runs_are_compared_with_each_other(model_folder: Path, capsys: Capture) -> None:
    assert cli.main(["check", str(model_folder), "--device=simulated", "--rank=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:6]] == ["equal"] * 4
    assert lines[6:] == ["made dense in each forward pass: nothing"]


def test_a_difference_is_found_and_located(
    model_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = comparison.offload

    def altered(model: Any, config: Any) -> Any:
        model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 0.5
        return offload(model, config)

    monkeypatch.setattr(comparison, "offload", altered)
    assert cli.main(["check", str(model_folder), "--tiny", "--device=cpu"]) == 1
    said = capsys.readouterr()
    assert said.out.count("first different module: model.layers.1.mlp.down_proj") == 4
    assert "step 0: (" in said.out
    assert said.err.endswith("error: 4 of 4 runs differ from plain forward passes\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seq-len=1", "seq_len must be at least 2, got 1"),
        ("--seq-len=513", "reads at most 512 tokens"),
        ("--kind=seq2seq", "cannot load model "),
        ("--device=tpu", "device must be 'cuda', 'cpu' or 'simulated', got 'tpu'"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    words: str, message: str, model_folder: Path, capsys: Capture
) -> None:
    assert cli.main(["check", str(model_folder), *words.split()]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
