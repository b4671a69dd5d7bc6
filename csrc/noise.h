// noise.h -- random words turned into directions: the noise contract (docs/contracts.md).
#pragma once

#include "philox.h"

namespace zo2ext {

enum class Distribution : int32_t { kGaussian = 0, kRademacher = 1 };

/// Last word of the counter: what the random words are for.
enum class Domain : uint32_t {
  kDirection = 0,  // z of a dense direction
  kRounding = 1,
  kKeys = 2,
  kLeft = 3,   // the factor U of a direction U V^T
  kRight = 4,  // the factor V
};

/// Elements that share one Philox block.
constexpr int64_t kGaussianBlock = 4;
constexpr int64_t kRademacherBlock = 128;

/// The four words of one block, for one lane.
ZO2_HOST_DEVICE void random_words(uint64_t key, uint64_t index, uint32_t tensor_id, Domain domain,
                                  uint32_t (&words)[4]) {
  words[0] = static_cast<uint32_t>(index);
  words[1] = static_cast<uint32_t>(index >> 32);
  words[2] = tensor_id;
  words[3] = static_cast<uint32_t>(domain);
  philox4x32_10(words, key);
}

/// Key of one direction of one step.
ZO2_HOST_DEVICE uint64_t direction_key(uint64_t seed, uint64_t step, uint32_t direction) {
  uint32_t words[4];
  random_words(seed, step, direction, Domain::kKeys, words);
  return words[0] | uint64_t{words[1]} << 32;
}

/// -2 ln u with u = (2 (word >> 9) + 1) 2^-24, in (0, 1): 1.2e-7 to 33.3.
template <class Word>
ZO2_HOST_DEVICE FloatOf<Word> squared_radius(Word word) {
  using Float = FloatOf<Word>;
  const Float u = from_bits(Word(0x3f800000u) | shift_right<9>(word)) - Float(0x1.fffffep-1f);
  // u = 2^(s / 2^23) (1 + f), the mantissa between sqrt(1/2) and sqrt(2).
  const Word s = (to_bits(u) - Word(0x3f3504f3u)) & Word(0xff800000u);
  const Float f = from_bits(to_bits(u) - s) - Float(1.0f);
  Float p = fused(Float(-0x1.65e53ap-3f), f, Float(0x1.2502ccp-2f));
  p = fused(p, f, Float(-0x1.317d6cp-2f));
  p = fused(p, f, Float(0x1.535c98p-2f));
  p = fused(p, f, Float(-0x1.98d39ap-2f));
  p = fused(p, f, Float(0x1.0004a6p-1f));
  p = fused(p, f, Float(-0x1.5556fp-1f));
  p = fused(p, f, Float(0x1.fffffap-1f));
  p = fused(p, f, Float(-0x1p+1f));
  return fused(from_signed(s), Float(-0x1.62e43p-23f), f * p);
}

/// cos(a pi/2) / sqrt 2 and sin(a pi/2) / sqrt 2, with a = int32(word << 2) 2^-32 in [-1/2, 1/2].
template <class Word>
ZO2_HOST_DEVICE void scaled_cosine_sine(Word word, FloatOf<Word>& cosine, FloatOf<Word>& sine) {
  using Float = FloatOf<Word>;
  const Float a = from_signed(shift_left<2>(word)) * Float(0x1p-32f);
  const Float q = a * a;
  Float c = fused(Float(0x1.febcdcp-13f), q, Float(-0x1.dcdc36p-7f));
  c = fused(c, q, Float(0x1.6f49fcp-3f));
  c = fused(c, q, Float(-0x1.bea582p-1f));
  cosine = fused(c, q, Float(0x1.6a09e6p-1f));
  Float d = fused(Float(-0x1.af88d2p-9f), q, Float(0x1.cdad7ep-5f));
  d = fused(d, q, Float(-0x1.d3baap-2f));
  d = fused(d, q, Float(0x1.1c5832p+0f));
  sine = a * d;
}

/// Box-Muller: exactly two words in, two normals out, so that counters stay predictable. The angle
/// is folded into a quarter turn; the top two bits of its word give the signs. |z| <= 5.77.
template <class Word>
ZO2_HOST_DEVICE void gaussian_pair(Word radius_word, Word angle_word, FloatOf<Word>& first,
                                   FloatOf<Word>& second) {
  using Float = FloatOf<Word>;
  const Float radius = square_root(squared_radius(radius_word));
  Float cosine, sine;
  scaled_cosine_sine(angle_word, cosine, sine);
  const Word sign(0x80000000u);
  first = from_bits(to_bits(radius * (cosine - sine)) ^ (angle_word & sign));
  second = from_bits(to_bits(radius * (cosine + sine)) ^ (shift_left<1>(angle_word) & sign));
}

/// The normals of elements 4 * index to 4 * index + 3, for one lane.
ZO2_HOST_DEVICE void gaussian_quad(uint64_t key, uint64_t index, uint32_t tensor_id,
                                   float (&z)[4]) {
  uint32_t words[4];
  random_words(key, index, tensor_id, Domain::kDirection, words);
  gaussian_pair(words[0], words[1], z[0], z[1]);
  gaussian_pair(words[2], words[3], z[2], z[3]);
}

/// +1 or -1 for the element whose bit is number `bit` of the word.
ZO2_HOST_DEVICE float rademacher(uint32_t word, uint32_t bit) {
  return from_bits(0x3f800000u | (shift_left(word, 31u - bit) & 0x80000000u));
}

}  // namespace zo2ext
