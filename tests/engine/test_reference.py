"""The reference against published answers, exact rational arithmetic and torch."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numeric import assert_same_bits, assert_within_ulps, ulp_distance
from reference import (
    direction_key,
    fma,
    mezo,
    normal,
    perturbed,
    philox4x32_10,
    rademacher,
    round_nearest,
    round_stochastic,
    rounding_words,
    updated,
)
from tiny_models import batch, batches, pretrained, tiny
from torch import nn

KEY = 0x0123456789ABCDEF
TENSOR_ID = 7


def float32(values: Any) -> reference.Float32:
    return np.array(values, np.float32)


def uint32(values: Any) -> reference.Uint32:
    return np.array(values, np.uint32)


# ------------------------------------------------------------- a second, slow opinion: Fractions


def rounded(x: Fraction) -> Fraction:
    """x to the nearest float32, ties to even, subnormals included; as an exact number."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if Fraction(2) ** exponent > abs(x):
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    return round(x / quantum) * quantum  # Python rounds halves to even


def exact(x: float) -> Fraction:
    return Fraction(float(x))


def bits(x: Fraction) -> int:
    return int(struct.unpack("<I", struct.pack("<f", float(x)))[0])


def from_bits(word: int) -> Fraction:
    return exact(struct.unpack("<f", struct.pack("<I", word & 0xFFFFFFFF))[0])


def signed(word: int) -> int:
    return word - (word >> 31 << 32)


def root(x: Fraction) -> Fraction:
    """Square root, correctly rounded: 2^100 of it truncated, with what was lost in the last bit."""
    scaled = x * 4**100
    whole = isqrt(scaled.numerator // scaled.denominator)
    return rounded(Fraction(2 * whole + (whole * whole != scaled), 2**101))


def slow_philox(counter: list[int], key: int) -> list[int]:
    """Written from the paper: rounds of two products, key bumped by the Weyl constants."""
    k = [key % 2**32, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [p1 >> 32 ^ counter[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ counter[3] ^ k[1]]
        counter.append(p0 % 2**32)
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return counter


L = (
    "-0x1p+1 0x1.fffffap-1 -0x1.5556fp-1 0x1.0004a6p-1 -0x1.98d39ap-2 0x1.535c98p-2 "
    "-0x1.317d6cp-2 0x1.2502ccp-2 -0x1.65e53ap-3"
)
C = "0x1.6a09e6p-1 -0x1.bea582p-1 0x1.6f49fcp-3 -0x1.dcdc36p-7 0x1.febcdcp-13"
S = "0x1.1c5832p+0 -0x1.d3baap-2 0x1.cdad7ep-5 -0x1.af88d2p-9"


def horner(constants: str, x: Fraction) -> Fraction:
    *rest, value = (exact(float.fromhex(c)) for c in constants.split())
    for c in reversed(rest):
        value = rounded(value * x + c)
    return value


def slow_pair(x0: int, x1: int) -> list[Fraction]:
    """The Gaussian of docs/contracts.md, line by line."""
    u = rounded(from_bits(0x3F800000 | x0 >> 9) - exact(float.fromhex("0x1.fffffep-1")))
    assert u == Fraction(2 * (x0 >> 9) + 1, 2**24)
    s = (bits(u) - 0x3F3504F3) & 0xFF800000
    f = rounded(from_bits(bits(u) - s) - 1)
    tail = rounded(f * horner(L, f))
    r = root(rounded(rounded(Fraction(signed(s))) * exact(float.fromhex("-0x1.62e43p-23")) + tail))
    a = rounded(rounded(Fraction(signed(x1 << 2 & 0xFFFFFFFF))) / 2**32)
    q = rounded(a * a)
    c = horner(C, q)
    d = rounded(a * horner(S, q))
    first, second = rounded(r * rounded(c - d)), rounded(r * rounded(c + d))
    return [-first if x1 >> 31 else first, -second if x1 >> 30 & 1 else second]


def slow_normal(element: int, key: int, tensor_id: int) -> float:
    quad = element // 4
    x = slow_philox([quad % 2**32, quad >> 32, tensor_id, 0], key)
    return float((slow_pair(x[0], x[1]) + slow_pair(x[2], x[3]))[element % 4])


# ------------------------------------------------------------------------------------- Philox


KNOWN_ANSWERS = [  # counter, key, words: Random123's kat_vectors, philox4x32 10
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["0", "f", "pi"])
def test_philox_gives_the_published_answers(counter: Any, key: int, words: list[int]) -> None:
    assert [int(w) for w in philox4x32_10(tuple(counter), key)] == words
    assert slow_philox(counter, key) == words


def test_philox_broadcasts_counter_words() -> None:
    words = philox4x32_10((np.arange(5), 1, 2, 3), KEY)
    for i in range(5):
        assert [int(w[i]) for w in words] == slow_philox([i, 1, 2, 3], KEY)


def test_direction_key_is_the_low_words_of_domain_2() -> None:
    seed, step, direction = 2**64 - 5, 2**33 + 9, 3
    x0, x1, _, _ = slow_philox([9, 2, 3, 2], seed)
    assert direction_key(seed, step, direction) == x0 + (x1 << 32)
    keys = {direction_key(s, t, k) for s in range(4) for t in range(4) for k in range(4)}
    assert len(keys) == 64


@pytest.mark.parametrize("args", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 0, 2**32)])
def test_direction_key_rejects_what_does_not_fit(args: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        direction_key(*args)


# ---------------------------------------------------------------------------------------- fma


def fma_inputs(rng: np.random.Generator, n: int) -> dict[str, tuple[Any, Any, Any]]:
    def floats(low: int, high: int) -> Any:
        exponents = rng.integers(low, high, n)
        return np.ldexp(rng.uniform(-2, 2, n), exponents).astype(np.float32)

    a, b = floats(-20, 20), floats(-20, 20)
    product = a.astype(np.float64) * b
    # Odd 24-bit numbers; 1.5 times one of the small ones lies on a tie.
    odd = (rng.integers(2**23, 2**24, n) | 1).astype(np.float32)
    small_odd = (rng.integers(2**23, 2**24 * 2 // 3, n) | 1).astype(np.float32)
    sign = rng.choice(np.array([-1, 1], np.float32), n)
    tiny = np.ldexp(sign, rng.integers(-120, -6, n)).astype(np.float32)
    little = np.ldexp(sign, rng.integers(-23, -11, n)).astype(np.float32)
    half = np.ldexp(sign, rng.integers(-3, 1, n)).astype(np.float32)
    anything = [rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32) for _ in range(3)]
    return {
        "random": (a, b, floats(-40, 40)),
        "cancelling": (a, b, -product.astype(np.float32)),
        "nearly cancelling": (a, b, -np.nextafter(product.astype(np.float32), sign)),
        "near a tie": (half * (1 + little), 1 - little, odd),  # half an ulp, times 1 - little^2
        "near a tie of the product": (small_odd, np.full_like(a, 1.5), tiny),
        "tie": (half, sign, odd),
        "tie of the product": (small_odd, np.full_like(a, 1.5) * sign, np.zeros_like(a)),
        "subnormal": (floats(-80, -60), floats(-80, -60), floats(-150, -125)),
        "near a subnormal tie": (
            np.ldexp(half * (1 + little), -75),
            np.ldexp(1 - little, -74),
            np.ldexp((rng.integers(0, 2**22, n) | 1).astype(np.float32), -149),
        ),
        "any bits": (anything[0], anything[1], anything[2]),
    }


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(1)
    for name, (a, b, c) in fma_inputs(rng, 3000).items():
        with np.errstate(all="ignore"):
            got = fma(a, b, c)
            plain = a.astype(np.float64) * b + c
        finite = np.isfinite(plain)
        expected = got.copy()
        for i in np.flatnonzero(finite):
            value = rounded(exact(a[i]) * exact(b[i]) + exact(c[i]))
            if value != 0:
                expected[i] = float(value) if abs(value) < 2**128 else np.inf * np.sign(plain[i])
            else:
                expected[i] = np.copysign(0.0, plain[i])
        assert_same_bits(got, expected, name)
        assert_same_bits(np.isnan(got), np.isnan(plain), f"NaN of {name}")
        infinite = np.isinf(plain)
        assert_same_bits(got[infinite], plain[infinite].astype(np.float32), f"infinity of {name}")


def test_fma_differs_from_rounding_twice() -> None:
    """The inputs above do reach the cases that need round-to-odd."""
    wrong = 0
    for a, b, c in fma_inputs(np.random.default_rng(1), 3000).values():
        with np.errstate(all="ignore"):
            twice = (a.astype(np.float64) * b + c).astype(np.float32)
            wrong += int((fma(a, b, c).view(np.int32) != twice.view(np.int32)).sum())
    assert wrong > 1000


def test_fma_broadcasts_and_keeps_shape() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_same_bits(fma(np.float32(2), x, np.float32(1)), 2 * x + 1, "2 x + 1")
    assert fma(1.0, 2.0, 3.0).shape == ()


# --------------------------------------------------------------------------------------- noise

GOLDEN = (
    "-0x1.75aac6p-1 0x1.9f0deap+0 -0x1.0c805cp-3 0x1.6730a4p-6 "
    "0x1.93de18p-8 0x1.cb4722p-3 -0x1.0339e4p+0 -0x1.561ab6p+0"
)


def test_normal_gives_the_recorded_answers() -> None:
    golden = [float.fromhex(z) for z in GOLDEN.split()]
    z = normal(8, key=KEY, tensor_id=TENSOR_ID)
    assert_same_bits(z, float32(golden), "elements 0 .. 7")
    assert [slow_normal(e, KEY, TENSOR_ID) for e in range(8)] == golden


@pytest.mark.parametrize("offset", [0, 4 * 4096 - 6, 2**34 - 6, 2**40 + 3])
def test_normal_matches_exact_arithmetic(offset: int) -> None:
    z = normal(12, key=KEY, tensor_id=TENSOR_ID, offset=offset)
    slow = [slow_normal(offset + i, KEY, TENSOR_ID) for i in range(12)]
    assert_same_bits(z, float32(slow), f"elements from {offset}")


def test_normal_at_the_ends_of_the_uniform() -> None:
    x0 = np.array([0, 0x1FF, 0x200, 0x80000000, 0xB504F200, 0xB504F400, 0xFFFFFFFF], np.uint32)
    x1 = np.array([0, 1, 0x20000000, 0x1FFFFFFF, 0x80000000, 0x40000000, 0xFFFFFFFF], np.uint32)
    for w0 in x0:
        got = reference._box_muller(np.full_like(x1, w0), x1)
        expected = [slow_pair(int(w0), int(w1)) for w1 in x1]
        for k in range(2):
            # A zero keeps its sign only in float32: compare values there, bits elsewhere.
            slow = float32([float(pair[k]) for pair in expected])
            assert_same_bits(np.abs(got[k]), np.abs(slow), f"|z| of word {int(w0):#x}")
            assert (got[k] == slow).all()
        assert np.abs(got).max() <= 5.77


def test_normal_is_normal() -> None:
    z = normal(1 << 20, key=KEY, tensor_id=TENSOR_ID).astype(np.float64)
    n = z.size
    # Bounds of 5 standard deviations of each moment's mean over n draws.
    assert abs(z.mean()) < 5 / n**0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / n**0.5


def test_normal_is_close_to_box_muller_in_float64() -> None:
    index = np.arange(50_000)
    x0, x1, _, _ = philox4x32_10((index, 0, TENSOR_ID, 0), KEY)
    u = (2.0 * (x0 >> 9) + 1) * 2.0**-24
    angle = (x1 << np.uint32(2)).view(np.int32) * 2.0**-32 * np.pi / 2
    r = np.sqrt(-2 * np.log(u) / 2)
    first = np.where(x1 >> 31, -1, 1) * r * (np.cos(angle) - np.sin(angle))
    second = np.where(x1 >> 30 & 1, -1, 1) * r * (np.cos(angle) + np.sin(angle))
    z = normal(4 * index.size, key=KEY, tensor_id=TENSOR_ID).reshape(-1, 4)
    assert np.abs(z[:, 0] - first).max() < 4e-6
    assert np.abs(z[:, 1] - second).max() < 4e-6


def test_rademacher_takes_bit_after_bit() -> None:
    z = rademacher(300, key=KEY, tensor_id=TENSOR_ID)
    for e in range(300):
        words = slow_philox([e // 128, 0, TENSOR_ID, 0], KEY)
        assert z[e] == (-1.0 if words[e // 32 % 4] >> e % 32 & 1 else 1.0)
    assert abs(rademacher(1 << 20, key=KEY, tensor_id=TENSOR_ID).mean()) < 5 / 2**10


def test_rounding_words_are_of_domain_1() -> None:
    words = rounding_words(10, key=KEY, tensor_id=TENSOR_ID, offset=2**34)
    slow = [word for i in range(3) for word in slow_philox([i, 1, TENSOR_ID, 1], KEY)]
    assert words.tolist() == slow[:10]


@pytest.mark.parametrize("draw", [normal, rademacher, rounding_words])
def test_elements_do_not_depend_on_slicing(draw: Any) -> None:
    whole = draw(40_000, key=KEY, tensor_id=TENSOR_ID)
    for begin, end in [
        (0, 1),
        (1, 6),
        (127, 129),
        (130, 30_001),
        (16_383, 16_385),
        (39_999, 40_000),
    ]:
        part = draw(end - begin, key=KEY, tensor_id=TENSOR_ID, offset=begin)
        assert_same_bits(part, whole[begin:end], f"elements {begin} .. {end}")
    assert draw(0, key=KEY, tensor_id=TENSOR_ID, offset=5).shape == (0,)


# ------------------------------------------------------------------------------------ rounding

HALVES = [torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 65504, 65519.996, 65520, -65520, 65536]
SPECIAL += [2.0**-24, 2.0**-25, 2.0**-25 * 1.0000001, 2.0**-26, 2.0**-14, 2.0**-14 - 2.0**-25]
SPECIAL += [3.3895313892515355e38, 3.3961775e38, 3.3961773e38, 3.4028235e38, 1e-45, 1.1754944e-38]


def awkward_values() -> Any:
    """Every exponent, with mantissas on, beside and between the ties of both formats."""
    rng = np.random.default_rng(2)
    words = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    steps = rng.integers(-1, 2, words.size).astype(np.uint32)
    ties = [(words & ~np.uint32(2**d - 1) | np.uint32(2 ** (d - 1))) + steps for d in range(13, 24)]
    return np.concatenate([words, *ties, float32(SPECIAL).view(np.uint32)]).view(np.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_round_nearest_matches_torch(dtype: torch.dtype) -> None:
    w = torch.from_numpy(awkward_values())
    got, expected = round_nearest(w, dtype), w.to(dtype)
    assert torch.equal(got.isnan(), w.isnan())
    assert_same_bits(got[~w.isnan()], expected[~w.isnan()], "rounded to nearest")
    quiet = 0x7FC0 if dtype == torch.bfloat16 else 0x7E00
    assert (got[w.isnan()].view(torch.int16) == quiet).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_round_stochastic_goes_up_with_the_odds_of_the_distance(dtype: torch.dtype) -> None:
    """Exactly: of all words, as many go up as the distance to the lower neighbour says."""
    values = float32([1 + 2**-9, 1 + 2**-15, 1.9999, 2**-14 * 1.01, -3e-5, 5.1e-7, 4e-8, 1e-9])
    values = np.concatenate([values, float32([0.1, -7e4, 7e-9, 65503.9, 2.0**-31 * 1.2])])
    n = 1 << 16  # evenly spaced words: the low 16 bits and the high 16 bits take every value
    counts = np.arange(n, dtype=np.uint32)
    words = counts | counts << np.uint32(16)
    for value in values:
        w = np.full(n, value, np.float32)
        got = round_stochastic(w, dtype, words).double()
        low, high = got.abs().min().item(), got.abs().max().item()
        if np.isinf(high):
            assert_same_bits(low, high, f"{value} is too large for {dtype}")
            continue
        # The neighbours are neighbours, and the mean is the value, to one word in 2^16.
        assert low <= abs(float(value)) <= high
        if low < high:
            ends = torch.tensor([low, high], dtype=dtype)
            assert ulp_distance(ends[:1], ends[1:])[0] == 1
            assert abs(got.abs().mean().item() - abs(float(value))) <= (high - low) * 2.0**-15
        assert (torch.signbit(got) == (value < 0)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_round_stochastic_with_extreme_words_is_floor_and_ceiling(dtype: torch.dtype) -> None:
    w = torch.from_numpy(awkward_values())
    w = w[w.abs() <= torch.finfo(dtype).max]
    zeros, ones = np.zeros(len(w), np.uint32), np.full(len(w), 0xFFFFFFFF, np.uint32)
    down, up = round_stochastic(w, dtype, zeros), round_stochastic(w, dtype, ones)
    assert (down.float().abs() <= w.abs()).all()
    representable = w.to(dtype).float() == w
    assert_same_bits(down[representable], w.to(dtype)[representable], "representable")
    assert_same_bits(up[representable], w.to(dtype)[representable], "representable")
    # A word of ones lifts everything but what loses more than 32 bits below 1/2^32 of a quantum.
    lifted = ~representable & (w.abs() >= 2.0**-56 if dtype == torch.float16 else w.abs() > 0)
    assert (up.float().abs() > w.abs())[lifted].all()
    assert (ulp_distance(down, up)[lifted.numpy()] == 1).all()


def test_round_stochastic_adds_the_low_bits_of_the_word() -> None:
    w = np.full(4, 1.5 + 2.0**-8, np.float32)  # bits 0x3fc08000: half way in bfloat16
    words = uint32([0x00007FFF, 0x00008000, 0xABCD7FFF, 0xFFFF8000])
    got = round_stochastic(w, torch.bfloat16, words)
    assert got.view(torch.int16).tolist() == [0x3FC0, 0x3FC1, 0x3FC0, 0x3FC1]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_round_stochastic_treats_the_ends_as_nearest_does(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    beyond = torch.nextafter(torch.tensor(largest), torch.tensor(torch.inf))
    spacing = 2.0 ** (torch.tensor(largest).log2().floor().item()) * torch.finfo(dtype).eps
    w = torch.tensor([beyond, largest + spacing / 2, torch.inf, torch.nan, -torch.inf, -beyond])
    for word in (0, 0xFFFFFFFF):
        got = round_stochastic(w, dtype, np.full(6, word, np.uint32))
        assert got[[0, 1, 2, 4, 5]].tolist() == [largest, *(2 * [torch.inf]), -torch.inf, -largest]
        assert got[3].isnan()


def test_rounding_keeps_float32_and_shape() -> None:
    w = torch.randn(2, 3, 5)
    assert_same_bits(round_nearest(w, torch.float32), w, "float32")
    words = rounding_words(30, key=KEY, tensor_id=0)
    assert_same_bits(round_stochastic(w, torch.float32, words), w, "float32")
    assert round_stochastic(w, torch.float16, words).shape == w.shape
    assert round_nearest(torch.tensor(1.0), torch.bfloat16).shape == ()
    assert round_nearest(w, torch.bfloat16).data_ptr() % 64 == 0


# ---------------------------------------------------------------------------------- arithmetic


def test_perturbed_and_updated_match_exact_arithmetic() -> None:
    rng = np.random.default_rng(3)
    theta, z = rng.standard_normal((2, 500)).astype(np.float32)
    eps, coefficient, decay = (float(np.float32(v)) for v in (1e-3, -3.7e-5, 1 - 1e-6))
    moved, changed = perturbed(theta, z, eps), updated(theta, z, coefficient, decay)
    for i in range(500):
        t, z_i = exact(theta[i]), exact(z[i])
        assert exact(moved[i]) == rounded(exact(eps) * z_i + t)
        decayed = rounded(t * exact(decay))
        assert exact(changed[i]) == rounded(-exact(coefficient) * z_i + decayed)
    assert_same_bits(updated(theta, z, 0.0), theta, "a zero update")
    assert_same_bits(perturbed(theta, z, -eps), perturbed(theta, -z, eps), "the other side")


# --------------------------------------------------------------------------- the plain loop


class Quadratic(nn.Module):
    """Loss (theta - 1)^2 / 2 with parameters of every kind that the loop must tell apart."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)  # id 0
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))  # id 1, decays
        self.tied = self.matrix
        self.bias = nn.Parameter(torch.zeros(5))  # id 2
        self.scale = nn.Parameter(torch.tensor(0.5))  # id 3, no dimension
        self.dropout = nn.Dropout(dropout)

    def forward(self, **_: Any) -> Any:
        terms = [self.matrix + self.tied, self.bias, self.scale.reshape(1)]
        total = sum(((self.dropout(t) - 1) ** 2).sum() / 2 for t in terms)
        return type("Output", (), {"loss": total})


def test_mezo_is_the_algorithm() -> None:
    """One step by hand, with two directions and weight decay."""
    model = Quadratic()
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    lr, eps, wd, seed = 1e-2, 1e-3, 0.1, 11
    result = mezo(
        model, [{}], lr=lr, eps=eps, weight_decay=wd, directions=2, estimator="two_sided", seed=seed
    )

    names = {1: "matrix", 2: "bias", 3: "scale"}
    weights = {n: theta[n].numpy() for n in names.values()}
    for k in range(2):
        key = direction_key(seed, 0, k)
        z = {n: normal(theta[n].numel(), key=key, tensor_id=i) for i, n in names.items()}
        losses = []
        for side in (eps, -eps):
            moved = {n: torch.from_numpy(perturbed(theta[n], z[n], side)) for n in z}
            losses.append(torch.func.functional_call(model, moved).loss.item())
        assert result.losses[0][k] == tuple(losses)
        grad = (losses[0] - losses[1]) / (2 * eps)
        assert result.projected_grads[0][k] == grad
        coefficient = float(np.float32(lr * grad / 2))
        assert result.coefficients[0][k] == coefficient
        for n, w in weights.items():
            decay = 1 - lr * wd if n == "matrix" and k == 0 else 1.0
            weights[n] = updated(w, z[n], coefficient, decay)
    assert list(result.weights) == list(weights)
    for n, w in weights.items():
        assert_same_bits(result.weights[n], torch.from_numpy(w), n)


def test_mezo_leaves_the_model_as_it_was() -> None:
    model = Quadratic()
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    mezo(model, [{}] * 3, lr=1e-2, eps=1e-3)
    for n, p in model.named_parameters():
        assert p.data_ptr() == before[n][0]
        assert_same_bits(p, before[n][1], n)


def test_mezo_restores_the_model_when_the_loss_raises() -> None:
    model = Quadratic()
    pointer = model.bias.data_ptr()

    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError, match="no loss"):
        mezo(model, [{}], lr=1e-2, eps=1e-3, loss=loss)
    assert model.bias.data_ptr() == pointer


def test_mezo_write_back_period_does_not_matter_in_float32() -> None:
    runs = [mezo(Quadratic(), [{}] * 7, lr=1e-2, eps=1e-3, write_back=k) for k in (1, 3, 100)]
    for run in runs[1:]:
        assert run.losses == runs[0].losses
        for n, w in run.weights.items():
            assert_same_bits(w, runs[0].weights[n], n)


def test_mezo_rounds_when_it_writes_back_and_only_then() -> None:
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-2, "seed": 5, "storage": torch.bfloat16}
    every = mezo(Quadratic(), [{}] * 4, **options)
    assert {w.dtype for w in every.weights.values()} == {torch.bfloat16}

    # Four steps in a row: the flush at the end is the write-back that step 4 would have made.
    longer = mezo(Quadratic(), [{}] * 5, **options)
    assert longer.losses[:4] == every.losses
    # With a period of 4 and 4 steps, nothing is rounded before the end.
    late = mezo(Quadratic(), [{}] * 4, **options, write_back=4)
    start = {n: p.detach().bfloat16().float() for n, p in Quadratic().named_parameters()}
    weights = {n: start[n].numpy() for n in late.current}
    for t in range(4):
        for i, n in enumerate(weights, 1):
            z = normal(weights[n].size, key=direction_key(5, t, 0), tensor_id=i)
            weights[n] = updated(weights[n], z, late.coefficients[t][0])
    for i, n in enumerate(weights, 1):
        assert_same_bits(late.current[n], torch.from_numpy(weights[n]), n)
        words = rounding_words(weights[n].size, key=direction_key(5, 4, 0), tensor_id=i)
        final = round_stochastic(weights[n], torch.bfloat16, words)
        assert_same_bits(late.weights[n], final, n)
    nearest = mezo(Quadratic(), [{}] * 4, **options, write_back=4, rounding="nearest")
    for n, w in nearest.weights.items():
        assert_same_bits(w, late.current[n].bfloat16(), n)


def test_mezo_keeps_what_nearest_rounding_loses() -> None:
    """Updates far below half a unit in the last place: stochastic rounding moves, nearest not."""
    options: dict[str, Any] = {"lr": 2e-5, "eps": 1e-2, "storage": torch.bfloat16}
    start, runs = mezo(Quadratic(), [], **options), {}
    for rounding in ("nearest", "stochastic"):
        run = mezo(Quadratic(), [{}] * 20, **options, rounding=rounding)
        runs[rounding] = float((run.weights["matrix"] != start.weights["matrix"]).sum())
    assert runs["nearest"] < runs["stochastic"]


def test_mezo_skips_a_step_that_is_not_finite() -> None:
    model, seen = Quadratic(), []

    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        value: torch.Tensor = model().loss
        return value * torch.nan if batch["step"] == 1 else value

    def lr(step: int) -> float:
        seen.append(step)
        return [0.1, 0.2, 0.3][step]

    steps = [{"step": t} for t in range(3)]
    run = mezo(model, steps, lr=lr, eps=1e-3, loss=loss, seed=2)
    assert seen == [0, 2]
    assert [len(c) for c in run.coefficients] == [1, 0, 1]
    start, z = dict(model.named_parameters()), {}
    for t in (0, 2):  # the step counter went on: step 2 has the key of step 2
        z[t] = normal(5, key=direction_key(2, t, 0), tensor_id=2)
    bias = updated(start["bias"], z[0], run.coefficients[0][0])
    bias = updated(bias, z[2], run.coefficients[2][0])
    assert_same_bits(run.weights["bias"], torch.from_numpy(bias), "bias")


def test_mezo_forwards_share_their_dropout() -> None:
    model = Quadratic(dropout=0.5).train()
    masks = []
    model.dropout.register_forward_hook(lambda m, args, out: masks.append(out == 0))
    mezo(model, [{}] * 2, lr=1e-2, eps=1e-3, directions=2, estimator="two_sided")
    per_forward = [torch.cat([m.flatten() for m in masks[i : i + 3]]) for i in range(0, 24, 3)]
    for step in (per_forward[:4], per_forward[4:]):
        assert all(torch.equal(step[0], mask) for mask in step[1:])
    assert not torch.equal(per_forward[0], per_forward[4])


def test_mezo_runs_in_the_dtype_of_the_model() -> None:
    dtypes = []

    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        dtypes.append({p.dtype for p in model.parameters()})
        value: torch.Tensor = model().loss
        return value

    run = mezo(Quadratic().bfloat16(), [{}], lr=1e-2, eps=1e-2, loss=loss)
    assert dtypes == [{torch.bfloat16}] * 2
    assert {w.dtype for w in run.weights.values()} == {torch.float32}


def test_mezo_rejects_an_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="rounding"):
        mezo(Quadratic(), [], lr=1e-2, eps=1e-3, rounding="up")


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_mezo_makes_the_loss_of_a_model_fall(distribution: str) -> None:
    model, data = tiny("gpt2"), [batch("gpt2")] * 40
    run = mezo(model, data, lr=5e-4, eps=1e-3, distribution=distribution)
    means = [sum(step[0]) / 2 for step in run.losses]
    assert means[-1] < means[0] - 0.05


def test_mezo_moves_tied_weights_once() -> None:
    run = mezo(tiny("llama-tied"), batches("llama-tied", 2), lr=1e-3, eps=1e-3)
    assert "model.embed_tokens.weight" in run.weights
    assert "lm_head.weight" not in run.weights


def test_the_pretrained_model_predicts_its_text(model_folder: Path, text_file: Path) -> None:
    """So that tests which train it or compare its losses do so on text that it knows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [tokenizer(line)["input_ids"] for line in text_file.read_text().splitlines()[:20]]
    model = pretrained(model_folder)
    batches = [torch.tensor([row]) for row in rows]
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
    assert sum(losses) / len(losses) < 2.5  # a guess has ln 512 = 6.2


# ------------------------------------------------------------------------------ numeric.py


def test_ulp_distance_counts_numbers_between() -> None:
    one = torch.tensor([1.0, 0.0, -1e-45, torch.nan, torch.nan, 1.0])
    other = torch.tensor([1.0 + 2**-22, -0.0, 1e-45, torch.nan, 0.0, -1.0])
    distance = [2, 0, 2, 0, 2**64 - 1, 2 * 0x3F800000]
    assert ulp_distance(one, other).tolist() == distance
    assert ulp_distance(other.numpy(), one.numpy()).tolist() == distance
    assert ulp_distance(-1.7e308, 1.7e308) > 2**63
    for dtype in HALVES:
        assert ulp_distance(torch.ones((), dtype=dtype), -torch.ones((), dtype=dtype)) == 2 * int(
            torch.ones((), dtype=dtype).view(torch.int16)
        )


def test_assert_same_bits_accepts_what_is_the_same() -> None:
    assert_same_bits(torch.tensor([torch.nan, -0.0]), torch.tensor([torch.nan, -0.0]))
    assert_same_bits(torch.arange(3), torch.arange(3))
    assert_same_bits([1.5, 2.5], (1.5, 2.5))
    assert_same_bits(torch.ones(0, 3), torch.ones(0, 3))
    assert_same_bits(torch.ones(2, 3).T, torch.ones(3, 2))
    assert_same_bits(torch.tensor([True]), torch.tensor([True]))


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.ones(2), torch.ones(2).double(), "x: dtype float32, expected float64"),
        (torch.ones(2), torch.ones(3), r"x: shape \(2,\), expected \(3,\)"),
        (0.0, -0.0, r"x: 1 of 1 elements differ; first at \[\]: 0x0+ \(0.0\), expected 0x80+"),
        (torch.arange(4), torch.tensor([0, 1, 2, 7]), r"1 of 4 .* \[3\]: 0x0+3 \(3\), .*7 \(7\)$"),
        (
            torch.tensor([[1.0, 1.0], [1.0, 1 + 2**-23]]),
            torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
            r"\[1, 1\]: 0x3f800001 \(1\.00000011920\d*\), expected 0x3f800000 \(1\.0\), 1 ulp$",
        ),
        (
            torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16),
            torch.tensor([1.0, 2.984375, 1.0], dtype=torch.bfloat16),
            r"2 of 3 .* \[1\]: 0x4040 \(3.0\), .* 1 ulp; worst at \[2\]: 0x4000 .*, 128 ulp$",
        ),
    ],
)
def test_assert_same_bits_says_what_differs(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_bits(actual, expected, "x")


def test_assert_within_ulps() -> None:
    x = torch.tensor([1.0, 2.0, 0.0])
    y = torch.tensor([1.0 + 2**-22, 2.0, -0.0])
    assert_within_ulps(x, y, 2)
    with pytest.raises(AssertionError, match=r"y \(within 1 ulp\): 1 of 3 .*\[0\].* 2 ulp$"):
        assert_within_ulps(x, y, 1, "y")
    with pytest.raises(AssertionError):
        assert_within_ulps(x, torch.tensor([1.0, torch.nan, 0.0]), 2**31)
    with pytest.raises(TypeError, match="floating"):
        assert_within_ulps(torch.arange(2), torch.arange(2), 1)
