"""Build zo2ext.ops._C: with CUDA if torch has it and its toolkit is found, otherwise for CPUs only.

A machine with a GPU whose toolkit is missing or does not match is an error, unless ZO2EXT_CUDA=0
asks for a build without CUDA: such a build would train on the CPU.

ZO2EXT_CUDA=0 or 1 forces either. TORCH_CUDA_ARCH_LIST replaces the default architectures, as for
any extension of torch. ZO2EXT_WERROR=1 turns compiler warnings into errors.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# 86 and 89 could run the machine code of 80, but have other limits on registers and blocks.
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
# No contraction, so that every compiler rounds as docs/contracts.md says; sqrt as an instruction.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra"] + ["-Werror"] * (os.environ.get("ZO2EXT_WERROR") == "1")
CHANGES_ARITHMETIC = re.compile(
    r"(?<!\S)--?(use_fast_math|(ftz|fmad)(=|\s+)true|prec-(sqrt|div)(=|\s+)false)(?!\S)"
)


# -- with or without CUDA


def missing_for_cuda(
    torch_version: str, cuda: str | None, hip: str | None, home: str | None
) -> str | None:
    """Return what a build with CUDA lacks, or None.

    Args:
        torch_version: Version of the installed torch.
        cuda: CUDA release that torch was built for, such as "13.0".
        hip: ROCm release that torch was built for.
        home: Folder of the CUDA toolkit.
    """
    if hip is not None:
        return f"torch {torch_version} is for ROCm, for which zo2ext has no kernels"
    if cuda is None:
        return f"torch {torch_version} has no CUDA"
    if home is None:
        return f"no CUDA {cuda} toolkit was found (set CUDA_HOME, or put nvcc on the PATH)"
    if not (Path(home) / "bin" / "nvcc").is_file():
        return f"CUDA_HOME={home} has no bin/nvcc (images for running programs have no compiler)"
    release = re.search(r"release (\d+)\.(\d+)", nvcc(home, "--version"))
    if release is None:
        return f"{home}/bin/nvcc --version names no release"
    if release[1] != cuda.split(".")[0]:
        return (
            f"torch {torch_version} is for CUDA {cuda}, but the toolkit in {home} is "
            f"{release[1]}.{release[2]} (without --no-build-isolation, pip builds against a torch "
            "of its own)"
        )
    return None


def use_cuda(wanted: str | None, missing: str | None, *, gpu: bool) -> tuple[bool, str]:
    """Return whether to build the CUDA kernels, and why.

    Args:
        wanted: ZO2EXT_CUDA.
        missing: Name of the thing that a build with CUDA lacks, or None.
        gpu: Whether torch is built for GPUs and this machine has one.

    Raises:
        SystemExit: The build cannot be what was asked for, or a GPU would be left unused.
    """
    if wanted not in (None, "", "0", "1"):
        raise SystemExit(f"zo2ext: ZO2EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return False, "ZO2EXT_CUDA=0"
    if missing is None:
        return True, "torch has it and its toolkit was found"
    if wanted == "1":
        raise SystemExit(f"zo2ext: ZO2EXT_CUDA is 1, but {missing}")
    if gpu:
        raise SystemExit(
            f"zo2ext: this machine has a GPU, but {missing}; install what is missing, or set "
            "ZO2EXT_CUDA=0 to build zo2ext for the CPU only"
        )
    return False, missing


def has_gpu() -> bool:
    """Return whether torch is built for GPUs and one is visible, to torch or as a device file."""
    if torch.version.cuda is None and torch.version.hip is None:
        return False
    return torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*"))


def check_nvcc_flags(environment: Mapping[str, str]) -> None:
    """Refuse options of nvcc from the environment that would change the bits of a run.

    Raises:
        SystemExit: A variable has such an option.
    """
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "TORCH_NVCC_FLAGS"):
        found = CHANGES_ARITHMETIC.search(environment.get(name, ""))
        if found:
            raise SystemExit(
                f"zo2ext: {name} has {found[0]}, with which GPUs would round differently from "
                f"docs/contracts.md; build without it: {name}= pip install ..."
            )


# -- how


def nvcc(home: str, option: str) -> str:
    """Return what the nvcc of the toolkit in `home` prints for `option`."""
    command = [str(Path(home) / "bin" / "nvcc"), option]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def default_architectures(known: Iterable[int]) -> list[str]:
    """Return flags for machine code of ARCHITECTURES, and for PTX that other GPUs can compile.

    GPUs from the newest architecture that nvcc knows use that one's PTX; those in between use the
    PTX of compute_90.

    Args:
        known: Architectures that nvcc knows. Those that it does not know are left out.
    """
    known = sorted(known)
    made = [(n, f"sm_{n}") for n in ARCHITECTURES if n in known]
    made += [(n, f"compute_{n}") for n in sorted({90, known[-1]})]
    return [f"-gencode=arch=compute_{n},code={code}" for n, code in made]


def architecture_flags() -> list[str]:
    """Return flags for the architectures of TORCH_CUDA_ARCH_LIST, or for the default ones."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return cpp_extension._get_cuda_arch_flags()
    known = re.findall(r"compute_(\d+)\b", nvcc(cpp_extension.CUDA_HOME, "--list-gpu-arch"))
    return default_architectures(map(int, known))


def shipped(pattern: str, site: Path = Path(torch.__file__).parents[1]) -> Path | None:
    """Return the path of a shared library that torch brings, so that a process loads it once.

    Args:
        pattern: Pattern of the file's name, with the version if packages may bring several.
        site: Folder that torch is installed in.
    """
    folders = [site / "torch" / "lib", site / "torch.libs", *sorted(site.glob("nvidia/*/lib"))]
    return next((path for folder in folders for path in sorted(folder.glob(pattern))), None)


def openmp() -> tuple[list[str], list[str]]:
    """Return compile and link flags that let parallel loops run in torch's own thread pool.

    A second OpenMP runtime in the process would have a second pool.
    """
    library = shipped("libgomp*.so*")
    return ["-fopenmp"], ["-fopenmp" if library is None else str(library)]


def link_runtime(built: Extension) -> None:
    """Link the CUDA runtime that comes with torch, if any: a toolkit may have another, or none."""
    if "cudart" not in built.libraries:
        return
    library = shipped(f"libcudart*.so.{torch.version.cuda.split('.')[0]}*")
    if library is not None:
        built.libraries.remove("cudart")
        built.extra_link_args.append(str(library))


def extension() -> Extension:
    """Return the extension as this machine can build it."""
    sources = _relative("csrc/bindings/*.cpp") + _relative("csrc/cpu/*.cpp")
    compile_openmp, link_openmp = openmp()
    flags = {"cxx": ["-O3", "-g0", *ARITHMETIC, *WARNINGS, *compile_openmp]}
    macros: list[tuple[str, str | None]] = []
    kind = cpp_extension.CppExtension
    home, version = cpp_extension.CUDA_HOME, torch.version
    missing = missing_for_cuda(torch.__version__, version.cuda, version.hip, home)
    with_cuda, reason = use_cuda(os.environ.get("ZO2EXT_CUDA"), missing, gpu=has_gpu())
    if with_cuda:
        print(f"zo2ext: building with CUDA {version.cuda}, toolkit in {home}")
        check_nvcc_flags(os.environ)
        kind = cpp_extension.CUDAExtension
        sources += _relative("csrc/cuda/*.cu")
        architectures = architecture_flags()
        codes = re.findall(r",code=(\w+)", " ".join(architectures))
        macros = [("ZO2EXT_CUDA_CODES", ",".join(codes))]
        flags["nvcc"] = ["-O3", "--fmad=false", "-Xcompiler=-Wall,-Wextra", "--threads=0"]
        flags["nvcc"] += architectures
        if "-Werror" in WARNINGS:
            flags["nvcc"] += ["-Werror=all-warnings"]
    else:
        print(f"zo2ext: building for CPUs only, because {reason}")
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


if __name__ == "__main__":
    setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
