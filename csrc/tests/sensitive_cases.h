// sensitive_cases.h -- launches in which weights of 16 bits show the last bit of z.
//
// A weight that is z itself, rounded to storage, is updated by -1 z or perturbed along -1 z: what
// remains is the rounding error of z, so that a z that is wrong in its last place shows in one
// element of some hundred. In random launches a weight of 16 bits hides it.
#pragma once

#include "cuda_cases.h"

namespace zo2ext {

struct Sensitive {
  DType storage, compute;
  Distribution distribution;
  Rounding rounding;
  bool of_update;  // the update is along z; otherwise the perturbation
  bool general;    // by the kernel for any number of updates and outputs
  int64_t numel, offset;
  uint64_t key;
};

template <class Runner>
bool check_sensitive(const Sensitive& c, Runner& runner) {
  Memory stored(c.storage, c.numel), expected_stored(c.storage, c.numel);
  Memory outputs[3] = {{c.compute, c.numel}, {c.compute, c.numel}, {c.compute, c.numel}};
  Memory expected[3] = {{c.compute, c.numel}, {c.compute, c.numel}, {c.compute, c.numel}};
  noise_cpu({stored.data(), c.storage, c.numel, c.offset, c.key, 7, c.distribution}, parallel_for);
  expected_stored.copy_from(stored);
  UpdatePerturbArgs args{};
  args.storage = c.storage;
  args.compute = c.compute;
  args.numel = c.numel;
  args.num_segments = 1;
  args.only_segment = {0, c.numel, c.offset, 7, 1};
  args.num_updates = 1;
  args.only_update = {c.of_update ? c.key : ~c.key, c.of_update ? 1.0f : 0.0f, 1.0f};
  args.write_back = true;
  args.rounding = c.rounding;
  args.rounding_key = 99;
  args.distribution = c.distribution;
  args.num_directions = 1;
  const auto with = [&](Memory& weights, Memory(&to)[3]) {
    args.stored = weights.data();
    const uint64_t key = c.of_update ? ~c.key : c.key;
    args.directions[0] = {key, c.of_update ? 1.0f : -1.0f, to[0].data(), to[1].data()};
    args.plain = c.general ? to[2].data() : nullptr;
    return args;
  };
  update_perturb_cpu(with(expected_stored, expected), parallel_for);
  runner.update_perturb(with(stored, outputs), {&stored, &outputs[0], &outputs[1], &outputs[2]});
  bool same = stored == expected_stored;
  for (int i = 0; i < 3; ++i) same = same && outputs[i] == expected[i];
  if (!same) {
    std::fprintf(stderr,
                 "update_perturb of z itself differs: storage %d, compute %d, distribution %d, "
                 "rounding %d, of_update %d, general %d, %lld elements from %lld\n",
                 static_cast<int>(c.storage), static_cast<int>(c.compute),
                 static_cast<int>(c.distribution), static_cast<int>(c.rounding), c.of_update,
                 c.general, static_cast<long long>(c.numel), static_cast<long long>(c.offset));
  }
  return same;
}

/// Runs every kernel on `numel` elements several times; returns how many launches differed.
template <class Runner>
int check_sensitive_cases(int64_t numel, Runner& runner) {
  int failures = 0;
  uint64_t key = 0x1234567890abcdefull;
  for (DType storage : kDTypes) {
    for (DType compute : kDTypes) {
      for (Distribution distribution : kDistributions) {
        for (Rounding rounding : kRoundings) {
          for (int way = 0; way < 4; ++way) {
            Sensitive c{storage, compute, distribution, rounding, way % 2 == 1, way / 2 == 1,
                        numel,   0,       ++key};
            failures += !check_sensitive(c, runner);
            // Where the counter's high word changes; misaligned, so element by element.
            c.numel = numel / 8;
            c.offset = (int64_t{1} << 34) - numel / 16 / 4 * 4 + 4;
            failures += !check_sensitive(c, runner);
          }
        }
      }
    }
  }
  return failures;
}

}  // namespace zo2ext
