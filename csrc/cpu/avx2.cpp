// avx2.cpp -- the kernels for x86-64 with AVX2, FMA and F16C: 8 lanes.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <functional>

// From here on only, and not by a compiler flag: no inline function of the standard library may be
// compiled for AVX2 here and then be linked into code that runs without it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_avx2.h"

namespace zo2ext {
using Lanes = Avx2Lanes;
}  // namespace zo2ext

#include "fold_chunks.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace zo2ext {
const Variant kAvx2{"avx2", update_perturb, fold, noise, pack};
}  // namespace zo2ext

#endif
