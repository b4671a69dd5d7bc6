"""A GPU that this build cannot use is refused by name, also where no device was asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from tiny_models import tiny

import zo2ext
from zo2ext.commands.main import main
from zo2ext.ops import _C
from zo2ext.ops.build import serves, why_not_on_gpu
from zo2ext.streaming.devices.select import make_device

DEFAULT = "sm_75,sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,compute_90,compute_121"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch that finds a GPU of compute capability 9.0, though this machine may have none."""
    importlib.import_module("zo2ext.integrations.trainer")  # whose imports look for GPUs
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    has_capability(monkeypatch, 9, 0)
    return monkeypatch


def has_capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


@pytest.mark.parametrize("name", [None, "cuda"])
def test_a_build_without_cuda_never_takes_the_cpu_in_silence(
    gpu: pytest.MonkeyPatch, name: str | None
) -> None:
    gpu.setattr(_C, "cuda_codes", "")
    cure = r"without CUDA.*`ZO2EXT_CUDA=1 pip install --no-build-isolation -e \.`.*device='cpu'"
    with pytest.raises(zo2ext.UserError, match=cure):
        make_device(name)
    model = tiny("opt")
    with pytest.raises(zo2ext.UserError, match=cure):
        zo2ext.offload(model, zo2ext.ZOConfig(device=name))
    assert make_device("cpu").torch_device.type == "cpu"
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu")):
        pass


@pytest.mark.parametrize(
    "command",
    ["check", "train --text TEXT --out OUT", "generate --prompt p", "plan", "eval --text TEXT"],
)
def test_no_command_takes_the_cpu_in_silence(
    gpu: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text_file: Path,
    tmp_path: Path,
    command: str,
) -> None:
    gpu.setattr(_C, "cuda_codes", "")
    command = command.replace("TEXT", str(text_file)).replace("OUT", str(tmp_path / "out"))
    name, *options = command.split()
    model = ["zo2ext/demo/model"] if name == "check" else ["--model", "zo2ext/demo/model"]
    assert main([name, *model, *options]) == 1
    assert "but zo2ext was built without CUDA; reinstall it" in capsys.readouterr().err


def test_rocm_is_named(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "7.0")
    with pytest.raises(zo2ext.UserError, match="torch is for ROCm"):
        make_device(None)


def test_a_gpu_that_is_too_old_is_refused_before_the_model_is_touched(
    gpu: pytest.MonkeyPatch,
) -> None:
    gpu.setattr(_C, "cuda_codes", DEFAULT)
    has_capability(gpu, 6, 1)
    model = tiny("opt")
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    too_old = r"Some GPU has compute capability 6\.1, and zo2ext needs 7\.5 or newer"
    with pytest.raises(zo2ext.UserError, match=too_old):
        zo2ext.offload(model)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before


def test_a_gpu_that_was_left_out_of_the_build_is_refused_with_the_cure(
    gpu: pytest.MonkeyPatch,
) -> None:
    gpu.setattr(_C, "cuda_codes", "sm_80")
    with pytest.raises(zo2ext.UserError, match=r"this build has sm_80.*TORCH_CUDA_ARCH_LIST=9\.0"):
        make_device(None)


def test_which_gpus_a_build_serves() -> None:
    everything = DEFAULT.split(",")
    for capability in ((7, 5), (8, 0), (8, 7), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)):
        assert serves(capability, everything), capability
    for capability in ((3, 5), (6, 1), (7, 0), (7, 2)):
        assert not serves(capability, everything), capability
    assert serves((8, 6), ["sm_80"])
    assert not serves((8, 0), ["sm_86"])
    assert not serves((9, 0), ["sm_86"])
    assert serves((9, 0), ["compute_86"])
    assert serves((9, 0), ["sm_90a"])
    assert not serves((10, 0), ["compute_90a"])
    assert not serves((10, 3), ["sm_100a"])
    assert serves((10, 3), ["sm_100f"])
    assert not serves((12, 0), ["compute_100f"])


def test_info_says_whether_this_build_runs_on_each_gpu(
    gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Properties:
        name, total_memory, major, minor = "Some GPU", 2**34, 9, 0

    gpu.setattr(torch.cuda, "device_count", lambda: 1)
    gpu.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    gpu.setattr("zo2ext.commands.info.measure_rates", lambda device, dtypes: device)
    for codes, expected in (
        (DEFAULT, "compute capability 9.0: this build runs on it"),
        ("", "compute capability 9.0: cannot be used: zo2ext was built without CUDA"),
    ):
        gpu.setattr(_C, "cuda_codes", codes)
        assert main(["info"]) == 0
        said = capsys.readouterr().out
        assert expected in said
        assert ", ".join(codes.split(",")) in said


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_this_build_runs_on_this_gpu(device: torch.device) -> None:
    assert why_not_on_gpu(device) is None
