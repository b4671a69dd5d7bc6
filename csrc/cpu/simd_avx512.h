// simd_avx512.h -- 16 lanes: the operations of simd.h on AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "../formats.h"
#include "../simd.h"

namespace zo2ext {

struct F32x16 {
  __m512 v;
  F32x16() = default;
  ZO2_HOST_DEVICE F32x16(__m512 value) : v(value) {}
  ZO2_HOST_DEVICE explicit F32x16(float x) : v(_mm512_set1_ps(x)) {}
};

struct U32x16 {
  __m512i v;
  U32x16() = default;
  ZO2_HOST_DEVICE U32x16(__m512i value) : v(value) {}
  ZO2_HOST_DEVICE explicit U32x16(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
};

/// 16 counters or products, each in a 64-bit lane: a 32-bit multiplication reads only the low
/// halves, so that a Philox round needs one multiplication and one shift a half.
struct U64x16 {
  __m512i even, odd;
  U64x16() = default;
  ZO2_HOST_DEVICE U64x16(__m512i e, __m512i o) : even(e), odd(o) {}
  ZO2_HOST_DEVICE explicit U64x16(uint32_t x) : even(_mm512_set1_epi64(x)), odd(even) {}
};

ZO2_HOST_DEVICE F32x16 operator+(F32x16 a, F32x16 b) { return _mm512_add_ps(a.v, b.v); }
ZO2_HOST_DEVICE F32x16 operator-(F32x16 a, F32x16 b) { return _mm512_sub_ps(a.v, b.v); }
ZO2_HOST_DEVICE F32x16 operator*(F32x16 a, F32x16 b) { return _mm512_mul_ps(a.v, b.v); }
ZO2_HOST_DEVICE F32x16 fused(F32x16 a, F32x16 b, F32x16 c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
ZO2_HOST_DEVICE F32x16 square_root(F32x16 x) { return _mm512_sqrt_ps(x.v); }
ZO2_HOST_DEVICE U32x16 to_bits(F32x16 x) { return _mm512_castps_si512(x.v); }
ZO2_HOST_DEVICE F32x16 from_bits(U32x16 x) { return _mm512_castsi512_ps(x.v); }
ZO2_HOST_DEVICE F32x16 from_signed(U32x16 x) { return _mm512_cvtepi32_ps(x.v); }

ZO2_HOST_DEVICE U32x16 operator+(U32x16 a, U32x16 b) { return _mm512_add_epi32(a.v, b.v); }
ZO2_HOST_DEVICE U32x16 operator-(U32x16 a, U32x16 b) { return _mm512_sub_epi32(a.v, b.v); }
ZO2_HOST_DEVICE U32x16 operator&(U32x16 a, U32x16 b) { return _mm512_and_si512(a.v, b.v); }
ZO2_HOST_DEVICE U32x16 operator|(U32x16 a, U32x16 b) { return _mm512_or_si512(a.v, b.v); }
ZO2_HOST_DEVICE U32x16 operator^(U32x16 a, U32x16 b) { return _mm512_xor_si512(a.v, b.v); }

template <int kCount>
ZO2_HOST_DEVICE U32x16 shift_left(U32x16 x) {
  return _mm512_slli_epi32(x.v, kCount);
}

template <int kCount>
ZO2_HOST_DEVICE U32x16 shift_right(U32x16 x) {
  return _mm512_srli_epi32(x.v, kCount);
}

ZO2_HOST_DEVICE U32x16 shift_left(U32x16 x, U32x16 n) { return _mm512_sllv_epi32(x.v, n.v); }
ZO2_HOST_DEVICE U32x16 shift_right(U32x16 x, U32x16 n) { return _mm512_srlv_epi32(x.v, n.v); }
ZO2_HOST_DEVICE U32x16 smaller_of(U32x16 a, U32x16 b) { return _mm512_min_epu32(a.v, b.v); }
ZO2_HOST_DEVICE __mmask16 greater(U32x16 a, U32x16 b) { return _mm512_cmpgt_epu32_mask(a.v, b.v); }
ZO2_HOST_DEVICE U32x16 select(__mmask16 mask, U32x16 yes, U32x16 no) {
  return _mm512_mask_blend_epi32(mask, no.v, yes.v);
}

ZO2_HOST_DEVICE U64x16 multiply(U64x16 a, U64x16 b) {
  return {_mm512_mul_epu32(a.even, b.even), _mm512_mul_epu32(a.odd, b.odd)};
}
ZO2_HOST_DEVICE U64x16 low_half(U64x16 product) { return product; }
ZO2_HOST_DEVICE U64x16 high_half(U64x16 product) {
  return {_mm512_srli_epi64(product.even, 32), _mm512_srli_epi64(product.odd, 32)};
}
ZO2_HOST_DEVICE U64x16 xor3(U64x16 a, U64x16 b, U64x16 c) {
  return {_mm512_ternarylogic_epi64(a.even, b.even, c.even, 0x96),
          _mm512_ternarylogic_epi64(a.odd, b.odd, c.odd, 0x96)};
}

// The processor's own float16 conversions round as the generic ones do; only NaN needs care.

ZO2_HOST_DEVICE F32x16 unpack(Float16, U32x16 packed) {
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(packed.v));
}

ZO2_HOST_DEVICE U32x16 pack_nearest(Float16, F32x16 weight) {
  const U32x16 packed = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(weight.v, _MM_FROUND_TO_NEAREST_INT));
  const U32x16 magnitude = to_bits(weight) & U32x16(0x7fffffffu);
  return select(greater(magnitude, U32x16(0x7f800000u)), U32x16(0x7e00u), packed);
}

struct Avx512Lanes {
  using Float = F32x16;
  using Word = U32x16;
  using Counter = U64x16;
  static constexpr int kCount = 16;

  /// Lane 4l + k of the 16 takes block 4k + l, so that an in-lane transposition ends in memory
  /// order.
  static ZO2_HOST_DEVICE U64x16 counters(uint32_t first) {
    const __m512i base = _mm512_set1_epi64(first);
    return {_mm512_add_epi32(base, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11)),
            _mm512_add_epi32(base, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15))};
  }

  static ZO2_HOST_DEVICE U32x16 merge(U64x16 x) {
    return _mm512_mask_shuffle_epi32(x.even, 0xaaaa, x.odd, static_cast<_MM_PERM_ENUM>(0xa0));
  }

  static ZO2_HOST_DEVICE void to_memory_order(F32x16 (&x)[4]) {
    const __m512 a = _mm512_unpacklo_ps(x[0].v, x[1].v), b = _mm512_unpackhi_ps(x[0].v, x[1].v);
    const __m512 c = _mm512_unpacklo_ps(x[2].v, x[3].v), d = _mm512_unpackhi_ps(x[2].v, x[3].v);
    x[0] = _mm512_shuffle_ps(a, c, 0x44);
    x[1] = _mm512_shuffle_ps(a, c, 0xee);
    x[2] = _mm512_shuffle_ps(b, d, 0x44);
    x[3] = _mm512_shuffle_ps(b, d, 0xee);
  }

  /// Bits first..first + 15 of the word, each as the sign bit of its lane.
  static ZO2_HOST_DEVICE U32x16 signs(uint32_t word, int first) {
    return _mm512_maskz_set1_epi32(static_cast<__mmask16>(word >> first),
                                   static_cast<int>(0x80000000u));
  }

  static ZO2_HOST_DEVICE uint32_t largest(U32x16 x) { return _mm512_reduce_max_epu32(x.v); }

  static ZO2_HOST_DEVICE F32x16 load(const float* from) { return _mm512_loadu_ps(from); }
  static ZO2_HOST_DEVICE void store(float* to, F32x16 x) { _mm512_storeu_ps(to, x.v); }
  static ZO2_HOST_DEVICE void store(uint32_t* to, U32x16 x) { _mm512_storeu_si512(to, x.v); }
  static ZO2_HOST_DEVICE U32x16 load(const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static ZO2_HOST_DEVICE U32x16 load(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static ZO2_HOST_DEVICE U32x16 load(const uint32_t* from) { return _mm512_loadu_si512(from); }
  /// Words below 256.
  static ZO2_HOST_DEVICE void store(uint8_t* to, U32x16 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x.v));
  }
  /// The low halves of the words.
  static ZO2_HOST_DEVICE void store(uint16_t* to, U32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x.v));
  }

  // The same past the caches, to addresses that are multiples of the vector's size.
  static ZO2_HOST_DEVICE void stream(float* to, F32x16 x) { _mm512_stream_ps(to, x.v); }
  static ZO2_HOST_DEVICE void stream(uint16_t* to, U32x16 x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x.v));
  }
};

}  // namespace zo2ext
