"""Any step's weights from base weights and journal, and checkpoints compared with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import zo2ext
from zo2ext.commands.arguments import ExportArguments, VerifyArguments
from zo2ext.commands.export import export, verify
from zo2ext.commands.main import main

STEPS = 7


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("opt").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def run(base: Path, folder: Path, **config: Any) -> list[dict[str, torch.Tensor]]:
    """A recorded run; the weights after each step, as they are read."""
    model, data = load(base), batches("opt", STEPS)
    settings = zo2ext.ZOConfig(lr=1e-2, device="cpu", **config)
    states = []
    with zo2ext.offload(model, settings) as zo:
        zo.keep_journal(folder / "journal.zo2", run={"model": str(base)})
        for batch in data:
            states.append({n: t.clone() for n, t in model.state_dict().items()})
            zo.step(lambda batch=batch: model(**batch).loss)
            if zo.steps == 4 and config.get("write_back") == 3:
                zo.flush()
        states.append({n: t.clone() for n, t in model.state_dict().items()})
        zo.save_pretrained(folder / "final")
    return states


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"storage": torch.bfloat16, "directions": 2},
        {"storage": "e4m3"},
        {"storage": "split", "write_back": 3},
        {"storage": torch.bfloat16, "write_back": 3, "distribution": "rademacher"},
        {"storage": torch.float16, "write_back": "never", "weight_decay": 0.5},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "fp32",
)
@pytest.mark.parametrize(
    "device", ["cpu", "simulated", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_any_step_is_rebuilt_to_the_bit(
    tmp_path: Path, base: Path, config: dict[str, Any], device: str
) -> None:
    states = run(base, tmp_path / "run", **config)
    for step in (None, 0, 3, 5):
        out = tmp_path / f"step-{step}"
        export(ExportArguments(run=str(tmp_path / "run"), step=step, out=str(out), device=device))
        rebuilt = load(out).state_dict()
        for name, tensor in states[STEPS if step is None else step].items():
            assert_same_bits(rebuilt[name], tensor, f"step {step}: {name}")


def test_a_run_is_verified_and_a_changed_checkpoint_found(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(base, tmp_path / "run", storage=torch.bfloat16)
    final, folder = str(tmp_path / "run" / "final"), str(tmp_path / "run")
    verify(VerifyArguments(run=folder, checkpoint=final))
    assert f"{final} equals the run after 7 steps, bit for bit" in capsys.readouterr().out
    verify(VerifyArguments(run=folder))
    assert "steps    0 to 7, 0 of them skipped" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"tensors of '.*' differ from those of the run after 6 steps"
    ):
        verify(VerifyArguments(run=folder, checkpoint=final, step=6))
    assert "differs in" in capsys.readouterr().out

    model = load(Path(final))
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias[3] += 0.25
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="1 tensors of"):
        verify(VerifyArguments(run=folder, checkpoint=str(tmp_path / "changed")))
    out = capsys.readouterr().out
    assert "model.decoder.layers.0.fc1.bias differs in 1 of 64 elements, by up to 0.25" in out
    tiny("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differ from those of the run"):
        verify(VerifyArguments(run=folder, checkpoint=str(tmp_path / "other")))
    assert "is missing from the checkpoint" in capsys.readouterr().out


def test_what_cannot_be_rebuilt_is_refused(tmp_path: Path, base: Path) -> None:
    run(base, tmp_path / "run")
    folder, out = str(tmp_path / "run"), str(tmp_path / "out")
    tiny("opt", seed=3).save_pretrained(tmp_path / "other")
    for arguments, complaint in (
        (
            {"run": str(tmp_path / "none")},
            "which is neither a journal nor a folder with a journal.zo2",
        ),
        ({"step": 8}, "step must be 0 to 7, the intact steps of .*, got 8"),
        (
            {"model": str(tmp_path / "other")},
            "the run did not begin with model .*: fingerprint was",
        ),
        ({"out": folder}, "which is not empty; name a new folder"),
    ):
        with pytest.raises(ValueError, match=complaint):
            export(ExportArguments(**{"run": folder, "out": out, **arguments}))
        assert not (tmp_path / "out").exists()
    shutil.copy(tmp_path / "run" / "journal.zo2", tmp_path / "alone.zo2")
    export(ExportArguments(run=str(tmp_path / "alone.zo2"), out=out))  # says where its base is


def test_repair_is_asked_for(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(base, tmp_path / "run")
    path = tmp_path / "run" / "journal.zo2"
    data = bytearray(path.read_bytes())
    data[-3 * 64 + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged: at byte .*; its first 4 steps are intact"):
        verify(VerifyArguments(run=str(tmp_path / "run")))
    assert path.read_bytes() == data
    verify(VerifyArguments(run=str(tmp_path / "run"), repair=True))
    assert "steps    0 to 4" in capsys.readouterr().out
    assert (tmp_path / "run" / "journal.zo2.damaged").read_bytes() == data
    verify(VerifyArguments(run=str(tmp_path / "run")))


@pytest.mark.parametrize("named", ["OPTModel", "OldOPTForCausalLM", "AutoTokenizer"])
def test_a_base_whose_config_names_another_class(tmp_path: Path, base: Path, named: str) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [named]}))
    run(base, tmp_path / "run")
    final = str(tmp_path / "run" / "final")
    verify(VerifyArguments(run=str(tmp_path / "run"), checkpoint=final))


def test_the_commands(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(base, tmp_path / "run")
    folder, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["export", folder, "--step", "7", "--out", out, "--device", "cpu"]) == 0
    assert main(["verify", folder, "--checkpoint", out, "--device", "cpu"]) == 0
    assert "equals the run after 7 steps, bit for bit" in capsys.readouterr().out
    assert main(["verify", f"--run={folder}", "--checkpoint", out, "--step", "3"]) == 1
    assert "differ from those of the run after 3 steps" in capsys.readouterr().err
    assert main(["verify"]) == 2
    assert main(["export", "--help"]) == 0
    assert "usage: zo2ext export RUN [OPTIONS]" in capsys.readouterr().out
