"""Directions in factors added to a slab: against the reference, bit for bit, in every format."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
from zo2ext.ops import _C, FoldSegment, Rounding

ROUNDING_KEY = 0xFEDCBA9876543210
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGES = [*DTYPES, *reference.SCALED]
VARIANTS = _C.simd_variants()


class Slab:
    """Weights in a storage format, on a device."""

    def __init__(self, weights: Tensor, storage: str, device: torch.device) -> None:
        self.storage = storage
        self.scales: Tensor | None = None
        self.low: Tensor | None = None
        if storage in DTYPES:
            self.stored = weights.to(device, DTYPES[storage], copy=True)
        else:
            packed = ops.pack_scaled(weights, split=storage == "split")
            self.stored, self.scales, self.low = (
                x if x is None else x.to(device) for x in (packed.stored, packed.scales, packed.low)
            )

    def unpacked(self) -> Tensor:
        """The weights in float32, on the CPU."""
        if self.scales is None:
            return self.stored.to("cpu", torch.float32, copy=True)
        return ops.unpack_scaled(ops.Packed(self.stored, self.scales, self.low)).cpu()

    def fold(self, segments: list[FoldSegment], **options: Any) -> None:
        ops.fold(
            self.stored,
            segments=ops.fold_table(segments, self.stored.device),
            scales=self.scales,
            low=self.low,
            **options,
        )


def rounded(w: Any, storage: str, rounding: Rounding, segment: FoldSegment) -> Tensor:
    """Flat `w` as the storage format holds it, in float32."""
    words = None
    if rounding is Rounding.STOCHASTIC:
        words = reference.rounding_words(
            segment.numel,
            key=ROUNDING_KEY,
            tensor_id=segment.tensor_id,
            offset=segment.offset,
        )
    if storage in reference.SCALED:
        form = reference.SCALED[storage]
        planes = reference.round_scaled(w, form, words)
        return torch.from_numpy(reference.scaled_values(planes, form))
    dtype = DTYPES[storage]
    if words is None:
        return reference.round_nearest(w, dtype).float()
    return reference.round_stochastic(w, dtype, words).float()


@st.composite
def matrices(draw_from: st.DrawFn) -> tuple[list[FoldSegment], int]:
    """Tensors of some shapes or slices of them, with gaps between them, and their slab's size."""
    segments: list[FoldSegment] = []
    end = left = right = 0
    for tensor_id in draw_from(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3)):
        m = draw_from(st.integers(1, 40))
        n = draw_from(
            st.one_of(st.integers(1, 150), st.sampled_from([32, 64, 128, 1000, 2048, 5000]))
        )
        stack = draw_from(st.integers(1, 3))
        offset = 32 * draw_from(st.one_of(st.just(0), st.integers(0, (stack * m * n - 1) // 32)))
        numel = stack * m * n - offset
        if draw_from(st.booleans()):
            numel = draw_from(st.integers(1, numel))
        segments.append(
            FoldSegment(
                -(-end // 128) * 128 + 128 * draw_from(st.integers(0, 1)),
                numel,
                tensor_id,
                draw_from(st.booleans()),
                offset,
                rows=m,
                columns=n,
                left_begin=left,
                right_begin=right,
            )
        )
        end = segments[-1].begin + numel
        # A rank of at most 3, and now and then a gap.
        left += 3 * stack * m + draw_from(st.integers(0, 1))
        right += 3 * stack * n + draw_from(st.sampled_from([0, 0, 1, 4]))
    return segments, end + draw_from(st.integers(0, 130))


def factors(numel: int, segment: FoldSegment, directions: int, rank: int, name: str) -> Any:
    """Where a tensor's factors are in ``(directions, numel)``, and what shape they have."""
    size = segment.rows if name == "left" else segment.columns
    begin = segment.left_begin if name == "left" else segment.right_begin
    stack = -(-(segment.offset + segment.numel) // (segment.rows * segment.columns))
    return slice(begin, begin + stack * rank * size), (directions, stack, rank, size)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slab=matrices(),
    storage=st.sampled_from(STORAGES),
    compute=st.sampled_from(list(DTYPES.values())),
    variant=st.sampled_from(VARIANTS),
    directions=st.sampled_from([0, 1, 2, 13]),
    rank=st.integers(1, 3),
    decay=st.sampled_from([1.0, 0.99]),
    write_back=st.sampled_from([None, *Rounding]),
    wants_plain=st.booleans(),
)
def test_fold_is_that_of_the_reference(
    device: torch.device,
    slab: tuple[list[FoldSegment], int],
    storage: str,
    compute: torch.dtype,
    variant: str,
    directions: int,
    rank: int,
    decay: float,
    write_back: Rounding | None,
    wants_plain: bool,
) -> None:
    segments, numel = slab
    actual = Slab(torch.randn(numel), storage, device)
    expected = actual.unpacked()
    plain = torch.randn(numel).to(compute)
    expected_plain = plain.clone()
    last = segments[-1]
    left, right = (
        torch.randn(directions, factors(0, last, directions, rank, name)[0].stop + 3)
        for name in ("left", "right")
    )
    bytes_before = actual.stored.view(torch.uint8).clone()
    inside = torch.zeros(numel, dtype=torch.bool)
    for s in segments:
        where = slice(s.begin, s.begin + s.numel)
        inside[where] = True
        parts = []
        for name, of in (("left", left), ("right", right)):
            part, shape = factors(of.shape[1], s, directions, rank, name)
            parts.append(of[:, part].numpy().reshape(shape))
        w: Any = reference.folded(
            expected[where], *parts, decay=decay if s.decays else 1.0, offset=s.offset
        )
        if write_back is not None:
            expected[where] = rounded(w, storage, write_back, s)
            w = expected[where]
        if wants_plain:
            expected_plain[where] = reference.round_nearest(w, compute)

    before = _C.simd()
    _C.set_simd(variant)
    plain = plain.to(device)
    try:
        actual.fold(
            segments,
            left=left.to(device),
            right=right.to(device),
            rank=rank,
            decay=decay,
            plain=plain if wants_plain else None,
            write_back=write_back,
            rounding_key=ROUNDING_KEY,
        )
    finally:
        _C.set_simd(before)
    # Elements in a gap may share a scale with the end of a segment: their bytes stay.
    assert_same_bits(actual.unpacked()[inside], expected[inside], "stored")
    outside = (~inside).repeat_interleave(actual.stored.element_size())
    bytes_after = actual.stored.view(torch.uint8).cpu()
    assert_same_bits(bytes_after[outside], bytes_before.cpu()[outside], "gaps")
    assert_same_bits(plain, expected_plain, "plain")


def test_one_direction_is_an_outer_product(device: torch.device) -> None:
    slab = torch.full((6,), 100.0, device=device)
    segment = FoldSegment(0, 6, 7, rows=2, columns=3, left_begin=1, right_begin=0)
    ops.fold(
        slab,
        segments=ops.fold_table([segment], device),
        left=torch.tensor([[9.0, 1.0, 2.0]], device=device),
        right=torch.tensor([[10.0, 20.0, 30.0]], device=device),
        rank=1,
        decay=0.5,
        write_back=Rounding.NEAREST,
    )
    assert slab.tolist() == [60.0, 70.0, 80.0, 70.0, 90.0, 110.0]


@pytest.fixture
def threads_restored() -> Iterator[None]:
    """Set the number of threads back after the test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("storage", STORAGES)
def test_threads_and_slices_do_not_matter(device: torch.device, storage: str) -> None:
    """A tensor large enough that its plain copy goes past the caches."""
    m, n, rank = 2048, 4160, 2
    weights, left, right = torch.randn(m * n), torch.randn(2, rank * m), torch.randn(2, rank * n)
    options = {
        "left": left.to(device),
        "right": right.to(device),
        "rank": rank,
        "write_back": Rounding.STOCHASTIC,
        "rounding_key": ROUNDING_KEY,
    }
    place = {"rows": m, "columns": n, "left_begin": 0, "right_begin": 0}
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        slab = Slab(weights, storage, device)
        plain = torch.empty(m * n, device=device)
        slab.fold([FoldSegment(0, m * n, 7, **place)], plain=plain, **options)
        results += [slab.unpacked(), plain.cpu()]
    cut = 128 * 30001
    slab, plain = Slab(weights, storage, device), torch.empty(m * n, device=device)
    for begin, end in ((0, cut), (cut, m * n)):
        slab.fold(
            [FoldSegment(begin, end - begin, 7, offset=begin, **place)], plain=plain, **options
        )
    results += [slab.unpacked(), plain.cpu()]
    for result in results[1:]:
        assert_same_bits(result, results[0])
    rows = np.s_[: 3 * n]
    w = reference.folded(
        Slab(weights, storage, device).unpacked()[rows],
        left.numpy().reshape(2, 1, rank, m),
        right.numpy().reshape(2, 1, rank, n),
    )
    expected = rounded(w, storage, Rounding.STOCHASTIC, FoldSegment(0, 3 * n, 7, **place))
    assert_same_bits(results[0][rows], expected)


def test_plain_may_be_the_slab_itself(device: torch.device) -> None:
    segment = FoldSegment(0, 5000, 7, rows=50, columns=100, left_begin=0, right_begin=0)
    weights, left, right = torch.randn(5000), torch.randn(1, 50), torch.randn(1, 100)
    options: dict[str, Any] = {
        "left": left.to(device),
        "right": right.to(device),
        "rank": 1,
    }
    slab, written = (Slab(weights, "bfloat16", device) for _ in range(2))
    slab.fold([segment], plain=slab.stored, **options)
    written.fold([segment], write_back=Rounding.NEAREST, **options)
    assert_same_bits(slab.stored, written.stored)


def test_a_table_that_was_copied_is_checked(device: torch.device) -> None:
    segment = FoldSegment(128, 6, 7, rows=2, columns=3, left_begin=0, right_begin=0)
    table = ops.fold_table([segment], device).clone()
    with pytest.raises(ValueError, match="segments end at 134, beyond stored, which has 133"):
        ops.fold(
            torch.zeros(133, device=device),
            segments=table,
            left=torch.zeros(1, 2, device=device),
            right=torch.zeros(1, 3, device=device),
            rank=1,
        )


WRONG_SEGMENTS = {
    "segments[0].rows must be at least 1, got 0": {"rows": 0},
    "segments[0].columns must be in [0, 2**31), got 2147483648": {"columns": 2**31},
    "segments[0].left_begin must be in [0, 2**63), got -1": {"left_begin": -1},
    "segments[0].begin must be a multiple of 128, got 4": {"begin": 4},
    "segments[0].offset must be a multiple of 4, got 3": {"offset": 3},
}


@pytest.mark.parametrize(("message", "wrong"), WRONG_SEGMENTS.items(), ids=WRONG_SEGMENTS)
def test_segments_that_cannot_be_are_named(message: str, wrong: dict[str, int]) -> None:
    fields = {"begin": 0, "numel": 6, "tensor_id": 7, "rows": 2, "columns": 3}
    fields |= {"left_begin": 0, "right_begin": 0}
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.fold_table([FoldSegment(**fields | wrong)])


def wrong_arguments() -> dict[str, dict[str, Any]]:
    """Messages, and the arguments of a good call that lead to them."""
    shared = torch.zeros(256)
    return {
        "rank must be at least 1, got 0": {"rank": 0},
        "left has 2 elements per direction, but the factors of segments[0] end at 4 with rank 2": {
            "rank": 2
        },
        "right has 2 elements per direction, but the factors of segments[0] end at 3 with rank 1": {
            "right": torch.zeros(1, 2)
        },
        "left must have shape (directions, numel), got [2]": {"left": torch.zeros(2)},
        "left has 2 directions, but right has 1": {"left": torch.zeros(2, 2)},
        "right must be float32, got Double": {"right": torch.zeros(1, 3).double()},
        "left must be contiguous": {"left": torch.zeros(1, 4)[:, ::2].expand(2, 2)},
        "decay must be a finite float32, got nan": {"decay": float("nan")},
        "segments must have shape (n, 8), got [1, 4]": {
            "segments": ops.segment_table([ops.Segment(0, 6, 7)])
        },
        "plain must have 128 elements as stored, got 127": {"plain": torch.zeros(127)},
        "plain and stored overlap in memory": {"stored": shared[:128], "plain": shared[64:192]},
        "left and plain overlap in memory": {
            "left": shared[:2].view(1, 2),
            "plain": shared[:128],
        },
        "with scales, offsets of segments must be multiples of 32": {
            "stored": torch.zeros(128).to(torch.float8_e4m3fn),
            "scales": torch.zeros(4).to(torch.float8_e8m0fnu),
            "segments": ops.fold_table(
                [FoldSegment(0, 2, 7, offset=4, rows=2, columns=3, left_begin=0, right_begin=0)]
            ),
        },
        "write_back must be a Rounding, got True": {"write_back": True},
    }


@pytest.mark.parametrize(("message", "wrong"), wrong_arguments().items(), ids=wrong_arguments())
def test_arguments_that_do_not_fit_are_named(message: str, wrong: dict[str, Any]) -> None:
    segment = FoldSegment(0, 6, 7, rows=2, columns=3, left_begin=0, right_begin=0)
    good: dict[str, Any] = {
        "stored": torch.zeros(128),
        "segments": ops.fold_table([segment]),
        "left": torch.zeros(1, 2),
        "right": torch.zeros(1, 3),
        "rank": 1,
    }
    arguments = good | wrong
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ops.fold(arguments.pop("stored"), **arguments)
