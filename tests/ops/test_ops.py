"""The operations: against the reference bit for bit, against float64 within derived bounds."""

from __future__ import annotations

import itertools
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from numeric import assert_same_bits
from tiny_models import batches, tiny
from torch import Tensor

from zo2ext import ops
from zo2ext.ops import _C, Direction, Distribution, Domain, Rounding, Segment, Update

KEY, ROUNDING_KEY = 0x0123456789ABCDEF, 0xFEDCBA9876543210
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = DTYPES[1:]
VARIANTS = _C.simd_variants()
SIZES = [1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 65_537]


@pytest.fixture(params=VARIANTS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = _C.simd()
    _C.set_simd(request.param)
    yield request.param
    _C.set_simd(before)


def draw(
    numel: int,
    key: int,
    tensor_id: int,
    offset: int,
    distribution: Distribution,
    domain: Domain = Domain.DIRECTION,
) -> Any:
    function = reference.DISTRIBUTIONS[distribution.value]
    domain_word = reference.DOMAINS[domain.value]
    return function(numel, key=key, tensor_id=tensor_id, offset=offset, domain=domain_word)


# ------------------------------------------------------------------------------------ one pass


def expected_pass(
    stored: Tensor,
    outputs: Sequence[Tensor],
    segments: Sequence[Segment],
    updates: Sequence[Update],
    directions: Sequence[tuple[int, float]],
    write_back: Rounding | None,
    distribution: Distribution,
    domain: Domain,
) -> None:
    """What `ops.update_perturb` does, by the reference, in place.

    `outputs`: plain, then plus and minus of each direction.
    """
    for s in segments:
        where = slice(s.begin, s.begin + s.numel)
        words = reference.rounding_words(
            s.numel, key=ROUNDING_KEY, tensor_id=s.tensor_id, offset=s.offset
        )
        w = stored[where].float().numpy()
        for u in updates:
            if u.round_first is Rounding.NEAREST:
                w = reference.round_nearest(w, stored.dtype).float().numpy()
            elif u.round_first is Rounding.STOCHASTIC:
                drawn = reference.rounding_words(
                    s.numel, key=u.rounding_key, tensor_id=s.tensor_id, offset=s.offset
                )
                w = reference.round_stochastic(w, stored.dtype, drawn).float().numpy()
            z = draw(s.numel, u.key, s.tensor_id, s.offset, distribution, domain)
            w = reference.updated(w, z, u.coefficient, u.decay if s.decays else 1.0)
        if write_back is Rounding.NEAREST:
            stored[where] = reference.round_nearest(w, stored.dtype)
        elif write_back is Rounding.STOCHASTIC:
            stored[where] = reference.round_stochastic(w, stored.dtype, words)
        if write_back is not None:
            w = stored[where].float().numpy()
        moved = [w]
        for key, eps in directions:
            z = draw(s.numel, key, s.tensor_id, s.offset, distribution, domain)
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
        offset = 4 * draw_from(st.one_of(st.integers(0, 600), st.integers(2**32 - 300, 2**32)))
        segments.append(Segment(begin, numel, tensor_id, draw_from(st.booleans()), offset))
        end = begin + numel
    return segments, end + draw_from(st.integers(0, 130))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slab=slabs(),
    storage=st.sampled_from(DTYPES),
    compute=st.sampled_from(DTYPES),
    variant=st.sampled_from(VARIANTS),
    distribution=st.sampled_from(Distribution),
    domain=st.sampled_from(Domain),
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
    storage: torch.dtype,
    compute: torch.dtype,
    variant: str,
    distribution: Distribution,
    domain: Domain,
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
    stored = torch.randn(numel).to(storage)
    outputs = [torch.randn(numel).to(compute) for _ in range(1 + 2 * directions)]
    expected = [stored.clone(), *(output.clone() for output in outputs)]
    expected_pass(
        expected[0], expected[1:], segments, pending, along, write_back, distribution, domain
    )
    # Outputs that are not asked for stay as they are.
    for i, output in enumerate(outputs):
        if not wanted[i]:
            expected[1 + i] = output.clone()

    actual = [x.to(device) for x in (stored, *outputs)]
    asked = [x if wanted[i] else None for i, x in enumerate(actual[1:])]
    before = _C.simd()
    _C.set_simd(variant)
    try:
        ops.update_perturb(
            actual[0],
            segments=ops.segment_table(segments, device),
            updates=ops.update_table(pending, device) if pending else None,
            plain=asked[0],
            directions=[
                Direction(key, eps, asked[1 + 2 * k], asked[2 + 2 * k])
                for k, (key, eps) in enumerate(along)
            ],
            write_back=write_back,
            rounding_key=ROUNDING_KEY,
            distribution=distribution,
            domain=domain,
        )
    finally:
        _C.set_simd(before)
    names = ["stored", "plain", *(f"{side} {k}" for k in range(directions) for side in "+-")]
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_same_bits(a, e, name)


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("storage", DTYPES, ids=str)
def test_large_pass_is_made_of_operations_on_tensors(
    simd: str, storage: torch.dtype, distribution: Distribution
) -> None:
    """Large enough that results go past the caches: one huge tensor and many small ones."""
    sizes = [(1 << 22) + 37, *itertools.repeat(75, 40)]
    segments, begin = [], 0
    for i, numel in enumerate(sizes):
        segments.append(Segment(begin, numel, i))
        begin = -(-(begin + numel) // 128) * 128
    stored = torch.randn(begin).to(storage)
    plus, minus = torch.zeros(begin), torch.zeros(begin)
    original = stored.clone()

    ops.update_perturb(
        stored,
        segments=ops.segment_table(segments),
        updates=ops.update_table([Update(KEY, 0.01 * 0.5, 1 - 0.01 * 0.1)]),
        directions=[Direction(KEY + 1, 1e-3, plus, minus)],
        write_back=Rounding.STOCHASTIC,
        rounding_key=ROUNDING_KEY,
        distribution=distribution,
    )

    for s in segments:
        where = slice(s.begin, s.begin + s.numel)
        w = original[where].clone()
        tensor = {"tensor_id": s.tensor_id, "distribution": distribution}
        step = {"lr": 0.01, "projected_grad": 0.5, "weight_decay": 0.1}
        rounding = {"rounding": Rounding.STOCHASTIC, "rounding_key": ROUNDING_KEY}
        ops.update_(w, key=KEY, **tensor, **step, **rounding)
        assert_same_bits(stored[where], w, f"stored {s.tensor_id}")
        for name, output, eps in (("plus", plus, 1e-3), ("minus", minus, -1e-3)):
            moved = ops.perturb_(ops.unpack(w), key=KEY + 1, eps=eps, **tensor)
            assert_same_bits(output[where], moved, f"{name} {s.tensor_id}")


def test_more_than_eight_directions_see_the_weights_that_were_written_back(
    device: torch.device,
) -> None:
    n = 1000
    stored = torch.randn(n).bfloat16().to(device)
    outputs = torch.zeros(20, 2, n, device=device)
    ops.update_perturb(
        stored,
        segments=ops.segment_table([Segment(0, n, 7)], device),
        updates=ops.update_table([Update(KEY, 0.25)], device),
        directions=[Direction(k, 1e-2, *outputs[k]) for k in range(20)],
        write_back=Rounding.STOCHASTIC,
        rounding_key=ROUNDING_KEY,
    )
    for k in range(20):
        for output, eps in zip(outputs[k], (1e-2, -1e-2), strict=True):
            moved = ops.perturb_(ops.unpack(stored), key=k, tensor_id=7, eps=eps)
            assert_same_bits(output, moved, f"direction {k}")


def test_an_output_may_be_the_slab_itself(device: torch.device) -> None:
    n = 5000
    original = torch.randn(n).bfloat16().to(device)
    stored, minus = original.clone(), torch.empty_like(original)
    ops.update_perturb(
        stored,
        segments=ops.segment_table([Segment(0, n, 7)], device),
        directions=[Direction(KEY, 1e-2, stored, minus)],
    )
    assert_same_bits(stored, ops.perturb_(original.clone(), key=KEY, tensor_id=7, eps=1e-2))
    assert_same_bits(minus, ops.perturb_(original.clone(), key=KEY, tensor_id=7, eps=-1e-2))


def test_many_updates_apply_in_order(device: torch.device) -> None:
    n, count = 300, 50
    w = torch.randn(n).to(device)
    expected = w.clone()
    for k in range(count):
        ops.update_(expected, key=k, tensor_id=7, lr=1e-2, projected_grad=float(k - 20))
    ops.update_perturb(
        w,
        segments=ops.segment_table([Segment(0, n, 7)], device),
        updates=ops.update_table([Update(k, 1e-2 * (k - 20)) for k in range(count)], device),
        write_back=Rounding.NEAREST,
    )
    assert_same_bits(w, expected)


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_pass_of_many_updates_is_as_many_steps_written_back(
    dtype: torch.dtype, rounding: Rounding, device: torch.device
) -> None:
    """What replays a run: a pass whose updates round where the steps did."""
    n, count = 5000, 40
    w = (torch.randn(n) * 1e-2).to(dtype).to(device)
    stepped = w.clone()
    segments = ops.segment_table([Segment(0, n, 7)], device)
    for k in range(count):
        ops.update_perturb(
            stepped,
            segments=segments,
            updates=ops.update_table([Update(k, 1e-4 * (k - 20), 0.999)], device),
            write_back=rounding,
            rounding_key=1000 + k,
        )
    updates = [
        Update(k, 1e-4 * (k - 20), 0.999, rounding if k else None, 1000 + k - 1 if k else 0)
        for k in range(count)
    ]
    ops.update_perturb(
        w,
        segments=segments,
        updates=ops.update_table(updates, device),
        write_back=rounding,
        rounding_key=1000 + count - 1,
    )
    assert_same_bits(w, stepped)


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            w = torch.randn(100_003).half()
            results.append(
                ops.update_(
                    w,
                    key=KEY,
                    tensor_id=7,
                    lr=1.0,
                    projected_grad=0.1,
                    rounding=Rounding.STOCHASTIC,
                )
            )
    finally:
        torch.set_num_threads(threads)
    for w in results[1:]:
        assert_same_bits(w, results[0])


def test_flushing_of_subnormals_does_not_matter(simd: str) -> None:
    """torch.set_flush_denormal holds for torch's own operations, not for these."""
    w = torch.arange(1, 1 << 23, 9973, dtype=torch.int32).view(torch.float32)
    expected = ops.perturb_(w.clone(), key=KEY, tensor_id=7, eps=1.2e-38)
    assert (expected != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        actual = ops.perturb_(w.clone(), key=KEY, tensor_id=7, eps=1.2e-38)
        halves = ops.pack(w, torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)
    assert_same_bits(halves, w.bfloat16())


# ---------------------------------------------------------------------- operations on a tensor


@pytest.mark.parametrize("numel", SIZES, ids=lambda n: f"n={n}")
@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_matches_float64(
    device: torch.device, dtype: torch.dtype, distribution: Distribution, numel: int
) -> None:
    lr, projected_grad, weight_decay = 1e-2, 0.7, 0.1
    w = torch.randn(numel).to(device, dtype)
    draw_ = ops.normal if distribution is Distribution.GAUSSIAN else ops.rademacher
    z = draw_(numel, key=KEY, tensor_id=7, offset=8, device=device).double()
    kept = w.double() * (1 - lr * weight_decay)
    change = lr * projected_grad * z
    exact = kept - change

    ops.update_(
        w,
        key=KEY,
        tensor_id=7,
        lr=lr,
        projected_grad=projected_grad,
        weight_decay=weight_decay,
        offset=8,
        distribution=distribution,
    )

    # Half a unit each: of the decay and its product, of the coefficient, of the sum; then of the
    # storage. The last term is for products of these errors.
    half = torch.finfo(torch.float32).eps / 2
    bound = half * (2 * kept.abs() + change.abs() + exact.abs())
    bound = bound + torch.finfo(dtype).eps / 2 * (exact.abs() + bound) * (dtype != torch.float32)
    bound = bound * (1 + 2**-20) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (w.double() - exact).abs()
    assert (error <= bound).all(), f"worst {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_and_perturb_are_those_of_the_reference(
    device: torch.device, simd: str, dtype: torch.dtype, distribution: Distribution
) -> None:
    original = torch.randn(37, 5, 11).to(dtype)
    z = draw(original.numel(), KEY, 7, 12, distribution).reshape(original.shape)
    same = {"key": KEY, "tensor_id": 7, "offset": 12, "distribution": distribution}

    moved = original.clone().to(device)
    assert ops.perturb_(moved, eps=1e-3, **same) is moved
    expected = reference.round_nearest(reference.perturbed(original, z, 1e-3), dtype)
    assert_same_bits(moved, expected)

    step = {"lr": 1e-2, "projected_grad": 0.7, "weight_decay": 0.1}
    changed = reference.updated(original, z, 1e-2 * 0.7, 1 - 1e-2 * 0.1)
    updated = original.clone().to(device)
    assert ops.update_(updated, **step, **same) is updated
    assert_same_bits(updated, reference.round_nearest(changed, dtype))
    words = reference.rounding_words(original.numel(), key=5, tensor_id=7, offset=12)
    updated = ops.update_(
        original.clone().to(device), **step, **same, rounding=Rounding.STOCHASTIC, rounding_key=5
    )
    assert_same_bits(updated, reference.round_stochastic(changed, dtype, words))


def test_negative_eps_undoes_a_perturbation(device: torch.device) -> None:
    w = torch.randn(10_000, device=device)
    original = w.clone()
    ops.perturb_(w, key=KEY, tensor_id=7, eps=1e-3)
    assert (w - original).abs().max() > 1e-3
    ops.perturb_(w, key=KEY, tensor_id=7, eps=-1e-3)
    # Two roundings, each of half a unit of a number no larger than the sum below.
    bound = torch.finfo(torch.float32).eps * (original.abs() + 1e-3 * 5.77)
    assert ((w - original).abs() <= bound).all()


@pytest.mark.parametrize("cut", [4, 64, 100, 2048, 5000])
def test_slices_of_a_tensor_are_updated_as_the_tensor_is(device: torch.device, cut: int) -> None:
    whole = torch.randn(9001, device=device)
    parts = whole.clone()
    step = {"key": KEY, "tensor_id": 7, "lr": 1.0, "projected_grad": 0.3}
    ops.update_(whole, **step)
    ops.update_(parts[:cut], **step)
    ops.update_(parts[cut:], offset=cut, **step)  # not aligned for vectors
    assert_same_bits(parts, whole)


def test_autograd_hears_of_writes() -> None:
    w = torch.randn(10, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        ops.perturb_(w, key=KEY, tensor_id=7, eps=1e-3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_example_is_the_reference_loop() -> None:
    """examples/mezo_loop.py: the plain loop made of these operations."""
    path = Path(__file__).parents[2] / "examples" / "mezo_loop.py"
    mezo = runpy.run_path(str(path))["mezo"]
    data = batches("llama-tied", 3)
    model = tiny("llama-tied")
    losses = list(mezo(model, data, lr=1e-2, eps=1e-3, seed=5))
    expected = reference.mezo(tiny("llama-tied"), data, lr=1e-2, eps=1e-3, seed=5)
    assert losses == [(plus + minus) / 2 for ((plus, minus),) in expected.losses]
    for name, weight in model.named_parameters():
        assert_same_bits(weight, expected.weights[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_tensors_are_fine(device: torch.device, dtype: torch.dtype) -> None:
    empty = torch.empty(0, 3, dtype=dtype, device=device)
    assert ops.perturb_(empty, key=0, tensor_id=0, eps=1.0).shape == (0, 3)
    assert ops.update_(empty, key=0, tensor_id=0, lr=1.0, projected_grad=1.0).shape == (0, 3)
    assert ops.unpack(empty).shape == (0, 3)
    assert ops.pack(ops.unpack(empty), dtype).dtype == dtype
    assert ops.normal(0, key=0, tensor_id=0, dtype=dtype, device=device).shape == (0,)
    flat = empty.view(-1)
    for rows in ([], [Segment(0, 0, 7), Segment(0, 0, 8)]):
        ops.update_perturb(
            flat,
            segments=ops.segment_table(rows, device),
            updates=ops.update_table([], device),
            plain=flat.clone(),
            write_back=Rounding.NEAREST,
        )


# ------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nearest_rounding_is_torchs_around_every_target(
    device: torch.device, simd: str, dtype: torch.dtype
) -> None:
    """Every number of the format, and what lies just around the middle to the next one."""
    targets = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype).float()
    above = (torch.arange(1 << 16) & 0x7FFF) + 1
    above = above.clamp(max=0x7FFF).to(torch.int16).view(dtype).double()
    finite = targets.isfinite() & above.isfinite()
    middle = ((targets.double().abs() + above) / 2)[finite].float()  # exact
    step = torch.tensor([-1, 0, 1], dtype=torch.int32)
    around = (middle.view(torch.int32)[:, None] + step).view(torch.float32).flatten()
    near = (targets[targets.isfinite()].abs().view(torch.int32)[:, None] + step[1:]).flatten()
    overflow = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps * torch.arange(-1, 2, 0.125))
    some = torch.cat([targets, around, near.view(torch.float32), overflow.float()])
    weights = torch.cat([some, -some])

    packed = ops.pack(weights.to(device), dtype).cpu()

    expected = weights.to(dtype)
    not_a_number = weights.isnan()
    assert_same_bits(packed[~not_a_number], expected[~not_a_number])
    assert packed[not_a_number].isnan().all()
    assert len(packed[not_a_number].view(torch.int16).unique()) == 1, "one NaN a format"


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_that_of_the_reference_for_any_bits(
    device: torch.device, simd: str, dtype: torch.dtype, rounding: Rounding
) -> None:
    words = reference.rounding_words(1 << 18, key=1, tensor_id=2, offset=4)
    weights = torch.from_numpy(words.view(np.float32).copy())  # all exponents, NaN, infinity
    packed = ops.pack(weights.to(device), dtype, rounding=rounding, key=KEY, tensor_id=7, offset=8)
    if rounding is Rounding.NEAREST:
        expected = reference.round_nearest(weights, dtype)
    else:
        words = reference.rounding_words(1 << 18, key=KEY, tensor_id=7, offset=8)
        expected = reference.round_stochastic(weights, dtype, words)
    assert_same_bits(packed, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack_is_exact_on_every_number(
    device: torch.device, simd: str, dtype: torch.dtype
) -> None:
    count = 1 << 16
    bits = torch.arange(count).to(torch.int32)
    if dtype == torch.float32:
        packed = (bits * 65_521).view(torch.float32)
    else:
        packed = bits.to(torch.int16).view(dtype)
    unpacked = ops.unpack(packed.to(device)).cpu()
    assert unpacked.dtype == torch.float32
    number = ~packed.isnan()
    assert_same_bits(unpacked[number], packed[number].float())
    assert unpacked[~number].isnan().all()


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_values_never_move(
    device: torch.device, simd: str, dtype: torch.dtype, rounding: Rounding
) -> None:
    if dtype == torch.float32:
        values = torch.randn(1 << 16)
    else:
        values = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
        values = values[~values.isnan()]
    for key in range(8):
        packed = ops.pack(values.float().to(device), dtype, rounding=rounding, key=key)
        assert_same_bits(packed, values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.77])
@pytest.mark.parametrize("scale", ["normal", "large", "subnormal", "smallest"])
def test_stochastic_rounding_is_right_on_average(
    device: torch.device, simd: str, dtype: torch.dtype, part: float, scale: str
) -> None:
    info = torch.finfo(dtype)
    low = {
        "normal": 0.7,
        "large": info.max * 0.99,
        "subnormal": info.smallest_normal * 0.3,
        "smallest": 0.0,
    }[scale]
    lower = torch.tensor(low).to(dtype)
    upper = (lower.view(torch.int16) + 1).view(dtype)
    spacing = upper.double() - lower.double()
    w = (lower.double() + part * spacing).float()
    draws = 100_000
    for sign in (1, -1):
        packed = ops.pack(
            (sign * w).expand(draws).contiguous().to(device),
            dtype,
            rounding=Rounding.STOCHASTIC,
            key=KEY,
            tensor_id=7,
        )
        up = packed.cpu() == sign * upper
        assert (up | (packed.cpu() == sign * lower)).all(), "only the two neighbours"
        odds = float((w.double() - lower.double()) / spacing)
        error = abs(float(up.double().mean()) - odds)
        assert error <= 5 * math.sqrt(odds * (1 - odds) / draws)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_overflows_where_nearest_does(
    device: torch.device, simd: str, dtype: torch.dtype
) -> None:
    largest = torch.finfo(dtype).max
    before = (torch.tensor(largest, dtype=dtype).view(torch.int16) - 1).view(dtype)
    spacing = largest - float(before)
    limit = torch.tensor(largest + spacing / 2)  # a tie, which goes to the even neighbour
    below = torch.nextafter(limit, torch.tensor(0.0))
    for w, expected in [(below, largest), (limit, math.inf), (-below, -largest)]:
        packed = ops.pack(
            w.expand(1000).contiguous().to(device), dtype, rounding=Rounding.STOCHASTIC, key=KEY
        )
        assert (packed.float() == expected).all()


def test_small_updates_survive_stochastic_rounding_only(device: torch.device) -> None:
    """An update of a thousandth of bfloat16's spacing, 2000 times, moves weights by two of it."""
    results = {}
    for rounding in Rounding:
        w = torch.ones(20_000, dtype=torch.bfloat16, device=device)
        for step in range(2000):
            ops.update_(
                w,
                key=0,
                tensor_id=7,
                lr=2.0**-7 / 1000,
                projected_grad=1.0,
                distribution=Distribution.RADEMACHER,
                rounding=rounding,
                rounding_key=ops.direction_key(0, step, 0),
            )
        z = ops.rademacher(20_000, key=0, tensor_id=7, device=device)
        results[rounding] = float(((1 - w.float()) * z)[z < 0].mean())
    assert results[Rounding.NEAREST] == 0
    assert abs(results[Rounding.STOCHASTIC] - 2 * 2.0**-7) < 0.05 * 2.0**-7


# ----------------------------------------------------------------------------------- bad input


def tensor(numel: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(numel, dtype=dtype)


def perturb(weights: Any = None, **changes: Any) -> None:
    weights = tensor() if weights is None else weights
    ops.perturb_(weights, **{"key": 1, "tensor_id": 0, "eps": 1e-3} | changes)


def update(weights: Any = None, **changes: Any) -> None:
    weights = tensor() if weights is None else weights
    right = {"key": 1, "tensor_id": 0, "lr": 1e-3, "projected_grad": 1.0}
    ops.update_(weights, **right | changes)


def segment(**changes: Any) -> None:
    ops.segment_table([Segment(**{"begin": 0, "numel": 4, "tensor_id": 0} | changes)])


def one_pass(stored: Any = None, **changes: Any) -> None:
    stored = tensor() if stored is None else stored
    ops.update_perturb(stored, **{"segments": ops.segment_table([Segment(0, 256, 0)])} | changes)


def overlapping(offset: int) -> None:
    memory = torch.zeros(1024)
    stored, plus = memory[:256], memory[offset : offset + 256]
    one_pass(stored, directions=[Direction(1, 1e-3, plus)])


def same_output_twice() -> None:
    out = tensor()
    one_pass(directions=[Direction(1, 1e-3, out, out)])


def alias_with(stored: Tensor, count: int = 1, **changes: Any) -> None:
    directions = [Direction(1, 1e-3, stored)] + [
        Direction(k, 1e-3, tensor()) for k in range(2, count + 1)
    ]
    one_pass(stored, directions=directions, **changes)


NAN, INF = math.nan, math.inf
BAD: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    # noise
    ("numel", lambda: ops.normal(-1, key=0, tensor_id=0), ValueError, r"numel .* got -1"),
    ("numel type", lambda: ops.normal(1.5, key=0, tensor_id=0), TypeError, r"numel .* 1\.5"),
    ("key", lambda: ops.normal(4, key=-1, tensor_id=0), ValueError, r"key .* got -1"),
    ("key type", lambda: ops.normal(4, key="a", tensor_id=0), TypeError, r"key .* 'a'"),
    ("large key", lambda: ops.rademacher(4, key=2**64, tensor_id=0), ValueError, r"key .* 2\*\*64"),
    ("tensor id", lambda: ops.normal(4, key=0, tensor_id=2**32), ValueError, "tensor_id .* 429"),
    ("offset", lambda: ops.normal(4, key=0, tensor_id=0, offset=2), ValueError, "offset .* got 2"),
    ("offset < 0", lambda: ops.normal(4, key=0, tensor_id=0, offset=-4), ValueError, "offset .*-4"),
    (
        "counter's range",
        lambda: ops.normal(8, key=0, tensor_id=0, offset=2**63 - 4),
        ValueError,
        r"offset \+ numel .* past the counter's range",
    ),
    (
        "dtype",
        lambda: ops.normal(4, key=0, tensor_id=0, dtype=torch.float64),
        TypeError,
        r"dtype .* got torch\.float64",
    ),
    (
        "direction",
        lambda: ops.direction_key(0, 0, 2**32),
        ValueError,
        "direction .* got 4294967296",
    ),
    ("seed", lambda: ops.direction_key(-1, 0, 0), ValueError, "seed .* got -1"),
    # operations on tensors
    ("float64", lambda: perturb(tensor(dtype=torch.float64)), TypeError, "weights .* got Double"),
    ("int8", lambda: update(tensor(dtype=torch.int8)), TypeError, "weights .* got Char"),
    ("strides", lambda: perturb(torch.zeros(8, 8).t()), ValueError, "weights must be contiguous"),
    ("expanded", lambda: update(torch.zeros(1).expand(8)), ValueError, "weights must be contig"),
    ("meta", lambda: perturb(torch.zeros(8, device="meta")), ValueError, "weights .* got meta"),
    ("NaN eps", lambda: perturb(eps=NAN), ValueError, "eps .* got nan"),
    ("infinite eps", lambda: perturb(eps=INF), ValueError, "eps .* got inf"),
    ("eps beyond float32", lambda: perturb(eps=1e39), ValueError, r"eps .* got 1e\+39"),
    ("past the end", lambda: perturb(offset=2**63 - 4), ValueError, "past the counter's range"),
    ("NaN lr", lambda: update(lr=NAN), ValueError, "lr must be finite, got nan"),
    ("NaN gradient", lambda: update(projected_grad=NAN), ValueError, "projected_grad .* got nan"),
    ("decay", lambda: update(weight_decay=INF), ValueError, "weight_decay .* got inf"),
    ("coefficient", lambda: update(lr=1e30, projected_grad=1e30), ValueError, r"lr \* projected"),
    ("distribution", lambda: perturb(distribution="normal"), TypeError, "distribution .* 'normal'"),
    ("rounding", lambda: update(rounding=None), TypeError, "rounding must be a Rounding, got None"),
    ("rounding key", lambda: update(rounding_key=-1), ValueError, "rounding_key .* got -1"),
    ("pack dtype", lambda: ops.pack(tensor(), torch.int8), TypeError, r"dtype .* torch\.int8"),
    (
        "pack weights",
        lambda: ops.pack(tensor(dtype=torch.half), torch.half),
        TypeError,
        "weights must be float32, got Half",
    ),
    ("unpack", lambda: ops.unpack(tensor(dtype=torch.int32)), TypeError, "packed .* got Int"),
    # tables
    ("begin", lambda: segment(begin=64), ValueError, r"segments\[0\].begin .* 128, got 64"),
    ("begin < 0", lambda: segment(begin=-128), ValueError, r"segments\[0\].begin .* got -128"),
    ("segment numel", lambda: segment(numel=-1), ValueError, r"segments\[0\].numel .* got -1"),
    ("segment offset", lambda: segment(offset=6), ValueError, r"segments\[0\].offset .* got 6"),
    ("segment id", lambda: segment(tensor_id=-1), ValueError, r"segments\[0\].tensor_id .* got -1"),
    ("segment end", lambda: segment(offset=2**63 - 4, numel=8), ValueError, "past the counter's"),
    (
        "overlapping segments",
        lambda: ops.segment_table([Segment(0, 129, 0), Segment(128, 1, 1)]),
        ValueError,
        r"segments\[1\].begin is 128, inside the segment before it, which ends at 129",
    ),
    (
        "unsorted segments",
        lambda: ops.segment_table([Segment(128, 1, 0), Segment(0, 1, 1)]),
        ValueError,
        r"segments\[1\].begin is 0, inside the segment before it",
    ),
    ("update key", lambda: ops.update_table([Update(2**64, 1)]), ValueError, r"updates\[0\].key"),
    ("update", lambda: ops.update_table([Update(1, NAN)]), ValueError, r"updates\[0\].coefficient"),
    (
        "update decay",
        lambda: ops.update_table([Update(1, 1, INF)]),
        ValueError,
        r"\[0\].decay .*inf",
    ),
    # the pass
    (
        "stored shape",
        lambda: one_pass(torch.zeros(2, 128)),
        ValueError,
        "stored must be a 1-D slab",
    ),
    (
        "stored strides",
        lambda: one_pass(torch.zeros(512)[::2]),
        ValueError,
        "stored must be contig",
    ),
    ("stored dtype", lambda: one_pass(tensor(dtype=torch.int16)), TypeError, "stored .* got Short"),
    (
        "slab too small",
        lambda: one_pass(tensor(255)),
        ValueError,
        r"segments\[0\] ends at 0 \+ 256",
    ),
    ("table dtype", lambda: one_pass(segments=tensor()), TypeError, "segments must be an int64"),
    (
        "table shape",
        lambda: one_pass(updates=torch.zeros(1, 2, dtype=torch.int64)),
        ValueError,
        r"updates must have shape \(n, 4\), got \[1, 2\]",
    ),
    ("plain size", lambda: one_pass(plain=tensor(257)), ValueError, "plain must have 256 elements"),
    (
        "plain dtype",
        lambda: one_pass(plain=tensor(dtype=torch.int8)),
        TypeError,
        "plain .* got Char",
    ),
    (
        "two compute dtypes",
        lambda: one_pass(plain=tensor(), directions=[Direction(1, 1.0, tensor(dtype=torch.half))]),
        TypeError,
        r"directions\[0\].plus must be Float as the other outputs, got Half",
    ),
    (
        "output device",
        lambda: one_pass(plain=torch.zeros(256, device="meta")),
        ValueError,
        "plain must be on cpu as stored, got meta",
    ),
    ("eps 0", lambda: one_pass(directions=[Direction(1, 0.0)]), ValueError, r"\[0\].eps .* got 0"),
    ("eps < 0", lambda: one_pass(directions=[Direction(1, -1.0)]), ValueError, r"\[0\].eps .*-1"),
    ("eps NaN", lambda: one_pass(directions=[Direction(1, NAN)]), ValueError, r"\[0\].eps .*nan"),
    ("direction key", lambda: one_pass(directions=[Direction(-1, 1.0)]), ValueError, r"\[0\].key"),
    ("write_back", lambda: one_pass(write_back=True), TypeError, "write_back must be a Rounding"),
    ("overlap", lambda: overlapping(128), ValueError, r"plus and stored overlap in memory"),
    ("same output twice", same_output_twice, ValueError, r"plus and .*minus overlap in memory"),
    (
        "slab written twice",
        lambda: alias_with(tensor(), write_back=Rounding.NEAREST),
        ValueError,
        "overlap in memory, which needs equal dtypes, no write_back and at most 8",
    ),
    ("slab read later", lambda: alias_with(tensor(), 9), ValueError, "at most 8 directions"),
    ("instruction set", lambda: _C.set_simd("mmx"), ValueError, "name must be one of .* got mmx"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_refused_by_name(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_refused_input_changes_nothing() -> None:
    stored, plus, minus = torch.ones(256), torch.ones(256), torch.ones(255)
    with pytest.raises(ValueError, match="minus must have 256 elements"):
        one_pass(stored, directions=[Direction(1, 1.0, plus, minus)], write_back=Rounding.NEAREST)
    assert (stored == 1).all()
    assert (plus == 1).all()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_table_that_was_moved_to_the_gpu_is_checked(device: torch.device) -> None:
    segments = ops.segment_table([Segment(0, 256, 0)]).to(device)
    one_pass(torch.zeros(256, device=device), segments=segments)
    with pytest.raises(ValueError, match="segments end at 256, beyond stored, which has 255"):
        one_pass(torch.zeros(255, device=device), segments=segments)
    with pytest.raises(ValueError, match="segments must be on cuda"):
        one_pass(torch.zeros(256, device=device), segments=segments.cpu())


@pytest.mark.skipif(
    not torch.cuda.is_available() or ops.cuda_built(),
    reason="needs a GPU that this build cannot drive",
)
def test_a_gpu_without_kernels_is_named() -> None:
    with pytest.raises(RuntimeError, match="zo2ext was built without CUDA; reinstall it"):
        perturb(torch.zeros(4, device="cuda"))
