// philox.h -- Philox4x32-10, a counter turned into four random words.
//
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. The known
// answers that Random123 publishes are in tests/ops/data/philox4x32.txt.
#pragma once

#include "simd.h"

namespace zo2ext {

/// Replaces the counter by its four random words. `Counter` is a word, or many: one a lane.
template <class Counter>
ZO2_HOST_DEVICE void philox4x32_10(Counter (&counter)[4], uint64_t key) {
  uint32_t key_low = static_cast<uint32_t>(key);
  uint32_t key_high = static_cast<uint32_t>(key >> 32);
  ZO2_UNROLL
  for (int round = 0; round < 10; ++round) {
    const auto product_0 = multiply(counter[0], Counter(0xD2511F53u));
    const auto product_2 = multiply(counter[2], Counter(0xCD9E8D57u));
    counter[0] = xor3(high_half(product_2), counter[1], Counter(key_low));
    counter[2] = xor3(high_half(product_0), counter[3], Counter(key_high));
    counter[1] = low_half(product_2);
    counter[3] = low_half(product_0);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
}

}  // namespace zo2ext
