// accuracy_check.cpp -- ln, cos and sin of the noise contract against float64, on every input.
//
// The functions run on AVX2, which has the same bits as every other variant (variants_check.cpp);
// on a machine without it, on a part of the inputs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "../threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "../cpu/simd_avx2.h"
#include "../noise.h"
namespace {
using Lanes = zo2ext::Avx2Lanes;
constexpr int64_t kStride = 1;
}  // namespace
#else
#include "../cpu/simd_plain.h"
#include "../noise.h"
namespace {
using Lanes = zo2ext::PlainLanes;
constexpr int64_t kStride = 64;
}  // namespace
#endif

namespace {

using Word = Lanes::Word;
using Float = Lanes::Float;

constexpr int64_t kBlock = 1024;  // inputs that are evaluated together

/// Largest distance of the approximation from the exact value, in float32 units in the last place
/// of the exact value.
double worst_ulps(const float* approximate, const double* exact) {
  double worst = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    uint64_t bits;
    std::memcpy(&bits, &exact[i], sizeof bits);
    bits = (bits & 0x7ff0000000000000u) - (uint64_t{23} << 52);  // unit of the last place
    double unit;
    std::memcpy(&unit, &bits, sizeof unit);
    const double error = std::fabs(approximate[i] - exact[i]) / unit;
    worst = error > worst ? error : worst;
  }
  return worst;
}

Word load_words(const uint32_t* from) {
  float as_floats[Lanes::kCount];
  std::memcpy(as_floats, from, sizeof as_floats);
  return zo2ext::to_bits(Lanes::load(as_floats));
}

double worst_logarithm(int64_t first) {
  uint32_t words[kBlock];
  float approximate[kBlock];
  double exact[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t k = static_cast<uint32_t>(first + i);
    words[i] = k << 9 | (k * 2654435761u >> 23);  // the low 9 bits must not matter
    exact[i] = -2 * std::log((2.0 * k + 1) * 0x1p-24);
  }
  for (int64_t i = 0; i < kBlock; i += Lanes::kCount) {
    Lanes::store(approximate + i, zo2ext::squared_radius(load_words(words + i)));
  }
  return worst_ulps(approximate, exact);
}

/// cos and sin of the angles of inputs first..first + kBlock - 1: one rotation from the first.
struct Rotation {
  double cosine[kBlock], sine[kBlock];

  Rotation() {
    for (int64_t i = 0; i < kBlock; ++i) {
      cosine[i] = std::cos(angle(i));
      sine[i] = std::sin(angle(i));
    }
  }

  static double angle(int64_t quarter_turns) {
    return static_cast<double>(quarter_turns) * (0x1p-30 * 1.57079632679489661923);
  }
};

struct Worst {
  double cosine = 0, sine = 0;
};

Worst worst_cosine_sine(int64_t first, const Rotation& rotation) {
  uint32_t words[kBlock];
  float cosines[kBlock], sines[kBlock];
  double exact_cosines[kBlock], exact_sines[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    words[i] = static_cast<uint32_t>(first + i) & 0x3fffffffu;
  }
  for (int64_t i = 0; i < kBlock; i += Lanes::kCount) {
    Float cosine, sine;
    zo2ext::scaled_cosine_sine(load_words(words + i), cosine, sine);
    Lanes::store(cosines + i, cosine);
    Lanes::store(sines + i, sine);
  }
  const double scale = std::sqrt(0.5);
  const double c = std::cos(Rotation::angle(first)) * scale;
  const double s = std::sin(Rotation::angle(first)) * scale;
  for (int64_t i = 0; i < kBlock; ++i) {
    exact_cosines[i] = c * rotation.cosine[i] - s * rotation.sine[i];
    exact_sines[i] = s * rotation.cosine[i] + c * rotation.sine[i];
    if (first + i == 0) exact_sines[i] = sines[i] == 0 ? 0x1p-100 : 1;  // 0 has no last place
    if (first + i == 0) sines[i] = 0x1p-100f;
  }
  return {worst_ulps(cosines, exact_cosines), worst_ulps(sines, exact_sines)};
}

}  // namespace

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

void check(const char* name, const char* inputs, double worst, double bound, bool* good) {
  std::printf("%-12s %-28s worst %.3f ulp, bound %.2f\n", name, inputs, worst, bound);
  *good = *good && worst <= bound;
}

}  // namespace

int main() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::printf("this check needs AVX2 and FMA\n");
    return 77;
  }
#endif
  bool good = true;
  std::mutex mutex;
  double logarithm = 0;
  Worst turn;
  zo2ext::parallel_for((int64_t{1} << 23) / kBlock, [&](int64_t begin, int64_t end) {
    double worst = 0;
    for (int64_t i = begin; i < end; ++i) worst = std::fmax(worst, worst_logarithm(i * kBlock));
    const std::lock_guard<std::mutex> lock(mutex);
    logarithm = std::fmax(logarithm, worst);
  });
  const Rotation rotation;
  const int64_t blocks = (int64_t{1} << 30) / kBlock;
  zo2ext::parallel_for(blocks / kStride, [&](int64_t begin, int64_t end) {
    Worst worst;
    for (int64_t i = begin; i < end; ++i) {
      const Worst here = worst_cosine_sine((i * kStride - blocks / 2) * kBlock, rotation);
      worst.cosine = std::fmax(worst.cosine, here.cosine);
      worst.sine = std::fmax(worst.sine, here.sine);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    turn.cosine = std::fmax(turn.cosine, worst.cosine);
    turn.sine = std::fmax(turn.sine, worst.sine);
  });
  const char* angles = kStride == 1 ? "all 2^30 angles" : "every 64th block of angles";
  check("-2 ln u", "all 2^23 radius words", logarithm, 2.0, &good);
  check("cos / sqrt 2", angles, turn.cosine, 1.25, &good);
  check("sin / sqrt 2", angles, turn.sine, 2.5, &good);
  return !good;
}
