// simd_avx2.h -- 8 lanes: the operations of simd.h on AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "../formats.h"
#include "../simd.h"

namespace zo2ext {

struct F32x8 {
  __m256 v;
  F32x8() = default;
  ZO2_HOST_DEVICE F32x8(__m256 value) : v(value) {}
  ZO2_HOST_DEVICE explicit F32x8(float x) : v(_mm256_set1_ps(x)) {}
};

struct U32x8 {
  __m256i v;
  U32x8() = default;
  ZO2_HOST_DEVICE U32x8(__m256i value) : v(value) {}
  ZO2_HOST_DEVICE explicit U32x8(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
};

/// 8 counters or products, each in a 64-bit lane: a 32-bit multiplication reads only the low
/// halves, so that a Philox round needs one multiplication and one shift a half.
struct U64x8 {
  __m256i even, odd;
  U64x8() = default;
  ZO2_HOST_DEVICE U64x8(__m256i e, __m256i o) : even(e), odd(o) {}
  ZO2_HOST_DEVICE explicit U64x8(uint32_t x) : even(_mm256_set1_epi64x(x)), odd(even) {}
};

ZO2_HOST_DEVICE F32x8 operator+(F32x8 a, F32x8 b) { return _mm256_add_ps(a.v, b.v); }
ZO2_HOST_DEVICE F32x8 operator-(F32x8 a, F32x8 b) { return _mm256_sub_ps(a.v, b.v); }
ZO2_HOST_DEVICE F32x8 operator*(F32x8 a, F32x8 b) { return _mm256_mul_ps(a.v, b.v); }
ZO2_HOST_DEVICE F32x8 fused(F32x8 a, F32x8 b, F32x8 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
ZO2_HOST_DEVICE F32x8 square_root(F32x8 x) { return _mm256_sqrt_ps(x.v); }
ZO2_HOST_DEVICE U32x8 to_bits(F32x8 x) { return _mm256_castps_si256(x.v); }
ZO2_HOST_DEVICE F32x8 from_bits(U32x8 x) { return _mm256_castsi256_ps(x.v); }
ZO2_HOST_DEVICE F32x8 from_signed(U32x8 x) { return _mm256_cvtepi32_ps(x.v); }

ZO2_HOST_DEVICE U32x8 operator+(U32x8 a, U32x8 b) { return _mm256_add_epi32(a.v, b.v); }
ZO2_HOST_DEVICE U32x8 operator-(U32x8 a, U32x8 b) { return _mm256_sub_epi32(a.v, b.v); }
ZO2_HOST_DEVICE U32x8 operator&(U32x8 a, U32x8 b) { return _mm256_and_si256(a.v, b.v); }
ZO2_HOST_DEVICE U32x8 operator|(U32x8 a, U32x8 b) { return _mm256_or_si256(a.v, b.v); }
ZO2_HOST_DEVICE U32x8 operator^(U32x8 a, U32x8 b) { return _mm256_xor_si256(a.v, b.v); }

template <int kCount>
ZO2_HOST_DEVICE U32x8 shift_left(U32x8 x) {
  return _mm256_slli_epi32(x.v, kCount);
}

template <int kCount>
ZO2_HOST_DEVICE U32x8 shift_right(U32x8 x) {
  return _mm256_srli_epi32(x.v, kCount);
}

ZO2_HOST_DEVICE U32x8 shift_left(U32x8 x, U32x8 n) { return _mm256_sllv_epi32(x.v, n.v); }
ZO2_HOST_DEVICE U32x8 shift_right(U32x8 x, U32x8 n) { return _mm256_srlv_epi32(x.v, n.v); }
ZO2_HOST_DEVICE U32x8 smaller_of(U32x8 a, U32x8 b) { return _mm256_min_epu32(a.v, b.v); }
/// All ones in the lanes where it holds.
ZO2_HOST_DEVICE U32x8 greater(U32x8 a, U32x8 b) { return _mm256_cmpgt_epi32(a.v, b.v); }
ZO2_HOST_DEVICE U32x8 select(U32x8 mask, U32x8 yes, U32x8 no) {
  return _mm256_blendv_epi8(no.v, yes.v, mask.v);
}

ZO2_HOST_DEVICE U64x8 multiply(U64x8 a, U64x8 b) {
  return {_mm256_mul_epu32(a.even, b.even), _mm256_mul_epu32(a.odd, b.odd)};
}
ZO2_HOST_DEVICE U64x8 low_half(U64x8 product) { return product; }
ZO2_HOST_DEVICE U64x8 high_half(U64x8 product) {
  return {_mm256_srli_epi64(product.even, 32), _mm256_srli_epi64(product.odd, 32)};
}
ZO2_HOST_DEVICE U64x8 xor3(U64x8 a, U64x8 b, U64x8 c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.even, b.even), c.even),
          _mm256_xor_si256(_mm256_xor_si256(a.odd, b.odd), c.odd)};
}

// The processor's own float16 conversions round as the generic ones do; only NaN needs care.

ZO2_HOST_DEVICE F32x8 unpack(Float16, U32x8 packed) {
  return _mm256_cvtph_ps(
      _mm_packus_epi32(_mm256_castsi256_si128(packed.v), _mm256_extracti128_si256(packed.v, 1)));
}

ZO2_HOST_DEVICE U32x8 pack_nearest(Float16, F32x8 weight) {
  const U32x8 packed = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(weight.v, _MM_FROUND_TO_NEAREST_INT));
  const U32x8 magnitude = to_bits(weight) & U32x8(0x7fffffffu);
  return select(greater(magnitude, U32x8(0x7f800000u)), U32x8(0x7e00u), packed);
}

struct Avx2Lanes {
  using Float = F32x8;
  using Word = U32x8;
  using Counter = U64x8;
  static constexpr int kCount = 8;

  /// Lane 4l + k of the 8 takes block 2k + l, so that an in-lane transposition ends in memory
  /// order.
  static ZO2_HOST_DEVICE U64x8 counters(uint32_t first) {
    const __m256i base = _mm256_set1_epi64x(first);
    return {_mm256_add_epi32(base, _mm256_setr_epi64x(0, 4, 1, 5)),
            _mm256_add_epi32(base, _mm256_setr_epi64x(2, 6, 3, 7))};
  }

  static ZO2_HOST_DEVICE U32x8 merge(U64x8 x) {
    return _mm256_blend_epi32(x.even, _mm256_slli_epi64(x.odd, 32), 0xaa);
  }

  static ZO2_HOST_DEVICE void to_memory_order(F32x8 (&x)[4]) {
    const __m256 a = _mm256_unpacklo_ps(x[0].v, x[1].v), b = _mm256_unpackhi_ps(x[0].v, x[1].v);
    const __m256 c = _mm256_unpacklo_ps(x[2].v, x[3].v), d = _mm256_unpackhi_ps(x[2].v, x[3].v);
    x[0] = _mm256_shuffle_ps(a, c, 0x44);
    x[1] = _mm256_shuffle_ps(a, c, 0xee);
    x[2] = _mm256_shuffle_ps(b, d, 0x44);
    x[3] = _mm256_shuffle_ps(b, d, 0xee);
  }

  /// Bits first..first + 7 of the word, each as the sign bit of its lane.
  static ZO2_HOST_DEVICE U32x8 signs(uint32_t word, int first) {
    const __m256i count =
        _mm256_sub_epi32(_mm256_set1_epi32(31 - first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return U32x8(_mm256_sllv_epi32(U32x8(word).v, count)) & U32x8(0x80000000u);
  }

  static ZO2_HOST_DEVICE uint32_t largest(U32x8 x) {
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
  }

  static ZO2_HOST_DEVICE F32x8 load(const float* from) { return _mm256_loadu_ps(from); }
  static ZO2_HOST_DEVICE void store(float* to, F32x8 x) { _mm256_storeu_ps(to, x.v); }
  static ZO2_HOST_DEVICE void store(uint32_t* to, U32x8 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x.v);
  }
  static ZO2_HOST_DEVICE U32x8 load(const uint16_t* from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static ZO2_HOST_DEVICE U32x8 load(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static ZO2_HOST_DEVICE U32x8 load(const uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  /// Words below 256.
  static ZO2_HOST_DEVICE void store(uint8_t* to, U32x8 x) {
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
  }
  /// The low halves of the words.
  static ZO2_HOST_DEVICE void store(uint16_t* to, U32x8 x) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_packus_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1)));
  }

  // The same past the caches, to addresses that are multiples of the vector's size.
  static ZO2_HOST_DEVICE void stream(float* to, F32x8 x) { _mm256_stream_ps(to, x.v); }
  static ZO2_HOST_DEVICE void stream(uint16_t* to, U32x8 x) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_packus_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1)));
  }
};

}  // namespace zo2ext
