// fold_cases.h -- random folds of directions in factors, as cuda_cases.h has other launches:
// matrices of many shapes, slices of them, factors that are not aligned.
#pragma once

#include "cuda_cases.h"

namespace zo2ext {

/// Matrices of many shapes in the place of the segments, and the factors that they need.
inline std::vector<FoldSegment> some_fold_segments(Random& random, FoldArgs& args) {
  std::vector<FoldSegment> segments;
  for (Segment segment : some_segments(random, args.storage, args.numel)) {
    if (segments.size() == 50) break;
    const int64_t unit = random.one_in(3) ? 1 : random.one_in(2) ? 4 : 32;
    const int64_t rows = 1 + random.below(40), columns = unit * (1 + random.below(600 / unit));
    // Offsets are huge elsewhere; here each row of the stack has factors.
    segment.offset = random.below(2 * rows * columns) / kScaleGroup * kScaleGroup;
    if (!is_scaled(args.storage) && random.one_in(2)) segment.offset += 4 * random.below(8);
    const int64_t matrices = (segment.offset + segment.numel - 1) / (rows * columns) + 1;
    const int64_t shift = random.one_in(5) ? random.below(4) : 0;
    segments.push_back(
        {segment, rows, columns, args.left_numel + random.below(3), args.right_numel + shift});
    args.left_numel = segments.back().left_begin + matrices * args.rank * rows;
    args.right_numel = segments.back().right_begin + matrices * args.rank * columns;
    args.right_numel += random.one_in(9) ? 0 : -args.right_numel & 3;
  }
  return segments;
}

template <class Runner>
bool check_fold(uint64_t seed, Runner& runner) {
  Random random(seed);
  FoldArgs args{};
  args.storage = random.of(kStorages);
  const bool scaled = is_scaled(args.storage);
  args.compute = !scaled && random.one_in(2) ? args.storage : random.of(kDTypes);
  args.write_back = !random.one_in(4);
  args.rounding = random.of(kRoundings);
  args.rounding_key = random.key();
  args.rank = 1 + random.below(5);
  args.num_directions = random.below(4);
  args.decay = random.number(random.one_in(2) ? 1.0f : 0.99f);
  const std::vector<FoldSegment> segments = some_fold_segments(random, args);
  args.segments = segments.data();
  args.num_segments = static_cast<int64_t>(segments.size());
  FoldArgs expected = args;
  Pairs pairs(random);
  add_slab(random, pairs, scaled && random.one_in(2), args, expected);
  const auto add_factors = [&](int64_t numel, const float*& actual, const float*& other) {
    numel *= args.num_directions;
    pairs.add(DType::kFloat32, numel, actual, other);
    pairs.fill_last([&](Memory& memory) { fill(random, DType::kFloat32, numel, memory); });
  };
  add_factors(args.left_numel, args.left, expected.left);
  add_factors(args.right_numel, args.right, expected.right);
  if (!args.write_back || random.one_in(2)) {
    pairs.add(args.compute, args.numel, args.plain, expected.plain);
  }
  fold_cpu(expected, parallel_for);
  runner.fold(args, pairs.actual());
  const bool same = pairs.same();
  if (!same) {
    std::fprintf(stderr,
                 "fold differs: seed %llu, %lld elements in %zu segments, storage %d, split %d, "
                 "compute %d, rounding %d, write_back %d, rank %lld, %lld directions\n",
                 static_cast<unsigned long long>(seed), static_cast<long long>(args.numel),
                 segments.size(), static_cast<int>(args.storage), args.low != nullptr,
                 static_cast<int>(args.compute), static_cast<int>(args.rounding),
                 static_cast<int>(args.write_back), static_cast<long long>(args.rank),
                 static_cast<long long>(args.num_directions));
  }
  return same;
}

/// Runs so many random cases; returns how many failed.
template <class Runner>
int check_fold_cases(int cases, Runner& runner) {
  int failures = 0;
  for (int seed = 0; seed < cases; ++seed) failures += !check_fold(seed, runner);
  return failures;
}

}  // namespace zo2ext
