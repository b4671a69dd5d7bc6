"""What setup.py decides: with or without CUDA, for which GPUs, and which options are refused."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module: it builds nothing unless it is run as a program."""
    spec = importlib.util.spec_from_file_location("zo2ext_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(folder: Path, release: str) -> str:
    """Make a CUDA toolkit whose nvcc says that it is of this release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return str(folder)


def test_a_matching_toolkit_lacks_nothing(build: ModuleType, tmp_path: Path) -> None:
    for release in ("13.0", "13.2"):  # minor releases are compatible
        home = toolkit(tmp_path / release, release)
        assert build.missing_for_cuda("2.13.0", "13.0", None, home) is None


def test_what_a_build_with_cuda_lacks_is_named(build: ModuleType, tmp_path: Path) -> None:
    other = toolkit(tmp_path / "cuda-12.8", "12.8")
    bare = tmp_path / "cuda-runtime"
    bare.mkdir()
    for arguments, expected in (
        (("2.13.0+cpu", None, None, other), "torch 2.13.0+cpu has no CUDA"),
        (("2.13.0+rocm7", None, "7.0", None), "torch 2.13.0+rocm7 is for ROCm"),
        (("2.13.0", "13.0", None, None), "no CUDA 13.0 toolkit was found (set CUDA_HOME"),
        (("2.13.0", "13.0", None, str(bare)), f"CUDA_HOME={bare} has no bin/nvcc"),
        (("2.13.0", "13.0", None, other), f"the toolkit in {other} is 12.8"),
    ):
        missing = build.missing_for_cuda(*arguments)
        assert missing is not None
        assert expected in missing
        assert "\n" not in missing


def test_a_gpu_is_never_left_unused_in_silence(build: ModuleType) -> None:
    missing = "no CUDA 13.0 toolkit was found"
    with pytest.raises(SystemExit, match=r"this machine has a GPU, but no CUDA.*ZO2EXT_CUDA=0"):
        build.use_cuda(None, missing, gpu=True)
    assert build.use_cuda(None, missing, gpu=False) == (False, missing)
    assert build.use_cuda("0", missing, gpu=True) == (False, "ZO2EXT_CUDA=0")
    assert build.use_cuda("", None, gpu=True)[0]
    assert build.use_cuda("1", None, gpu=False)[0]
    with pytest.raises(SystemExit, match="ZO2EXT_CUDA is 1, but no CUDA"):
        build.use_cuda("1", missing, gpu=False)
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        build.use_cuda("yes", None, gpu=True)


@pytest.mark.parametrize(
    "flags",
    [
        "--use_fast_math",
        "-O3 -use_fast_math",
        "-ftz=true",
        "--ftz true -O3",
        "--fmad=true",
        "-fmad true",
        "-prec-sqrt=false",
        "--prec-div false",
    ],
)
def test_options_that_change_bits_are_refused(build: ModuleType, flags: str) -> None:
    for name in ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "TORCH_NVCC_FLAGS"):
        with pytest.raises(SystemExit, match=f"{name} has -.*round differently"):
            build.check_nvcc_flags({name: flags})


@pytest.mark.parametrize("flags", ["", "-O3", "--fmad=false", "-ftz=false", "-prec-sqrt=true"])
def test_other_options_pass(build: ModuleType, flags: str) -> None:
    build.check_nvcc_flags({"NVCC_APPEND_FLAGS": flags, "CXXFLAGS": "--use_fast_math"})


def test_architectures_are_those_that_nvcc_knows(build: ModuleType) -> None:
    def codes(known: list[int]) -> list[str]:
        return re.findall(r",code=(\w+)", " ".join(build.default_architectures(known)))

    old = [50, 60, 70, 75, 80, 86, 87, 89, 90]  # CUDA 12.6
    assert codes(old) == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    new = [75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121]  # CUDA 13.0
    turing_to_hopper = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"]
    assert codes(new) == [*turing_to_hopper, "sm_100", "sm_120", "compute_90", "compute_121"]


def test_the_runtime_of_torchs_own_release_is_linked(build: ModuleType, tmp_path: Path) -> None:
    """Another package may bring a CUDA runtime too, and its folder may come first."""
    for name in ("cu13/lib/libcudart.so.13", "cuda_runtime/lib/libcudart.so.12"):
        path = tmp_path / "nvidia" / name
        path.parent.mkdir(parents=True)
        path.touch()
    for major in ("12", "13"):
        found = build.shipped(f"libcudart*.so.{major}*", tmp_path)
        assert found is not None
        assert found.name == f"libcudart.so.{major}"
    assert build.shipped("libcudart*.so.11*", tmp_path) is None
