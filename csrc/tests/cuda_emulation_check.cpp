// cuda_emulation_check.cpp -- what every thread of every grid does, done on the host.
//
// The bodies of the CUDA kernels run here for all blocks and threads, one after the other, on
// random slabs of awkward shapes, and must leave the bytes that the CPU kernels leave: in the
// weights, in the gaps between segments and around the slabs. What a GPU computes otherwise than a
// host, its conversions and its square root, is left to tests/test_cuda.py; of the square root, all
// that does not depend on the GPU's estimate is proved here.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <typeinfo>
#include <vector>

#include "../cuda/plan.h"
#include "../threads.h"

using namespace zo2ext;

namespace {

int failures = 0;
std::map<std::string, int> launches;  // of each body

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
  uint64_t key() { return word() | uint64_t{word()} << 32; }

 private:
  uint64_t seed_, index_ = 0;
};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Distribution kDistributions[] = {Distribution::kGaussian, Distribution::kRademacher};
constexpr Rounding kRoundings[] = {Rounding::kNearest, Rounding::kStochastic};
constexpr uint32_t kShares[] = {0, kWarpStep, 3 * kWarpStep, 16 * kWarpStep};  // 0: as planned

/// Runs a plan's body for every thread.
struct Emulation {
  uint32_t share;

  template <class Body, class Grid>
  void operator()(Body, Grid grid, int64_t numel) const {
    if (share != 0) grid.division.share = share;
    const uint32_t count = blocks(numel, grid.division);
    for (uint32_t block = 0; block < count; ++block) {
      for (uint32_t thread = 0; thread < kThreads; ++thread) {
        Body::thread(grid, {block, thread, kThreads});
      }
    }
    ++launches[typeid(Body).name()];
  }
};

/// Memory between bytes that must stay as they are, aligned to 16 bytes or to one element more.
class Memory {
 public:
  Memory(int64_t bytes, int64_t shift) : bytes_(static_cast<size_t>(bytes + 2 * kMargin), 0x55) {
    shift_ = kMargin + shift;
    while (reinterpret_cast<uintptr_t>(bytes_.data() + shift_ - shift) % 16 != 0) ++shift_;
  }
  Memory(const Memory& other) = delete;

  char* data() { return bytes_.data() + shift_; }
  void copy_from(const Memory& other, int64_t bytes) {
    std::memcpy(data(), other.bytes_.data() + other.shift_, static_cast<size_t>(bytes));
  }
  bool operator==(const Memory& other) const {
    // The margins' sizes may differ, by where the allocation lies.
    const size_t size = bytes_.size() - 2 * kMargin - kMargin / 2;
    return std::memcmp(bytes_.data() + shift_ - kMargin / 2,
                       other.bytes_.data() + other.shift_ - kMargin / 2, size + kMargin) == 0;
  }

 private:
  static constexpr int64_t kMargin = 128;
  std::vector<char> bytes_;
  int64_t shift_;
};

/// Mostly like weights; some of any magnitude, a few infinite or NaN.
void fill(Random& random, DType dtype, int64_t numel, Memory& memory) {
  const bool wild = random.one_in(3);
  for (int64_t i = 0; i < numel; ++i) {
    const uint32_t word = random.word();
    float weight = from_bits(0x3c000000u | (word & 0x82ffffffu));  // about 2^-7
    if (wild && i % 5 == 0) weight = from_bits(word);
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
int64_t some_offset(Random& random) {
  constexpr int64_t kBases[] = {0, 0, 128, 1000, 4096, (int64_t{1} << 34) - 1024, int64_t{1} << 40};
  return random.of(kBases) + (random.one_in(2) ? 0 : 4 * random.below(300));
}

int64_t some_length(Random& random) {
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

std::vector<Segment> some_segments(Random& random, int64_t& numel) {
  std::vector<Segment> segments;
  const int64_t count = random.one_in(10) ? 100 : 1 + random.below(6);
  const bool tiny = count == 100;
  int64_t at = random.one_in(4) ? 128 * random.below(5) : 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = tiny ? random.below(200) : some_length(random);
    segments.push_back({at, length, some_offset(random), random.word() % 1000,
                        static_cast<uint32_t>(random.below(2))});
    at += (length + 127) / 128 * 128 + (random.one_in(5) ? 128 * random.below(5) : 0);
  }
  // The slab may end with its last segment, or beyond.
  numel =
      segments.back().begin + segments.back().numel + (random.one_in(2) ? 0 : random.below(500));
  return segments;
}

void check_update_perturb(uint64_t seed) {
  Random random(seed);
  UpdatePerturbArgs args{};
  const std::vector<Segment> segments = some_segments(random, args.numel);
  // Two of three are what most launches are.
  const bool usual = !random.one_in(3);
  args.storage = random.of(kDTypes);
  args.compute = usual && random.one_in(2) ? args.storage : random.of(kDTypes);
  args.distribution = random.of(kDistributions);
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
  std::vector<Update> updates(static_cast<size_t>(usual ? 1 : random.below(4)));
  for (Update& update : updates) {
    update = {random.key(), static_cast<float>(random.below(200) - 100) * 1e-5f,
              random.one_in(2) ? 1.0f : 0.99f};
    if (random.one_in(30)) update.coefficient = INFINITY;
  }
  args.updates = updates.data();
  args.num_updates = static_cast<int64_t>(updates.size());
  if (updates.size() == 1 && random.one_in(2)) {
    args.only_update = updates[0];
    args.updates = nullptr;
  }
  args.num_directions = usual ? 1 : static_cast<int>(random.below(kMaxDirections + 1));

  const int64_t stored_bytes = args.numel * size_of(args.storage);
  const int64_t bytes = args.numel * size_of(args.compute);
  const auto shift = [&](DType dtype) { return random.one_in(5) ? size_of(dtype) : 0; };
  Memory stored(stored_bytes, shift(args.storage)), expected(stored_bytes, 0);
  fill(random, args.storage, args.numel, stored);
  expected.copy_from(stored, stored_bytes);

  std::vector<Memory*> outputs, expected_outputs;
  const auto add_output = [&](void*& slab, void*& expected_slab) {
    outputs.push_back(new Memory(bytes, shift(args.compute)));
    expected_outputs.push_back(new Memory(bytes, 0));
    slab = outputs.back()->data();
    expected_slab = expected_outputs.back()->data();
  };
  UpdatePerturbArgs expected_args = args;
  args.stored = stored.data();
  expected_args.stored = expected.data();
  if (!usual && random.one_in(2)) add_output(args.plain, expected_args.plain);
  bool may_alias = !args.write_back && args.storage == args.compute;
  for (int k = 0; k < args.num_directions; ++k) {
    Direction& direction = args.directions[k];
    Direction& expected_direction = expected_args.directions[k];
    direction.key = expected_direction.key = random.key();
    direction.eps = expected_direction.eps = random.one_in(30) ? INFINITY : 1e-3f;
    if (may_alias && random.one_in(3)) {
      may_alias = false;
      direction.plus = args.stored;
      expected_direction.plus = expected_args.stored;
    } else if (usual || !random.one_in(3)) {
      add_output(direction.plus, expected_direction.plus);
    }
    if (usual || !random.one_in(3)) add_output(direction.minus, expected_direction.minus);
  }

  update_perturb_cpu(expected_args, parallel_for);
  plan_update_perturb(args, Emulation{random.of(kShares)});
  bool same = stored == expected;
  for (size_t i = 0; i < outputs.size(); ++i) same = same && *outputs[i] == *expected_outputs[i];
  for (Memory* memory : outputs) delete memory;
  for (Memory* memory : expected_outputs) delete memory;
  if (same) return;
  ++failures;
  std::fprintf(stderr,
               "update_perturb differs: seed %llu, %lld elements in %zu segments, storage %d, "
               "compute %d, distribution %d, rounding %d, write_back %d, %zu updates, "
               "%d directions\n",
               static_cast<unsigned long long>(seed), static_cast<long long>(args.numel),
               segments.size(), static_cast<int>(args.storage), static_cast<int>(args.compute),
               static_cast<int>(args.distribution), static_cast<int>(args.rounding),
               static_cast<int>(args.write_back), updates.size(), args.num_directions);
}

void check_noise(uint64_t seed, int64_t numel) {
  Random random(seed);
  const DType dtype = random.of(kDTypes);
  Memory out(numel * size_of(dtype), random.one_in(4) ? size_of(dtype) : 0);
  Memory expected(numel * size_of(dtype), 0);
  NoiseArgs args{expected.data(),          dtype,        numel,
                 some_offset(random),      random.key(), random.word(),
                 random.of(kDistributions)};
  noise_cpu(args, parallel_for);
  args.out = out.data();
  plan_noise(args, Emulation{random.of(kShares)});
  if (out == expected) return;
  ++failures;
  std::fprintf(stderr, "noise differs: seed %llu, %lld elements from %lld\n",
               static_cast<unsigned long long>(seed), static_cast<long long>(numel),
               static_cast<long long>(args.offset));
}

void check_pack(uint64_t seed, int64_t numel) {
  Random random(seed);
  const DType dtype = kDTypes[1 + random.below(2)];
  Memory weights(numel * 4, random.one_in(4) ? 4 : 0);
  Memory packed(numel * 2, random.one_in(4) ? 2 : 0), expected(numel * 2, 0);
  fill(random, DType::kFloat32, numel, weights);
  PackArgs args{reinterpret_cast<const float*>(weights.data()),
                expected.data(),
                dtype,
                numel,
                some_offset(random),
                random.of(kRoundings),
                random.key(),
                random.word()};
  pack_cpu(args, parallel_for);
  args.packed = packed.data();
  plan_pack(args, Emulation{random.of(kShares)});
  if (packed == expected) return;
  ++failures;
  std::fprintf(stderr, "pack differs: seed %llu, %lld elements from %lld\n",
               static_cast<unsigned long long>(seed), static_cast<long long>(numel),
               static_cast<long long>(args.offset));
}

/// simd.h's square root on a GPU corrects an estimate of 1 / sqrt(x), which CUDA documents to be
/// within 2^-22.9 of it. Of all radicands that noise has, all estimates must lead to the right root
/// but for one: __fsqrt_rn, the same instructions, is right there too, by its documentation.
void check_square_root() {
  int64_t estimates = 0, wrong = 0;
  for (uint32_t i = 0; i < 1u << 23; ++i) {
    const float x = squared_radius(i << 9);
    if (to_bits(x) < 0x0d000000u || to_bits(x) > 0x7f7fffffu) ++failures;  // not the fast way
    const float right = square_root(x);
    const double exact = 1 / std::sqrt(static_cast<double>(x));
    for (uint32_t distance = 0; distance < 9; ++distance) {
      const float estimate = from_bits(to_bits(static_cast<float>(exact)) + distance - 4);
      if (std::fabs(estimate - exact) > exact * 0x1.125fbep-23) continue;  // 2^-22.9
      const float root = x * estimate;
      ++estimates;
      if (fused(fused(-root, root, x), estimate * 0.5f, root) != right) {
        ++wrong;
        if (to_bits(x) != 0x3efc114au) ++failures;
      }
    }
  }
  std::printf("square roots: %lld estimates, %lld leads to a wrong root\n",
              static_cast<long long>(estimates), static_cast<long long>(wrong));
}

}  // namespace

int main() {
  check_square_root();
  for (uint64_t seed = 0; seed < 3000; ++seed) check_update_perturb(seed);
  for (uint64_t seed = 0; seed < 600; ++seed) {
    Random random(~seed);
    check_noise(seed, some_length(random) + 1);
    check_pack(seed, some_length(random) + 1);
  }
  // As large grids are planned.
  check_noise(600, (1 << 23) + 5);
  check_pack(600, (1 << 23) + 5);
  // 14 that update and perturb both ways, 4 that do anything, 6 for noise, 4 for packing.
  if (launches.size() != 14 + 4 + 6 + 4) {
    std::fprintf(stderr, "%zu bodies ran\n", launches.size());
    ++failures;
  }
  for (const auto& [body, count] : launches) {
    if (count < 20) {
      std::fprintf(stderr, "%s ran %d times\n", body.c_str(), count);
      ++failures;
    }
  }
  std::printf("%zu kernel bodies, %d disagreements\n", launches.size(), failures);
  return failures != 0;
}
