"""The kernels, one typed function each: noise, perturbation, update, and all of them in one pass.

They stand alone: a whole MeZO loop for a resident model is twenty lines of them
(``examples/mezo_loop.py``). z, the direction, is never stored: it is a pure function of
``(key, tensor_id, element)`` with the same bits on every CPU and GPU, whatever the threads, slices
and order (docs/contracts.md, "Noise, version 1").

Weights are float32, bfloat16 or float16, on the CPU or a CUDA device; arithmetic is float32. Stored
weights may also have 8 bits and share scales, or have 16 bits in two planes (`Packed`). CPU work
runs in torch's thread pool and is done on return. CUDA work is queued on the current stream of the
tensors' device and not waited for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from operator import index
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zo2ext import _C

__all__ = [
    "GROUP",
    "Direction",
    "Distribution",
    "Packed",
    "Rounding",
    "Segment",
    "Update",
    "cuda_built",
    "direction_key",
    "normal",
    "pack",
    "pack_scaled",
    "perturb_",
    "rademacher",
    "segment_table",
    "unpack",
    "unpack_scaled",
    "update_",
    "update_perturb",
    "update_table",
]

GROUP = 32
"""Consecutive elements of a tensor that share a scale."""

_T = TypeVar("_T")
_FLOAT32_MAX = float.fromhex("0x1.fffffep127")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCALED = torch.float8_e4m3fn
_SCALE = torch.float8_e8m0fnu
_SEGMENT_ROW = struct.Struct("=qqqII")
_UPDATE_ROW = struct.Struct("=QffQiI")
_CHECKED = "_zo2ext_checked"  # attribute of a segment table: a _Checked


class _Checked(NamedTuple):
    """What is known of the rows of a segment table, which a GPU keeps to itself."""

    end: int
    """Of the last segment."""
    grouped: bool
    """Whether all offsets are multiples of GROUP."""


class Distribution(StrEnum):
    """Of the direction z."""

    GAUSSIAN = "gaussian"
    """Standard normal, ``|z| <= 5.77``."""
    RADEMACHER = "rademacher"
    """+1 or -1, one random bit an element."""


class Rounding(StrEnum):
    """Of float32 to a storage dtype; float32 itself is never rounded."""

    NEAREST = "nearest"
    """Ties to even."""
    STOCHASTIC = "stochastic"
    """Up or down with the odds of the distances, so that small updates survive on average."""


_DISTRIBUTIONS = {
    Distribution.GAUSSIAN: _C.Distribution.GAUSSIAN,
    Distribution.RADEMACHER: _C.Distribution.RADEMACHER,
}
_ROUNDINGS = {
    Rounding.NEAREST: _C.Rounding.NEAREST,
    Rounding.STOCHASTIC: _C.Rounding.STOCHASTIC,
}


_ROUND_FIRST = {Rounding.NEAREST: 1, Rounding.STOCHASTIC: 2, None: 0}  # as kernels.h has them


@dataclass(frozen=True)
class Segment:
    """One tensor, or a slice of one, in a slab."""

    begin: int
    """Its first element in the slab; a multiple of 128."""
    numel: int
    """Elements."""
    tensor_id: int
    """Position in ``named_parameters()``, tied weights counted once."""
    decays: bool = True
    """Whether weight decay applies."""
    offset: int = 0
    """Index of its first element within the tensor; a multiple of 4, and of 32 in float8."""


@dataclass(frozen=True)
class Update:
    """A pending update: ``w <- w * decay - coefficient * z``, ``decay`` where segments decay."""

    key: int
    """Of the direction."""
    coefficient: float
    """``lr * projected_grad / directions``; rounded to float32."""
    decay: float = 1.0
    """``1 - lr * weight_decay``, and 1 after the first direction of a step; rounded to float32."""
    round_first: Rounding | None = None
    """How the weights are rounded to storage before this update: a write-back was due there."""
    rounding_key: int = 0
    """Of that rounding, where it is stochastic, ``0 <= rounding_key < 2**64``."""


@dataclass(frozen=True)
class Packed:
    """Weights in a format whose elements share scales; see docs/contracts.md, "Formats"."""

    stored: Tensor
    """float8_e4m3fn; in the split format, the top plane."""
    scales: Tensor
    """Shape (ceil(numel / 32),), float8_e8m0fnu: a power of two for each 32 elements of `stored`,
    flattened. Under a NaN every weight is NaN."""
    low: Tensor | None = None
    """The shape of `stored`, uint8: the low plane of the split format, None of the others."""


class Direction(NamedTuple):
    """A direction to perturb along, and where the perturbed weights go."""

    key: int
    """Of the direction."""
    eps: float
    """Perturbation scale, in the weights' own units; positive."""
    plus: Tensor | None = None
    """Receives ``w + eps * z``: shape (numel,) of the slab, compute dtype."""
    minus: Tensor | None = None
    """Receives ``w - eps * z``: the same."""


def cuda_built() -> bool:
    """Whether this build has the CUDA kernels."""
    return _C.cuda_built


def direction_key(seed: int, step: int, direction: int) -> int:
    """The key of one direction of one step; that of direction 0 is also the step's rounding key.

    Args:
        seed: Of the run, ``0 <= seed < 2**64``.
        step: Counted from 0, ``0 <= step < 2**64``.
        direction: Counted from 0 within the step, ``0 <= direction < 2**32``.

    Returns:
        64 bits of Philox4x32-10; see docs/contracts.md, "Keys".

    Raises:
        TypeError: An argument is not an integer.
        ValueError: An argument is out of range.
    """
    return _C.direction_key(
        _integer("seed", seed, 64), _integer("step", step, 64), _integer("direction", direction, 32)
    )


def normal(
    numel: int,
    *,
    key: int,
    tensor_id: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal z of elements ``offset`` to ``offset + numel - 1`` of one tensor.

    Args:
        numel: Elements, at least 0.
        key: Of the direction, ``0 <= key < 2**64``; see `direction_key`.
        tensor_id: Of the tensor, ``0 <= tensor_id < 2**32``.
        offset: Index of the first element within the tensor; a multiple of 4.
        dtype: float32, bfloat16 or float16; z is made in float32 and rounded to nearest.
        device: CPU or CUDA.

    Returns:
        Shape ``(numel,)``. On CUDA queued on the current stream, not waited for.

    Raises:
        TypeError: No kernel for this dtype.
        ValueError: An argument is out of range, or ``offset + numel`` passes ``2**63 - 1``.

    Source:
        Philox4x32-10, Salmon et al., SC'11; Box and Muller 1958.
    """
    return _noise(numel, key, tensor_id, offset, dtype, device, _C.Distribution.GAUSSIAN)


def rademacher(
    numel: int,
    *,
    key: int,
    tensor_id: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """z of +1 or -1, one random bit an element; everything else as in `normal`."""
    return _noise(numel, key, tensor_id, offset, dtype, device, _C.Distribution.RADEMACHER)


def perturb_(
    weights: Tensor,
    *,
    key: int,
    tensor_id: int,
    eps: float,
    offset: int = 0,
    distribution: Distribution = Distribution.GAUSSIAN,
) -> Tensor:
    """Add ``eps * z`` to `weights` in place, z regenerated.

    Calling again with ``-eps`` undoes it, up to rounding in the dtype of the weights. That rounding
    adds up: `update_perturb` writes perturbed copies instead, and nothing drifts.

    Args:
        weights: Any shape, contiguous; float32, bfloat16 or float16; CPU or CUDA.
        key: Of the direction, ``0 <= key < 2**64``.
        tensor_id: Of the tensor, ``0 <= tensor_id < 2**32``.
        eps: Perturbation scale, in the weights' own units, of either sign; typically 1e-3.
        offset: Index of ``weights[0]`` within the tensor, in elements; a multiple of 4.
        distribution: Of z.

    Returns:
        `weights`. On CUDA the work is queued on the current stream, not waited for.

    Raises:
        TypeError: No kernel for this dtype.
        ValueError: `weights` is not contiguous, or an argument is out of range.
        RuntimeError: `weights` is on a GPU and this build has no CUDA.

    Source:
        Malladi et al. 2023, arXiv:2305.17333, Algorithm 1; Philox4x32-10, Salmon et al., SC'11.
    """
    key, tensor_id = _integer("key", key, 64), _integer("tensor_id", tensor_id, 32)
    _launch(
        _C.perturb,
        weights,
        (
            weights,
            _offset(offset),
            key,
            tensor_id,
            _float32("eps", eps),
            _code("distribution", distribution, _DISTRIBUTIONS),
        ),
    )
    return weights


def update_(
    weights: Tensor,
    *,
    key: int,
    tensor_id: int,
    lr: float,
    projected_grad: float,
    weight_decay: float = 0.0,
    offset: int = 0,
    distribution: Distribution = Distribution.GAUSSIAN,
    rounding: Rounding = Rounding.NEAREST,
    rounding_key: int = 0,
) -> Tensor:
    """``w <- w * (1 - lr * weight_decay) - lr * projected_grad * z`` in place, z regenerated.

    Args:
        weights: Any shape, contiguous; float32, bfloat16 or float16; CPU or CUDA.
        key: Of the direction that `projected_grad` was measured along, ``0 <= key < 2**64``.
        tensor_id: Of the tensor, ``0 <= tensor_id < 2**32``.
        lr: Learning rate; for n directions, divided by n.
        projected_grad: ``(loss_plus - loss_minus) / (2 * eps)``.
        weight_decay: Applied to these weights as it is given. By docs/contracts.md a step decays
            tensors of two or more dimensions only, and once, with its first direction.
        offset: Index of ``weights[0]`` within the tensor, in elements; a multiple of 4.
        distribution: Of z.
        rounding: To the dtype of the weights.
        rounding_key: Of stochastic rounding, ``0 <= rounding_key < 2**64``.

    Returns:
        `weights`. On CUDA the work is queued on the current stream, not waited for.

    Raises:
        TypeError: No kernel for this dtype.
        ValueError: `weights` is not contiguous, or an argument is out of range or not finite.
        RuntimeError: `weights` is on a GPU and this build has no CUDA.

    Source:
        Malladi et al. 2023, arXiv:2305.17333, Algorithm 1.
    """
    _finite("lr", lr)
    _finite("projected_grad", projected_grad)
    _finite("weight_decay", weight_decay)
    key, tensor_id = _integer("key", key, 64), _integer("tensor_id", tensor_id, 32)
    _launch(
        _C.update,
        weights,
        (
            weights,
            _offset(offset),
            key,
            tensor_id,
            _float32("lr * projected_grad", lr * projected_grad),
            _float32("1 - lr * weight_decay", 1 - lr * weight_decay),
            _code("distribution", distribution, _DISTRIBUTIONS),
            _code("rounding", rounding, _ROUNDINGS),
            _integer("rounding_key", rounding_key, 64),
        ),
    )
    return weights


def segment_table(segments: Iterable[Segment], device: torch.device | str = "cpu") -> Tensor:
    """Segments packed for `update_perturb`, to be made once and kept.

    Args:
        segments: In the order of `begin`, not overlapping.
        device: Where the slab lives. A CUDA table holds device memory.

    Returns:
        Shape ``(n, 4)``, int64, one packed row a segment.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of range, or segments overlap or are not in order.
    """
    rows = bytearray()
    end, grouped = 0, True
    for i, s in enumerate(segments):
        name = f"segments[{i}]"
        begin, numel = (
            _integer(f"{name}.begin", s.begin, 63),
            _integer(f"{name}.numel", s.numel, 63),
        )
        tensor_id = _integer(f"{name}.tensor_id", s.tensor_id, 32)
        offset = _offset(s.offset, f"{name}.offset")
        if begin % 128:
            raise ValueError(f"{name}.begin must be a multiple of 128, got {begin}")
        if begin < end:
            raise ValueError(
                f"{name}.begin is {begin}, inside the segment before it, which ends at {end}"
            )
        end, grouped = begin + numel, grouped and offset % GROUP == 0
        if max(end, offset + numel) >= 2**63:
            raise ValueError(
                f"{name} ends past the counter's range, 2**63 - 1: begin {begin}, offset {offset}, "
                f"numel {numel}"
            )
        rows += _SEGMENT_ROW.pack(begin, numel, offset, tensor_id, bool(s.decays))
    table = _table(rows, 4).to(device)
    setattr(table, _CHECKED, _Checked(end, grouped))
    return table


def update_table(updates: Iterable[Update], device: torch.device | str = "cpu") -> Tensor:
    """Updates packed for `update_perturb`, in the order in which they apply.

    Args:
        updates: Any number.
        device: Where the slab lives.

    Returns:
        Shape ``(n, 4)``, int64, one packed row an update. On CUDA its upload is queued on the
        current stream, and not waited for.

    Raises:
        TypeError: A key is not an integer, or `round_first` no `Rounding`.
        ValueError: A key is out of range, or a coefficient or decay is no finite float32.
    """
    rows = bytearray()
    for i, u in enumerate(updates):
        rows += _UPDATE_ROW.pack(
            _integer(f"updates[{i}].key", u.key, 64),
            _float32(f"updates[{i}].coefficient", u.coefficient),
            _float32(f"updates[{i}].decay", u.decay),
            _integer(f"updates[{i}].rounding_key", u.rounding_key, 64),
            _code(f"updates[{i}].round_first", u.round_first, _ROUND_FIRST),
            0,
        )
    table = _table(rows, 4)
    if torch.device(device).type != "cuda":
        return table.to(device)
    # From page-locked memory, so that the host does not wait; torch keeps that until it is read.
    return table.pin_memory().to(device, non_blocking=True)


def update_perturb(
    stored: Tensor,
    *,
    segments: Tensor,
    scales: Tensor | None = None,
    low: Tensor | None = None,
    updates: Tensor | None = None,
    plain: Tensor | None = None,
    directions: Sequence[Direction] = (),
    write_back: Rounding | None = None,
    rounding_key: int = 0,
    distribution: Distribution = Distribution.GAUSSIAN,
) -> None:
    """One pass over a slab: apply pending updates, write weights back, write perturbed copies.

    For each element of each segment: unpack to float32; apply `updates` in order, rounding to
    storage before those that say so, without storing; if `write_back`,
    round to the storage dtype, store, and go on from the rounded value; then write the weights to
    `plain`, and ``w + eps * z`` and ``w - eps * z`` to each direction's slabs, rounded to nearest
    into the compute dtype. Elements outside the segments are neither read nor written.

    Eight directions share one pass. More take further passes, which start from the weights that
    the first one wrote, or replay the updates.

    Args:
        stored: The slab, shape ``(numel,)``, contiguous, in the storage dtype: float32, bfloat16,
            float16 or float8_e4m3fn. Written only with `write_back`.
        segments: From `segment_table`, on the slab's device. In float8 every `Segment.offset` is
            a multiple of 32.
        scales: Of float8, one for each 32 elements of the slab: shape ``(ceil(numel / 32),)``,
            contiguous, float8_e8m0fnu. Written with `stored`.
        low: The low plane of the split format, whose top plane `stored` is in float8_e4m3fn: shape
            ``(numel,)``, contiguous, uint8. Written with `stored`. Without it, a top plane and its
            scales are weights in e4m3, and so would be what is written back: the low plane would
            then belong to nothing.
        updates: From `update_table`, on the slab's device.
        plain: Receives the updated, unperturbed weights: shape ``(numel,)``, compute dtype.
        directions: What to perturb along; all outputs have one compute dtype. One output may be
            `stored` itself, if nothing is written back and there are at most 8 directions.
        write_back: How to round to storage; None leaves `stored` as it is.
        rounding_key: Of stochastic rounding, ``0 <= rounding_key < 2**64``.
        distribution: Of every z.

    On CUDA the work is queued on the current stream and not waited for; the tensors, tables
    included, must live until the stream is past, as torch's allocator sees to for tensors that
    were allocated on it.

    Raises:
        TypeError: No kernel for a dtype, or outputs of different dtypes.
        ValueError: Shapes, devices or tables do not fit, memory overlaps, a key is out of range,
            or an eps is not positive and finite.
        RuntimeError: `stored` is on a GPU and this build has no CUDA.

    Source:
        The delayed update of ZO2, arXiv:2503.12668, with MeZO's two perturbations in the same pass.
    """
    for i, direction in enumerate(directions):
        _integer(f"directions[{i}].key", direction.key, 64)
        if not 0 < direction.eps <= _FLOAT32_MAX:
            raise ValueError(
                f"directions[{i}].eps must be positive and finite, got {direction.eps}"
            )
    if segments.is_cuda:
        checked = _checked(segments)
        if checked.end > stored.numel():
            raise ValueError(
                f"segments end at {checked.end}, beyond stored, which has {stored.numel()} elements"
            )
        if scales is not None and not checked.grouped:
            raise ValueError(f"with scales, offsets of segments must be multiples of {GROUP}")
    _launch(
        _C.update_perturb,
        stored,
        (
            stored,
            _scale_bytes(scales),
            low,
            segments,
            updates,
            plain,
            directions,
            None if write_back is None else _code("write_back", write_back, _ROUNDINGS),
            _integer("rounding_key", rounding_key, 64),
            _code("distribution", distribution, _DISTRIBUTIONS),
        ),
    )


def pack(
    weights: Tensor,
    dtype: torch.dtype,
    *,
    rounding: Rounding = Rounding.NEAREST,
    key: int = 0,
    tensor_id: int = 0,
    offset: int = 0,
) -> Tensor:
    """float32 weights rounded to a storage dtype.

    Args:
        weights: float32, any shape, contiguous; CPU or CUDA.
        dtype: float32, bfloat16 or float16.
        rounding: To nearest, ties to even, as ``Tensor.to`` does; or stochastic.
        key, tensor_id, offset: Of the random bits of stochastic rounding, as in `normal`.

    Returns:
        A new tensor of the same shape. On CUDA queued on the current stream, not waited for.

    Raises:
        TypeError: `weights` is not float32, or there is no format for `dtype`.
        ValueError: `weights` is not contiguous, or an argument is out of range.
    """
    if dtype == _SCALED:
        raise TypeError(f"{dtype} has scales: use pack_scaled")
    _check_dtype(dtype)
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
    """float32 weights rounded to e4m3, or to 16 bits in two planes, with their groups' scales.

    Args:
        weights: float32, any shape, contiguous; CPU or CUDA.
        split: With a low plane: eight more bits of mantissa.
        rounding: To nearest, ties to even; or stochastic. Nothing finite overflows: the scales are
            chosen so.
        key, tensor_id, offset: Of the random bits of stochastic rounding, as in `normal`; `offset`
            is a multiple of 32.

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
    """Weights of any storage dtype as float32; exact.

    Args:
        packed: float32, bfloat16 or float16, any shape, contiguous; CPU or CUDA.

    Returns:
        A new float32 tensor of the same shape. On CUDA queued on the current stream.

    Raises:
        TypeError: No format for this dtype.
        ValueError: `packed` is not contiguous.
    """
    if packed.dtype == _SCALED:
        raise TypeError(f"packed of {packed.dtype} has scales: use unpack_scaled")
    weights = torch.empty(packed.shape, dtype=torch.float32, device=packed.device)
    _launch(_C.unpack, packed, (packed, None, None, weights))
    return weights


def unpack_scaled(packed: Packed) -> Tensor:
    """Weights that share scales as float32; exact.

    Args:
        packed: As from `pack_scaled`. Without its low plane a top plane gives the weights that it
            has alone, in e4m3.

    Returns:
        A new float32 tensor, of the shape of ``packed.stored``; infinite where the scale takes a
        weight beyond float32. On CUDA queued on the current stream.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor is not contiguous, or has another size or device than it should.
    """
    stored = packed.stored
    if stored.dtype != _SCALED:
        raise TypeError(f"packed.stored must be float8_e4m3fn, got {stored.dtype}")
    weights = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
    low = None if packed.low is None else packed.low.reshape(-1)
    _launch(_C.unpack, stored, (stored, _scale_bytes(packed.scales), low, weights))
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
    code = _code("rounding", rounding, _ROUNDINGS)
    key, tensor_id = _integer("key", key, 64), _integer("tensor_id", tensor_id, 32)
    flat = None if low is None else low.view(-1)
    planes = (packed, _scale_bytes(scales), flat)
    _launch(_C.pack, weights, (weights, *planes, _offset(offset), code, key, tensor_id))


def _scale_bytes(scales: Tensor | None) -> Tensor | None:
    """Scales as the kernels take them."""
    if scales is None:
        return None
    if scales.dtype != _SCALE:
        raise TypeError(f"scales must be float8_e8m0fnu, got {scales.dtype}")
    return scales.view(torch.uint8)


def _noise(
    numel: int,
    key: int,
    tensor_id: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device | str,
    distribution: _C.Distribution,
) -> Tensor:
    numel = _integer("numel", numel, 63)
    offset = _offset(offset)
    if offset + numel >= 2**63:
        raise ValueError(
            f"offset + numel is {offset} + {numel}, past the counter's range, 2**63 - 1"
        )
    key, tensor_id = _integer("key", key, 64), _integer("tensor_id", tensor_id, 32)
    _check_dtype(dtype)
    out = torch.empty(numel, dtype=dtype, device=device)
    _launch(_C.noise, out, (out, offset, key, tensor_id, distribution))
    return out


def _launch(kernel: Callable[..., None], tensor: Tensor, arguments: tuple[Any, ...]) -> None:
    """Run `kernel`; its last argument is the current stream of the tensor's device."""
    if not tensor.is_cuda:
        kernel(*arguments, 0)
        return
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    if tensor.device.index == torch.cuda.current_device():
        kernel(*arguments, stream)
        return
    with torch.cuda.device(tensor.device):
        kernel(*arguments, stream)


def _table(rows: bytearray, columns: int) -> Tensor:
    if not rows:
        return torch.empty((0, columns), dtype=torch.int64)
    return torch.frombuffer(rows, dtype=torch.int64).view(-1, columns)


def _checked(segments: Tensor) -> _Checked:
    """What is known of a CUDA table.

    A table that was moved to the device after it was made is read back, once.
    """
    checked: _Checked | None = getattr(segments, _CHECKED, None)
    if checked is None:
        rows = segments.cpu().contiguous()
        unpacked = _SEGMENT_ROW.iter_unpack(rows.numpy().tobytes())
        table = segment_table(
            Segment(begin, numel, tensor_id, bool(decays), offset)
            for begin, numel, offset, tensor_id, decays in unpacked
        )
        checked = getattr(table, _CHECKED)
        setattr(segments, _CHECKED, checked)
    return checked


def _integer(name: str, value: int, bits: int) -> int:
    try:
        value = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be in [0, 2**{bits}), got {value}")
    return value


def _offset(value: int, name: str = "offset") -> int:
    value = _integer(name, value, 63)
    if value % 4:
        raise ValueError(f"{name} must be a multiple of 4, got {value}")
    return value


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _float32(name: str, value: float) -> float:
    """`value` if it is finite in float32; the kernel rounds it."""
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite float32, got {value}")
    return value


def _code(name: str, value: Enum | None, codes: dict[Any, _T]) -> _T:
    code = codes.get(value)
    if code is None:
        kind = type(next(iter(codes))).__name__
        raise TypeError(f"{name} must be a {kind}, got {value!r}")
    return code


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
