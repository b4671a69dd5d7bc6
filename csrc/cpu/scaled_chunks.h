// scaled_chunks.h -- a chunk of a format whose elements share scales: unpacked, and rounded.
//
// Compiled once for each instruction set, as chunk_kernels.h. A chunk begins with a group; its last
// group may be short.
#pragma once

#include "../scaled_formats.h"
#include "chunk.h"

namespace zo2ext {
namespace {

/// Where a chunk is stored: its elements, the scales of its groups, and its low bytes. The last
/// two are null where the format has none.
struct Stored {
  void* elements;
  uint8_t* scales;
  uint8_t* low;
};

/// Elements in whole groups of both kinds, those that share scales and those of a Philox call.
constexpr int64_t kWhole = kGroup > kScaleGroup ? kGroup : kScaleGroup;
static_assert(kWhole % kGroup == 0 && kWhole % kScaleGroup == 0 && kChunk % kWhole == 0,
              "chunks are whole groups");

/// Zeroes what lies between the last weight and the end of its group.
void clear_tail(float* weights, int64_t numel) {
  const int64_t rest = (kWhole - numel % kWhole) % kWhole;
  std::memset(weights + numel, 0, static_cast<size_t>(rest) * sizeof(*weights));
}

/// The bytes of a group: where they are, or a copy where the group is short.
const uint8_t* whole_group(const uint8_t* from, int64_t left, uint8_t (&copy)[kScaleGroup]) {
  if (left >= kScaleGroup) return from;
  std::memset(copy, 0, sizeof copy);
  std::memcpy(copy, from, static_cast<size_t>(left));
  return copy;
}

template <class Format>
void unpack_groups(Format format, const Stored& stored, int64_t numel, float* weights) {
  const auto* const tops = static_cast<const uint8_t*>(stored.elements);
  for (int64_t i = 0; i < numel; i += kScaleGroup) {
    uint8_t top_copy[kScaleGroup], low_copy[kScaleGroup];
    const uint8_t* const top = whole_group(tops + i, numel - i, top_copy);
    const uint8_t* low = nullptr;
    if constexpr (Format::kSplit) low = whole_group(stored.low + i, numel - i, low_copy);
    const Float scale(scale_factor(stored.scales[i / kScaleGroup]));
    for (int64_t j = 0; j < kScaleGroup; j += Lanes::kCount) {
      Word low_bytes(0u);
      if constexpr (Format::kSplit) low_bytes = Lanes::load(low + j);
      const Word code = code_of_bytes(format, Lanes::load(top + j), low_bytes);
      Lanes::store(weights + i + j, value_of(format, code, scale));
    }
  }
  clear_tail(weights, numel);
}

/// Rounds one whole group to codes; `random` is null for rounding to nearest. Returns the scale.
template <class Format>
ZO2_HOST_DEVICE uint32_t round_group(Format format, const float* weights, const uint32_t* random,
                                     Word (&codes)[kScaleGroup / Lanes::kCount]) {
  constexpr int kVectors = kScaleGroup / Lanes::kCount;
  Word largest(0u);
  for (int v = 0; v < kVectors; ++v) {
    const Float w = Lanes::load(weights + v * Lanes::kCount);
    largest = larger_of(largest, counted_magnitude(format, w));
  }
  uint32_t scale = scale_for(format, Lanes::largest(largest));
  const Float inverse(inverse_factor(scale));
  Word largest_code(0u);
  for (int v = 0; v < kVectors; ++v) {
    const Float w = Lanes::load(weights + v * Lanes::kCount);
    if (random == nullptr) {
      codes[v] = code_nearest(format, w, inverse);
    } else {
      codes[v] = code_stochastic(format, w, inverse, Lanes::load(random + v * Lanes::kCount));
    }
    largest_code = larger_of(largest_code, counted_code(format, codes[v]));
  }
  if (is_halved(format, scale, Lanes::largest(largest_code))) {
    --scale;
    for (Word& code : codes) code = halved_code(format, code);
  }
  return scale;
}

/// Zeroes the weights' tail.
template <class Format>
void round_groups(Format format, Rounding rounding, uint64_t key, const Chunk& chunk,
                  float* weights, const Stored& stored) {
  clear_tail(weights, chunk.numel);
  const bool nearest = rounding == Rounding::kNearest;
  alignas(64) uint32_t random[kChunk];
  for (int64_t i = 0; i < chunk.numel && !nearest; i += kGroup) {
    Word words[4];
    random_words(key, static_cast<uint64_t>(chunk.element + i) / 4, chunk.tensor_id,
                 Domain::kRounding, words, Lanes());
    to_memory_order(words);
    for (int j = 0; j < 4; ++j) Lanes::store(random + i + j * Lanes::kCount, words[j]);
  }
  for (int64_t i = 0; i < chunk.numel; i += kScaleGroup) {
    Word codes[kScaleGroup / Lanes::kCount];
    const uint32_t scale = round_group(format, weights + i, nearest ? nullptr : random + i, codes);
    stored.scales[i / kScaleGroup] = static_cast<uint8_t>(scale);
    uint8_t bytes[kScaleGroup];
    const int64_t left = chunk.numel - i < kScaleGroup ? chunk.numel - i : kScaleGroup;
    const auto store = [&](auto byte_of, uint8_t* to) {
      for (int64_t j = 0; j < kScaleGroup; j += Lanes::kCount) {
        Lanes::store(bytes + j, byte_of(codes[j / Lanes::kCount]));
      }
      std::memcpy(to + i, bytes, static_cast<size_t>(left));
    };
    store([&](Word code) { return top_byte(format, code); },
          static_cast<uint8_t*>(stored.elements));
    if constexpr (Format::kSplit) store([](Word code) { return low_byte(code); }, stored.low);
  }
}

}  // namespace
}  // namespace zo2ext
