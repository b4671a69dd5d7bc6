// scaled_formats.h -- formats whose elements share scales: e4m3, and e4m11 in two planes of
// bytes (the split format).
//
// The OCP MX layout: 32 consecutive elements, a *group*, share one scale, a power of two in a byte
// (E8M0). An element travels as a *code*: its magnitude as an integer, which grows with the value,
// and its sign in bit 31. All of it is integer work and exact products, so every device rounds
// alike.
//
// The scale of a group is the smallest under which nothing finite overflows, of the weights that
// are rounded and again of those that come out. So what was rounded once never changes, nor does
// its scale, whatever the random words.
#pragma once

#include "formats.h"

namespace zo2ext {

/// Elements that share a scale.
constexpr int64_t kScaleGroup = 32;

/// A float with e4m3's exponent: the largest value that rounding makes is 1.75 * 2^kTop. There is
/// no infinity.
template <int kMantissaBits>
struct ScaledFormat {
  static constexpr DType kDType = DType::kFloat8E4M3;
  static constexpr int kMantissa = kMantissaBits;
  static constexpr int kBias = 7;
  static constexpr int kTop = 8;
  static constexpr uint32_t kOneBinade = 1u << kMantissa;
  /// Code of the largest value that rounding makes.
  static constexpr uint32_t kLargest = (kBias + kTop) * kOneBinade + 3 * (kOneBinade / 4);
  /// float32 bits of the largest value that fits float32 under any scale; larger weights count as
  /// this.
  static constexpr uint32_t kCap = 0x7f800000u - (1u << (23 - kMantissa));
};

struct Float8E4M3 : ScaledFormat<3> {
  static constexpr bool kSplit = false;
  static constexpr uint32_t kLastFinite = 0x7e, kNaN = 0x7f;
};

/// The top plane is e4m3: the code rounded to its upper byte. The low plane has the code's lower
/// byte, which tells what to add to the top or to take from it.
struct Split : ScaledFormat<11> {
  static constexpr bool kSplit = true;
  static constexpr uint32_t kLastFinite = 0x7e7f, kNaN = 0x7f00;
};

/// Whether elements of this dtype share scales.
constexpr bool is_scaled(DType dtype) { return dtype == DType::kFloat8E4M3; }

/// Calls f(Float8E4M3()) or f(Split()); `split`: whether there is a low plane.
template <class Function>
void with_scaled_format(bool split, const Function& f) {
  split ? f(Split()) : f(Float8E4M3());
}

// Scales.

/// 2^(scale - 127); NaN of 255.
ZO2_HOST_DEVICE float scale_factor(uint32_t scale) {
  const uint32_t bits = select(scale == 0, 0x00400000u, scale << 23);
  return from_bits(select(scale == 255, 0x7fc00000u, bits));
}

/// 2^(127 - scale), of a scale that `scale_for` gives.
ZO2_HOST_DEVICE float inverse_factor(uint32_t scale) { return from_bits((254u - scale) << 23); }

/// What a weight counts for in the choice of the scale: the bits of its magnitude, or 0.
template <class Format, class Float, class Word = decltype(to_bits(Float()))>
ZO2_HOST_DEVICE Word counted_magnitude(Format, Float weight) {
  const Word magnitude = to_bits(weight) & Word(0x7fffffffu);
  return select(greater(magnitude, Word(0x7f7fffffu)), Word(0u),
                smaller_of(magnitude, Word(Format::kCap)));
}

/// The smallest scale under which the group's largest counted magnitude does not overflow.
template <class Format>
ZO2_HOST_DEVICE uint32_t scale_for(Format, uint32_t largest) {
  const uint32_t exponent = (largest + 0x1fffffu) >> 23;  // one more beyond 1.75
  return exponent > Format::kTop ? exponent - Format::kTop : 0;
}

// Codes.

template <class Word>
ZO2_HOST_DEVICE Word larger_of(Word a, Word b) {
  return select(greater(a, b), a, b);
}

/// A rounded magnitude becomes a code; infinity and NaN become NaN's. Zero and NaN lose their sign:
/// an update by nothing may change that of zero.
template <class Format, class Word>
ZO2_HOST_DEVICE Word finished_code(Format, Word bits, Word rounded) {
  const Word magnitude = bits & Word(0x7fffffffu);
  const Word sign = bits & Word(0x80000000u);
  const Word code = select(greater(rounded, Word(0u)), rounded | sign, rounded);
  return select(greater(magnitude, Word(0x7f7fffffu)), Word(Format::kNaN), code);
}

/// The magnitude in units of the scale. Exact but for weights so small that all become zero.
template <class Format, class Float, class Word = decltype(to_bits(Float()))>
ZO2_HOST_DEVICE Word unscaled_magnitude(Format, Float weight, Float inverse) {
  const Word magnitude = to_bits(weight) & Word(0x7fffffffu);
  return to_bits(from_bits(smaller_of(magnitude, Word(Format::kCap))) * inverse);
}

/// To nearest, ties to even. `inverse`: see inverse_factor.
template <class Format, class Float, class Word = decltype(to_bits(Float()))>
ZO2_HOST_DEVICE Word code_nearest(Format format, Float weight, Float inverse) {
  const Word magnitude = unscaled_magnitude(format, weight, inverse);
  return finished_code(format, to_bits(weight),
                       shortened_nearest<Format::kMantissa, Format::kBias>(magnitude));
}

/// To one of the two neighbours.
template <class Format, class Float, class Word>
ZO2_HOST_DEVICE Word code_stochastic(Format format, Float weight, Float inverse, Word random) {
  const Word magnitude = unscaled_magnitude(format, weight, inverse);
  return finished_code(format, to_bits(weight),
                       shortened_stochastic<Format::kMantissa, Format::kBias>(magnitude, random));
}

/// What a code counts for in `is_halved`: its magnitude, or 0.
template <class Format, class Word>
ZO2_HOST_DEVICE Word counted_code(Format, Word code) {
  const Word magnitude = code & Word(0x7fffffffu);
  return select(greater(magnitude, Word(Format::kLargest)), Word(0u), magnitude);
}

/// Whether the rounded group, whose largest counted code this is, fits the next smaller scale. It
/// does where the largest weight was rounded down to half the largest value.
template <class Format>
ZO2_HOST_DEVICE bool is_halved(Format, uint32_t scale, uint32_t largest) {
  return scale > 0 && largest <= Format::kLargest - Format::kOneBinade;
}

/// The same value under the next smaller scale: subnormals double, others gain a binade.
template <class Format, class Word>
ZO2_HOST_DEVICE Word halved_code(Format, Word code) {
  const Word magnitude = code & Word(0x7fffffffu);
  return select(greater(magnitude, Word(Format::kLargest)), code,
                code + smaller_of(magnitude, Word(Format::kOneBinade)));
}

/// The value of a code; `scale`: see scale_factor.
template <class Format, class Word>
ZO2_HOST_DEVICE FloatOf<Word> value_of(Format, Word code, FloatOf<Word> scale) {
  const Word magnitude = code & Word(0x7fffffffu);
  // Exact, and normalises the subnormals.
  const FloatOf<Word> unit = from_bits(Word((254u - Format::kBias) << 23));
  const Word finite = to_bits(from_bits(shift_left<23 - Format::kMantissa>(magnitude)) * unit);
  const Word bits =
      select(greater(magnitude, Word(Format::kLastFinite)), Word(0x7fc00000u), finite);
  return from_bits(bits | (code & Word(0x80000000u))) * scale;
}

// Bytes.

/// The code that the bytes of an element hold; `low` is read of the split format only.
template <class Format, class Word>
ZO2_HOST_DEVICE Word code_of_bytes(Format, Word top, Word low) {
  Word magnitude = top & Word(0x7fu);
  if constexpr (Format::kSplit) {
    // What no rounding makes, less than zero, counts as NaN.
    magnitude = (shift_left<8>(magnitude) + (low ^ Word(0x80u)) - Word(0x80u)) & Word(0xffffu);
  }
  return magnitude | shift_left<24>(top & Word(0x80u));
}

template <class Format, class Word>
ZO2_HOST_DEVICE Word top_byte(Format, Word code) {
  Word top = code & Word(0x7fffffffu);
  if constexpr (Format::kSplit) top = shift_right<8>(top + Word(0x80u));
  return top | shift_right<24>(code & Word(0x80000000u));
}

template <class Word>
ZO2_HOST_DEVICE Word low_byte(Word code) {
  return code & Word(0xffu);
}

}  // namespace zo2ext
