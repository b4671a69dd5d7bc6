// formats.h -- float32, bfloat16 and float16: unpack to float32, pack by rounding.
//
// Packed values travel in the low 16 bits of a word. All of it is integer work on the bits (besides
// one exact product and one addition for float16's subnormals), so every device rounds alike. A NaN
// becomes the one quiet NaN of its format.
#pragma once

#include "simd.h"

namespace zo2ext {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Rounding : int32_t { kNearest = 0, kStochastic = 1 };

/// Bytes of one element.
constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

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
  const Word odd = shift_right<13>(bits) & Word(1u);
  const Word normal = shift_right<13>(magnitude + Word(0xfffu) + odd) - Word(112u << 10);
  // 1/2 has the subnormals' spacing, 2^-24, so the addition rounds there.
  const Word subnormal = to_bits(from_bits(magnitude) + Float(0.5f)) - Word(0x3f000000u);
  Word packed = select(greater(magnitude, Word(0x387fffffu)), normal, subnormal);
  packed = select(greater(magnitude, Word(0x477fefffu)), Word(0x7c00u), packed);  // from 65520 on
  packed = packed | shift_right<16>(bits & Word(0x80000000u));
  return select(greater(magnitude, Word(0x7f800000u)), Word(0x7e00u), packed);
}

/// To one of the two neighbours, the upper with probability (w - lo) / (hi - lo): random bits are
/// added to those that will be dropped. Beyond the largest finite value, to nearest.
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
  const Word normal = shift_right<13>(magnitude + (random & Word(0x1fffu))) - Word(112u << 10);
  // Subnormal: more bits of the significand are dropped. Beyond the 32 that a random word has, its
  // own lowest ones go first. The sum may have 33 bits, so it is halved as it is made.
  const Word wanted = Word(126u) - smaller_of(shift_right<23>(magnitude), Word(112u));
  const Word dropped = smaller_of(wanted, Word(32u));
  const Word excess = smaller_of(wanted - dropped, Word(31u));
  const Word significand = shift_right((magnitude & Word(0x007fffffu)) | Word(0x00800000u), excess);
  const Word added = random & shift_right(Word(0xffffffffu), Word(32u) - dropped);
  const Word half_sum = (significand & added) + shift_right<1>(significand ^ added);
  const Word subnormal = shift_right(half_sum, dropped - Word(1u));
  const Word packed = select(greater(magnitude, Word(0x387fffffu)), normal, subnormal);
  return select(greater(magnitude, Word(0x477fe000u)), pack_nearest(Float16(), weight),
                packed | shift_right<16>(bits & Word(0x80000000u)));
}

}  // namespace zo2ext
