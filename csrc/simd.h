// simd.h -- the operations that noise, formats and step are written in, for one lane.
//
// The arithmetic of a step exists once, as templates over a word type (uint32_t here) and the float
// type that belongs to it. The vector types in cpu/simd_avx2.h and cpu/simd_avx512.h overload the
// same functions for 8 and 16 lanes; a GPU thread uses these.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ZO2_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the same templates are compiled for several instruction sets, and no copy made
// for a newer one may be shared with code that must run on an older machine.
#define ZO2_HOST_DEVICE inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define ZO2_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define ZO2_UNROLL  // nvcc knows no such pragma in host code
#else
#define ZO2_UNROLL _Pragma("GCC unroll 16")
#endif

namespace zo2ext {

// Reinterpretation of the same 32 bits.

ZO2_HOST_DEVICE uint32_t to_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

ZO2_HOST_DEVICE float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

/// The float type with as many lanes as `Word`.
template <class Word>
using FloatOf = decltype(from_bits(Word(0u)));

// Float32 arithmetic, each rounded once to nearest even.

/// a * b + c
ZO2_HOST_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

/// Of x from 2^-101 to the largest finite number.
ZO2_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  // sqrt.rn.f32 without its test for other x. Its disassembly on sm_75 to sm_120:
  //   IADD3 t, x, -0xd000000; MUFU.RSQ y, x; ISETP.GT.U32 p, t, 0x727fffff; @p: the slow way
  //   FMUL.FTZ r, x, y; FMUL.FTZ h, y, 0.5; FFMA d, -r, r, x; FFMA r, d, h, r
  // csrc/tests/cuda_emulation_check.cpp tries every x that noise has with every y within the error
  // that CUDA documents; tests/ops/test_cuda.py has a GPU do all of them.
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float root = __fmul_rn(x, y);
  return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(y, 0.5f), root);
#else
  return __builtin_sqrtf(x);  // an instruction, under -fno-math-errno
#endif
}

/// The word as a signed integer, converted.
ZO2_HOST_DEVICE float from_signed(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word));
}

// Words. Shift counts are below 32; `greater` compares words below 2^31.

template <int kCount>
ZO2_HOST_DEVICE uint32_t shift_left(uint32_t word) {
  return word << kCount;
}

template <int kCount>
ZO2_HOST_DEVICE uint32_t shift_right(uint32_t word) {
  return word >> kCount;
}

ZO2_HOST_DEVICE uint32_t shift_left(uint32_t word, uint32_t count) { return word << count; }
ZO2_HOST_DEVICE uint32_t shift_right(uint32_t word, uint32_t count) { return word >> count; }
ZO2_HOST_DEVICE bool greater(uint32_t a, uint32_t b) { return a > b; }
ZO2_HOST_DEVICE uint32_t smaller_of(uint32_t a, uint32_t b) { return a < b ? a : b; }
ZO2_HOST_DEVICE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  return condition ? yes : no;
}
ZO2_HOST_DEVICE uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

// The full product of two words, and its halves.

ZO2_HOST_DEVICE uint64_t multiply(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
ZO2_HOST_DEVICE uint32_t low_half(uint64_t product) { return static_cast<uint32_t>(product); }
ZO2_HOST_DEVICE uint32_t high_half(uint64_t product) {
  return static_cast<uint32_t>(product >> 32);
}

}  // namespace zo2ext
