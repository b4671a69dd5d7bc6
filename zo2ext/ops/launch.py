"""Check arguments, and call kernels on the right stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from operator import index
from typing import Any, TypeVar

import torch
from torch import Tensor

from zo2ext._choices import Distribution, Domain, Rounding
from zo2ext.ops._extension import _C

_T = TypeVar("_T")
FLOAT32_MAX = float.fromhex("0x1.fffffep127")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


DISTRIBUTION_CODES = {
    Distribution.GAUSSIAN: _C.Distribution.GAUSSIAN,
    Distribution.RADEMACHER: _C.Distribution.RADEMACHER,
}
DOMAIN_CODES = {
    Domain.DIRECTION: _C.Domain.DIRECTION,
    Domain.LEFT: _C.Domain.LEFT,
    Domain.RIGHT: _C.Domain.RIGHT,
}
ROUNDING_CODES = {
    Rounding.NEAREST: _C.Rounding.NEAREST,
    Rounding.STOCHASTIC: _C.Rounding.STOCHASTIC,
}


def launch(kernel: Callable[..., None], tensor: Tensor, arguments: tuple[Any, ...]) -> None:
    """Call `kernel` with `arguments` and the current stream of the tensor's device."""
    if not tensor.is_cuda:
        kernel(*arguments, 0)
        return
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    if tensor.device.index == torch.cuda.current_device():
        kernel(*arguments, stream)
        return
    with torch.cuda.device(tensor.device):
        kernel(*arguments, stream)


def clear_cuda_error() -> None:
    """Forget the error of this thread's last call of the CUDA runtime, if it failed."""
    _C.clear_cuda_error()


def check_integer(name: str, value: int, bits: int) -> int:
    try:
        value = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be in [0, 2**{bits}), got {value}")
    return value


def check_offset(value: int, name: str = "offset") -> int:
    value = check_integer(name, value, 63)
    if value % 4:
        raise ValueError(f"{name} must be a multiple of 4, got {value}")
    return value


def check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_float32(name: str, value: float) -> float:
    """Return `value` if it is finite in float32; the kernel rounds it."""
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite float32, got {value}")
    return value


def code_of(name: str, value: Enum | None, codes: dict[Any, _T]) -> _T:
    code = codes.get(value)
    if code is None:
        kind = type(next(iter(codes))).__name__
        raise TypeError(f"{name} must be a {kind}, got {value!r}")
    return code


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
