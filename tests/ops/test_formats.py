"""Formats whose elements share scales: every code, every scale, every exponent; then the pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from numeric import assert_same_bits
from torch import Tensor

from zo2ext import ops
from zo2ext.ops import _C, Direction, Distribution, Packed, Rounding, Segment, Update

KEY, ROUNDING_KEY = 0x0123456789ABCDEF, 0xFEDCBA9876543210
E4M3 = torch.float8_e4m3fn
VARIANTS = _C.simd_variants()


@dataclass(frozen=True)
class Format:
    """A format by its name in the reference, and as `ops.pack_scaled` is told of it."""

    name: str
    split: bool = False

    @property
    def reference(self) -> reference.ScaledFormat:
        return reference.SCALED[self.name]

    @property
    def max_scale(self) -> int:
        """The byte of the largest scale that rounding chooses, for float32's largest weights."""
        return 255 - self.reference.top

    def pack(self, weights: Tensor, **options: Any) -> Packed:
        return ops.pack_scaled(weights, split=self.split, **options)

    def packed(self, codes: Tensor, scales: Tensor) -> Packed:
        """Codes, of magnitude and sign, [groups * 32], under scales, [groups], both integers."""
        magnitude, sign = codes & 0x7FFF, codes >> 15 << 7
        top = (magnitude + 0x80) >> 8 if self.split else magnitude
        stored = (top | sign).to(torch.uint8).view(E4M3)
        low = (magnitude & 0xFF).to(torch.uint8) if self.split else None
        return Packed(stored, scales.to(torch.uint8).view(torch.float8_e8m0fnu), low)


EIGHT_BITS = Format("e4m3")
FORMATS = [EIGHT_BITS, Format("split", split=True)]
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)


@pytest.fixture(params=VARIANTS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = _C.simd()
    _C.set_simd(request.param)
    yield request.param
    _C.set_simd(before)


def planes(packed: Packed) -> list[Tensor]:
    """The bytes, on the CPU."""
    found = [packed.stored.view(torch.uint8), packed.scales.view(torch.uint8)]
    return [x.cpu() for x in (*found, *([] if packed.low is None else [packed.low]))]


def assert_same(actual: Packed, expected: Packed) -> None:
    for name, a, e in zip(
        ("stored", "scales", "low"), planes(actual), planes(expected), strict=False
    ):
        assert_same_bits(a, e, name)
    assert (actual.low is None) == (expected.low is None)


def moved_to(packed: Packed, device: torch.device) -> Packed:
    low = None if packed.low is None else packed.low.to(device)
    return Packed(packed.stored.to(device), packed.scales.to(device), low)


def of_reference(found: reference.Planes) -> Packed:
    low = None if found.low is None else torch.from_numpy(found.low)
    return Packed(
        torch.from_numpy(found.top).view(E4M3),
        torch.from_numpy(found.scales).view(torch.float8_e8m0fnu),
        low,
    )


def planes_of_reference(packed: Packed) -> reference.Planes:
    top, scales, *low = (x.numpy() for x in planes(packed))
    return reference.Planes(top, scales, low[0] if low else None)


def anchored(values: Tensor, largest: float) -> Tensor:
    """Groups of 31 values and one that decides the scale; filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    return torch.nn.functional.pad(padded, (0, 1), value=largest).flatten()


def without_anchors(grouped: Tensor, count: int) -> Tensor:
    return grouped.view(-1, 32)[:, :31].reshape(-1)[:count]


def written_back(packed: Packed, rounding: Rounding, key: int, coefficient: float = 0.0) -> Packed:
    """A copy after one update along a direction and a write-back."""
    copy = Packed(
        packed.stored.clone(),
        packed.scales.clone(),
        None if packed.low is None else packed.low.clone(),
    )
    n, device = copy.stored.numel(), copy.stored.device
    ops.update_perturb(
        copy.stored,
        segments=ops.segment_table([Segment(0, n, 7)], device),
        scales=copy.scales,
        low=copy.low,
        updates=ops.update_table([Update(key, coefficient)], device),
        write_back=rounding,
        rounding_key=key,
    )
    return copy


def some_weights(kind: str, count: int = 1 << 16) -> Tensor:
    """float32 of some kind, not a multiple of 32 of them."""
    bits = reference.rounding_words(count - 5, key=1, tensor_id=2)
    if kind == "weights":
        bits = bits & np.uint32(0x83FFFFFF) | np.uint32(0x3C000000)
    elif kind == "subnormal":
        bits = bits & np.uint32(0x80FFFFFF)
    elif kind == "large":
        bits = bits & np.uint32(0x80FFFFFF) | np.uint32(0x7E000000)
    elif kind == "alike":  # every group within two binades: the edges of scales
        exponent = np.repeat(np.arange(len(bits) // 32 + 1, dtype=np.uint32) % 250, 32)
        bits = (bits & np.uint32(0x80FFFFFF)) + (exponent[: len(bits)] << np.uint32(23))
    return torch.from_numpy(bits.view(np.float32).copy())


KINDS = ["any bits", "weights", "subnormal", "large", "alike"]

# ------------------------------------------------------------------------------- every number


def test_codes_are_torchs(device: torch.device, simd: str) -> None:
    bytes_ = torch.arange(256).to(torch.uint8)
    scales = torch.full((8,), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    packed = Packed(bytes_.view(E4M3), scales)
    values = ops.unpack_scaled(moved_to(packed, device)).cpu()
    expected = bytes_.view(E4M3).float()
    number = ~expected.isnan()
    assert_same_bits(values[number], expected[number])
    assert values[~number].isnan().all()


@pytest.mark.parametrize("kind", ["codes", "wild"])
@every_format
def test_unpacked_is_that_of_the_reference(
    device: torch.device, simd: str, form: Format, kind: str
) -> None:
    """Every code under some scale, every scale with some code; then any bytes at all."""
    if kind == "codes":
        bits = 15 if form.split else 7
        magnitudes = torch.arange(1 << bits).repeat(2 << (15 - bits))
        codes = magnitudes | (torch.arange(len(magnitudes)) >> bits & 1) << 15
        packed = form.packed(codes, torch.arange(len(codes) // 32) % 256)
    else:
        drawn = reference.rounding_words(3 * (1 << 16), key=3, tensor_id=1).astype(np.uint8)
        top, low, scales = torch.from_numpy(drawn).view(3, -1)
        packed = Packed(
            top.view(E4M3),
            scales[: len(top) // 32].contiguous().view(torch.float8_e8m0fnu),
            low if form.split else None,
        )
    values = ops.unpack_scaled(moved_to(packed, device)).cpu()
    expected = torch.from_numpy(
        reference.scaled_values(planes_of_reference(packed), form.reference)
    )
    number = ~expected.isnan()
    assert_same_bits(values[number], expected[number])
    assert values[~number].isnan().all()


@every_format
def test_every_code_round_trips_under_every_scale(
    device: torch.device, simd: str, form: Format
) -> None:
    """Beside the largest code, which keeps the scale. Zero and NaN have no sign."""
    largest = len(form.reference.values) - 1
    codes = torch.arange(1, largest + 1)
    some = [0, 1, 2, 24, 126, 127, 128, 200, form.max_scale - 1, form.max_scale]
    for scale in some if form.split else range(form.max_scale + 1):
        highest = largest
        if scale == form.max_scale:  # the rest is beyond float32
            unit = 2.0 ** (scale - 127)
            highest = int((form.reference.values * unit <= torch.finfo(torch.float32).max).sum())
            highest -= 1
        finite = codes[codes <= highest]
        nan = 0x7F00 if form.split else 0x7F
        every = torch.cat([torch.tensor([0, nan]), finite, finite | 0x8000])
        grouped = anchored(every, highest)
        packed = moved_to(form.packed(grouped, torch.full((len(grouped) // 32,), scale)), device)
        weights = ops.unpack_scaled(packed)
        assert_same(form.pack(weights), packed)
        assert_same(form.pack(weights, rounding=Rounding.STOCHASTIC, key=scale), packed)
        assert_same(written_back(packed, Rounding.STOCHASTIC, scale), packed)


@every_format
def test_the_scale_is_the_smallest_that_will_do(
    device: torch.device, simd: str, form: Format
) -> None:
    """Just at, below and above the largest value of each scale."""
    exponents = torch.arange(-126 - form.reference.top, 120 - form.reference.top + 8)
    limit = form.reference.largest * 2.0 ** exponents.double()
    keep = (limit < 2.0**127) & (limit >= 2.0**-126) & (exponents > -127)
    limit, exponents = limit[keep].float(), exponents[keep]
    for weights, scales in (
        (limit, exponents),
        (torch.nextafter(limit, torch.tensor(0.0)), exponents),
        (torch.nextafter(limit, torch.tensor(math.inf)), exponents + 1),
    ):
        grouped = torch.zeros(len(weights), 32)
        grouped[:, 13] = -weights
        packed = form.pack(grouped.view(-1).to(device))
        # A weight just above a limit is rounded to it, and then the smaller scale will do.
        expected = torch.where(weights > limit, exponents, scales)
        assert_same_bits(planes(packed)[1], (expected + 127).to(torch.uint8))
        values = ops.unpack_scaled(packed).cpu().view(-1, 32)[:, 13]
        assert_same_bits(values, -limit)


@pytest.mark.parametrize("scale", [-100, -9, 0, 60])
def test_nearest_rounding_is_torchs_around_every_target(
    device: torch.device, simd: str, scale: int
) -> None:
    """Every value, the middles between them, and what lies just around both."""
    form = EIGHT_BITS
    values = torch.from_numpy(form.reference.values)
    middles = (values[1:] + values[:-1]) / 2
    exact = torch.cat([values, middles]).float()  # exact
    around = torch.tensor([-1, 0, 1], dtype=torch.int32)
    near = (exact[exact > 0].view(torch.int32)[:, None] + around).view(torch.float32).flatten()
    near = near[near <= form.reference.largest]
    weights = torch.cat([near, -near, torch.zeros(1)])
    grouped = anchored(weights, form.reference.largest)
    packed = form.pack((grouped * 2.0**scale).to(device))
    assert (planes(packed)[1] == scale + 127).all()
    expected = weights.to(E4M3).view(torch.uint8)
    expected[expected == 0x80] = 0
    assert_same_bits(without_anchors(planes(packed)[0], len(weights)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", Rounding)
@every_format
def test_rounding_is_that_of_the_reference(
    device: torch.device, simd: str, form: Format, rounding: Rounding, kind: str
) -> None:
    weights = some_weights(kind)
    packed = form.pack(weights.to(device), rounding=rounding, key=KEY, tensor_id=7, offset=96)
    words = reference.rounding_words(len(weights), key=KEY, tensor_id=7, offset=96)
    expected = reference.round_scaled(
        weights, form.reference, words if rounding is Rounding.STOCHASTIC else None
    )
    assert_same(packed, of_reference(expected))


@every_format
def test_nothing_finite_overflows(device: torch.device, simd: str, form: Format) -> None:
    """Infinity becomes NaN, and changes no scale."""
    largest = torch.finfo(torch.float32).max
    for rounding in Rounding:
        weights = torch.full((64,), largest)
        weights[1], weights[2], weights[40] = math.nan, -math.inf, 1.0
        weights[32:40] = -1.0
        packed = form.pack(weights.to(device), rounding=rounding, key=3)
        values = ops.unpack_scaled(packed).cpu()
        cap = (2 - 2.0**-form.reference.mantissa) * 2.0**127
        assert values[0] == cap
        assert (values[3:32] == cap).all()
        assert values[1:3].isnan().all()
        assert_same(form.pack(ops.unpack_scaled(packed), rounding=rounding, key=4), packed)
    alone = torch.tensor([math.inf, -math.nan, -0.0] + [0.0] * 29)
    packed = form.pack(alone.to(device))
    assert planes(packed)[1].tolist() == [0]
    assert planes(packed)[0][1:3].tolist() == [0x7F, 0]


def test_a_nan_scale_makes_every_weight_nan(device: torch.device, simd: str) -> None:
    for form in FORMATS:
        packed = moved_to(form.pack(torch.randn(100)), device)
        packed.scales.view(torch.uint8)[1] = 0xFF
        values = ops.unpack_scaled(packed)
        assert values[32:64].isnan().all()
        assert values[:32].isfinite().all()
        assert values[64:].isfinite().all()
        again = written_back(packed, Rounding.NEAREST, 1)
        assert (planes(again)[0][32:64] == 0x7F).all()
        assert planes(again)[1][1] == 0


# ------------------------------------------------------------------------ rounding, many times


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.77])
@pytest.mark.parametrize("where", ["largest", "normal", "subnormal", "smallest"])
@every_format
def test_stochastic_rounding_is_right_on_average(
    device: torch.device, form: Format, part: float, where: str
) -> None:
    values = form.reference.values
    low = {
        "largest": len(values) - 2,
        "normal": len(values) // 2 + 1,
        "subnormal": max(1, 2 ** (form.reference.mantissa - 1)),
        "smallest": 0,
    }[where]
    lower, upper = float(values[low]), float(values[low + 1])
    w = np.float32(lower + part * (upper - lower))
    draws = 100_000
    for sign in (1, -1):
        weights = anchored(torch.full((draws,), sign * float(w)), form.reference.largest)
        packed = form.pack(weights.to(device), rounding=Rounding.STOCHASTIC, key=KEY, tensor_id=7)
        found = without_anchors(ops.unpack_scaled(packed).cpu(), draws).double() * sign
        up = found == upper
        assert (up | (found == lower)).all(), "only the two neighbours"
        odds = (float(w) - lower) / (upper - lower)
        error = abs(float(up.double().mean()) - odds)
        assert error <= 5 * math.sqrt(odds * (1 - odds) / draws)


@every_format
def test_an_update_by_nothing_moves_no_bit_in_10000_steps(form: Format) -> None:
    """Of any group: no code, no scale, no low byte, whatever the random words."""
    weights = torch.cat([some_weights(kind, 1024) for kind in KINDS[1:]])
    packed = form.pack(weights, rounding=Rounding.STOCHASTIC, key=1)
    expected = [x.clone() for x in planes(packed)]
    n = packed.stored.numel()
    segments = ops.segment_table([Segment(0, n, 7)])
    updates = [ops.update_table([Update(k, 0.0)]) for k in range(100)]
    for step in range(10_000):
        ops.update_perturb(
            packed.stored,
            segments=segments,
            scales=packed.scales,
            low=packed.low,
            updates=updates[step % 100],
            write_back=Rounding.STOCHASTIC,
            rounding_key=step,
            distribution=Distribution.RADEMACHER,
        )
    for a, e in zip(planes(packed), expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("rounding", Rounding)
@every_format
def test_what_was_rounded_once_is_not_changed(
    device: torch.device, simd: str, form: Format, rounding: Rounding
) -> None:
    for kind in KINDS:
        weights = some_weights(kind).to(device)
        packed = form.pack(weights, rounding=rounding, key=KEY)
        for key in range(3):
            again = form.pack(ops.unpack_scaled(packed), rounding=Rounding.STOCHASTIC, key=key)
            assert_same(again, packed)
        assert_same(written_back(packed, Rounding.STOCHASTIC, 5), packed)


@every_format
def test_a_scale_that_is_too_large_is_made_smaller_and_no_value_moves(
    device: torch.device, simd: str, form: Format
) -> None:
    """The edge: the largest weight comes down to half the largest value of its scale."""
    half = form.reference.largest / 2
    above = np.nextafter(np.float32(half), np.float32(math.inf))
    some = torch.from_numpy(form.reference.values[form.reference.values < half]).float()
    grouped = anchored(some, float(above))
    packed = form.pack(grouped.to(device))
    assert (planes(packed)[1] == 126).all()
    values = ops.unpack_scaled(packed).cpu()
    assert (values.view(-1, 32)[:, 31] == half).all()
    assert_same_bits(without_anchors(values, len(some)), some)


def test_the_top_plane_is_the_weights_in_fewer_bits(device: torch.device, simd: str) -> None:
    weights = some_weights("weights").to(device)
    packed = ops.pack_scaled(weights, split=True)
    assert packed.low is not None
    exact = ops.unpack_scaled(packed)
    top = ops.unpack_scaled(Packed(packed.stored, packed.scales))
    scale = packed.scales.float().repeat_interleave(32)[: len(weights)]
    # Half a unit of e4m3's 3 bits, or of its subnormals.
    bound = torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10)
    assert ((top - exact).abs() <= bound).all()
    assert (
        (exact - weights).abs() <= torch.maximum(weights.abs() * 2.0**-12, scale * 2**-18)
    ).all()
    assert ((top - exact) != 0).any()


# --------------------------------------------------------------------------------- in the pass


def expected_pass(
    packed: Packed,
    outputs: list[Tensor],
    form: Format,
    segments: list[Segment],
    updates: list[Update],
    directions: list[tuple[int, float]],
    write_back: Rounding | None,
    distribution: Distribution,
) -> None:
    """What `ops.update_perturb` does, by the reference, in place."""
    draw = reference.DISTRIBUTIONS[distribution.value]
    for s in segments:
        of = {"tensor_id": s.tensor_id, "offset": s.offset}
        where = slice(s.begin, s.begin + s.numel)
        groups = slice(s.begin // 32, s.begin // 32 - (-s.numel // 32))

        def rounded(w: Any, rounding: Rounding, key: int, s: Segment = s, of: Any = of) -> Any:
            words = None
            if rounding is Rounding.STOCHASTIC:
                words = reference.rounding_words(s.numel, key=key, **of)
            return reference.round_scaled(w, form.reference, words)

        top, scales, *low = planes(packed)
        part = reference.Planes(
            top[where].numpy(), scales[groups].numpy(), low[0][where].numpy() if low else None
        )
        w = reference.scaled_values(part, form.reference)
        for u in updates:
            if u.round_first is not None:
                w = reference.scaled_values(
                    rounded(w, u.round_first, u.rounding_key), form.reference
                )
            z = draw(s.numel, key=u.key, **of)
            w = reference.updated(w, z, u.coefficient, u.decay if s.decays else 1.0)
        if write_back is not None:
            part = rounded(w, write_back, ROUNDING_KEY)
            w = reference.scaled_values(part, form.reference)
            packed.stored.view(torch.uint8)[where] = torch.from_numpy(part.top)
            packed.scales.view(torch.uint8)[groups] = torch.from_numpy(part.scales)
            if packed.low is not None:
                packed.low[where] = torch.from_numpy(part.low)
        moved = [w]
        for key, eps in directions:
            z = draw(s.numel, key=key, **of)
            moved += [reference.perturbed(w, z, eps), reference.perturbed(w, z, -eps)]
        for output, value in zip(outputs, moved, strict=True):
            output[where] = reference.round_nearest(value, output.dtype)


@st.composite
def slabs(draw_from: st.DrawFn) -> tuple[list[Segment], int]:
    """Segments with gaps between them, and the size of their slab."""
    segments, end = [], 0
    for tensor_id in draw_from(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4)):
        begin = -(-end // 128) * 128 + 128 * draw_from(st.integers(0, 2))
        numel = draw_from(st.one_of(st.integers(0, 300), st.integers(1000, 9000)))
        offset = 32 * draw_from(st.one_of(st.integers(0, 80), st.integers(2**29 - 40, 2**29)))
        segments.append(Segment(begin, numel, tensor_id, draw_from(st.booleans()), offset))
        end = begin + numel
    return segments, end + draw_from(st.integers(0, 130))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slab=slabs(),
    form=st.sampled_from(FORMATS),
    compute=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    variant=st.sampled_from(VARIANTS),
    distribution=st.sampled_from(Distribution),
    updates=st.lists(
        st.tuples(st.floats(-0.5, 0.5, width=32), st.sampled_from([None, *Rounding])), max_size=4
    ),
    directions=st.one_of(st.integers(0, 2), st.integers(9, 10)),
    write_back=st.sampled_from([None, *Rounding]),
    wanted=st.lists(st.booleans(), min_size=21, max_size=21),
)
def test_pass_is_that_of_the_reference(
    device: torch.device,
    slab: tuple[list[Segment], int],
    form: Format,
    compute: torch.dtype,
    variant: str,
    distribution: Distribution,
    updates: list[tuple[float, Rounding | None]],
    directions: int,
    write_back: Rounding | None,
    wanted: list[bool],
) -> None:
    segments, numel = slab
    pending = [
        Update(KEY + k, c, 1.0 - abs(c) / 8, first, ROUNDING_KEY + 1 + k)
        for k, (c, first) in enumerate(updates)
    ]
    along = [(KEY - k, 1e-3 * (k + 1)) for k in range(directions)]
    packed = form.pack(torch.randn(numel))
    outputs = [torch.randn(numel).to(compute) for _ in range(1 + 2 * directions)]
    expected = Packed(*(x if x is None else x.clone() for x in vars(packed).values()))
    expected_outputs = [output.clone() for output in outputs]
    expected_pass(
        expected, expected_outputs, form, segments, pending, along, write_back, distribution
    )
    # Outputs that are not asked for stay as they are.
    for i, output in enumerate(outputs):
        if not wanted[i]:
            expected_outputs[i] = output.clone()

    actual = moved_to(packed, device)
    actual_outputs = [x.to(device) for x in outputs]
    asked = [x if wanted[i] else None for i, x in enumerate(actual_outputs)]
    before = _C.simd()
    _C.set_simd(variant)
    try:
        ops.update_perturb(
            actual.stored,
            segments=ops.segment_table(segments, device),
            scales=actual.scales,
            low=actual.low,
            updates=ops.update_table(pending, device) if pending else None,
            plain=asked[0],
            directions=[
                Direction(key, eps, asked[1 + 2 * k], asked[2 + 2 * k])
                for k, (key, eps) in enumerate(along)
            ],
            write_back=write_back,
            rounding_key=ROUNDING_KEY,
            distribution=distribution,
        )
    finally:
        _C.set_simd(before)
    assert_same(actual, expected)
    names = ["plain", *(f"{side} {k}" for k in range(directions) for side in "+-")]
    for name, a, e in zip(names, actual_outputs, expected_outputs, strict=True):
        assert_same_bits(a, e, name)


@pytest.mark.parametrize("rounding", Rounding)
@every_format
def test_one_pass_of_many_updates_is_as_many_steps_written_back(
    device: torch.device, form: Format, rounding: Rounding
) -> None:
    n, count = 5000, 40
    packed = moved_to(form.pack(torch.randn(n) * 1e-2), device)
    stepped = packed
    for k in range(count):
        stepped = written_back(stepped, rounding, 1000 + k, 1e-4 * (k - 20))
    updates = [
        Update(1000 + k, 1e-4 * (k - 20), 1.0, rounding if k else None, 1000 + k - 1 if k else 0)
        for k in range(count)
    ]
    ops.update_perturb(
        packed.stored,
        segments=ops.segment_table([Segment(0, n, 7)], device),
        scales=packed.scales,
        low=packed.low,
        updates=ops.update_table(updates, device),
        write_back=rounding,
        rounding_key=1000 + count - 1,
    )
    assert_same(packed, stepped)


def test_updates_replayed_on_the_top_plane_are_those_of_e4m3(device: torch.device) -> None:
    """Between two write-backs of the split format: one plane is read, none is written."""
    n = 5000
    packed = moved_to(ops.pack_scaled(torch.randn(n), split=True), device)
    before = [x.clone() for x in planes(packed)]
    plus = torch.zeros(n, dtype=torch.bfloat16, device=device)
    updates = [Update(k, 1e-3) for k in range(5)]
    ops.update_perturb(
        packed.stored,
        segments=ops.segment_table([Segment(0, n, 7)], device),
        scales=packed.scales,
        updates=ops.update_table(updates, device),
        directions=[Direction(KEY, 1e-3, plus)],
    )
    w = ops.unpack_scaled(Packed(packed.stored, packed.scales))
    for u in updates:
        ops.update_(w, key=u.key, tensor_id=7, lr=u.coefficient, projected_grad=1.0)
    assert_same_bits(plus, ops.perturb_(w, key=KEY, tensor_id=7, eps=1e-3).bfloat16())
    for a, e in zip(planes(packed), before, strict=True):
        assert_same_bits(a, e)


@every_format
def test_rows_need_no_multiple_of_32(device: torch.device, form: Format) -> None:
    """Groups are of the flattened tensor; the last may be short."""
    weights = torch.randn(7, 37)
    packed = form.pack(weights.to(device))
    assert packed.stored.shape == (7, 37)
    assert packed.scales.shape == (9,)
    values = ops.unpack_scaled(packed).cpu()
    assert values.shape == (7, 37)
    largest = values.view(-1)[256:].abs().max()
    short = float(packed.scales.float()[8])
    assert form.reference.largest * short / 2 < largest <= form.reference.largest * short
    assert form.pack(torch.empty(0, 3, device=device)).scales.shape == (0,)
    assert ops.unpack_scaled(form.pack(torch.empty(0, 3, device=device))).shape == (0, 3)


@every_format
def test_threads_and_large_slabs_do_not_matter(form: Format) -> None:
    threads = torch.get_num_threads()
    weights = torch.randn(300_003)
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            packed = form.pack(weights, rounding=Rounding.STOCHASTIC)
            results.append(written_back(packed, Rounding.STOCHASTIC, 5, 0.01))
    finally:
        torch.set_num_threads(threads)
    for packed in results[1:]:
        assert_same(packed, results[0])


# ----------------------------------------------------------------------------------- bad input


def one_pass(**changes: Any) -> None:
    packed = ops.pack_scaled(torch.ones(256))
    stored = changes.pop("stored", packed.stored)
    right = {"segments": ops.segment_table([Segment(0, 256, 0)]), "scales": packed.scales}
    ops.update_perturb(stored, **right | changes)


def overlapping() -> None:
    memory = torch.zeros(1024, dtype=torch.uint8)
    scales = memory[:8].view(torch.float8_e8m0fnu)
    one_pass(scales=scales, plain=memory[:512].view(torch.bfloat16))


BYTES = torch.zeros(256, dtype=torch.uint8)
BAD: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("scales missing", lambda: one_pass(scales=None), ValueError, "scales are missing: stored"),
    (
        "scales too few",
        lambda: one_pass(scales=torch.zeros(7).to(torch.float8_e8m0fnu)),
        ValueError,
        "scales must have 8 elements for 256 of stored, got 7",
    ),
    ("scales dtype", lambda: one_pass(scales=torch.zeros(8)), TypeError, "scales .* got .*float32"),
    (
        "scales of bfloat16",
        lambda: one_pass(stored=torch.zeros(256, dtype=torch.bfloat16)),
        ValueError,
        "scales belong to float8_e4m3fn only, got them with stored of BFloat16",
    ),
    (
        "scales shape",
        lambda: one_pass(scales=torch.zeros(2, 4).to(torch.float8_e8m0fnu)),
        ValueError,
        "scales must be a 1-D slab",
    ),
    (
        "scales device",
        lambda: one_pass(scales=torch.zeros(8, device="meta", dtype=torch.float8_e8m0fnu)),
        ValueError,
        "scales must be on cpu as stored, got meta",
    ),
    ("low size", lambda: one_pass(low=BYTES[:255]), ValueError, "low must have 256 elements"),
    (
        "low dtype",
        lambda: one_pass(low=torch.zeros(256)),
        TypeError,
        "low must be bytes, got Float",
    ),
    (
        "low of bfloat16",
        lambda: one_pass(stored=torch.zeros(256, dtype=torch.bfloat16), scales=None, low=BYTES),
        ValueError,
        "low belongs to float8_e4m3fn only, got it with stored of BFloat16",
    ),
    (
        "offset",
        lambda: one_pass(segments=ops.segment_table([Segment(0, 128, 0, True, 4)])),
        ValueError,
        "segment offset must be a multiple of 32 and not negative, got 4",
    ),
    ("overlap", overlapping, ValueError, "overlap in memory"),
    (
        "computing in float8",
        lambda: one_pass(plain=torch.zeros(256, dtype=E4M3)),
        TypeError,
        "plain must be float32, bfloat16 or float16, got Float8_e4m3fn",
    ),
    (
        "perturb_",
        lambda: ops.perturb_(BYTES.view(E4M3), key=0, tensor_id=0, eps=1.0),
        TypeError,
        "weights must be float32, bfloat16 or float16, got Float8_e4m3fn",
    ),
    ("pack", lambda: ops.pack(torch.zeros(32), E4M3), TypeError, "use pack_scaled"),
    ("unpack", lambda: ops.unpack(BYTES.view(E4M3)), TypeError, "has scales: use unpack_scaled"),
    (
        "weights",
        lambda: ops.pack_scaled(torch.zeros(32).half()),
        TypeError,
        "weights must be float32, got Half",
    ),
    (
        "strides",
        lambda: ops.pack_scaled(torch.zeros(32, 32).t()),
        ValueError,
        "weights must be contiguous",
    ),
    (
        "pack offset",
        lambda: ops.pack_scaled(torch.zeros(32), offset=4),
        ValueError,
        "offset must be a multiple of 32",
    ),
    (
        "unpack_scaled",
        lambda: ops.unpack_scaled(Packed(torch.zeros(32), torch.zeros(1))),
        TypeError,
        "packed.stored must be float8_e4m3fn, got torch.float32",
    ),
    (
        "unpack_scaled low",
        lambda: ops.unpack_scaled(
            Packed(BYTES.view(E4M3), torch.zeros(8).to(torch.float8_e8m0fnu), BYTES[:32])
        ),
        ValueError,
        "low must have 256 elements for 256 of packed, got 32",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_refused_by_name(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_offsets_in_a_table_on_the_gpu_are_checked(device: torch.device) -> None:
    packed = moved_to(ops.pack_scaled(torch.ones(256)), device)
    for segments in (
        ops.segment_table([Segment(0, 128, 0, True, 4)], device),
        ops.segment_table([Segment(0, 128, 0, True, 4)]).to(device),
    ):
        with pytest.raises(ValueError, match="offsets of segments must be multiples of 32"):
            ops.update_perturb(packed.stored, segments=segments, scales=packed.scales)
