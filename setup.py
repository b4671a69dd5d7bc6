"""Builds zo2ext._C: with CUDA where torch has CUDA and a toolkit is found, otherwise for CPUs only.

ZO2EXT_CUDA=0 or 1 forces either. TORCH_CUDA_ARCH_LIST replaces the default architectures.
ZO2EXT_WERROR=1 turns compiler warnings into errors.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;8.6;8.9;9.0"
# No contraction, so that every compiler rounds as docs/contracts.md says; sqrt as an instruction.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra"] + ["-Werror"] * (os.environ.get("ZO2EXT_WERROR") == "1")


def use_cuda() -> bool:
    """Whether to build the CUDA kernels; says why."""
    wanted = os.environ.get("ZO2EXT_CUDA")
    if wanted not in (None, "", "0", "1"):
        raise SystemExit(f"ZO2EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        print("zo2ext: building for CPUs only, because ZO2EXT_CUDA=0")
        return False
    if torch.version.cuda is None:
        lacking = f"torch {torch.__version__} has no CUDA"
    elif CUDA_HOME is None:
        lacking = "no CUDA toolkit was found (set CUDA_HOME, or put nvcc on the PATH)"
    else:
        print(f"zo2ext: building with CUDA, torch for {torch.version.cuda}, toolkit in {CUDA_HOME}")
        return True
    if wanted == "1":
        raise SystemExit(f"ZO2EXT_CUDA=1, but {lacking}")
    print(f"zo2ext: building for CPUs only, because {lacking}")
    return False


def newest_architecture() -> str:
    """The newest virtual architecture that nvcc knows, such as "12.1"."""
    nvcc = str(Path(CUDA_HOME or "") / "bin" / "nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    newest = max(int(n) for n in re.findall(r"compute_(\d+)\b", listed.stdout))
    return f"{newest // 10}.{newest % 10}"


def openmp() -> tuple[list[str], list[str]]:
    """Flags to compile and to link, so that parallel loops run in torch's own thread pool.

    A second OpenMP runtime in the process would bring a pool of its own; the runtime that torch
    ships is therefore named, where it ships one.
    """
    library = Path(torch.__file__).parent
    for folder in (library / "lib", library.parent / "torch.libs"):
        for path in sorted(folder.glob("libgomp*.so*")):
            return ["-fopenmp"], [str(path)]
    return ["-fopenmp"], ["-fopenmp"]


def extension() -> Extension:
    sources = ["csrc/bindings.cpp", *_relative("csrc/cpu/*.cpp")]
    compile_openmp, link_openmp = openmp()
    flags = {"cxx": ["-O3", "-g0", *ARITHMETIC, *WARNINGS, *compile_openmp]}
    options = {"define_macros": [], "extra_link_args": link_openmp}
    kind = CppExtension
    if use_cuda():
        kind = CUDAExtension
        sources += _relative("csrc/cuda/*.cu")
        options["define_macros"] = [("ZO2EXT_WITH_CUDA", None)]
        flags["nvcc"] = ["-O3", "--fmad=false", "-lineinfo", "--expt-relaxed-constexpr"]
        if "-Werror" in WARNINGS:
            flags["nvcc"] += ["-Werror", "all-warnings"]
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = f"{ARCHITECTURES};{newest_architecture()}+PTX"
    built = kind("zo2ext._C", sources, extra_compile_args=flags, **options)
    # torch's headers are not ours to warn about.
    for flag in flags.values():
        flag += [f"-isystem{path}" for path in built.include_dirs]
    built.include_dirs = []
    # setuptools rebuilds when one of these changes; ninja follows the includes.
    built.depends = _relative("csrc/*.h") + _relative("csrc/cpu/*.h") + _relative("csrc/cuda/*")
    return built


def _relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
