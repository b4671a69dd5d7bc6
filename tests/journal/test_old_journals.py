"""Journals that zo2ext 0.1.0 wrote are replayed to the same bits: see data/v0.1/make.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import zo2ext
from zo2ext.commands import main as cli
from zo2ext.demo.task import MODEL_DIR
from zo2ext.journal.journal import read_journal

V01 = Path(__file__).parent / "data" / "v0.1"
STEPS = 6


def assert_recorded(weights: Mapping[str, Tensor], name: str) -> None:
    """Compare weights with the hashes that were recorded when the run was made."""
    record = json.loads((V01 / name / "record.json").read_text())
    assert record["zo2ext"] == "0.1.0"
    found = {}
    for key in record["sha256"].keys() & weights.keys():
        content = weights[key].detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[key] = hashlib.sha256(content).hexdigest()
    tied = {"lm_head.weight"}  # is saved once, as the embedding
    assert found.keys() >= record["sha256"].keys() - tied
    assert found == {key: record["sha256"][key] for key in found}


@pytest.mark.parametrize("name", ["text", "trainer"])
def test_export_rebuilds_the_final_weights(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(V01 / name, run)
    where = [str(run), f"--model={MODEL_DIR}", "--device=cpu"]
    assert cli.main(["export", *where, f"--out={tmp_path / 'final'}"]) == 0
    assert_recorded(load_file(tmp_path / "final" / "model.safetensors"), name)
    assert cli.main(["verify", *where, f"--checkpoint={tmp_path / 'final'}"]) == 0
    assert cli.main(["verify", *where, "--step=5", f"--checkpoint={tmp_path / 'final'}"]) == 1


def test_a_loop_continues_from_its_journal(tmp_path: Path) -> None:
    """Weights in bfloat16, rounded stochastically and written back after every fourth step."""
    journal = tmp_path / "loop.zo2"
    shutil.copy(V01 / "loop" / "loop.zo2", journal)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    config = zo2ext.ZOConfig(
        lr=1e-4, seed=7, device="cpu", rounding="stochastic", write_back=4, storage=torch.bfloat16
    )
    with zo2ext.offload(model, config) as zo:
        assert zo.keep_journal(journal) == STEPS
        assert_recorded(model.state_dict(), "loop")
    assert read_journal(journal).next_step == STEPS
