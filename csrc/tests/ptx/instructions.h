// instructions.h -- the meaning of PTX instructions for which C++ has no operator (PTX ISA 9.0).
//
// float32 is the host's, which rounds to nearest even and keeps subnormals: the build neither
// contracts nor reorders, and a launch checks the mode. NaN is handled here.
#pragma once

#include "machine.h"

namespace ptx {

#define PTX_OP static inline __attribute__((always_inline))

// Integers. Shift counts are clamped to the width.

PTX_OP int16_t as_signed(uint16_t a) { return static_cast<int16_t>(a); }
PTX_OP int32_t as_signed(uint32_t a) { return static_cast<int32_t>(a); }
PTX_OP int64_t as_signed(uint64_t a) { return static_cast<int64_t>(a); }

template <class U>
PTX_OP U shift_left(U a, uint32_t count) {
  return count >= 8 * sizeof(U) ? U{0} : static_cast<U>(a << count);
}
template <class U>
PTX_OP U shift_right(U a, uint32_t count) {
  return count >= 8 * sizeof(U) ? U{0} : static_cast<U>(a >> count);
}
template <class U>
PTX_OP U shift_right_signed(U a, uint32_t count) {
  return static_cast<U>(as_signed(a) >> (count >= 8 * sizeof(U) ? 8 * sizeof(U) - 1 : count));
}
/// The upper half of {b, a} << (c & 31), with `b` above.
PTX_OP uint32_t funnel_left(uint32_t a, uint32_t b, uint32_t c) {
  return static_cast<uint32_t>(((uint64_t{b} << 32 | a) << (c & 31)) >> 32);
}
PTX_OP uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (selector & 7))) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// float32.

PTX_OP float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
PTX_OP uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
PTX_OP bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }
PTX_OP uint32_t made(const Thread& m, float x) { return x == x ? bits_of(x) : m.nan; }

PTX_OP uint32_t add(const Thread& m, uint32_t a, uint32_t b) {
  return made(m, number(a) + number(b));
}
PTX_OP uint32_t subtract(const Thread& m, uint32_t a, uint32_t b) {
  return made(m, number(a) - number(b));
}
PTX_OP uint32_t multiply(const Thread& m, uint32_t a, uint32_t b) {
  return made(m, number(a) * number(b));
}
PTX_OP uint32_t fused(const Thread& m, uint32_t a, uint32_t b, uint32_t c) {
  return made(m, __builtin_fmaf(number(a), number(b), number(c)));
}
PTX_OP uint32_t negate(const Thread& m, uint32_t a) { return is_nan(a) ? m.nan : a ^ 0x80000000u; }
PTX_OP uint32_t absolute(const Thread& m, uint32_t a) {
  return is_nan(a) ? m.nan : a & 0x7fffffffu;
}
PTX_OP uint32_t float_of_signed(uint32_t a) { return bits_of(static_cast<float>(as_signed(a))); }

/// To nearest even, by the distances to the two neighbours.
PTX_OP uint32_t bfloat_of_float(uint32_t a) {
  if (is_nan(a)) return 0x7fffu;
  const uint32_t below = a >> 16, rest = a & 0xffffu;
  return rest == 0x8000u ? below + (below & 1) : below + (rest > 0x8000u);
}

// Memory.

template <uint32_t kBytes>
PTX_OP const uint8_t* ld_param(const Thread& m, uint64_t offset) {
  if (offset % kBytes != 0 || offset + kBytes > m.parameter_bytes) {
    fault(m, "a load from outside of the parameters, or misaligned", offset, kBytes);
  }
  return m.parameters + offset;
}

template <class U>
PTX_OP U get(const uint8_t* at, size_t i) {
  U value;
  std::memcpy(&value, at + sizeof(U) * i, sizeof value);
  return value;
}
/// The low bits of a register that may be wider.
template <class U>
PTX_OP void put(uint8_t* at, size_t i, uint64_t wide) {
  const U value = static_cast<U>(wide);
  std::memcpy(at + sizeof(U) * i, &value, sizeof value);
}

}  // namespace ptx
