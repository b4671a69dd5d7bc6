"""Build zo2ext.ops._C: with CUDA if torch has it and a toolkit is found, otherwise for CPUs only.

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
ARCHITECTURES = ["80", "86", "89", "90"]
# No contraction, so that every compiler rounds as docs/contracts.md says; sqrt as an instruction.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra"] + ["-Werror"] * (os.environ.get("ZO2EXT_WERROR") == "1")


def use_cuda() -> bool:
    """Return whether to build the CUDA kernels, and print why."""
    wanted = os.environ.get("ZO2EXT_CUDA")
    if wanted not in (None, "", "0", "1"):
        raise SystemExit(f"ZO2EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        print("zo2ext: building for CPUs only, because ZO2EXT_CUDA=0")
        return False
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} has no CUDA"
    elif CUDA_HOME is None:
        missing = "no CUDA toolkit was found (set CUDA_HOME, or put nvcc on the PATH)"
    elif (toolkit := nvcc("--version", r"release (\d+)")[0]) != torch.version.cuda.split(".")[0]:
        missing = f"torch is for CUDA {torch.version.cuda}, the toolkit in {CUDA_HOME} is {toolkit}"
    else:
        print(f"zo2ext: building with CUDA {torch.version.cuda}, toolkit in {CUDA_HOME}")
        return True
    if wanted == "1":
        raise SystemExit(f"ZO2EXT_CUDA=1, but {missing}")
    print(f"zo2ext: building for CPUs only, because {missing}")
    return False


def nvcc(option: str, pattern: str) -> list[str]:
    """Return the matches of `pattern` in nvcc's output for `option`."""
    command = [str(Path(CUDA_HOME) / "bin" / "nvcc"), option]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(pattern, answer)


def architecture_flags() -> list[str]:
    """Return flags for machine code of ARCHITECTURES, and for PTX that later GPUs can compile.

    GPUs from the newest architecture that nvcc knows use that one's PTX; those in between use the
    PTX of the last entry of ARCHITECTURES.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # torch makes the flags
    newest = max(nvcc("--list-gpu-arch", r"compute_(\d+)\b"), key=int)
    made = [(n, f"sm_{n}") for n in ARCHITECTURES]
    made += [(n, f"compute_{n}") for n in (ARCHITECTURES[-1], newest)]
    return [f"-gencode=arch=compute_{n},code={code}" for n, code in made]


def shipped(name: str) -> Path | None:
    """Return the path of a shared library that torch brings, so that a process loads it once."""
    library = Path(torch.__file__).parent
    folders = [library / "lib", library.parent / "torch.libs"]
    folders += sorted(library.parent.glob("nvidia/*/lib"))
    return next((path for folder in folders for path in sorted(folder.glob(f"{name}*.so*"))), None)


def openmp() -> tuple[list[str], list[str]]:
    """Return compile and link flags that let parallel loops run in torch's own thread pool.

    A second OpenMP runtime in the process would have a second pool.
    """
    library = shipped("libgomp")
    return ["-fopenmp"], ["-fopenmp" if library is None else str(library)]


def link_runtime(built: Extension) -> None:
    """Link the CUDA runtime that comes with torch, if any: a toolkit may have another, or none."""
    library = shipped("libcudart")
    if library is not None and "cudart" in built.libraries:
        built.libraries.remove("cudart")
        built.extra_link_args.append(str(library))


def extension() -> Extension:
    sources = _relative("csrc/bindings/*.cpp") + _relative("csrc/cpu/*.cpp")
    compile_openmp, link_openmp = openmp()
    flags = {"cxx": ["-O3", "-g0", *ARITHMETIC, *WARNINGS, *compile_openmp]}
    macros: list[tuple[str, str | None]] = []
    kind = CppExtension
    if use_cuda():
        kind = CUDAExtension
        sources += _relative("csrc/cuda/*.cu")
        macros = [("ZO2EXT_WITH_CUDA", None)]
        flags["nvcc"] = ["-O3", "--fmad=false", "-Xcompiler=-Wall,-Wextra", *architecture_flags()]
        if "-Werror" in WARNINGS:
            flags["nvcc"] += ["-Werror=all-warnings"]
    built = kind(
        "zo2ext.ops._C",
        sources,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link_openmp,
    )
    link_runtime(built)
    # No warnings about torch's headers; CUDA sources include none of them.
    flags["cxx"] += [word for path in built.include_dirs for word in ("-isystem", path)]
    built.include_dirs = []
    # setuptools rebuilds when one of these changes; ninja follows the includes.
    built.depends = _relative("csrc/**/*.h") + _relative("csrc/cuda/*.cu")
    return built


def _relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
