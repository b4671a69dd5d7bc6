// variants_check.cpp -- every instruction set gives the same bits, and so does every slicing.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "../scaled_formats.h"
#include "../threads.h"

using namespace zo2ext;

namespace {

int failures = 0;

void compare(const char* what, const std::vector<char>& actual, const std::vector<char>& expected,
             int64_t length, int64_t offset) {
  if (actual == expected) return;
  size_t at = 0;
  while (actual[at] == expected[at]) ++at;
  std::fprintf(stderr, "%s, %s: length %lld, offset %lld: byte %zu differs\n",
               current_simd_variant(), what, static_cast<long long>(length),
               static_cast<long long>(offset), at);
  ++failures;
}

/// Results lie between bytes that must stay as they are.
constexpr size_t kMargin = 64;

std::vector<char> blank(int64_t bytes) {
  return std::vector<char>(static_cast<size_t>(bytes) + 2 * kMargin, 0x55);
}

std::vector<char> noise_bytes(int64_t numel, int64_t offset, DType dtype,
                              Distribution distribution) {
  std::vector<char> out = blank(numel * size_of(dtype));
  noise_cpu({out.data() + kMargin, dtype, numel, offset, 0x0123456789abcdef, 7, distribution},
            parallel_for);
  return out;
}

/// Weights of every magnitude, a few infinite or NaN; of 8 bits, any bytes.
std::vector<char> some_weights(int64_t numel, DType dtype) {
  std::vector<char> weights = blank(numel * size_of(dtype));
  uint32_t words[4];
  for (int64_t i = 0; i < numel; ++i) {
    random_words(99, static_cast<uint64_t>(i), 0, Domain::kDirection, words);
    if (i % 97 == 0) words[0] = 0x7f800000u;
    if (i % 101 == 0) words[0] = 0x7fc00000u;
    const float tame = from_bits(0x3c000000u | (words[0] & 0x82ffffffu));  // about 2^-7
    const float weight = i % 3 == 0 ? from_bits(words[0]) : tame;
    char* to = weights.data() + kMargin + i * size_of(dtype);
    if (is_scaled(dtype)) {
      *to = static_cast<char>(words[1]);
    } else if (dtype == DType::kFloat32) {
      std::memcpy(to, &weight, 4);
    } else {
      const uint32_t packed = dtype == DType::kBFloat16 ? pack_nearest(BFloat16(), weight)
                                                        : pack_nearest(Float16(), weight);
      std::memcpy(to, &packed, 2);
    }
  }
  return weights;
}

/// A whole pass: stored, scales, low, plain, plus and minus, one behind the other.
std::vector<char> pass_bytes(int64_t numel, int64_t offset, DType storage, bool split,
                             DType compute, Distribution distribution, Rounding rounding) {
  std::vector<char> stored = some_weights(numel, storage);
  std::vector<char> scales = some_weights((numel + kScaleGroup - 1) / kScaleGroup, storage);
  std::vector<char> low = some_weights(numel, storage);
  std::vector<char> plain = blank(numel * size_of(compute)), plus = plain, minus = plain;
  const Update updates[] = {{1, 1e-3f, 0.999f}, {2, -2e-3f, 1.0f, 7, RoundFirst::kStochastic}};
  UpdatePerturbArgs args{};
  args.stored = stored.data() + kMargin;
  args.storage = storage;
  if (is_scaled(storage)) args.scales = reinterpret_cast<uint8_t*>(scales.data()) + kMargin;
  if (split) args.low = reinterpret_cast<uint8_t*>(low.data()) + kMargin;
  args.compute = compute;
  args.numel = numel;
  args.num_segments = 1;
  args.only_segment = {0, numel, offset, 7, 1};
  args.updates = updates;
  args.num_updates = 2;
  args.write_back = true;
  args.rounding = rounding;
  args.rounding_key = 3;
  args.distribution = distribution;
  args.plain = plain.data() + kMargin;
  args.directions[0] = {4, 1e-3f, plus.data() + kMargin, minus.data() + kMargin};
  args.num_directions = 1;
  update_perturb_cpu(args, parallel_for);
  for (const auto* part : {&scales, &low, &plain, &plus, &minus}) {
    stored.insert(stored.end(), part->begin(), part->end());
  }
  return stored;
}

/// A fold of two matrices and a part of a third, whose rows are `columns` long: stored, scales, low
/// and plain.
std::vector<char> fold_bytes(int64_t numel, int64_t columns, DType storage, bool split,
                             Rounding rounding) {
  std::vector<char> stored = some_weights(numel, storage);
  std::vector<char> scales = some_weights((numel + kScaleGroup - 1) / kScaleGroup, storage);
  std::vector<char> low = some_weights(numel, storage);
  std::vector<char> plain = blank(numel * 4);
  const int64_t rows = std::max<int64_t>(1, numel / columns * 2 / 5);
  const int64_t matrices = (32 + numel - 1) / (rows * columns) + 1;
  constexpr int64_t kRank = 17;  // so that two directions need more than one pass over a row
  std::vector<float> left(static_cast<size_t>(2 * kRank * matrices * rows));
  std::vector<float> right(static_cast<size_t>(2 * kRank * matrices * columns));
  noise_cpu({left.data(), DType::kFloat32, static_cast<int64_t>(left.size()), 0, 1, 7,
             Distribution::kGaussian, Domain::kLeft},
            parallel_for);
  noise_cpu({right.data(), DType::kFloat32, static_cast<int64_t>(right.size()), 0, 1, 7,
             Distribution::kGaussian, Domain::kRight},
            parallel_for);
  const FoldSegment segment{{0, numel, 32, 7, 1}, rows, columns, 0, 0};
  FoldArgs args{};
  args.stored = stored.data() + kMargin;
  args.storage = storage;
  if (is_scaled(storage)) args.scales = reinterpret_cast<uint8_t*>(scales.data()) + kMargin;
  if (split) args.low = reinterpret_cast<uint8_t*>(low.data()) + kMargin;
  args.numel = numel;
  args.segments = &segment;
  args.num_segments = 1;
  args.left = left.data();
  args.right = right.data();
  args.left_numel = static_cast<int64_t>(left.size()) / 2;
  args.right_numel = static_cast<int64_t>(right.size()) / 2;
  args.num_directions = 2;
  args.rank = kRank;
  args.decay = 0.999f;
  args.write_back = true;
  args.rounding = rounding;
  args.rounding_key = 3;
  args.plain = plain.data() + kMargin;
  fold_cpu(args, parallel_for);
  for (const auto* part : {&scales, &low, &plain}) {
    stored.insert(stored.end(), part->begin(), part->end());
  }
  return stored;
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr DType kStorages[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                               DType::kFloat8E4M3, DType::kFloat8E4M3};
constexpr Distribution kDistributions[] = {Distribution::kGaussian, Distribution::kRademacher};
constexpr Rounding kRoundings[] = {Rounding::kNearest, Rounding::kStochastic};

template <class Work>
void check_variants(const char* what, int64_t length, int64_t offset, const Work& work) {
  set_simd_variant("plain");
  const std::vector<char> expected = work();
  for (int i = 0; i < num_simd_variants(); ++i) {
    set_simd_variant(simd_variant_name(i));
    compare(what, work(), expected, length, offset);
  }
}

}  // namespace

int main() {
  // Long enough to be streamed, and so that counters carry into their high word.
  for (Distribution distribution : kDistributions) {
    const int64_t length = 1 << 24, offset = (int64_t{1} << 34) - 4096;
    check_variants("noise", length, offset,
                   [&] { return noise_bytes(length, offset, DType::kFloat32, distribution); });
  }
  for (int64_t length = 1; length <= 300; ++length) {
    for (int64_t offset : {int64_t{0}, int64_t{4}, int64_t{124}, int64_t{2044}}) {
      for (Distribution distribution : kDistributions) {
        for (DType dtype : kDTypes) {
          check_variants("noise", length, offset,
                         [&] { return noise_bytes(length, offset, dtype, distribution); });
        }
      }
    }
  }
  for (int i = 0; i < 5; ++i) {
    const DType storage = kStorages[i];
    const bool split = i == 4;
    for (DType compute : kDTypes) {
      for (Distribution distribution : kDistributions) {
        for (Rounding rounding : kRoundings) {
          for (int64_t length : {1, 3, 63, 64, 65, 127, 128, 129, 300, 2047, 2049, 100003}) {
            for (int64_t offset : {0, 4, 1000}) {
              if (is_scaled(storage)) offset *= 32;
              check_variants("pass", length, offset, [&] {
                return pass_bytes(length, offset, storage, split, compute, distribution, rounding);
              });
            }
          }
        }
      }
    }
  }
  for (int i = 0; i < 5; ++i) {
    for (Rounding rounding : kRoundings) {
      for (int64_t length : {1, 65, 300, 2049, 10003}) {
        for (int64_t columns : {1, 3, 8, 67, 128, 3000}) {
          check_variants("fold", length, columns, [&] {
            return fold_bytes(length, columns, kStorages[i], i == 4, rounding);
          });
        }
      }
    }
  }
  // Threads and slices.
  for (Distribution distribution : kDistributions) {
    const std::vector<char> whole = noise_bytes(100003, 8, DType::kFloat32, distribution);
    for (int threads : {1, 2, 3, 7}) {
      num_threads() = threads;
      compare("threads", noise_bytes(100003, 8, DType::kFloat32, distribution), whole, 100003, 8);
    }
    for (int64_t cut : {4, 64, 2048, 50000}) {
      std::vector<char> joined = noise_bytes(cut, 8, DType::kFloat32, distribution);
      const std::vector<char> rest =
          noise_bytes(100003 - cut, 8 + cut, DType::kFloat32, distribution);
      joined.resize(joined.size() - kMargin);
      joined.insert(joined.end(), rest.begin() + kMargin, rest.end());
      compare("slices", joined, whole, cut, 8);
    }
  }
  std::printf("%d instruction sets, %d disagreements\n", num_simd_variants(), failures);
  return failures != 0;
}
