"""The noise contract, version 1: published answers, the reference, statistics, error in ULP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numeric import assert_same_bits
from torch import Tensor

from zo2ext import ops
from zo2ext.ops import _C

KEY = 0x0123456789ABCDEF
DISTRIBUTIONS = [ops.normal, ops.rademacher]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = _C.simd_variants()


@pytest.fixture(params=VARIANTS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = _C.simd()
    _C.set_simd(request.param)
    yield request.param
    _C.set_simd(before)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


# ------------------------------------------------------------------------------ known answers


def known_answers() -> list[tuple[list[int], int, list[int]]]:
    path = Path(__file__).parent / "data" / "philox4x32.txt"
    rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    words = [[int(word, 16) for word in row] for row in rows]
    return [(row[:4], row[4] | row[5] << 32, row[6:]) for row in words]


@pytest.mark.parametrize(("counter", "key", "expected"), known_answers(), ids=["0", "f", "pi"])
def test_philox_gives_the_published_answers(
    counter: list[int], key: int, expected: list[int]
) -> None:
    assert list(_C.philox4x32_10(counter, key)) == expected


def test_signs_are_the_bits_of_the_published_answer(simd: str) -> None:
    """Counter 0 and key 0 are element 0 of tensor 0."""
    words = known_answers()[0][2]
    minus = [word >> bit & 1 for word in words for bit in range(32)]
    z = ops.rademacher(128, key=0, tensor_id=0)
    assert z.tolist() == [1.0 - 2.0 * bit for bit in minus]


@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("offset", [0, 4, 124, 2**34 - 2048, 2**39 - 2048, 2**62])
def test_noise_is_that_of_the_reference(device: torch.device, draw: Any, offset: int) -> None:
    n = 5003  # past 2^34 and 2^39, where counters carry into their high word
    z = draw(n, key=KEY, tensor_id=2**32 - 1, offset=offset, device=device)
    expected = getattr(reference, draw.__name__)(n, key=KEY, tensor_id=2**32 - 1, offset=offset)
    assert_same_bits(z, torch.from_numpy(expected))


@pytest.mark.parametrize("domain", ops.Domain)
@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_noise_of_a_domain_is_that_of_the_reference(
    device: torch.device, simd: str, draw: Any, domain: ops.Domain
) -> None:
    where: dict[str, int] = {"key": KEY, "tensor_id": 7, "offset": 2**34 - 128}
    z = draw(300, **where, device=device, domain=domain)
    expected = getattr(reference, draw.__name__)(
        300, **where, domain=reference.DOMAINS[domain.value]
    )
    assert_same_bits(z, torch.from_numpy(expected))


def test_domain_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match="domain must be a Domain, got 3"):
        ops.normal(1, key=0, tensor_id=0, domain=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seed", "step", "direction"), [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**32 - 1), (3, 2**33 + 1, 2)]
)
def test_direction_key_is_that_of_the_reference(seed: int, step: int, direction: int) -> None:
    expected = reference.direction_key(seed, step, direction)
    assert ops.direction_key(seed, step, direction) == expected


# ---------------------------------------------------------------- one function of the element


@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_instruction_sets_agree_on_2_to_the_24(draw: Any) -> None:
    n = 1 << 24
    before = _C.simd()
    try:
        _C.set_simd("plain")
        expected = draw(n, key=KEY, tensor_id=7)
        for name in VARIANTS[1:]:
            _C.set_simd(name)
            assert torch.equal(bits(draw(n, key=KEY, tensor_id=7)), bits(expected)), name
    finally:
        _C.set_simd(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_every_tail_and_offset_is_part_of_the_whole(
    simd: str, draw: Any, dtype: torch.dtype
) -> None:
    whole = torch.from_numpy(
        getattr(reference, draw.__name__)(2600, key=KEY, tensor_id=7, offset=2**20)
    ).to(dtype)
    for length in range(301):
        for offset in (0, 4, 20, 64, 124, 1020, 2044):
            z = draw(length, key=KEY, tensor_id=7, offset=2**20 + offset, dtype=dtype)
            expected = whole[offset : offset + length]
            assert torch.equal(bits(z), bits(expected)), f"length {length}, offset {offset}"


@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_threads_do_not_matter(draw: Any) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            results.append(draw(300_001, key=KEY, tensor_id=7))
    finally:
        torch.set_num_threads(threads)
    for z in results[1:]:
        assert_same_bits(z, results[0])


def test_noise_ignores_and_keeps_the_state_of_generators() -> None:
    state = torch.get_rng_state()
    first = ops.normal(100, key=KEY, tensor_id=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert_same_bits(ops.normal(100, key=KEY, tensor_id=7), first)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_device_and_host_agree_on_2_to_the_28(device: torch.device, draw: Any) -> None:
    n = 1 << 24
    for offset in range(0, 1 << 28, n):
        on_device = draw(n, key=KEY, tensor_id=7, offset=offset, device=device)
        on_host = draw(n, key=KEY, tensor_id=7, offset=offset)
        assert torch.equal(bits(on_device).cpu(), bits(on_host)), f"from element {offset} on"


# ------------------------------------------------------------------------------- distribution


def test_normals_follow_the_normal_distribution() -> None:
    """Kolmogorov-Smirnov and moments on 10^8 normals; the bounds are five standard errors."""
    chunk, chunks, bins = 1 << 22, 24, 1 << 16  # 1.007e8
    n = chunk * chunks
    histogram = torch.zeros(bins, dtype=torch.float64)
    powers = torch.zeros(4, dtype=torch.float64)
    largest = 0.0
    for i in range(chunks):
        z = ops.normal(chunk, key=ops.direction_key(1, i, 0), tensor_id=i, offset=4 * i)
        largest = max(largest, float(z.abs().max()))
        square = z.square()
        moments = (z.sum(), square.sum(), (square * z).sum(), square.square_().sum())
        powers += torch.stack([m.double() for m in moments])
        # The exact distribution function makes uniform numbers of normal ones.
        uniform = z.double().mul_(-math.sqrt(0.5)).erfc_().mul_(0.5)
        histogram += torch.histc(uniform, bins=bins, min=0.0, max=1.0)
    assert histogram.sum() == n
    assert largest <= 5.77

    exact = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    distance = float((histogram.cumsum(0) / n - exact).abs().max())
    assert distance * math.sqrt(n) < 1.63, "the hypothesis of a normal distribution falls at 1%"
    chi_square = float(((histogram - n / bins) ** 2).sum()) / (n / bins)
    assert abs(chi_square - bins) < 5 * math.sqrt(2 * bins)

    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = float(powers[power - 1]) / n - mean
        assert abs(error) < 5 * math.sqrt(variance / n), f"mean of z^{power}"


def test_signs_are_even() -> None:
    n = 1 << 24
    total = float(ops.rademacher(n, key=KEY, tensor_id=7).double().sum())
    assert abs(total) < 5 * math.sqrt(n)


@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_streams_are_independent(draw: Any) -> None:
    """Neighbouring keys, tensor ids, steps, and elements show no correlation, nor do squares."""
    n = 1 << 20
    streams = {
        "key": draw(n, key=KEY, tensor_id=7),
        "key + 1": draw(n, key=KEY + 1, tensor_id=7),
        "key, high word": draw(n, key=KEY ^ 1 << 32, tensor_id=7),
        "tensor id": draw(n, key=KEY, tensor_id=8),
        "step": draw(n, key=ops.direction_key(0, 0, 0), tensor_id=7),
        "next step": draw(n, key=ops.direction_key(0, 1, 0), tensor_id=7),
        "direction": draw(n, key=ops.direction_key(0, 0, 1), tensor_id=7),
        "tensor": draw(n, key=KEY, tensor_id=7, offset=n),
        "left": draw(n, key=KEY, tensor_id=7, domain=ops.Domain.LEFT),
        "right": draw(n, key=KEY, tensor_id=7, domain=ops.Domain.RIGHT),
    } | {
        f"{lag} later": draw(n + lag, key=KEY, tensor_id=7)[lag:].clone() for lag in (1, 2, 3, 128)
    }
    bound = 5 / math.sqrt(n)
    for (a, x), (b, y) in combinations(streams.items(), 2):
        assert abs(float((x.double() * y).mean())) < bound, f"{a} and {b}"
        if draw is ops.normal:
            squares = (x.double().square() - 1) * (y.double().square() - 1) / 2
            assert abs(float(squares.mean())) < bound, f"squares of {a} and {b}"


# ------------------------------------------------------------------------- error of functions


def worst_ulps(approximate: Tensor, exact: Tensor) -> float:
    """Largest error in float32 units in the last place of the exact value."""
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    return float(((approximate.double() - exact).abs() / unit).max())


def test_logarithm_is_within_2_ulp_on_every_input() -> None:
    k = torch.arange(1 << 23, dtype=torch.int32)
    exact = -2 * torch.log((2 * k.double() + 1) * 2.0**-24)
    squared = _C.squared_radius(k << 9 | (k & 0x1FF))
    assert worst_ulps(squared, exact) <= 2.0
    assert float(squared.max()) ** 0.5 <= 5.77
    assert float(squared.min()) > 0


def test_cosine_and_sine_are_within_3_ulp() -> None:
    """On every 509th of the 2^30 inputs; csrc/tests/accuracy_check.cpp takes them all."""
    angles = torch.arange(-(1 << 29), 1 << 29, 509, dtype=torch.int32)
    angles = torch.cat([angles, torch.tensor([1 - (1 << 29), -1, 1, (1 << 29) - 1]).int()])
    exact_angles = angles.double() * (math.pi / 2 * 2.0**-30)
    cosine, sine = _C.scaled_cosine_sine(angles & 0x3FFFFFFF)
    assert worst_ulps(cosine, exact_angles.cos() * math.sqrt(0.5)) <= 1.25
    not_zero = angles != 0
    exact = exact_angles.sin() * math.sqrt(0.5)
    assert worst_ulps(sine[not_zero], exact[not_zero]) <= 2.5
    assert np.all(sine[~not_zero].numpy() == 0)


def test_signs_come_from_the_top_bits_of_the_angle_word() -> None:
    """All four sign patterns are equally frequent, whatever the magnitudes."""
    z = ops.normal(1 << 20, key=KEY, tensor_id=7).view(-1, 2)
    patterns = (z[:, 0] < 0).int() * 2 + (z[:, 1] < 0).int()
    counts = torch.bincount(patterns, minlength=4).double()
    expected = len(z) / 4
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()
