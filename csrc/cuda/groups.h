// groups.h -- formats whose elements share scales: a thread holds a whole group at a time, so that
// it needs no other thread to choose the scale.
//
// Lanes of a warp take neighbouring groups. Groups that are short or not aligned are read and
// written byte by byte; so is a copy with a NaN, whose bits the GPU's own conversions would not
// keep.
#pragma once

#include "../scaled_formats.h"
#include "../step.h"
#include "runs.h"

namespace zo2ext {

constexpr uint32_t kGroupElements = kScaleGroup;
constexpr uint32_t kGroupStep = kGroupElements * kWarp;  // elements in the groups of a warp

/// A group's weights, as octets.
using GroupWeights = float[4][8];

/// One group of a run.
struct Group {
  int64_t at;     // its first element, counted from the pointers
  uint32_t i;     // the same, counted from the run
  uint32_t left;  // elements of it in the run: up to 32
  bool vectors;   // whether it can be accessed 16 bytes at a time

  ZO2_HOST_DEVICE Group(const Run& run, uint32_t first, bool aligned)
      : at(run.at + first),
        i(first),
        left(run.count - first < kGroupElements ? run.count - first : kGroupElements),
        vectors(aligned && left == kGroupElements) {}
};

/// Where a group's elements are stored.
struct GroupMemory {
  void* elements;
  uint8_t* scales;
  uint8_t* low;
};

/// The direction along a group, octet by octet.
template <Distribution kDistribution>
class GroupNoise;

template <>
class GroupNoise<Distribution::kGaussian> {
 public:
  ZO2_HOST_DEVICE GroupNoise(uint64_t key, Domain domain, const Run& run, uint32_t i)
      : noise_(round_keys(key, domain), run), i_(i) {}

  ZO2_HOST_DEVICE void octet(uint32_t o, float (&z)[8]) const { noise_.octet(i_ + 8 * o, z); }

 private:
  RunNoise<Distribution::kGaussian, false> noise_;
  uint32_t i_;
};

/// One word has the signs of a group.
template <>
class GroupNoise<Distribution::kRademacher> {
 public:
  ZO2_HOST_DEVICE GroupNoise(uint64_t key, Domain domain, const Run& run, uint32_t i) {
    uint32_t words[4];
    const uint64_t element = run.quad * 4 + i;
    random_words(key, element / kRademacherBlock, run.tensor_id, domain, words);
    word_ = one_of(words, element / 32);
  }

  ZO2_HOST_DEVICE void octet(uint32_t o, float (&z)[8]) const {
    ZO2_UNROLL
    for (uint32_t j = 0; j < 8; ++j) z[j] = rademacher(word_, 8 * o + j);
  }

 private:
  uint32_t word_;
};

// Memory.

/// The bytes of a group, zero where it has no more.
ZO2_HOST_DEVICE void load_bytes(const void* elements, const Group& group, uint32_t (&words)[8]) {
  const auto* const from = static_cast<const uint8_t*>(elements) + group.at;
  if (group.vectors) {
    load_words<4>(from, words);
    load_words<4>(from + 16, words + 4);
    return;
  }
  ZO2_UNROLL
  for (uint32_t q = 0; q < 8; ++q) {
    words[q] = 0;
    ZO2_DO_NOT_UNROLL
    for (uint32_t b = 0; b < 4 && 4 * q + b < group.left; ++b) {
      words[q] |= shift_left(from[4 * q + b], 8 * b);
    }
  }
}

ZO2_HOST_DEVICE void store_bytes(const uint32_t (&words)[8], const Group& group, void* elements) {
  auto* const to = static_cast<uint8_t*>(elements) + group.at;
  if (group.vectors) {
    store_words<4>(to, words);
    store_words<4>(to + 16, words + 4);
    return;
  }
  ZO2_UNROLL
  for (uint32_t q = 0; q < 8; ++q) {
    ZO2_DO_NOT_UNROLL
    for (uint32_t b = 0; b < 4 && 4 * q + b < group.left; ++b) {
      to[4 * q + b] = static_cast<uint8_t>(shift_right(words[q], 8 * b));
    }
  }
}

/// One octet of a group, rounded to nearest into a compute dtype.
ZO2_HOST_DEVICE void store_computed(DType dtype, const float (&w)[8], const Group& group,
                                    uint32_t o, void* to) {
  if (group.vectors && all_numbers(w)) {
    with_compute_format<true>(dtype, [&](auto format) {
      using Element = typename decltype(format)::Storage;
      store_octet<false>(pack_octet(format, w), static_cast<Element*>(to) + group.at, 8 * o);
    });
    return;
  }
  ZO2_DO_NOT_UNROLL
  for (uint32_t j = 0; j < 8 && 8 * o + j < group.left; ++j) {
    float weight = w[0];
    ZO2_UNROLL
    for (uint32_t k = 1; k < 8; ++k) weight = j == k ? w[k] : weight;
    store_element(dtype, Rounding::kNearest, 0, weight, to, group.at + 8 * o + j);
  }
}

template <class Format>
ZO2_HOST_DEVICE void load_group(Format format, const GroupMemory& memory, const Group& group,
                                GroupWeights& w) {
  uint32_t top[8], low[8] = {};
  load_bytes(memory.elements, group, top);
  if constexpr (Format::kSplit) load_bytes(memory.low, group, low);
  const float scale = scale_factor(memory.scales[group.at / kScaleGroup]);
  ZO2_UNROLL
  for (uint32_t j = 0; j < kGroupElements; ++j) {
    const uint32_t shift = 8 * (j % 4);
    const uint32_t code = code_of_bytes(format, shift_right(top[j / 4], shift) & 0xffu,
                                        shift_right(low[j / 4], shift) & 0xffu);
    w[j / 8][j % 8] = value_of(format, code, scale);
  }
}

/// float32 weights of a group, zero where it has no more.
ZO2_HOST_DEVICE void load_weights(const float* from, const Group& group, GroupWeights& w) {
  ZO2_UNROLL
  for (uint32_t q = 0; q < 8; ++q) {
    uint32_t words[4] = {};
    if (group.vectors) {
      load_words<4>(from + 4 * q, words);
    } else {
      ZO2_UNROLL
      for (uint32_t j = 0; j < 4; ++j) {
        if (4 * q + j < group.left) words[j] = to_bits(from[4 * q + j]);
      }
    }
    ZO2_UNROLL
    for (uint32_t j = 0; j < 4; ++j) w[q / 2][4 * (q % 2) + j] = from_bits(words[j]);
  }
}

/// Rounds a group, and stores it if asked to.
template <class Format>
ZO2_HOST_DEVICE void round_group(Format format, Rounding rounding, uint64_t key, const Run& run,
                                 const Group& group, GroupWeights& w, const GroupMemory& memory,
                                 bool stores) {
  uint32_t largest = 0;
  ZO2_UNROLL
  for (uint32_t j = 0; j < kGroupElements; ++j) {
    float& weight = w[j / 8][j % 8];
    weight = j < group.left ? weight : 0.0f;
    largest = larger_of(largest, counted_magnitude(format, weight));
  }
  uint32_t scale = scale_for(format, largest);
  const float inverse = inverse_factor(scale);
  uint32_t codes[kGroupElements];
  if (rounding == Rounding::kNearest) {
    ZO2_UNROLL
    for (uint32_t j = 0; j < kGroupElements; ++j) {
      codes[j] = code_nearest(format, w[j / 8][j % 8], inverse);
    }
  } else {
    const RunRandom<false> run_random(round_keys(key, Domain::kRounding), run);
    ZO2_UNROLL
    for (uint32_t o = 0; o < 4; ++o) {
      uint32_t random[8];
      run_random.octet(group.i + 8 * o, random);
      ZO2_UNROLL
      for (uint32_t j = 0; j < 8; ++j) {
        codes[8 * o + j] = code_stochastic(format, w[o][j], inverse, random[j]);
      }
    }
  }
  uint32_t largest_code = 0;
  ZO2_UNROLL
  for (uint32_t j = 0; j < kGroupElements; ++j) {
    largest_code = larger_of(largest_code, counted_code(format, codes[j]));
  }
  if (is_halved(format, scale, largest_code)) {
    --scale;
    ZO2_UNROLL
    for (uint32_t j = 0; j < kGroupElements; ++j) codes[j] = halved_code(format, codes[j]);
  }
  const float factor = scale_factor(scale);
  uint32_t top[8] = {}, low[8] = {};
  ZO2_UNROLL
  for (uint32_t j = 0; j < kGroupElements; ++j) {
    top[j / 4] |= shift_left(top_byte(format, codes[j]), 8 * (j % 4));
    low[j / 4] |= shift_left(low_byte(codes[j]), 8 * (j % 4));
    w[j / 8][j % 8] = value_of(format, codes[j], factor);
  }
  if (!stores) return;
  store_bytes(top, group, memory.elements);
  if constexpr (Format::kSplit) store_bytes(low, group, memory.low);
  memory.scales[group.at / kScaleGroup] = static_cast<uint8_t>(scale);
}

/// Calls f(group) for the lane's groups of a run.
template <class Function>
ZO2_HOST_DEVICE void for_each_group(const Run& run, const Place& place, bool aligned,
                                    const Function& f) {
  for (uint32_t i = kGroupElements * place.lane(); i < run.count; i += kGroupStep) {
    f(Group(run, i, aligned));
  }
}

}  // namespace zo2ext
