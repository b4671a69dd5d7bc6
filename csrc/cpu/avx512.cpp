// avx512.cpp -- the kernels for x86-64 with AVX-512: 16 lanes.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <functional>

// From here on only, and not by a compiler flag: no inline function of the standard library may be
// compiled for AVX-512 here and then be linked into code that runs without it.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "simd_avx512.h"

namespace zo2ext {
using Lanes = Avx512Lanes;
}  // namespace zo2ext

#include "fold_chunks.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace zo2ext {
const Variant kAvx512{"avx512", update_perturb, fold, noise, pack};
}  // namespace zo2ext

#endif
