"""``zo2ext info``: print versions, devices, build and measured rates, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from zo2ext._format import gib
from zo2ext._version import __version__
from zo2ext.commands.arguments import InfoArguments
from zo2ext.ops import _C
from zo2ext.ops.build import cuda_codes, why_not_on_gpu
from zo2ext.ops.formats import TRAINABLE_DTYPES
from zo2ext.planning.rates import measure_rates

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "greenlet")
_EXTRAS = ("matplotlib", "accelerate", "datasets", "peft", "trl", "bitsandbytes", "torchao")


def info(arguments: InfoArguments) -> None:
    """Run ``zo2ext info``."""
    print(f"zo2ext {__version__}, Python {platform.python_version()}, {platform.platform()}")
    versions = {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__}
    print("  " + ", ".join(f"{name} {found}" for name, found in versions.items()))
    print("  extras: " + ", ".join(f"{name} {_version(name)}" for name in _EXTRAS))
    variants = ", ".join(_C.simd_variants())
    print(f"kernels: CPU ({variants}; in use: {_C.simd()})", end="")
    print(f", CUDA ({', '.join(cuda_codes())})" if cuda_codes() else "; built without CUDA")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(torch.device("cuda", index))
        reason = why_not_on_gpu(devices[-1])
        print(
            f"GPU {index}: {properties.name}, {gib(properties.total_memory)}, compute capability "
            f"{properties.major}.{properties.minor}: "
            + ("this build runs on it" if reason is None else f"cannot be used: {reason}")
        )
    if len(devices) == 1:
        print("GPU: none available to torch")
    print(f"CPU: {torch.get_num_threads()} threads")
    for device in devices:
        print(f"  {measure_rates(device, TRAINABLE_DTYPES)}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
