// kernels_bench.cpp -- CPU kernels beside a copy of the same memory, measured in the same run.
//
//   kernels_bench [elements of the slab, default 2^25] [threads, default all]
//
// Noise is made in a buffer that stays in the second-level cache, on one thread. The pass applies
// one update, writes back and writes both perturbed slabs; the fold adds one direction of rank 4 to
// rows of 4096 and writes back. Caches hold nothing of a slab when a
// run begins: a slab is larger than they are, and runs go through it from its start.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../kernels.h"
#include "../scaled_formats.h"
#include "../threads.h"

using namespace zo2ext;

namespace {

double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Median of `runs`, after one to warm up.
double median_seconds(int runs, const std::function<void()>& work) {
  work();
  std::vector<double> times;
  for (int i = 0; i < runs; ++i) times.push_back(seconds(work));
  std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
  return times[static_cast<size_t>(runs / 2)];
}

void bench_noise(Distribution distribution, const char* name) {
  constexpr int64_t kNumel = 1 << 16;
  std::vector<float> out(kNumel);
  const NoiseArgs args{out.data(), DType::kFloat32, kNumel, 0, 42, 7, distribution};
  const int threads = num_threads();
  num_threads() = 1;
  const double time = median_seconds(201, [&] { noise_cpu(args, parallel_for); });
  num_threads() = threads;
  std::printf("%-8s %-34s %10.0f us %8.2f G/s\n", current_simd_variant(), name, time * 1e6,
              kNumel / time / 1e9);
}

/// Bytes a second that memcpy moves, reading and writing counted.
double copy_rate(std::vector<char>& to, const std::vector<char>& from) {
  const double time = median_seconds(5, [&] {
    parallel_for(static_cast<int64_t>(from.size() / 4096), [&](int64_t begin, int64_t end) {
      std::memcpy(to.data() + begin * 4096, from.data() + begin * 4096,
                  static_cast<size_t>(end - begin) * 4096);
    });
  });
  return 2.0 * static_cast<double>(from.size()) / time;
}

/// `moved`: bytes read and written.
void print_pass(const char* name, int64_t numel, double time, double moved, double copy) {
  std::printf("%-8s %-34s %10.0f us %8.2f G/s %8.1f GB/s %6.0f%% of copy\n", current_simd_variant(),
              name, time * 1e6, static_cast<double>(numel) / time / 1e9, moved / time / 1e9,
              100 * moved / time / copy);
}

/// Storage of 8 bits is perturbed in bfloat16; `split`: with a low plane.
void bench_pass(int64_t numel, DType dtype, bool split, Distribution distribution,
                Rounding rounding, const char* name, double copy) {
  const bool scaled = is_scaled(dtype);
  UpdatePerturbArgs args{};
  args.storage = dtype;
  args.compute = scaled ? DType::kBFloat16 : dtype;
  const auto bytes = static_cast<size_t>(numel * size_of(args.compute));
  std::vector<char> stored(static_cast<size_t>(numel * size_of(dtype))), plus(bytes), minus(bytes);
  std::vector<uint8_t> scales(static_cast<size_t>(scaled ? (numel + 31) / 32 : 0), 120);
  std::vector<uint8_t> low(static_cast<size_t>(split ? numel : 0));
  args.stored = stored.data();
  if (scaled) args.scales = scales.data();
  if (split) args.low = low.data();
  args.numel = numel;
  args.num_segments = 1;
  args.only_segment = {0, numel, 0, 7, 1};
  args.only_update = {1, 1e-6f, 1.0f};
  args.num_updates = 1;
  args.write_back = true;
  args.rounding = rounding;
  args.rounding_key = 3;
  args.distribution = distribution;
  args.directions[0] = {2, 1e-3f, plus.data(), minus.data()};
  args.num_directions = 1;
  const double time = median_seconds(5, [&] { update_perturb_cpu(args, parallel_for); });
  // Read, write back, plus, minus.
  const double moved =
      2.0 * static_cast<double>(stored.size() + scales.size() + low.size() + bytes);
  print_pass(name, numel, time, moved, copy);
}

void bench_fold(int64_t numel, DType dtype, Rounding rounding, const char* name, double copy) {
  constexpr int64_t kColumns = 4096, kRank = 4;
  const int64_t rows = (numel + kColumns - 1) / kColumns;
  std::vector<char> stored(static_cast<size_t>(numel * size_of(dtype)));
  std::vector<float> left(static_cast<size_t>(kRank * rows), 1e-3f), right(kRank * kColumns, 1e-3f);
  const FoldSegment segment{{0, numel, 0, 7, 1}, rows, kColumns, 0, 0};
  FoldArgs args{};
  args.stored = stored.data();
  args.storage = args.compute = dtype;
  args.numel = numel;
  args.segments = &segment;
  args.num_segments = 1;
  args.left = left.data();
  args.right = right.data();
  args.left_numel = kRank * rows;
  args.right_numel = kRank * kColumns;
  args.num_directions = 1;
  args.rank = kRank;
  args.decay = 1.0f;
  args.write_back = true;
  args.rounding = rounding;
  args.rounding_key = 3;
  const double time = median_seconds(5, [&] { fold_cpu(args, parallel_for); });
  print_pass(name, numel, time, 2.0 * static_cast<double>(stored.size()), copy);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t numel = argc > 1 ? std::atoll(argv[1]) : 1 << 25;
  if (argc > 2) num_threads() = std::atoi(argv[2]);
  if (numel <= 0 || num_threads() <= 0) {
    std::fprintf(stderr, "usage: %s [elements] [threads]\n", argv[0]);
    return 2;
  }
  double copy;
  {
    std::vector<char> from(static_cast<size_t>(numel) * 4, 1), to(from.size(), 2);
    copy = copy_rate(to, from);
  }
  std::printf("%lld elements, %d threads, copy %.1f GB/s\n", static_cast<long long>(numel),
              num_threads(), copy / 1e9);
  for (int i = 0; i < num_simd_variants(); ++i) {
    set_simd_variant(simd_variant_name(i));
    bench_noise(Distribution::kGaussian, "normal, float32, one thread");
    bench_noise(Distribution::kRademacher, "rademacher, float32, one thread");
    const auto gaussian = Distribution::kGaussian, rademacher = Distribution::kRademacher;
    const auto nearest = Rounding::kNearest, stochastic = Rounding::kStochastic;
    bench_pass(numel, DType::kFloat32, false, gaussian, nearest, "pass, float32, normal", copy);
    bench_pass(numel, DType::kFloat32, false, rademacher, nearest, "pass, float32, rademacher",
               copy);
    bench_pass(numel, DType::kBFloat16, false, gaussian, nearest, "pass, bfloat16, normal", copy);
    bench_pass(numel, DType::kBFloat16, false, gaussian, stochastic,
               "pass, bfloat16, normal, stochastic", copy);
    bench_pass(numel, DType::kBFloat16, false, rademacher, nearest, "pass, bfloat16, rademacher",
               copy);
    bench_pass(numel, DType::kFloat16, false, gaussian, nearest, "pass, float16, normal", copy);
    bench_pass(numel, DType::kFloat16, false, rademacher, nearest, "pass, float16, rademacher",
               copy);
    bench_fold(numel, DType::kFloat32, nearest, "fold, float32, rank 4", copy);
    bench_fold(numel, DType::kBFloat16, nearest, "fold, bfloat16, rank 4", copy);
    bench_fold(numel, DType::kBFloat16, stochastic, "fold, bfloat16, rank 4, stochastic", copy);
    for (Rounding rounding : {nearest, stochastic}) {
      const bool nearly = rounding == nearest;
      bench_pass(numel, DType::kFloat8E4M3, false, gaussian, rounding,
                 nearly ? "pass, e4m3, normal" : "pass, e4m3, normal, stochastic", copy);
      bench_pass(numel, DType::kFloat8E4M3, true, gaussian, rounding,
                 nearly ? "pass, split, normal" : "pass, split, normal, stochastic", copy);
      bench_pass(numel, DType::kFloat8E4M3, false, rademacher, rounding,
                 nearly ? "pass, e4m3, rademacher" : "pass, e4m3, rademacher, stochastic", copy);
    }
  }
}
