// runs.h -- where a thread stands among the elements, and the noise there.
//
// A warp has a *share* of the elements, whole *steps* of 256, and walks through it in *runs*:
// elements of one tensor whose blocks of noise differ in the low word of their index alone. A
// thread holds an octet at a time.
#pragma once

#include "keyed_words.h"
#include "octet.h"

namespace zo2ext {

/// Which thread of which grid.
struct Place {
  uint32_t block;
  uint32_t thread;
  uint32_t threads;  // in a block: whole warps

  ZO2_HOST_DEVICE int64_t warp() const {
    return static_cast<int64_t>(block) * (threads / kWarp) + thread / kWarp;
  }
  ZO2_HOST_DEVICE uint32_t lane() const { return thread % kWarp; }
};

/// How the elements are divided.
struct Division {
  uint32_t share;  // elements a warp
  bool aligned;    // whether all pointers are multiples of 16
};

/// Elements of one tensor, fewer than 2^32, in one warp's share.
struct Run {
  int64_t at;      // of the first, counted from the pointers
  uint64_t quad;   // index of the first; its low word does not overflow in the run
  uint32_t count;  // elements
  uint32_t tensor_id;
  bool aligned;  // whether octets can be accessed at once, and share words of noise

  /// First elements of whole octets are below this.
  template <bool kApart>
  ZO2_HOST_DEVICE uint32_t whole() const {
    constexpr uint32_t kReach = kSecondQuad<kApart> + 3;
    return aligned && count > kReach ? count - kReach : 0;
  }

  /// Calls f(i) for the elements of the octet at `i`, one after the other.
  template <bool kApart, class Function>
  ZO2_HOST_DEVICE void for_each_element(uint32_t i, const Function& f) const {
    ZO2_DO_NOT_UNROLL
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t element = i + j % 4 + (j < 4 ? 0 : kSecondQuad<kApart>);
      if (element < count) f(element);
    }
  }
};

/// Calls f(run) for [from, to) of a share, where `from` is element `element` of a tensor.
template <class Function>
ZO2_HOST_DEVICE void for_each_run(int64_t from, int64_t to, int64_t element, uint32_t tensor_id,
                                  const Division& division, const Function& f) {
  constexpr int64_t kElements = kGaussianBlock << 32;  // whose quads have the same high word
  while (from < to) {
    const int64_t room = kElements - element % kElements;
    const int64_t count = to - from < room ? to - from : room;
    f(Run{from, static_cast<uint64_t>(element) / kGaussianBlock, static_cast<uint32_t>(count),
          tensor_id, division.aligned && from % 8 == 0 && element % 8 == 0});
    from += count;
    element += count;
  }
}

/// The whole share as one tensor.
template <class Function>
ZO2_HOST_DEVICE void for_each_run(const Place& place, int64_t numel, int64_t offset,
                                  uint32_t tensor_id, const Division& division, const Function& f) {
  const int64_t from = place.warp() * division.share;
  const int64_t to = from + division.share;
  for_each_run(from, to < numel ? to : numel, offset + from, tensor_id, division, f);
}

// Noise.

/// The direction along a run; the keys have its domain.
template <Distribution kDistribution, bool kApart>
class RunNoise;

template <bool kApart>
class RunNoise<Distribution::kGaussian, kApart> {
 public:
  ZO2_HOST_DEVICE RunNoise(const RoundKeys& keys, const Run& run)
      : words_(keys, static_cast<uint32_t>(run.quad >> 32), run.tensor_id),
        quad_(static_cast<uint32_t>(run.quad)) {}

  /// z of the octet at `i`, of an aligned run.
  ZO2_HOST_DEVICE void octet(uint32_t i, float (&z)[8]) const {
    ZO2_UNROLL
    for (uint32_t half = 0; half < 2; ++half) {
      uint32_t words[4];
      words_(quad_ + i / 4 + half * (kSecondQuad<kApart> / 4), words);
      gaussian_pair(words[0], words[1], z[4 * half], z[4 * half + 1]);
      gaussian_pair(words[2], words[3], z[4 * half + 2], z[4 * half + 3]);
    }
  }

 private:
  KeyedWords words_;
  uint32_t quad_;
};

template <bool kApart>
class RunNoise<Distribution::kRademacher, kApart> {
 public:
  ZO2_HOST_DEVICE RunNoise(const RoundKeys& keys, const Run& run)
      : words_(keys, static_cast<uint32_t>(run.quad / kBlockQuads >> 32), run.tensor_id),
        quad_(run.quad) {}

  ZO2_HOST_DEVICE void octet(uint32_t i, float (&z)[8]) const {
    const uint32_t bits = quad_bits(quad_ + i / 4);
    uint32_t second_bits = shift_right<4>(bits);
    if constexpr (kApart) second_bits = quad_bits(quad_ + i / 4 + kSecondQuad<kApart> / 4);
    ZO2_UNROLL
    for (uint32_t j = 0; j < 4; ++j) {
      z[j] = rademacher(bits, j);
      z[4 + j] = rademacher(second_bits, j);
    }
  }

 private:
  static constexpr uint64_t kBlockQuads = kRademacherBlock / 4;

  /// The bits of a quad and of the one after it, if that is in the same word, from bit 0 on.
  ZO2_HOST_DEVICE uint32_t quad_bits(uint64_t quad) const {
    uint32_t words[4];
    words_(static_cast<uint32_t>(quad / kBlockQuads), words);
    const uint32_t place = static_cast<uint32_t>(quad) % kBlockQuads;
    const bool odd_word = place / 8 % 2 != 0;
    const uint32_t word =
        place < 16 ? select(odd_word, words[1], words[0]) : select(odd_word, words[3], words[2]);
    return shift_right(word, 4 * (place % 8));
  }

  KeyedWords words_;
  uint64_t quad_;
};

/// Random words of stochastic rounding along a run; the keys have its domain.
template <bool kApart>
class RunRandom {
 public:
  ZO2_HOST_DEVICE RunRandom(const RoundKeys& keys, const Run& run)
      : words_(keys, static_cast<uint32_t>(run.quad >> 32), run.tensor_id),
        quad_(static_cast<uint32_t>(run.quad)) {}

  ZO2_HOST_DEVICE void octet(uint32_t i, uint32_t (&random)[8]) const {
    ZO2_UNROLL
    for (uint32_t half = 0; half < 2; ++half) {
      uint32_t words[4];
      words_(quad_ + i / 4 + half * (kSecondQuad<kApart> / 4), words);
      ZO2_UNROLL
      for (uint32_t j = 0; j < 4; ++j) random[4 * half + j] = words[j];
    }
  }

 private:
  KeyedWords words_;
  uint32_t quad_;
};

ZO2_HOST_DEVICE uint32_t one_of(const uint32_t (&words)[4], uint64_t i) {
  const uint32_t low = select(i % 2 != 0, words[1], words[0]);
  return select(i % 4 < 2, low, select(i % 2 != 0, words[3], words[2]));
}

/// z of one element of a tensor.
ZO2_HOST_DEVICE float noise_element(Distribution distribution, uint64_t key, Domain domain,
                                    uint32_t tensor_id, uint64_t element) {
  uint32_t words[4];
  if (distribution == Distribution::kRademacher) {
    random_words(key, element / kRademacherBlock, tensor_id, domain, words);
    return rademacher(one_of(words, element / 32), static_cast<uint32_t>(element % 32));
  }
  random_words(key, element / kGaussianBlock, tensor_id, domain, words);
  const bool second_pair = element % 4 >= 2;
  float first, second;
  gaussian_pair(select(second_pair, words[2], words[0]), select(second_pair, words[3], words[1]),
                first, second);
  return element % 2 == 0 ? first : second;
}

/// Random word for the rounding of one element.
ZO2_HOST_DEVICE uint32_t random_element(uint64_t key, uint32_t tensor_id, uint64_t element) {
  uint32_t words[4];
  random_words(key, element / 4, tensor_id, Domain::kRounding, words);
  return one_of(words, element);
}

}  // namespace zo2ext
