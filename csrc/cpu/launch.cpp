// launch.cpp -- picks the instruction set, and shares the work out to threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "variants.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zo2ext {
namespace {

std::vector<const Variant*> usable_variants() {
  std::vector<const Variant*> variants{&kPlain};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    variants.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      variants.push_back(&kAvx512);
    }
  }
#endif
  return variants;
}

const std::vector<const Variant*>& variants() {
  static const std::vector<const Variant*> usable = usable_variants();
  return usable;
}

std::atomic<const Variant*>& variant_in_use() {
  static std::atomic<const Variant*> variant{variants().back()};
  return variant;
}

/// Rounding to nearest, with subnormals, whatever the calling thread has set: torch's
/// set_flush_denormal would change bits.
class DefaultArithmetic {
#if defined(__x86_64__)
 public:
  DefaultArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultArithmetic() { _mm_setcsr(saved_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  DefaultArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultArithmetic() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  uint64_t saved_;
#else
 public:
  DefaultArithmetic() {}  // not trivial, so that the variable counts as used
#endif
};

/// Results of so many bytes leave the caches before anything reads them, whatever the machine.
constexpr int64_t kStreamedBytes = int64_t{1} << 25;

/// Runs body(first, numel) on [0, numel), cut at multiples of kShare.
void share_out(int64_t numel, ParallelFor parallel_for,
               const std::function<void(int64_t, int64_t)>& body) {
  if (numel <= 0) return;
  parallel_for((numel - 1) / kShare + 1, [&](int64_t begin, int64_t end) {
    const DefaultArithmetic guard;
    body(begin * kShare, std::min(end * kShare, numel) - begin * kShare);
#if defined(__x86_64__)
    _mm_sfence();  // streamed stores are ordered by nothing else
#endif
  });
}

/// Runs work(segment, first, numel, streamed) on all of all segments; `outputs`: results besides
/// what is written back.
template <class Row, class Work>
void share_out(const SlabArgs& args, const Row* segments, int64_t num_segments, int64_t outputs,
               ParallelFor parallel_for, const Work& work) {
  const size_t count = static_cast<size_t>(num_segments);
  // ends[i]: elements in segments 0..i, each rounded up so that cuts fall on multiples of 128.
  std::vector<int64_t> ends(count);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    total += (segments[i].numel + 127) / 128 * 128;
    ends[i] = total;
  }
  const bool streamed = total * outputs * size_of(args.compute) >= kStreamedBytes;
  share_out(total, parallel_for, [&](int64_t first, int64_t numel) {
    const int64_t last = first + numel;
    size_t i =
        static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), first) - ends.begin());
    for (; i < count && first < last; ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1];
      const int64_t begin = first - start;
      const int64_t end = std::min(last - start, segments[i].numel);
      if (begin < end) work(segments[i], begin, end - begin, streamed);
      first = ends[i];
    }
  });
}

}  // namespace

void update_perturb_cpu(const UpdatePerturbArgs& args, ParallelFor parallel_for) {
  int64_t outputs = args.plain != nullptr;
  for (int k = 0; k < args.num_directions; ++k) {
    outputs += args.directions[k].plus != nullptr;
    outputs += args.directions[k].minus != nullptr;
  }
  const bool only = args.segments == nullptr;
  const Variant& variant = *variant_in_use();
  share_out(args, only ? &args.only_segment : args.segments, only ? 1 : args.num_segments, outputs,
            parallel_for, [&](const Segment& segment, auto... part) {
              variant.update_perturb(args, segment, part...);
            });
}

void fold_cpu(const FoldArgs& args, ParallelFor parallel_for) {
  const Variant& variant = *variant_in_use();
  share_out(
      args, args.segments, args.num_segments, args.plain != nullptr, parallel_for,
      [&](const FoldSegment& segment, auto... part) { variant.fold(args, segment, part...); });
}

void noise_cpu(const NoiseArgs& args, ParallelFor parallel_for) {
  const bool streamed = args.numel * size_of(args.dtype) >= kStreamedBytes;
  const Variant& variant = *variant_in_use();
  share_out(args.numel, parallel_for,
            [&](int64_t first, int64_t numel) { variant.noise(args, first, numel, streamed); });
}

void pack_cpu(const PackArgs& args, ParallelFor parallel_for) {
  const bool streamed = args.numel * size_of(args.dtype) >= kStreamedBytes;
  const Variant& variant = *variant_in_use();
  share_out(args.numel, parallel_for,
            [&](int64_t first, int64_t numel) { variant.pack(args, first, numel, streamed); });
}

int num_simd_variants() { return static_cast<int>(variants().size()); }

const char* simd_variant_name(int i) { return variants()[static_cast<size_t>(i)]->name; }

const char* current_simd_variant() { return variant_in_use().load()->name; }

bool set_simd_variant(const char* name) {
  for (const Variant* variant : variants()) {
    if (std::strcmp(variant->name, name) == 0) {
      variant_in_use() = variant;
      return true;
    }
  }
  return false;
}

}  // namespace zo2ext
