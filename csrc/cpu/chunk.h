// chunk.h -- a chunk, small enough for the first-level cache, and its random words.
//
// Compiled once for each instruction set, as chunk_kernels.h.
#pragma once

#include "variants.h"

namespace zo2ext {
namespace {

using Float = Lanes::Float;
using Word = Lanes::Word;

/// Elements in four vectors: what one Philox call of all lanes makes.
constexpr int64_t kGroup = 4 * Lanes::kCount;
constexpr int64_t kChunk = 2048;
static_assert(kChunk % kGroup == 0 && kChunk % kRademacherBlock == 0, "chunks are whole groups");

/// Elements [element, element + numel) of a tensor. Chunks end where `element` is a multiple of
/// kChunk, so the high word of a counter is the same throughout.
struct Chunk {
  int64_t element;
  int64_t numel;
  uint32_t tensor_id;
};

/// Four words for each of `kCount` consecutive blocks, lane by lane: words[i] in lane order.
ZO2_HOST_DEVICE void random_words(uint64_t key, uint64_t index, uint32_t tensor_id, Domain domain,
                                  Word (&words)[4], Lanes) {
  using Counter = Lanes::Counter;
  Counter counter[4] = {Lanes::counters(static_cast<uint32_t>(index)),
                        Counter(static_cast<uint32_t>(index >> 32)), Counter(tensor_id),
                        Counter(static_cast<uint32_t>(domain))};
  philox4x32_10(counter, key);
  for (int i = 0; i < 4; ++i) words[i] = Lanes::merge(counter[i]);
}

ZO2_HOST_DEVICE void to_memory_order(Word (&words)[4]) {
  Float as_floats[4];
  for (int i = 0; i < 4; ++i) as_floats[i] = from_bits(words[i]);
  Lanes::to_memory_order(as_floats);
  for (int i = 0; i < 4; ++i) words[i] = to_bits(as_floats[i]);
}

}  // namespace
}  // namespace zo2ext
