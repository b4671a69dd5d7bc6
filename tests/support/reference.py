"""The contract of docs/contracts.md in plain NumPy and PyTorch: what zo2ext is compared with.

Nothing here is shared with csrc/ or imports zo2ext. Every float32 operation is either one NumPy
float32 operation, which IEEE 754 rounds correctly, or `fma`, which is built here from float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Uint32 = npt.NDArray[np.uint32]
Uint64 = npt.NDArray[np.uint64]
Array = npt.NDArray[np.float32] | Tensor

DIRECTION, ROUNDING, KEYS, LEFT, RIGHT = range(5)  # the last word of the counter

_BLOCK = 4096  # counters at a time: the temporaries of a block stay in the L2 cache
_WORD = 0xFFFFFFFF

# ---------------------------------------------------------------------------------- Philox4x32-10


def philox4x32_10(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], key: int
) -> tuple[Uint32, Uint32, Uint32, Uint32]:
    """Four random words for each counter; counter words broadcast against each other.

    Args:
        counter: Four 32-bit words, each an integer or an array of them.
        key: 64 bits; its low half is the first key word of the published generator.

    Source:
        Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
    """
    mask, half = np.uint64(_WORD), np.uint64(32)
    m0, m1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    x0, x1, x2, x3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    for i in range(10):
        k0 = np.uint64((key + i * 0x9E3779B9) & _WORD)
        k1 = np.uint64(((key >> 32) + i * 0xBB67AE85) & _WORD)
        product0, product1 = x0 * m0, x2 * m1
        x0, x1, x2, x3 = (
            (product1 >> half) ^ x1 ^ k0,
            product1 & mask,
            (product0 >> half) ^ x3 ^ k1,
            product0 & mask,
        )
    a, b, c, d = (word.astype(np.uint32) for word in np.broadcast_arrays(x0, x1, x2, x3))
    return a, b, c, d


def direction_key(seed: int, step: int, direction: int) -> int:
    """The 64-bit key of one direction of one step; of direction 0 also for rounding."""
    if not (0 <= seed < 2**64 and 0 <= step < 2**64 and 0 <= direction < 2**32):
        raise ValueError(f"out of range: seed {seed}, step {step}, direction {direction}")
    x0, x1, _, _ = philox4x32_10((step & _WORD, step >> 32, direction, KEYS), seed)
    return int(x0) | int(x1) << 32


# -------------------------------------------------------------------------- fused multiply-add


def _fma64(a: Float64 | float, b: Float64 | float, c: Float64 | float) -> Float32:
    """`fma` on float32 values that are held in float64.

    The product has 48 bits, so it is exact. The sum is rounded to 53 bits and then to 24, which
    is right unless the first rounding lands on a tie of the second. Those few elements, and those
    near float32's subnormals, whose ties lie elsewhere, are rounded to odd first: then the last
    bit remembers that something was lost, and the second rounding cannot be misled.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        total = np.atleast_1d(np.add(product, c, dtype=np.float64))
        rounded: Float32 = total.astype(np.float32)
        tie = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
        tie |= np.abs(total) < 2.0**-125
        if tie.any():
            x, y = (np.broadcast_to(v, total.shape)[tie] for v in (product, np.asarray(c)))
            rounded[tie] = _sum_rounded_to_odd(x, y).astype(np.float32)
    return rounded


def _sum_rounded_to_odd(x: Float64, y: Float64) -> Float64:
    """x + y in float64: exact, or the neighbor of the exact sum whose last bit is 1."""
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)  # Knuth's TwoSum: x + y == total + error
    bits = total.view(np.int64).copy()
    even = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)  # the exact sum is larger in magnitude than `total`
    bits += np.where(even, np.where(away, 1, -1), 0)
    return bits.view(np.float64)


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Float32:
    """a * b + c for float32 values, rounded once to float32, to nearest even.

    Right for every float32, subnormal, infinite and NaN ones and subnormal results included: the
    smallest product, 2^-298, and the largest, below 2^256, are normal numbers of float64.
    """
    wide = [np.asarray(v, dtype=np.float32).astype(np.float64) for v in (a, b, c)]
    shape = np.broadcast_shapes(*(v.shape for v in wide))
    return _fma64(*wide).reshape(shape)


# ------------------------------------------------------------------------------------- noise


def _constants(text: str) -> list[float]:
    return [float.fromhex(word) for word in text.split()]


_L = _constants(
    "-0x1p+1 0x1.fffffap-1 -0x1.5556fp-1 0x1.0004a6p-1 -0x1.98d39ap-2 0x1.535c98p-2"
    " -0x1.317d6cp-2 0x1.2502ccp-2 -0x1.65e53ap-3"
)
_C = _constants("0x1.6a09e6p-1 -0x1.bea582p-1 0x1.6f49fcp-3 -0x1.dcdc36p-7 0x1.febcdcp-13")
_S = _constants("0x1.1c5832p+0 -0x1.d3baap-2 0x1.cdad7ep-5 -0x1.af88d2p-9")
_LN2 = float.fromhex("-0x1.62e43p-23")  # -2 ln 2, for an exponent still in its place, at bit 23
_BELOW_ONE = np.float32(1 - 2.0**-24)


def _polynomial(coefficients: list[float], x: Float32) -> Float32:
    wide = x.astype(np.float64)
    value: Float64 | float = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        rounded = _fma64(value, wide, coefficient)
        value = rounded.astype(np.float64)
    return rounded


def _box_muller(x0: Uint32, x1: Uint32) -> tuple[Float32, Float32]:
    """Two normals for each pair of words."""
    u = (np.uint32(0x3F800000) | x0 >> np.uint32(9)).view(np.float32) - _BELOW_ONE
    bits = u.view(np.uint32)
    s = (bits - np.uint32(0x3F3504F3)) & np.uint32(0xFF800000)
    f = (bits - s).view(np.float32) - np.float32(1)
    tail = f * _polynomial(_L, f)
    r = np.sqrt(_fma64(s.view(np.int32).astype(np.float64), _LN2, tail.astype(np.float64)))

    a = (x1 << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2.0**-32)
    q = a * a
    c = _polynomial(_C, q)
    d = a * _polynomial(_S, q)
    first, second = r * (c - d), r * (c + d)
    sign = np.uint32(0x80000000)
    first.view(np.uint32)[...] ^= x1 & sign
    second.view(np.uint32)[...] ^= (x1 << np.uint32(1)) & sign
    return first, second


def _counters(first: int, count: int, tensor_id: int, domain: int, key: int) -> Iterable[Any]:
    """Words of the counters with index first .. first + count - 1, block by block."""
    for begin in range(first, first + count, _BLOCK):
        index = np.arange(begin, min(begin + _BLOCK, first + count), dtype=np.uint64)
        low, high = index & np.uint64(_WORD), index >> np.uint64(32)
        yield philox4x32_10((low, high, tensor_id, domain), key)


def _elements(
    numel: int,
    offset: int,
    per_counter: int,
    dtype: type[np.float32 | np.uint32],
    make: Callable[[tuple[Uint32, Uint32, Uint32, Uint32]], npt.NDArray[Any]],
    **stream: int,
) -> npt.NDArray[Any]:
    """Elements offset .. offset + numel - 1; `make` turns words [n] into [n, per_counter]."""
    first, skipped = divmod(offset, per_counter)
    count = -(-(skipped + numel) // per_counter)
    out = np.empty((count, per_counter), dtype)
    done = 0
    for words in _counters(first, count, **stream):
        made = make(words)
        out[done : done + len(made)] = made
        done += len(made)
    return np.ascontiguousarray(out.reshape(-1)[skipped : skipped + numel])


def normal(
    numel: int, *, key: int, tensor_id: int, offset: int = 0, domain: int = DIRECTION
) -> Float32:
    """Gaussian z of elements offset .. offset + numel - 1 of one tensor, shape [numel]."""

    def make(words: tuple[Uint32, Uint32, Uint32, Uint32]) -> Float32:
        x0, x1, x2, x3 = words
        return np.stack(_box_muller(x0, x1) + _box_muller(x2, x3), axis=1)

    return _elements(
        numel, offset, 4, np.float32, make, tensor_id=tensor_id, domain=domain, key=key
    )


def rademacher(
    numel: int, *, key: int, tensor_id: int, offset: int = 0, domain: int = DIRECTION
) -> Float32:
    """z of +1 or -1 with equal probability, shape [numel]."""

    def make(words: tuple[Uint32, Uint32, Uint32, Uint32]) -> Float32:
        bytes_ = np.stack(words, axis=1).astype("<u4").view(np.uint8)  # [n, 16], bit 0 first
        minus = np.unpackbits(bytes_, axis=1, bitorder="little")
        return np.float32(1) - np.float32(2) * minus

    return _elements(
        numel, offset, 128, np.float32, make, tensor_id=tensor_id, domain=domain, key=key
    )


def rounding_words(numel: int, *, key: int, tensor_id: int, offset: int = 0) -> Uint32:
    """The words of stochastic rounding, shape [numel]."""
    return _elements(
        numel,
        offset,
        4,
        np.uint32,
        lambda words: np.stack(words, axis=1),
        tensor_id=tensor_id,
        domain=ROUNDING,
        key=key,
    )


DOMAINS = {"direction": DIRECTION, "left": LEFT, "right": RIGHT}  # of noise, by name
DISTRIBUTIONS: dict[str, Callable[..., Float32]] = {"gaussian": normal, "rademacher": rademacher}

# ---------------------------------------------------------------------------------- rounding


@dataclass(frozen=True)
class _Format:
    mantissa: int  # bits kept of float32's 23
    min_exponent: int  # of normal numbers
    largest: int  # float32 bits of the largest finite value


_FORMATS = {
    torch.bfloat16: _Format(mantissa=7, min_exponent=-126, largest=0x7F7F0000),
    torch.float16: _Format(mantissa=10, min_exponent=-14, largest=0x477FE000),
}


def _float32(x: Array | float) -> Float32:
    if isinstance(x, Tensor):
        x = x.detach().cpu().float().contiguous().numpy()
    return np.asarray(x, dtype=np.float32, order="C")


def _tensor(values: Float32, dtype: torch.dtype) -> Tensor:
    """A copy in memory of torch's own allocator (64-byte aligned); the conversion is exact."""
    return torch.empty(values.shape, dtype=dtype).copy_(torch.from_numpy(np.asarray(values)))


def _round(w: Array, dtype: torch.dtype, words: Uint32 | None) -> Tensor:
    w = _float32(w)
    if dtype == torch.float32:
        return _tensor(w, dtype)
    form = _FORMATS[dtype]
    bits = w.view(np.uint32)
    magnitude = (bits & np.uint32(0x7FFFFFFF)).astype(np.int64)
    exponent = np.maximum(magnitude >> 23, 1)  # |w| = significand * 2^(exponent - 150)
    significand = (magnitude & 0x7FFFFF) | np.where(magnitude >> 23 > 0, 1 << 23, 0)
    dropped = (23 - form.mantissa) + np.maximum(form.min_exponent + 127 - exponent, 0)

    # A word has 32 bits. Where more are dropped, the significand's lowest ones go first.
    drop = np.minimum(dropped, 32)
    odd = (significand >> drop) & 1
    kept = (significand + (np.int64(1) << (drop - 1)) - 1 + odd) >> drop
    if words is not None:
        random = np.asarray(words).reshape(w.shape).astype(np.int64)
        shortened = significand >> np.minimum(dropped - drop, 63)
        up_or_down = (shortened + (random & ((np.int64(1) << drop) - 1))) >> drop
        kept = np.where(magnitude > form.largest, kept, up_or_down)

    value = np.ldexp(kept.astype(np.float64), exponent - 150 + dropped)
    largest = np.uint32(form.largest).view(np.float32)
    value = np.where(value > largest, np.inf, value).astype(np.float32)
    value = np.where(magnitude == 0x7F800000, np.inf, value)
    result = _tensor(np.copysign(value, w), dtype)
    # Every NaN becomes the one quiet NaN of the format, 0x7fc0 or 0x7e00.
    result[torch.from_numpy(np.asarray(magnitude > 0x7F800000))] = torch.nan
    return result


def round_nearest(w: Array, dtype: torch.dtype) -> Tensor:
    """float32 `w` to float32, bfloat16 or float16, to nearest even; the shape of `w`."""
    return _round(w, dtype, None)


def round_stochastic(w: Array, dtype: torch.dtype, words: Uint32) -> Tensor:
    """float32 `w` up or down, with the odds of its distances; `words` has one word an element."""
    return _round(w, dtype, words)


def _stored(w: Float32, storage: torch.dtype | str, words: Uint32 | None) -> tuple[Tensor, Float32]:
    """Float32 `w` as `storage`, a dtype or a name in `SCALED`, holds it; and what its top plane
    alone says of it. The shape of `w`."""
    if isinstance(storage, torch.dtype):
        rounded = _round(w, storage, words)
        return rounded, _float32(rounded)
    form = SCALED[storage]
    planes = round_scaled(w, form, words)
    top = scaled_values(Planes(planes.top, planes.scales, None), form)
    whole = scaled_values(planes, form)
    return _tensor(whole.reshape(w.shape), torch.float32), top.reshape(w.shape)


# ------------------------------------------------------------------------------ shared scales


@dataclass(frozen=True)
class ScaledFormat:
    """A small float whose groups of 32 share a power of two."""

    mantissa: int
    low_plane: bool = False
    bias = 7
    top = 8  # the largest value that rounding makes is 1.75 * 2^top

    @property
    def values(self) -> Float64:
        """The magnitude of each code up to the largest, in units of the scale; exact."""
        codes = np.arange((self.bias + self.top + 1) << self.mantissa)
        exponent, mantissa = np.divmod(codes, 1 << self.mantissa)
        significand = mantissa + np.where(exponent > 0, 1 << self.mantissa, 0)
        all_ = np.ldexp(
            significand.astype(np.float64), np.maximum(exponent, 1) - self.bias - self.mantissa
        )
        return all_[all_ <= self.largest]

    @property
    def largest(self) -> float:
        return math.ldexp(1.75, self.top)


SCALED = {
    "e4m3": ScaledFormat(3),
    "split": ScaledFormat(11, low_plane=True),
}


@dataclass(frozen=True)
class Planes:
    """Bytes of weights that share scales."""

    top: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.uint8]  # E8M0
    low: npt.NDArray[np.uint8] | None


def _groups(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[n] -> [ceil(n / 32), 32], filled up with zeros."""
    padded = np.zeros(-(-len(x) // 32) * 32, x.dtype)
    padded[: len(x)] = x
    return padded.reshape(-1, 32)


def _smallest_scale(form: ScaledFormat, groups: Float64) -> npt.NDArray[Any]:
    """The exponent of each group's scale, shape [groups, 1]; what is not finite does not count."""
    finite = np.where(np.isfinite(groups), np.abs(groups), 0.0)
    fraction, exponent = np.frexp(finite.max(axis=1, keepdims=True))
    smallest = exponent - (form.top + 1) + (fraction > 0.875)
    return np.where(fraction == 0, -127, np.maximum(smallest, -127))


def round_scaled(w: Array, form: ScaledFormat, words: Uint32 | None = None) -> Planes:
    """float32 `w`, flattened, to nearest even, or up or down if there are random words."""
    flat = _float32(w).reshape(-1)
    with np.errstate(invalid="ignore"):
        exact = flat.astype(np.float64)
    # What float32 could not hold once it is rounded counts as the largest that it can.
    cap = math.ldexp(2 - 2.0**-form.mantissa, 127)
    exact = np.where(np.isfinite(exact), np.clip(exact, -cap, cap), exact)
    groups = _groups(exact)
    scale = _smallest_scale(form, groups)
    values = form.values
    with np.errstate(invalid="ignore"):
        x = np.ldexp(np.where(np.isfinite(groups), np.abs(groups), 0.0), -scale)
        code = np.searchsorted(values, x, side="right") - 1  # values[code] <= x
        lower = values[code]
        upper = values[np.minimum(code + 1, len(values) - 1)]
        if words is None:
            up = (2 * x > lower + upper) | ((2 * x == lower + upper) & (code % 2 == 1))
        else:
            # A unit in the last place of x, whose significand has 24 bits; of what is dropped no
            # more than 32 bits count, as many as a random word has.
            unit = np.ldexp(1.0, np.frexp(x)[1] - 24)
            inside = lower < upper
            dropped = np.where(inside, np.frexp((upper - lower) / unit)[1] - 1, 1)
            counted = np.minimum(dropped, 32)
            part = np.floor(np.ldexp((x - lower) / unit, counted - dropped)).astype(np.int64)
            random = _groups(words.astype(np.int64)) & ((np.int64(1) << counted) - 1)
            up = inside & (part + random >= np.int64(1) << counted)
    code = code + (up & (lower < x))

    # The scale again, of what came out: the same values, and then nothing can change any more.
    rounded = np.where(np.isfinite(groups), np.ldexp(values[code], scale), groups)
    scale = _smallest_scale(form, rounded)
    code = np.searchsorted(values, np.ldexp(np.where(np.isfinite(groups), rounded, 0), -scale))
    nan = 0x7F << (8 if form.low_plane else 0)
    code = np.where(np.isfinite(groups), code, nan).reshape(-1)[: len(flat)]
    # Zero has none: an update by nothing could change it.
    sign = np.where(np.signbit(flat) & (code > 0) & np.isfinite(flat), 0x80, 0)
    top = (code + 0x80) >> 8 if form.low_plane else code
    return Planes(
        (top | sign).astype(np.uint8),
        (scale.reshape(-1) + 127).astype(np.uint8),
        (code & 0xFF).astype(np.uint8) if form.low_plane else None,
    )


def scaled_values(planes: Planes, form: ScaledFormat) -> Float32:
    """The weights as float32, flattened: infinite where float32 has no number so large."""
    top = planes.top.astype(np.int64)
    code = top & 0x7F
    if planes.low is not None:
        code = (code << 8) + planes.low.view(np.int8)
    elif form.low_plane:
        form = SCALED["e4m3"]
    finite_codes = 0x7E80 if form.low_plane else len(form.values)
    exponent, mantissa = np.divmod(code, 1 << form.mantissa)
    significand = mantissa + np.where(exponent > 0, 1 << form.mantissa, 0)
    scale = np.repeat(planes.scales.astype(np.int64) - 127, 32)[: len(top)]
    value = np.ldexp(
        significand.astype(np.float64), np.maximum(exponent, 1) - form.bias - form.mantissa + scale
    )
    is_nan = (code < 0) | (code >= finite_codes) | (scale == 128)
    with np.errstate(over="ignore"):
        return np.where(is_nan, np.nan, np.where(top & 0x80, -value, value)).astype(np.float32)


# -------------------------------------------------------------------------------- arithmetic


def perturbed(theta: Array, z: Array, eps: float) -> Float32:
    """fma(eps, z, theta), the shape of `theta`; `eps` is rounded to float32."""
    theta = _float32(theta)
    return fma(np.float32(eps), _float32(z).reshape(theta.shape), theta)


def updated(theta: Array, z: Array, coefficient: float, decay: float = 1.0) -> Float32:
    """fma(-coefficient, z, theta * decay), the shape of `theta`; scalars rounded to float32."""
    theta = _float32(theta)
    with np.errstate(all="ignore"):
        decayed = theta * np.float32(decay)
        return fma(-np.float32(coefficient), _float32(z).reshape(theta.shape), decayed)


def folded(w: Array, left: Float32, right: Float32, decay: float = 1.0, offset: int = 0) -> Float32:
    """Flat `w`, elements of a tensor [matrices, rows, columns] from `offset` on, after directions.

    Args:
        left: U, shape [directions, matrices, rank, rows].
        right: V, shape [directions, matrices, rank, columns].
    """
    shape = left.shape[1], left.shape[3], right.shape[3]
    s, i, j = np.unravel_index(offset + np.arange(len(w)), shape)
    with np.errstate(all="ignore"):
        w = _float32(w) * np.float32(decay)
        for u, v in zip(left, right, strict=True):
            for q in range(left.shape[2]):
                w = fma(u[s, q, i], v[s, q, j], w)
    return w


# --------------------------------------------------------------------------- the plain loop


@dataclass(frozen=True)
class Result:
    """What a run of `mezo` was and left behind. Weights are those of trainable parameters."""

    losses: list[list[tuple[float, ...]]] = field(default_factory=list)
    """[step][direction]: (loss_plus, loss_minus) or (loss_plus,), float32 values."""
    projected_grads: list[list[float]] = field(default_factory=list)
    """[step][direction], float64; NaN or infinite in a skipped step."""
    coefficients: list[list[float]] = field(default_factory=list)
    """[step][direction], float32 values; an empty list for a skipped step."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """By name, in the storage dtype (float32 where it has scales), after the flush at the end."""
    current: dict[str, Tensor] = field(default_factory=dict)
    """By name, float32: the same before the flush rounded them."""


@dataclass
class _Weight:
    name: str
    tensor_id: int
    parameter: nn.Parameter
    original: Tensor
    current: Float32  # stored weights plus pending updates
    seen: Float32  # the same by the top plane, which is all of them but in the split format


def mezo(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    lr: float | Callable[[int], float],
    eps: float,
    weight_decay: float = 0.0,
    directions: int = 1,
    estimator: str | None = None,
    normalize: bool | None = None,
    clip: float | None = None,
    seed: int = 0,
    distribution: str = "gaussian",
    storage: torch.dtype | str = torch.float32,
    rounding: str = "stochastic",
    write_back: int | None = 1,
    loss: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
) -> Result:
    """MeZO (arXiv:2305.17333) as docs/contracts.md defines it, one step for each batch.

    The compute dtype of a parameter is the dtype it has in `model`. The starting weights are
    rounded to nearest into `storage`. All forwards of a step start from one state of torch's
    random generators, and a step leaves them as its last forward did. A step with a loss that is
    not finite, or a coefficient that overflows float32, changes no weight, but counts as a step;
    so does one of equal losses if steps are normalized.

    Args:
        model: Any module; its parameters are its own again at the end, unchanged.
        batches: Keyword arguments of `model`, one mapping a step.
        lr: Learning rate, or a function of the step.
        storage: A dtype, or a name in `SCALED`.
        write_back: Period; None for never.
        loss: Scalar loss of (model, batch); by default ``model(**batch).loss``.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    estimator = estimator or ("two_sided" if directions == 1 else "centered")
    normalize = estimator == "centered" if normalize is None else normalize
    loss = loss or (lambda model, batch: model(**batch).loss)
    draw = DISTRIBUTIONS[distribution]
    result = Result()
    weights = []
    for i, (name, p) in enumerate(model.named_parameters()):
        if p.requires_grad:
            whole, top = _stored(_float32(p), storage, None)
            weights.append(_Weight(name, i, p, p.data, _float32(whole), top))

    def is_write_back(step: int) -> bool:
        return write_back is not None and step % write_back == 0

    def to_storage(weight: _Weight, step: int) -> tuple[Tensor, Float32]:
        words = None
        if rounding == "stochastic" and storage != torch.float32:
            key = direction_key(seed, step, 0)
            words = rounding_words(weight.current.size, key=key, tensor_id=weight.tensor_id)
        return _stored(weight.current, storage, words)

    def loss_at(scale: float, z: list[Float32], batch: Mapping[str, Any]) -> float:
        for weight, z_i in zip(weights, z, strict=True):
            # At write-back steps both planes are there; between them, the top one.
            theta = weight.current if is_write_back(step) else weight.seen
            moved = round_nearest(perturbed(theta, z_i, scale), weight.original.dtype)
            weight.parameter.data = moved.to(weight.original.device)
        with torch.no_grad():
            return float(loss(model, dict(batch)).float())

    step = -1
    pending = False
    sizes: list[float] = []
    try:
        for step, batch in enumerate(batches):
            if pending and is_write_back(step):
                for weight in weights:
                    whole, weight.seen = to_storage(weight, step)
                    weight.current = _float32(whole)
                pending = False

            generators = _GeneratorState()
            z = []  # [direction][weight]
            losses = []
            for k in range(directions):
                key = direction_key(seed, step, k)
                z.append([draw(w.current.size, key=key, tensor_id=w.tensor_id) for w in weights])
                both = []
                for scale in (eps, -eps) if estimator == "two_sided" else (eps,):
                    generators.restore()
                    both.append(loss_at(scale, z[k], batch))
                losses.append(tuple(both))
            projected_grads = _slopes(losses, eps)
            result.losses.append(losses)
            result.projected_grads.append(projected_grads)
            result.coefficients.append([])
            if not all(math.isfinite(value) for both in losses for value in both):
                continue

            rate = lr(step) if callable(lr) else lr
            decay = 1 - rate * weight_decay
            size = math.sqrt(math.fsum(g * g for g in projected_grads) / directions)
            if normalize and size == 0:
                continue
            factor = 1.0
            if clip is not None and len(sizes) >= 5:
                factor = min(1.0, clip * float(np.median(sizes[-33:])) / size) if size else 1.0
            sizes += [size] if size else []
            unit = size if normalize else 1.0
            exact = [rate * (g / unit * factor) / directions for g in projected_grads]
            if any(abs(value) > np.finfo(np.float32).max for value in exact):
                continue
            for k, coefficient in enumerate(map(float, np.float32(exact))):
                result.coefficients[-1].append(coefficient)
                for weight, z_i in zip(weights, z[k], strict=True):
                    decays = k == 0 and weight.current.ndim >= 2
                    factor = decay if decays else 1.0
                    weight.current = updated(weight.current, z_i, coefficient, factor)
                    weight.seen = updated(weight.seen, z_i, coefficient, factor)
            pending = True
    finally:
        for weight in weights:
            weight.parameter.data = weight.original

    for weight in weights:
        result.current[weight.name] = _tensor(weight.current, torch.float32)
        result.weights[weight.name], _ = to_storage(weight, step + 1)
    return result


def _slopes(losses: list[tuple[float, ...]], eps: float) -> list[float]:
    n = len(losses)
    if len(losses[0]) == 2:
        return [(plus - minus) / (2 * eps) for plus, minus in losses]
    total = math.fsum(plus for (plus,) in losses) if np.isfinite(losses).all() else math.nan
    return [(plus - total / n) / eps * n / (n - 1) for (plus,) in losses]


class _GeneratorState:
    """torch's random generators as they were when this was made."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
