"""Directions as functions of (key, tensor, element)."""

from __future__ import annotations

import torch
from torch import Tensor

from zo2ext._choices import Distribution, Domain
from zo2ext.ops._extension import _C
from zo2ext.ops.launch import (
    DISTRIBUTION_CODES,
    DOMAIN_CODES,
    check_dtype,
    check_integer,
    check_offset,
    code_of,
    launch,
)


def direction_key(seed: int, step: int, direction: int) -> int:
    """Return the key of one direction of one step.

    The key of direction 0 is also the step's rounding key.

    Args:
        seed: Seed of the run, ``0 <= seed < 2**64``.
        step: Index of the step, ``0 <= step < 2**64``.
        direction: Index of the direction within the step, ``0 <= direction < 2**32``.

    Returns:
        64 bits of Philox4x32-10; see docs/contracts.md, "Keys".

    Raises:
        TypeError: An argument is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> key = zo2ext.direction_key(seed=0, step=10, direction=0)
        >>> z = zo2ext.ops.normal(1024, key=key, tensor_id=3)
    """
    return _C.direction_key(
        check_integer("seed", seed, 64),
        check_integer("step", step, 64),
        check_integer("direction", direction, 32),
    )


def normal(
    numel: int,
    *,
    key: int,
    tensor_id: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    domain: Domain = Domain.DIRECTION,
) -> Tensor:
    """Return the standard normal z of consecutive elements of one tensor.

    Args:
        numel: Number of elements, at least 0.
        key: Key of the direction, ``0 <= key < 2**64``; see `direction_key`.
        tensor_id: Id of the tensor, ``0 <= tensor_id < 2**32``.
        offset: Index of the first element within the tensor; a multiple of 4.
        dtype: float32, bfloat16 or float16; z is computed in float32 and rounded to nearest.
        device: CPU or CUDA.
        domain: Domain of the random words: a dense direction, or a factor of one in factors.

    Returns:
        A tensor of shape ``(numel,)``. On CUDA queued on the current stream, not waited for.

    Raises:
        TypeError: There is no kernel for this dtype, or `domain` is not a `Domain`.
        ValueError: An argument is out of range, or ``offset + numel`` exceeds ``2**63 - 1``.

    Source:
        Philox4x32-10, Salmon et al., SC'11; Box and Muller 1958.
    """
    return _noise(numel, key, tensor_id, offset, dtype, device, Distribution.GAUSSIAN, domain)


def rademacher(
    numel: int,
    *,
    key: int,
    tensor_id: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    domain: Domain = Domain.DIRECTION,
) -> Tensor:
    """Return z of +1 or -1, one random bit per element; otherwise the same as `normal`."""
    return _noise(numel, key, tensor_id, offset, dtype, device, Distribution.RADEMACHER, domain)


def _noise(
    numel: int,
    key: int,
    tensor_id: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device | str,
    distribution: Distribution,
    domain: Domain,
) -> Tensor:
    numel = check_integer("numel", numel, 63)
    offset = check_offset(offset)
    if offset + numel >= 2**63:
        raise ValueError(
            f"offset + numel is {offset} + {numel}, past the counter's range, 2**63 - 1"
        )
    key, tensor_id = check_integer("key", key, 64), check_integer("tensor_id", tensor_id, 32)
    check_dtype(dtype)
    out = torch.empty(numel, dtype=dtype, device=device)
    codes = DISTRIBUTION_CODES[distribution], code_of("domain", domain, DOMAIN_CODES)
    launch(_C.noise, out, (out, offset, key, tensor_id, *codes))
    return out
