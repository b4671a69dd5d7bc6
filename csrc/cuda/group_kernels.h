// group_kernels.h -- what one GPU thread does where elements share scales, group by group.
#pragma once

#include "groups.h"
#include "thread_kernels.h"

namespace zo2ext {

/// The unperturbed weights of a group, where they are wanted.
ZO2_HOST_DEVICE void store_plain(const SlabArgs& args, const Group& group, const GroupWeights& w) {
  if (args.plain == nullptr) return;
  ZO2_UNROLL
  for (uint32_t o = 0; o < 4; ++o) store_computed(args.compute, w[o], group, o, args.plain);
}

/// Any number of updates and directions.
template <class Format, Distribution kDistribution>
struct UpdatePerturbGroups {
  static constexpr int kMinBlocks = 4;
  using Noise = GroupNoise<kDistribution>;

  static ZO2_HOST_DEVICE void thread(const UpdatePerturbGrid& grid, const Place& place) {
    const UpdatePerturbArgs& args = grid.args;
    const GroupMemory memory{args.stored, args.scales, args.low};
    for_each_run(grid, place, [&](const Run& run, const Segment& segment) {
      const bool decays = segment.decays != 0;
      for_each_group(run, place, grid.division.aligned, [&](const Group& group) {
        GroupWeights w;
        load_group(Format(), memory, group, w);
        update(args, run, decays, group, memory, w);
        store_plain(args, group, w);
        ZO2_DO_NOT_UNROLL
        for (int k = 0; k < args.num_directions; ++k) {
          perturb(args, args.directions[k], run, group, w);
        }
      });
    });
  }

 private:
  /// The updates in order, and the write-back.
  static ZO2_HOST_DEVICE void update(const UpdatePerturbArgs& args, const Run& run, bool decays,
                                     const Group& group, const GroupMemory& memory,
                                     GroupWeights& w) {
    ZO2_DO_NOT_UNROLL
    for (int64_t k = 0; k <= args.num_updates; ++k) {
      const bool last = k == args.num_updates;
      const Update update = last ? Update{} : update_at(args, k);
      if (last ? args.write_back : update.round_first != RoundFirst::kNo) {
        round_group(Format(), last ? args.rounding : rounding_before(update),
                    last ? args.rounding_key : update.rounding_key, run, group, w, memory, last);
      }
      if (last) break;
      const Noise noise(update.key, args.domain, run, group.i);
      ZO2_UNROLL
      for (uint32_t o = 0; o < 4; ++o) {
        float z[8];
        noise.octet(o, z);
        update_octet(z, update, decays, w[o]);
      }
    }
  }

  /// Both sides of a direction.
  static ZO2_HOST_DEVICE void perturb(const UpdatePerturbArgs& args, const Direction& direction,
                                      const Run& run, const Group& group, const GroupWeights& w) {
    const Noise noise(direction.key, args.domain, run, group.i);
    ZO2_UNROLL
    for (uint32_t o = 0; o < 4; ++o) {
      float z[8];
      noise.octet(o, z);
      ZO2_DO_NOT_UNROLL
      for (int side = 0; side < 2; ++side) {
        void* const to = side == 0 ? direction.plus : direction.minus;
        const float eps = side == 0 ? direction.eps : -direction.eps;
        if (to == nullptr) continue;
        float moved[8];
        ZO2_UNROLL
        for (int j = 0; j < 8; ++j) moved[j] = perturbed(w[o][j], z[j], eps);
        store_computed(args.compute, moved, group, o, to);
      }
    }
  }
};

/// float32 weights rounded.
template <class Format>
struct PackGroups {
  static constexpr int kMinBlocks = 4;

  static ZO2_HOST_DEVICE void thread(const PackGrid& grid, const Place& place) {
    const PackArgs& args = grid.args;
    const GroupMemory memory{args.packed, args.scales, args.low};
    const auto pack = [&](const Run& run) {
      for_each_group(run, place, grid.division.aligned, [&](const Group& group) {
        GroupWeights w;
        load_weights(args.weights + group.at, group, w);
        round_group(Format(), args.rounding, args.key, run, group, w, memory, true);
      });
    };
    for_each_run(place, args.numel, args.offset, args.tensor_id, grid.division, pack);
  }
};

}  // namespace zo2ext
