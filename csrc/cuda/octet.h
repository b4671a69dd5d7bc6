// octet.h -- the eight elements that a thread holds at a time: memory, unpacking, packing.
//
// An octet is two quads. Where all formats in a kernel have 16 bits the quads are neighbours, so
// that a thread moves 16 bytes; otherwise they are 128 elements apart, so that the 16-byte accesses
// of a warp to float32 are contiguous too.
#pragma once

#include "../formats.h"

namespace zo2ext {

constexpr uint32_t kWarp = 32;             // threads
constexpr uint32_t kWarpStep = 8 * kWarp;  // elements in the octets of a warp

/// Calls f with the format of a dtype; one of 16 bits unless kFloat32.
template <bool kFloat32, class Function>
ZO2_HOST_DEVICE void with_compute_format(DType dtype, const Function& f) {
  if constexpr (kFloat32) {
    if (dtype == DType::kFloat32) return f(Float32());
  }
  return dtype == DType::kBFloat16 ? f(BFloat16()) : f(Float16());
}

/// Whether the quads of octets lie apart.
template <class... Formats>
constexpr bool kQuadsApart = ((sizeof(typename Formats::Storage) == 4) || ...);

/// Where the second quad of an octet begins, counted from the first.
template <bool kApart>
constexpr uint32_t kSecondQuad = kApart ? 4 * kWarp : 4;

/// Where a lane's first octet begins, in the elements of its warp.
template <bool kApart>
ZO2_HOST_DEVICE uint32_t first_octet(uint32_t lane) {
  return (kApart ? 4 : 8) * lane;
}

/// As in memory: the words of the first quad, then those of the second.
template <class Format>
struct PackedOctet {
  static constexpr int kWords = 2 * sizeof(typename Format::Storage);
  uint32_t words[kWords];
};

// Memory.

#if !defined(__CUDA_ARCH__)
/// Stops where a GPU would report a misaligned address.
inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) __builtin_trap();
}
#endif

/// 2 or 4 words, at an address aligned to all of them.
template <int kWords>
ZO2_HOST_DEVICE void load_words(const void* from, uint32_t* words) {
#if defined(__CUDA_ARCH__)
  if constexpr (kWords == 4) {
    const uint4 all = *static_cast<const uint4*>(from);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  } else {
    const uint2 all = *static_cast<const uint2*>(from);
    words[0] = all.x, words[1] = all.y;
  }
#else
  check_alignment(from, kWords * sizeof(*words));
  std::memcpy(words, from, kWords * sizeof(*words));
#endif
}

template <int kWords>
ZO2_HOST_DEVICE void store_words(void* to, const uint32_t* words) {
#if defined(__CUDA_ARCH__)
  if constexpr (kWords == 4) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
#else
  check_alignment(to, kWords * sizeof(*words));
  std::memcpy(to, words, kWords * sizeof(*words));
#endif
}

/// The whole octet that begins at element `i`.
template <bool kApart, class Format>
ZO2_HOST_DEVICE PackedOctet<Format> load_octet(Format, const typename Format::Storage* from,
                                               uint32_t i) {
  constexpr int kWords = PackedOctet<Format>::kWords;
  PackedOctet<Format> octet;
  if constexpr (kApart || kWords > 4) {
    load_words<kWords / 2>(from + i, octet.words);
    load_words<kWords / 2>(from + i + kSecondQuad<kApart>, octet.words + kWords / 2);
  } else {
    load_words<kWords>(from + i, octet.words);
  }
  return octet;
}

template <bool kApart, class Format>
ZO2_HOST_DEVICE void store_octet(const PackedOctet<Format>& octet, typename Format::Storage* to,
                                 uint32_t i) {
  constexpr int kWords = PackedOctet<Format>::kWords;
  if constexpr (kApart || kWords > 4) {
    store_words<kWords / 2>(to + i, octet.words);
    store_words<kWords / 2>(to + i + kSecondQuad<kApart>, octet.words + kWords / 2);
  } else {
    store_words<kWords>(to + i, octet.words);
  }
}

// Values, in the order of their elements.

/// Whether none is NaN.
ZO2_HOST_DEVICE bool all_numbers(const float (&w)[8]) {
#if defined(__CUDA_ARCH__)
  uint32_t all;
  asm("{.reg .pred p; setp.num.f32 p, %1, %2; setp.num.and.f32 p, %3, %4, p;"
      " setp.num.and.f32 p, %5, %6, p; setp.num.and.f32 p, %7, %8, p; selp.u32 %0, 1, 0, p;}"
      : "=r"(all)
      : "f"(w[0]), "f"(w[1]), "f"(w[2]), "f"(w[3]), "f"(w[4]), "f"(w[5]), "f"(w[6]), "f"(w[7]));
  return all != 0;
#else
  bool all = true;
  for (const float x : w) all = all && x == x;
  return all;
#endif
}

/// Whether none is NaN or beyond the largest finite bfloat16.
ZO2_HOST_DEVICE bool all_bounded(const float (&w)[8]) {
  bool all = true;
  ZO2_UNROLL
  for (int j = 0; j < 8; ++j) all = all & (__builtin_fabsf(w[j]) <= 0x1.fep127f);
  return all;
}

ZO2_HOST_DEVICE void unpack_octet(const PackedOctet<Float32>& octet, float (&w)[8]) {
  ZO2_UNROLL
  for (int j = 0; j < 8; ++j) w[j] = from_bits(octet.words[j]);
}

ZO2_HOST_DEVICE void unpack_octet(const PackedOctet<BFloat16>& octet, float (&w)[8]) {
  ZO2_UNROLL
  for (int j = 0; j < 8; j += 2) {
    w[j] = from_bits(shift_left<16>(octet.words[j / 2]));
    w[j + 1] = from_bits(octet.words[j / 2] & 0xffff0000u);
  }
}

/// A NaN loses its other bits here: the GPU's own conversion, and its imitation.
ZO2_HOST_DEVICE void unpack_octet(const PackedOctet<Float16>& octet, float (&w)[8]) {
  ZO2_UNROLL
  for (int j = 0; j < 8; j += 2) {
#if defined(__CUDA_ARCH__)
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2;"
        " cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(w[j]), "=f"(w[j + 1])
        : "r"(octet.words[j / 2]));
#else
    for (int half = 0; half < 2; ++half) {
      const float x = unpack(Float16(), octet.words[j / 2] >> 16 * half & 0xffffu);
      w[j + half] = x == x ? x : from_bits(0x7fffffffu);
    }
#endif
  }
}

/// Two numbers, rounded to nearest, the first in the low half. The GPU's own conversions, and their
/// imitation: NaN alone has other bits than in formats.h. Before compute capability 8.0 a GPU has
/// no conversion to bfloat16, and converts to float16 one number at a time.
template <class Format>
ZO2_HOST_DEVICE uint32_t pack_pair(Format format, float low, float high) {
#if defined(__CUDA_ARCH__)
  constexpr bool kBFloat16 = Format::kDType == DType::kBFloat16;
  [[maybe_unused]] uint32_t pair;
#if __CUDA_ARCH__ >= 800
  if constexpr (kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  if constexpr (!kBFloat16) {
    asm("{.reg .b16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2;"
        " mov.b32 %0, {low, high};}"
        : "=r"(pair)
        : "f"(low), "f"(high));
    return pair;
  }
#endif
#endif
  const auto pack = [&](float x) { return x == x ? pack_nearest(format, x) : 0x7fffu; };
  return pack(low) | pack(high) << 16;
}

/// Numbers to nearest.
template <class Format>
ZO2_HOST_DEVICE PackedOctet<Format> pack_octet(Format format, const float (&w)[8]) {
  PackedOctet<Format> octet;
  ZO2_UNROLL
  for (int j = 0; j < 8; j += 2) {
    if constexpr (Format::kDType == DType::kFloat32) {
      octet.words[j] = to_bits(w[j]);
      octet.words[j + 1] = to_bits(w[j + 1]);
    } else {
      octet.words[j / 2] = pack_pair(format, w[j], w[j + 1]);
    }
  }
  return octet;
}

/// Bounded weights (see all_bounded) to one of their neighbours.
ZO2_HOST_DEVICE PackedOctet<BFloat16> pack_octet(BFloat16, const float (&w)[8],
                                                 const uint32_t (&random)[8]) {
  PackedOctet<BFloat16> octet;
  ZO2_UNROLL
  for (int j = 0; j < 8; j += 2) {
    const uint32_t low = to_bits(w[j]) + (random[j] & 0xffffu);
    const uint32_t high = to_bits(w[j + 1]) + (random[j + 1] & 0xffffu);
    octet.words[j / 2] = shift_right<16>(low) | (high & 0xffff0000u);
  }
  return octet;
}

ZO2_HOST_DEVICE PackedOctet<Float16> pack_octet(Float16 format, const float (&w)[8],
                                                const uint32_t (&random)[8]) {
  PackedOctet<Float16> octet;
  ZO2_UNROLL
  for (int j = 0; j < 8; ++j) {
    const uint32_t magnitude = to_bits(w[j]) & 0x7fffffffu;
    uint32_t packed = (shift_right<13>(magnitude + (random[j] & 0x1fffu)) - (112u << 10)) |
                      (shift_right<16>(to_bits(w[j])) & 0x8000u);
    // Subnormal, infinite or NaN: a branch, since few are.
    if (magnitude - 0x38800000u > 0x477fe000u - 0x38800000u) {
      packed = pack_stochastic(format, w[j], random[j]);
    }
    octet.words[j / 2] = j % 2 == 0 ? packed : octet.words[j / 2] | shift_left<16>(packed);
  }
  return octet;
}

// One element, in whatever format.

ZO2_HOST_DEVICE uint32_t pack_element(DType dtype, Rounding rounding, uint32_t random,
                                      float weight) {
  if (dtype == DType::kFloat32) return to_bits(weight);
  const auto pack = [&](auto format) {
    return rounding == Rounding::kNearest ? pack_nearest(format, weight)
                                          : pack_stochastic(format, weight, random);
  };
  return dtype == DType::kBFloat16 ? pack(BFloat16()) : pack(Float16());
}

ZO2_HOST_DEVICE float unpack_element(DType dtype, uint32_t packed) {
  if (dtype == DType::kFloat32) return from_bits(packed);
  return dtype == DType::kBFloat16 ? unpack(BFloat16(), packed) : unpack(Float16(), packed);
}

ZO2_HOST_DEVICE float load_element(DType dtype, const void* from, int64_t i) {
  return unpack_element(dtype, dtype == DType::kFloat32 ? static_cast<const uint32_t*>(from)[i]
                                                        : static_cast<const uint16_t*>(from)[i]);
}

ZO2_HOST_DEVICE float round_element(DType dtype, Rounding rounding, uint32_t random, float weight) {
  return unpack_element(dtype, pack_element(dtype, rounding, random, weight));
}

/// Returns the weight as packed.
ZO2_HOST_DEVICE float store_element(DType dtype, Rounding rounding, uint32_t random, float weight,
                                    void* to, int64_t i) {
  const uint32_t packed = pack_element(dtype, rounding, random, weight);
  if (dtype == DType::kFloat32) {
    static_cast<float*>(to)[i] = from_bits(packed);
  } else {
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(packed);
  }
  return unpack_element(dtype, packed);
}

}  // namespace zo2ext
