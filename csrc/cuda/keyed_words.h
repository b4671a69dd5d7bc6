// keyed_words.h -- Philox for one tensor under one key in one domain, with all that its blocks
// share done once.
//
// Of the counter only the low word of the index changes along a tensor (up to 2^32 blocks). The
// first round then has one product left to make instead of two, and so has the second, and a block
// costs 18 wide multiplications and 19 three-way exclusive ors: random_words() of noise.h, bit for
// bit.
#pragma once

#include <type_traits>

#include "../noise.h"

#if defined(__CUDA_ARCH__)
#define ZO2_DO_NOT_UNROLL _Pragma("unroll 1")
#else
#define ZO2_DO_NOT_UNROLL
#endif

namespace zo2ext {

/// The same value. On a GPU all threads of a warp have it, and it will stay in registers, where the
/// compiler would read the kernel's arguments again at each use.
ZO2_HOST_DEVICE uint64_t in_registers(uint64_t value) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(0xffffffffu, value, 0);
#else
  return value;
#endif
}

/// The same value, which the compiler is not to work out again at each use.
template <class Value>
ZO2_HOST_DEVICE Value kept(Value value) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_pointer_v<Value>) {
    size_t address = __cvta_generic_to_global(value);
    asm volatile("" : "+l"(address));
    value = static_cast<Value>(__cvta_global_to_generic(address));
  } else {
    static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) % 4 == 0, "words");
    uint32_t words[sizeof(Value) / 4];
    memcpy(words, &value, sizeof value);
    ZO2_UNROLL
    for (uint32_t& word : words) asm volatile("" : "+r"(word));
    memcpy(&value, words, sizeof value);
  }
#endif
  return value;
}

/// The ten round keys of a key. The first high one, which meets nothing but the domain, has it in
/// it.
struct RoundKeys {
  uint32_t low[10];
  uint32_t high[10];
};

ZO2_HOST_DEVICE RoundKeys round_keys(uint64_t key, Domain domain) {
  RoundKeys keys;
  ZO2_UNROLL
  for (uint32_t round = 0; round < 10; ++round) {
    keys.low[round] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
    keys.high[round] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
  }
  keys.high[0] ^= static_cast<uint32_t>(domain);
  return keys;
}

class KeyedWords {
 public:
  ZO2_HOST_DEVICE KeyedWords(const RoundKeys& keys, uint32_t index_high, uint32_t tensor_id)
      : keys_(keys) {
    const uint64_t product_2 = multiply(tensor_id, kMultiplier2);
    const uint32_t word_0 = xor3(high_half(product_2), index_high, keys.low[0]);
    const uint64_t product_0 = multiply(word_0, kMultiplier0);
    first_ = keys.high[0];
    second_0_ = low_half(product_2) ^ keys.low[1];
    second_2_ = high_half(product_0) ^ keys.high[1];
    third_2_ = low_half(product_0) ^ keys.high[2];
  }

  /// The four words of the block whose index has this low word.
  ZO2_HOST_DEVICE void operator()(uint32_t index_low, uint32_t (&words)[4]) const {
    uint64_t product_0 = multiply(index_low, kMultiplier0);
    const uint64_t only_2 = multiply(high_half(product_0) ^ first_, kMultiplier2);
    uint32_t word_0 = high_half(only_2) ^ second_0_;
    uint32_t word_2 = low_half(product_0) ^ second_2_;
    product_0 = multiply(word_0, kMultiplier0);
    uint64_t product_2 = multiply(word_2, kMultiplier2);
    word_0 = xor3(high_half(product_2), low_half(only_2), keys_.low[2]);
    word_2 = high_half(product_0) ^ third_2_;
    uint32_t word_1 = low_half(product_2), word_3 = low_half(product_0);
    ZO2_UNROLL
    for (int round = 3; round < 10; ++round) {
      product_0 = multiply(word_0, kMultiplier0);
      product_2 = multiply(word_2, kMultiplier2);
      word_0 = xor3(high_half(product_2), word_1, keys_.low[round]);
      word_2 = xor3(high_half(product_0), word_3, keys_.high[round]);
      word_1 = low_half(product_2);
      word_3 = low_half(product_0);
    }
    words[0] = word_0;
    words[1] = word_1;
    words[2] = word_2;
    words[3] = word_3;
  }

 private:
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u;
  static constexpr uint32_t kMultiplier2 = 0xCD9E8D57u;

  RoundKeys keys_;
  uint32_t first_, second_0_, second_2_, third_2_;  // by round, and the word they go into
};

}  // namespace zo2ext
