// cuda_cases.h -- random launches of the CUDA kernels, compared with the CPU kernels byte by byte.
//
// Slabs of awkward shapes, all dtypes, any number of updates and directions, pointers that are not
// aligned, weights and coefficients that are subnormal, infinite or no numbers. What is compared:
// the weights, the gaps between segments and what lies around the slabs. Who runs the CUDA kernels,
// a GPU or a host that imitates one, is a `Runner`:
//
//   void update_perturb(const UpdatePerturbArgs& args, const Memories& memories);
//   void fold(const FoldArgs& args, const Memories& memories);  // in fold_cases.h
//   void noise(const NoiseArgs& args, const Memories& memories);
//   void pack(const PackArgs& args, const Memories& memories);
//
// The pointers in `args` are host memory; `memories` holds what they point into.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "../kernels.h"
#include "../scaled_formats.h"
#include "../threads.h"

namespace zo2ext {

/// A reproducible choice.
class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}

  uint32_t word() {
    uint32_t words[4];
    random_words(seed_, index_++, 0, Domain::kDirection, words);
    return words[0];
  }
  int64_t below(int64_t bound) { return static_cast<int64_t>(word()) % bound; }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T, size_t n>
  T of(const T (&values)[n]) {
    return values[below(n)];
  }
  uint64_t key() {
    if (one_in(20)) return one_in(2) ? ~uint64_t{0} : 0;
    return word() | uint64_t{word()} << 32;
  }
  /// `usual`, or now and then a number of another kind.
  float number(float usual) {
    if (!one_in(12)) return usual;
    const float others[] = {from_bits(word()),
                            from_bits(word() & 0x807fffffu),  // subnormal
                            0.0f,
                            -0.0f,
                            INFINITY,
                            -INFINITY,
                            from_bits(0x7fc00001u | (word() & 0x803fffffu)),
                            from_bits(0x7f7fffffu - word() % (1u << 18))};
    return of(others);
  }

 private:
  uint64_t seed_, index_ = 0;
};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr DType kStorages[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                               DType::kFloat8E4M3, DType::kFloat8E4M3};
constexpr Distribution kDistributions[] = {Distribution::kGaussian, Distribution::kRademacher};
constexpr Domain kDomains[] = {Domain::kDirection, Domain::kLeft, Domain::kRight};
constexpr Rounding kRoundings[] = {Rounding::kNearest, Rounding::kStochastic};

/// Elements between bytes that must stay as they are.
class Memory {
 public:
  static constexpr int64_t kMargin = 256;

  /// `shift`: elements from where vectors are aligned.
  Memory(DType dtype, int64_t numel, int64_t shift = 0)
      : dtype_(dtype),
        numel_(numel),
        begin_(kMargin + shift * size_of(dtype)),
        bytes_(static_cast<size_t>(begin_ + numel * size_of(dtype) + kMargin), 0x55) {}

  char* data() { return bytes_.data() + begin_; }
  std::vector<char>& bytes() { return bytes_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return begin_ + numel_ * size_of(dtype_); }
  void copy_from(Memory& other) {
    std::memcpy(data(), other.data(), static_cast<size_t>(numel_ * size_of(dtype_)));
  }

  /// Makes one NaN of all: which one float32 arithmetic makes is up to the machine.
  void unify_nan() {
    if (dtype_ != DType::kFloat32) return;
    for (int64_t i = 0; i < numel_; ++i) {
      float x;
      std::memcpy(&x, data() + 4 * i, 4);
      if (x != x) std::memset(data() + 4 * i, 0x7f, 4);
    }
  }

  /// Whether all is the same, from 128 bytes before to 128 bytes after.
  bool operator==(Memory& other) {
    const size_t size = static_cast<size_t>(numel_ * size_of(dtype_)) + kMargin;
    return std::memcmp(data() - kMargin / 2, other.data() - kMargin / 2, size) == 0;
  }

 private:
  DType dtype_;
  int64_t numel_, begin_;
  std::vector<char> bytes_;
};

using Memories = std::vector<Memory*>;

/// Any bytes; of scales, mostly those of weights.
inline void fill_bytes(Random& random, bool scales, int64_t numel, Memory& memory) {
  const bool wild = random.one_in(3);
  for (int64_t i = 0; i < numel; ++i) {
    uint32_t word = random.word();
    if (scales && !(wild && i % 3 == 0)) word = 110 + word % 8;
    memory.data()[i] = static_cast<char>(word);
  }
}

constexpr int64_t scales_of(int64_t numel) { return (numel + kScaleGroup - 1) / kScaleGroup; }

/// Mostly like weights; some of any magnitude, a few infinite or NaN.
inline void fill(Random& random, DType dtype, int64_t numel, Memory& memory) {
  if (is_scaled(dtype)) return fill_bytes(random, false, numel, memory);
  const bool wild = random.one_in(3);
  for (int64_t i = 0; i < numel; ++i) {
    const uint32_t word = random.word();
    float weight = from_bits(0x3c000000u | (word & 0x82ffffffu));  // about 2^-7
    if (wild && i % 5 == 0) weight = from_bits(word);
    // Beyond the largest finite numbers of bfloat16 and float16.
    if (wild && word % 37 == 0) weight = from_bits(word << 31 | 0x7f7f0000u | (word >> 16));
    if (wild && word % 41 == 0) weight = from_bits(word << 31 | 0x477fe000u | (word >> 19));
    if (wild && word % 131 == 0) weight = from_bits(word << 31 | 0x7f800000u);
    if (wild && word % 137 == 0) weight = from_bits(word << 31 | 0x7fc12345u);
    char* const to = memory.data() + i * size_of(dtype);
    const uint32_t packed = dtype == DType::kFloat32    ? to_bits(weight)
                            : dtype == DType::kBFloat16 ? pack_nearest(BFloat16(), weight)
                                                        : pack_nearest(Float16(), weight);
    std::memcpy(to, &packed, static_cast<size_t>(size_of(dtype)));
  }
}

/// Where a slice of a tensor may begin; near 2^34 the counter's high word changes.
inline int64_t some_offset(Random& random, DType storage) {
  constexpr int64_t kBases[] = {0, 0, 128, 1000, 4096, (int64_t{1} << 34) - 1024, int64_t{1} << 40};
  const int64_t offset = random.of(kBases) + (random.one_in(2) ? 0 : 4 * random.below(300));
  return is_scaled(storage) ? offset / kScaleGroup * kScaleGroup : offset;
}

inline int64_t some_shift(Random& random) { return random.one_in(5) ? random.below(32) : 0; }

inline int64_t some_length(Random& random) {
  switch (random.below(4)) {
    case 0:
      return random.below(20);
    case 1:
      return 128 * (1 + random.below(8)) + random.below(3) - 1;
    case 2:
      return random.below(700);
    default:
      return random.below(5000);
  }
}

inline std::vector<Segment> some_segments(Random& random, DType storage, int64_t& numel) {
  std::vector<Segment> segments;
  const bool tiny = random.one_in(10);
  const int64_t count = !tiny ? 1 + random.below(6) : random.one_in(10) ? 2000 : 100;
  int64_t at = random.one_in(4) ? 128 * random.below(5) : 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = tiny ? random.below(200) : some_length(random);
    segments.push_back({at, length, some_offset(random, storage),
                        random.one_in(9) ? ~0u : random.word() % 1000,
                        static_cast<uint32_t>(random.below(2))});
    at += (length + 127) / 128 * 128 + (random.one_in(5) ? 128 * random.below(5) : 0);
  }
  // The slab may end with its last segment, or beyond.
  const int64_t end = segments.back().begin + segments.back().numel;
  numel = end + (random.one_in(2) ? 0 : random.below(500));
  return segments;
}

/// Memory that a runner's launch and the CPU's each have for themselves.
class Pairs {
 public:
  explicit Pairs(Random& random) : random_(random) {}

  /// Points into new memory of both sides.
  template <class Pointer>
  void add(DType dtype, int64_t numel, Pointer*& actual, Pointer*& expected) {
    owned_.push_back(std::make_unique<Memory>(dtype, numel, some_shift(random_)));
    actual_.push_back(owned_.back().get());
    owned_.push_back(std::make_unique<Memory>(dtype, numel));
    expected_.push_back(owned_.back().get());
    actual = reinterpret_cast<Pointer*>(actual_.back()->data());
    expected = reinterpret_cast<Pointer*>(expected_.back()->data());
  }
  /// What add() made last, filled by fill(memory) on both sides.
  template <class Fill>
  void fill_last(const Fill& fill) {
    fill(*actual_.back());
    expected_.back()->copy_from(*actual_.back());
  }
  const Memories& actual() const { return actual_; }
  bool same() {
    bool same = true;
    for (size_t i = 0; i < actual_.size(); ++i) {
      actual_[i]->unify_nan();
      expected_[i]->unify_nan();
      same = same && *actual_[i] == *expected_[i];
    }
    return same;
  }

 private:
  Random& random_;
  std::vector<std::unique_ptr<Memory>> owned_;
  Memories actual_, expected_;
};

/// The slab of both sides, filled; `args` and `expected` have its storage dtype and size.
inline void add_slab(Random& random, Pairs& pairs, bool split, SlabArgs& args, SlabArgs& expected) {
  const DType storage = args.storage;
  pairs.add(storage, args.numel, args.stored, expected.stored);
  pairs.fill_last([&](Memory& memory) { fill(random, storage, args.numel, memory); });
  const auto add_bytes = [&](bool scales, int64_t numel, uint8_t*& actual, uint8_t*& other) {
    pairs.add(storage, numel, actual, other);
    pairs.fill_last([&](Memory& memory) { fill_bytes(random, scales, numel, memory); });
  };
  if (is_scaled(storage)) add_bytes(true, scales_of(args.numel), args.scales, expected.scales);
  if (split) add_bytes(false, args.numel, args.low, expected.low);
}

/// Whether `runner` does what the CPU does.
template <class Runner>
bool check_update_perturb(uint64_t seed, Runner& runner) {
  Random random(seed);
  UpdatePerturbArgs args{};
  args.storage = random.of(kStorages);
  const std::vector<Segment> segments = some_segments(random, args.storage, args.numel);
  // Two of three are what most launches are.
  const bool usual = !random.one_in(3);
  const bool scaled = is_scaled(args.storage);
  args.compute = usual && !scaled && random.one_in(2) ? args.storage : random.of(kDTypes);
  args.distribution = random.of(kDistributions);
  args.domain = random.of(kDomains);
  args.rounding = random.of(kRoundings);
  args.rounding_key = random.key();
  args.write_back = usual || random.one_in(2);
  args.segments = segments.data();
  args.num_segments = static_cast<int64_t>(segments.size());
  if (random.one_in(4)) {
    args.only_segment = segments[0];
    args.numel = segments[0].begin + segments[0].numel;
    args.segments = nullptr;
    args.num_segments = random.below(2);
  }
  std::vector<Update> updates(static_cast<size_t>(usual ? 1 : random.below(7)));
  for (Update& update : updates) {
    const float decay = random.one_in(2) ? 1.0f : random.one_in(2) ? 1.001f : 0.99f;
    update = {random.key(), random.number(static_cast<float>(random.below(200) - 100) * 1e-5f),
              random.number(decay), random.key(), static_cast<RoundFirst>(random.below(3))};
  }
  args.updates = updates.data();
  args.num_updates = static_cast<int64_t>(updates.size());
  if (updates.size() == 1 && random.one_in(2)) {
    args.only_update = updates[0];
    args.updates = nullptr;
  }
  args.num_directions = usual ? 1 : static_cast<int>(random.below(kMaxDirections + 1));

  const bool split = scaled && random.one_in(2);
  UpdatePerturbArgs expected_args = args;
  Pairs pairs(random);
  add_slab(random, pairs, split, args, expected_args);
  const auto add = [&](DType dtype, void*& pointer, void*& expected_pointer) {
    pairs.add(dtype, args.numel, pointer, expected_pointer);
  };
  if (!usual && random.one_in(2)) add(args.compute, args.plain, expected_args.plain);
  bool may_alias = !args.write_back && args.storage == args.compute;
  for (int k = 0; k < args.num_directions; ++k) {
    Direction& direction = args.directions[k];
    Direction& expected_direction = expected_args.directions[k];
    direction.key = expected_direction.key = random.key();
    direction.eps = expected_direction.eps = random.number(1e-3f);
    if (may_alias && random.one_in(3)) {
      may_alias = false;
      direction.plus = args.stored;
      expected_direction.plus = expected_args.stored;
    } else if (usual || !random.one_in(3)) {
      add(args.compute, direction.plus, expected_direction.plus);
    }
    if (usual || !random.one_in(3)) {
      add(args.compute, direction.minus, expected_direction.minus);
    }
  }

  update_perturb_cpu(expected_args, parallel_for);
  runner.update_perturb(args, pairs.actual());
  const bool same = pairs.same();
  if (!same) {
    std::fprintf(stderr,
                 "update_perturb differs: seed %llu, %lld elements in %zu segments, storage %d, "
                 "split %d, compute %d, distribution %d, rounding %d, write_back %d, %zu updates, "
                 "%d directions\n",
                 static_cast<unsigned long long>(seed), static_cast<long long>(args.numel),
                 segments.size(), static_cast<int>(args.storage), split,
                 static_cast<int>(args.compute), static_cast<int>(args.distribution),
                 static_cast<int>(args.rounding), static_cast<int>(args.write_back), updates.size(),
                 args.num_directions);
  }
  return same;
}

template <class Runner>
bool check_noise(uint64_t seed, int64_t numel, Runner& runner) {
  Random random(seed);
  const DType dtype = random.of(kDTypes);
  Memory out(dtype, numel, some_shift(random)), expected(dtype, numel);
  NoiseArgs args{expected.data(),
                 dtype,
                 numel,
                 some_offset(random, dtype),
                 random.key(),
                 random.word(),
                 random.of(kDistributions),
                 random.of(kDomains)};
  noise_cpu(args, parallel_for);
  args.out = out.data();
  runner.noise(args, {&out});
  if (out == expected) return true;
  std::fprintf(stderr, "noise differs: seed %llu, %lld elements from %lld\n",
               static_cast<unsigned long long>(seed), static_cast<long long>(numel),
               static_cast<long long>(args.offset));
  return false;
}

template <class Runner>
bool check_pack(uint64_t seed, int64_t numel, Runner& runner) {
  Random random(seed);
  const DType dtype = kStorages[1 + random.below(4)];
  const bool split = dtype == DType::kFloat8E4M3 && random.one_in(2);
  Memory weights(DType::kFloat32, numel, some_shift(random));
  Memory packed(dtype, numel, some_shift(random)), expected(dtype, numel);
  Memory scales(dtype, scales_of(numel)), expected_scales(dtype, scales_of(numel));
  Memory low(dtype, numel, some_shift(random)), expected_low(dtype, numel);
  fill(random, DType::kFloat32, numel, weights);
  const auto bytes = [](Memory& memory, bool wanted) {
    return wanted ? reinterpret_cast<uint8_t*>(memory.data()) : nullptr;
  };
  PackArgs args{reinterpret_cast<const float*>(weights.data()),
                expected.data(),
                dtype,
                numel,
                some_offset(random, dtype),
                random.of(kRoundings),
                random.key(),
                random.word(),
                bytes(expected_scales, is_scaled(dtype)),
                bytes(expected_low, split)};
  pack_cpu(args, parallel_for);
  args.packed = packed.data();
  args.scales = bytes(scales, is_scaled(dtype));
  args.low = bytes(low, split);
  runner.pack(args, {&weights, &packed, &scales, &low});
  if (packed == expected && scales == expected_scales && low == expected_low) return true;
  std::fprintf(stderr, "pack differs: seed %llu, %lld elements from %lld, dtype %d, split %d\n",
               static_cast<unsigned long long>(seed), static_cast<long long>(numel),
               static_cast<long long>(args.offset), static_cast<int>(dtype), split);
  return false;
}

/// Runs so many random cases of each kind, and two large ones; returns how many failed.
template <class Runner>
int check_cases(int passes, int others, Runner& runner) {
  int failures = 0;
  for (int seed = 0; seed < passes; ++seed) failures += !check_update_perturb(seed, runner);
  for (int seed = 0; seed < others; ++seed) {
    Random random(~uint64_t{0} - static_cast<uint64_t>(seed));
    failures += !check_noise(seed, some_length(random) + 1, runner);
    failures += !check_pack(seed, some_length(random) + 1, runner);
  }
  // As large grids are divided.
  failures += !check_noise(others, (1 << 23) + 5, runner);
  failures += !check_pack(others, (1 << 23) + 5, runner);
  return failures;
}

}  // namespace zo2ext
