"""Comparisons that say where and by how much: bit for bit, and in units in the last place."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Any) -> tuple[npt.NDArray[Any], str, bool]:
    """Bits as signed integers of the element's size, the dtype's name, and whether it floats."""
    if isinstance(x, Tensor):
        x = x.detach().cpu().contiguous()
        name = str(x.dtype).removeprefix("torch.")
        return x.view(_INTEGER[x.element_size()]).numpy(), name, x.dtype.is_floating_point
    x = np.asarray(x, order="C")
    return x.view(_SIGNED[x.itemsize]), x.dtype.name, x.dtype.kind == "f"


def _values(x: Any) -> npt.NDArray[Any]:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return np.asarray((x.double() if x.dtype.is_floating_point else x).numpy())
    return np.asarray(x)


def _compared(actual: Any, expected: Any, what: str) -> tuple[npt.NDArray[Any], ...]:
    """Bits of both, after their dtypes and shapes have been compared."""
    (a, a_type, _), (b, b_type, _) = _bits(actual), _bits(expected)
    if a_type != b_type:
        raise AssertionError(f"{what}: dtype {a_type}, expected {b_type}")
    if a.shape != b.shape:
        raise AssertionError(f"{what}: shape {a.shape}, expected {b.shape}")
    return a, b


def ulp_distance(a: Any, b: Any) -> npt.NDArray[np.uint64]:
    """How many representable numbers lie between, elementwise; the two zeros are one number.

    Two NaNs are at distance 0, a NaN and anything else at 2^64 - 1.

    Args:
        a: Tensor, array or number of a floating-point dtype.
        b: The same dtype and shape.
    """
    a_bits, b_bits = _compared(a, b, "ulp_distance")
    if not _bits(a)[2]:
        raise TypeError(f"ulp_distance needs floating-point numbers, got {_bits(a)[1]}")
    lowest = np.iinfo(a_bits.dtype).min

    def order(bits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        magnitude = (bits & ~lowest).astype(np.int64)
        return np.asarray(np.where(bits < 0, -magnitude, magnitude))

    x, y = order(a_bits), order(b_bits)
    # Modulo 2^64 the difference is right even for float64, where int64 would overflow.
    with np.errstate(over="ignore"):
        distance = np.maximum(x, y).astype(np.uint64) - np.minimum(x, y).astype(np.uint64)
    a_nan, b_nan = np.isnan(_values(a)), np.isnan(_values(b))
    distance = np.where(a_nan & b_nan, np.uint64(0), distance)
    return np.asarray(np.where(a_nan ^ b_nan, np.uint64(2**64 - 1), distance))


def _element(actual: Any, expected: Any, at: tuple[Any, ...]) -> str:
    parts = []
    for x in (actual, expected):
        bits = _bits(x)[0]
        unsigned = int(bits[at]) & (1 << 8 * bits.itemsize) - 1
        parts.append(f"0x{unsigned:0{2 * bits.itemsize}x} ({_values(x)[at]!s})")
    where = "[" + ", ".join(str(int(i)) for i in at) + "]"
    return f"{where}: {parts[0]}, expected {parts[1]}"


def _report(actual: Any, expected: Any, wrong: npt.NDArray[np.bool_], what: str) -> str:
    count = int(wrong.sum())
    first = tuple(np.argwhere(wrong)[0])
    text = f"{what}: {count} of {wrong.size} elements differ; first at "
    text += _element(actual, expected, first)
    if _bits(actual)[2]:
        distance = np.where(wrong, ulp_distance(actual, expected), np.uint64(0))
        worst = np.unravel_index(int(distance.argmax()), wrong.shape)
        text += f", {int(distance[first])} ulp"
        if worst != first:
            text += f"; worst at {_element(actual, expected, worst)}, {int(distance[worst])} ulp"
    return text


def assert_same_bits(actual: Any, expected: Any, what: str = "values") -> None:
    """Same dtype, same shape, same bits: -0 is not 0, and a NaN equals only its own bits.

    Args:
        actual: Tensor on any device, NumPy array, number, or nested sequence of numbers.
        expected: The same kind of thing, to the dtype.
        what: What is compared; the message begins with it.
    """
    a, b = _compared(actual, expected, what)
    wrong = a != b
    if wrong.any():
        raise AssertionError(_report(actual, expected, np.asarray(wrong), what))


def assert_within_ulps(actual: Any, expected: Any, ulps: int, what: str = "values") -> None:
    """Same dtype and shape, and nowhere further apart than `ulps`; NaN only where NaN is due."""
    _compared(actual, expected, what)
    wrong = np.asarray(ulp_distance(actual, expected) > np.uint64(ulps))
    if wrong.any():
        raise AssertionError(_report(actual, expected, wrong, f"{what} (within {ulps} ulp)"))
