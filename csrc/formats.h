// formats.h -- float32, bfloat16 and float16: unpack to float32, pack by rounding. Formats whose
// elements share scales are in scaled_formats.h.
//
// Packed values travel in the low 16 bits of a word. All of it is integer work on the bits (besides
// one exact product and one addition for float16's subnormals), so every device rounds alike. A NaN
// becomes the one quiet NaN of its format.
#pragma once

#include "simd.h"

namespace zo2ext {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8E4M3 = 3 };
enum class Rounding : int32_t { kNearest = 0, kStochastic = 1 };

/// Bytes of one element.
constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype <= DType::kFloat16 ? 2 : 1;
}

struct Float32 {
  using Storage = float;
  static constexpr DType kDType = DType::kFloat32;
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::kFloat16;
};

template <class Word>
ZO2_HOST_DEVICE FloatOf<Word> unpack(BFloat16, Word packed) {
  return from_bits(shift_left<16>(packed));
}

template <class Word>
ZO2_HOST_DEVICE FloatOf<Word> unpack(Float16, Word packed) {
  const Word magnitude = packed & Word(0x7fffu);
  // Exact, and normalises the subnormals.
  const Word finite = to_bits(from_bits(shift_left<13>(magnitude)) * FloatOf<Word>(0x1p+112f));
  Word special = shift_left<13>(magnitude) | Word(0x7f800000u);
  special = select(greater(magnitude, Word(0x7c00u)), special | Word(0x00400000u), special);
  const Word bits = select(greater(magnitude, Word(0x7bffu)), special, finite);
  return from_bits(bits | shift_left<16>(packed & Word(0x8000u)));
}

/// The bits of a magnitude rounded to a float with kMantissa bits of mantissa and this bias of the
/// exponent, to nearest, ties to even. Overflow is left to the caller.
template <int kMantissa, int kBias, class Word>
ZO2_HOST_DEVICE Word shortened_nearest(Word magnitude) {
  constexpr int kDropped = 23 - kMantissa;
  const Word odd = shift_right<kDropped>(magnitude) & Word(1u);
  const Word half = Word((1u << (kDropped - 1)) - 1u) + odd;
  const Word normal = shift_right<kDropped>(magnitude + half) - Word((127u - kBias) << kMantissa);
  // A power of two that has the subnormals' spacing, so that the addition rounds there.
  const Word spaced(static_cast<uint32_t>(151 - kBias - kMantissa) << 23);
  const Word subnormal = to_bits(from_bits(magnitude) + from_bits(spaced)) - spaced;
  return select(greater(magnitude, Word(((128u - kBias) << 23) - 1u)), normal, subnormal);
}

/// The same to one of the two neighbours, the upper with probability (w - lo) / (hi - lo): random
/// bits are added to those that will be dropped.
template <int kMantissa, int kBias, class Word>
ZO2_HOST_DEVICE Word shortened_stochastic(Word magnitude, Word random) {
  constexpr int kDropped = 23 - kMantissa;
  const Word low_bits = random & Word((1u << kDropped) - 1u);
  const Word normal =
      shift_right<kDropped>(magnitude + low_bits) - Word((127u - kBias) << kMantissa);
  // Subnormal: more bits of the significand are dropped. Beyond the 32 that a random word has, its
  // own lowest ones go first. The sum may have 33 bits, so it is halved as it is made.
  const Word exponent = smaller_of(shift_right<23>(magnitude), Word(127u - kBias));
  const Word wanted = Word(151u - kBias - kMantissa) - exponent;
  const Word dropped = smaller_of(wanted, Word(32u));
  const Word excess = smaller_of(wanted - dropped, Word(31u));
  const Word significand = shift_right((magnitude & Word(0x007fffffu)) | Word(0x00800000u), excess);
  const Word added = random & shift_right(Word(0xffffffffu), Word(32u) - dropped);
  const Word half_sum = (significand & added) + shift_right<1>(significand ^ added);
  const Word subnormal = shift_right(half_sum, dropped - Word(1u));
  return select(greater(magnitude, Word(((128u - kBias) << 23) - 1u)), normal, subnormal);
}

/// To nearest, ties to even.
template <class Float, class Word = decltype(to_bits(Float()))>
ZO2_HOST_DEVICE Word pack_nearest(BFloat16, Float weight) {
  const Word bits = to_bits(weight);
  const Word odd = shift_right<16>(bits) & Word(1u);
  const Word rounded = shift_right<16>(bits + Word(0x7fffu) + odd);
  return select(greater(bits & Word(0x7fffffffu), Word(0x7f800000u)), Word(0x7fc0u), rounded);
}

template <class Float, class Word = decltype(to_bits(Float()))>
ZO2_HOST_DEVICE Word pack_nearest(Float16, Float weight) {
  const Word bits = to_bits(weight);
  const Word magnitude = bits & Word(0x7fffffffu);
  Word packed = shortened_nearest<10, 15>(magnitude);
  packed = select(greater(magnitude, Word(0x477fefffu)), Word(0x7c00u), packed);  // from 65520 on
  packed = packed | shift_right<16>(bits & Word(0x80000000u));
  return select(greater(magnitude, Word(0x7f800000u)), Word(0x7e00u), packed);
}

/// To one of the two neighbours. Beyond the largest finite value, to nearest.
template <class Float, class Word>
ZO2_HOST_DEVICE Word pack_stochastic(BFloat16, Float weight, Word random) {
  const Word bits = to_bits(weight);
  const Word rounded = shift_right<16>(bits + (random & Word(0xffffu)));
  return select(greater(bits & Word(0x7fffffffu), Word(0x7f7f0000u)),
                pack_nearest(BFloat16(), weight), rounded);
}

template <class Float, class Word>
ZO2_HOST_DEVICE Word pack_stochastic(Float16, Float weight, Word random) {
  const Word bits = to_bits(weight);
  const Word magnitude = bits & Word(0x7fffffffu);
  const Word packed = shortened_stochastic<10, 15>(magnitude, random);
  return select(greater(magnitude, Word(0x477fe000u)), pack_nearest(Float16(), weight),
                packed | shift_right<16>(bits & Word(0x80000000u)));
}

}  // namespace zo2ext
