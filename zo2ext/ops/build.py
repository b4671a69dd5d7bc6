"""Which GPUs this build of the kernels runs on."""

from __future__ import annotations

import re

import torch

from zo2ext.ops._extension import _C, INSTALL

OLDEST = (7, 5)  # compute capability


def cuda_built() -> bool:
    """Return whether this build has the CUDA kernels."""
    return bool(_C.cuda_codes)


def cuda_codes() -> list[str]:
    """Return what this build has for GPUs: machine code ("sm_90"), and PTX ("compute_120")."""
    return _C.cuda_codes.split(",") if _C.cuda_codes else []


def serves(capability: tuple[int, int], codes: list[str]) -> bool:
    """Return whether a GPU of this compute capability runs a build that has these codes.

    Machine code runs on later GPUs of its major version, PTX on all later ones; a letter behind the
    number limits either.
    """
    for code in codes:
        number, letter = re.findall(r"_(\d+)([af]?)$", code)[0]
        built = divmod(int(number), 10)
        same_major = built[0] == capability[0]
        anywhere = code.startswith("compute") and not letter
        if built == capability or (
            letter != "a" and built < capability and (same_major or anywhere)
        ):
            return True
    return False


def why_not_on_gpu(device: torch.device) -> str | None:
    """Return why the kernels cannot run on this GPU and what to do about it; None if they can."""
    if torch.version.hip is not None:
        return "torch is for ROCm, for which zo2ext has no kernels; use device='cpu'"
    if not cuda_built():
        return (
            "zo2ext was built without CUDA; reinstall it in the clone with the CUDA "
            f"{torch.version.cuda} toolkit: `ZO2EXT_CUDA=1 {INSTALL}`, or use device='cpu'"
        )
    capability = torch.cuda.get_device_capability(device)
    if serves(capability, cuda_codes()):
        return None
    version = ".".join(map(str, capability))
    found = f"{torch.cuda.get_device_name(device)} has compute capability {version}"
    if capability < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"{found}, and zo2ext needs {oldest} or newer; use device='cpu'"
    return (
        f"{found}, and this build has {', '.join(cuda_codes())}; reinstall it in the clone: "
        f"`ZO2EXT_CUDA=1 TORCH_CUDA_ARCH_LIST={version} {INSTALL}`, or use device='cpu'"
    )
