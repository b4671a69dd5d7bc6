// simd_plain.h -- one lane, on any processor.
#pragma once

#include "../formats.h"
#include "../simd.h"

namespace zo2ext {

struct PlainLanes {
  using Float = float;
  using Word = uint32_t;
  using Counter = uint32_t;
  static constexpr int kCount = 1;

  static ZO2_HOST_DEVICE uint32_t counters(uint32_t first) { return first; }
  static ZO2_HOST_DEVICE uint32_t merge(uint32_t x) { return x; }
  static ZO2_HOST_DEVICE void to_memory_order(float (&)[4]) {}
  static ZO2_HOST_DEVICE uint32_t signs(uint32_t word, int bit) {
    return shift_left(word, static_cast<uint32_t>(31 - bit)) & 0x80000000u;
  }
  static ZO2_HOST_DEVICE uint32_t largest(uint32_t x) { return x; }
  static ZO2_HOST_DEVICE float load(const float* from) { return *from; }
  static ZO2_HOST_DEVICE void store(float* to, float x) { *to = x; }
  static ZO2_HOST_DEVICE void store(uint32_t* to, uint32_t x) { *to = x; }
  static ZO2_HOST_DEVICE uint32_t load(const uint8_t* from) { return *from; }
  static ZO2_HOST_DEVICE uint32_t load(const uint32_t* from) { return *from; }
  static ZO2_HOST_DEVICE void store(uint8_t* to, uint32_t x) { *to = static_cast<uint8_t>(x); }
  static ZO2_HOST_DEVICE uint32_t load(const uint16_t* from) { return *from; }
  static ZO2_HOST_DEVICE void store(uint16_t* to, uint32_t x) { *to = static_cast<uint16_t>(x); }
  static ZO2_HOST_DEVICE void stream(float* to, float x) { store(to, x); }
  static ZO2_HOST_DEVICE void stream(uint16_t* to, uint32_t x) { store(to, x); }
};

}  // namespace zo2ext
