"""Convert float32 weights to the storage formats and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo2ext._choices import Rounding
from zo2ext.ops._extension import _C
from zo2ext.ops.launch import (
    ROUNDING_CODES,
    check_dtype,
    check_integer,
    check_offset,
    code_of,
    launch,
)

GROUP = 32
"""Number of consecutive elements of a tensor that share a scale."""

_SCALED = torch.float8_e4m3fn
_SCALE = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Packed:
    """Weights in a format whose elements share scales; see docs/contracts.md, "Formats".

    Attributes:
        stored: Elements, float8_e4m3fn; in the split format, their top plane.
        scales: A power of two for each 32 elements of the flattened `stored`: shape
            ``(ceil(numel / 32),)``, float8_e8m0fnu. If it is NaN, so are these 32 weights.
        low: Low plane of the split format, of the shape of `stored`, uint8. None in e4m3.
    """

    stored: Tensor
    scales: Tensor
    low: Tensor | None = None


def pack(
    weights: Tensor,
    dtype: torch.dtype,
    *,
    rounding: Rounding = Rounding.NEAREST,
    key: int = 0,
    tensor_id: int = 0,
    offset: int = 0,
) -> Tensor:
    """Round float32 weights to a storage dtype.

    Args:
        weights: float32, any shape, contiguous; CPU or CUDA.
        dtype: float32, bfloat16 or float16.
        rounding: Rounding mode; `Rounding.NEAREST` is what ``Tensor.to`` does.
        key: Key of the random bits of stochastic rounding.
        tensor_id: Id of the tensor, as in `normal`.
        offset: Element index of ``weights[0]``, as in `normal`.

    Returns:
        A new tensor of the same shape. On CUDA queued on the current stream, not waited for.

    Raises:
        TypeError: `weights` is not float32, or there is no format for `dtype`.
        ValueError: `weights` is not contiguous, or an argument is out of range.
    """
    if dtype == _SCALED:
        raise TypeError(f"{dtype} has scales: use pack_scaled")
    check_dtype(dtype)
    packed = torch.empty(weights.shape, dtype=dtype, device=weights.device)
    _pack(weights, packed, None, None, rounding, key, tensor_id, offset)
    return packed


def pack_scaled(
    weights: Tensor,
    *,
    split: bool = False,
    rounding: Rounding = Rounding.NEAREST,
    key: int = 0,
    tensor_id: int = 0,
    offset: int = 0,
) -> Packed:
    """Round float32 weights to e4m3 or, in two planes, to the split format.

    Args:
        weights: float32, any shape, contiguous; CPU or CUDA.
        split: Whether to add a low plane with eight more bits of mantissa.
        rounding: Rounding mode. The scales are chosen so that no finite weight overflows.
        key: Key of the random bits of stochastic rounding.
        tensor_id: Id of the tensor, as in `normal`.
        offset: Element index of ``weights[0]``, a multiple of 32.

    Returns:
        New tensors. On CUDA queued on the current stream, not waited for.

    Raises:
        TypeError: `weights` is not float32.
        ValueError: `weights` is not contiguous, or an argument is out of range.
    """
    stored = torch.empty(weights.shape, dtype=_SCALED, device=weights.device)
    groups = -(-weights.numel() // GROUP)
    scales = torch.empty(groups, dtype=_SCALE, device=weights.device)
    low = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device) if split else None
    _pack(weights, stored, scales, low, rounding, key, tensor_id, offset)
    return Packed(stored, scales, low)


def unpack(packed: Tensor) -> Tensor:
    """Convert weights of any storage dtype to float32, exactly.

    Args:
        packed: float32, bfloat16 or float16, any shape, contiguous; CPU or CUDA.

    Returns:
        A new float32 tensor of the same shape. On CUDA queued on the current stream, not waited
        for.

    Raises:
        TypeError: There is no format for this dtype.
        ValueError: `packed` is not contiguous.
    """
    if packed.dtype == _SCALED:
        raise TypeError(f"packed of {packed.dtype} has scales: use unpack_scaled")
    weights = torch.empty(packed.shape, dtype=torch.float32, device=packed.device)
    launch(_C.unpack, packed, (packed, None, None, weights))
    return weights


def unpack_scaled(packed: Packed) -> Tensor:
    """Convert weights that share scales to float32, exactly.

    Args:
        packed: Result of `pack_scaled`. Without the low plane, a top plane is read as e4m3.

    Returns:
        A new float32 tensor of the shape of ``packed.stored``, infinite where a scaled weight is
        beyond float32. On CUDA queued on the current stream, not waited for.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A tensor is not contiguous, or has the wrong size or device.
    """
    stored = packed.stored
    if stored.dtype != _SCALED:
        raise TypeError(f"packed.stored must be float8_e4m3fn, got {stored.dtype}")
    weights = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
    low = None if packed.low is None else packed.low.reshape(-1)
    launch(_C.unpack, stored, (stored, scale_bytes(packed.scales), low, weights))
    return weights


def _pack(
    weights: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    low: Tensor | None,
    rounding: Rounding,
    key: int,
    tensor_id: int,
    offset: int,
) -> None:
    code = code_of("rounding", rounding, ROUNDING_CODES)
    key, tensor_id = check_integer("key", key, 64), check_integer("tensor_id", tensor_id, 32)
    flat = None if low is None else low.view(-1)
    planes = (packed, scale_bytes(scales), flat)
    launch(_C.pack, weights, (weights, *planes, check_offset(offset), code, key, tensor_id))


def scale_bytes(scales: Tensor | None) -> Tensor | None:
    """Return scales as the bytes that kernels expect."""
    if scales is None:
        return None
    if scales.dtype != _SCALE:
        raise TypeError(f"scales must be float8_e8m0fnu, got {scales.dtype}")
    return scales.view(torch.uint8)
