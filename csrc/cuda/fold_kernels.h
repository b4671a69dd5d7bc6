// fold_kernels.h -- what one GPU thread does in a fold: the factors of a tensor, multiplied out
// onto the weights that it holds.
#pragma once

#include "group_kernels.h"

namespace zo2ext {

struct FoldGrid {
  FoldArgs args;
  Division division;
  RoundKeys rounding_keys;
};

ZO2_HOST_DEVICE FoldSegment segment_at(const FoldArgs& args, int64_t s) { return args.segments[s]; }

/// A tensor's factors along a run.
class RunFactors {
 public:
  ZO2_HOST_DEVICE RunFactors(const FoldArgs& args, const FoldSegment& segment, const Run& run)
      : args_(args),
        rows_(static_cast<uint32_t>(segment.rows)),
        columns_(static_cast<uint32_t>(segment.columns)) {
    const uint64_t line = run.quad * 4 / columns_, matrix = line / rows_;
    column_ = static_cast<uint32_t>(run.quad * 4 - line * columns_);
    row_ = static_cast<uint32_t>(line - matrix * rows_);
    left_ = args.left + segment.left_begin + static_cast<int64_t>(matrix) * args.rank * rows_;
    right_ = args.right + segment.right_begin + static_cast<int64_t>(matrix) * args.rank * columns_;
  }

  /// Whether `kCount` elements from a multiple of `kCount` on lie in one row, where those of V can
  /// be loaded 16 bytes at a time.
  template <uint32_t kCount>
  ZO2_HOST_DEVICE bool in_vectors() const {
    const uint64_t strides = static_cast<uint64_t>(args_.right_numel) * sizeof(float);
    return columns_ % kCount == 0 && (reinterpret_cast<uintptr_t>(right_) | strides) % 16 == 0;
  }

  /// Adds all directions to `kCount` elements of a row, from element `i` of the run on.
  template <uint32_t kCount>
  ZO2_HOST_DEVICE void add(uint32_t i, float* w) const {
    const uint32_t line = (column_ + i) / columns_, column = (column_ + i) - line * columns_;
    const uint32_t matrix = (row_ + line) / rows_, row = (row_ + line) - matrix * rows_;
    const int64_t ranks = static_cast<int64_t>(matrix) * args_.rank;
    const float* left = left_ + ranks * rows_ + row;
    const float* right = right_ + ranks * columns_ + column;
    ZO2_DO_NOT_UNROLL
    for (int64_t k = 0; k < args_.num_directions; ++k) {
      // A group of weights in registers leaves no room for those of V of several ranks.
      ZO2_DO_NOT_UNROLL
      for (int64_t q = 0; q < args_.rank; ++q) {
        const float* const at = right + q * columns_;
        const float u = left[q * rows_];
        if constexpr (kCount == 1) {
          w[0] = fused(u, *at, w[0]);
        } else {
          ZO2_UNROLL
          for (uint32_t j = 0; j < kCount; j += 4) {
            uint32_t v[4];
            load_words<4>(at + j, v);
            ZO2_UNROLL
            for (uint32_t l = 0; l < 4; ++l) w[j + l] = fused(u, from_bits(v[l]), w[j + l]);
          }
        }
      }
      left += args_.left_numel;
      right += args_.right_numel;
    }
  }

 private:
  const FoldArgs& args_;
  uint32_t rows_, columns_;
  uint32_t row_, column_;  // of the run's first element
  const float* left_;      // of its matrix, in the first direction
  const float* right_;
};

ZO2_HOST_DEVICE float decay_of(const FoldArgs& args, const FoldSegment& segment) {
  return segment.decays != 0 ? args.decay : 1.0f;
}

template <bool kApart>
struct Fold {
  static constexpr int kMinBlocks = 5;
  using Slab = Octets<kApart>;

  static ZO2_HOST_DEVICE void thread(const FoldGrid& grid, const Place& place) {
    const FoldArgs& args = grid.args;
    for_each_run(grid, place, [&](const Run& run, const FoldSegment& segment) {
      const float decay = decay_of(args, segment);
      const RunFactors factors(args, segment, run);
      const uint32_t whole = factors.in_vectors<4>() ? run.whole<kApart>() : 0;
      for (uint32_t i = first_octet<kApart>(place.lane()); i < run.count; i += kWarpStep) {
        if (i < whole) {
          float w[8];
          Slab::load(args, run, i, w);
          ZO2_UNROLL
          for (float& weight : w) weight = weight * decay;
          factors.add<4>(i, w);
          factors.add<4>(i + kSecondQuad<kApart>, w + 4);
          if (Slab::can_finish(args, w)) {
            Slab::finish(args, grid.rounding_keys, run, i, w);
            continue;
          }
        }
        run.for_each_element<kApart>(i, [&](uint32_t j) {
          float w = load_element(args.storage, args.stored, run.at + j) * decay;
          factors.add<1>(j, &w);
          finish_element(args, run, j, w);
        });
      }
    });
  }
};

/// Where elements share scales.
template <class Format>
struct FoldGroups {
  static constexpr int kMinBlocks = 4;

  static ZO2_HOST_DEVICE void thread(const FoldGrid& grid, const Place& place) {
    const FoldArgs& args = grid.args;
    const GroupMemory memory{args.stored, args.scales, args.low};
    for_each_run(grid, place, [&](const Run& run, const FoldSegment& segment) {
      const float decay = decay_of(args, segment);
      const RunFactors factors(args, segment, run);
      const bool in_vectors = factors.in_vectors<kGroupElements>();
      for_each_group(run, place, grid.division.aligned, [&](const Group& group) {
        GroupWeights w;
        load_group(Format(), memory, group, w);
        ZO2_UNROLL
        for (uint32_t j = 0; j < kGroupElements; ++j) w[j / 8][j % 8] = w[j / 8][j % 8] * decay;
        if (in_vectors && group.left == kGroupElements) {
          factors.add<kGroupElements>(group.i, &w[0][0]);
        } else {
          add_one_by_one(factors, group, w);
        }
        if (args.write_back) {
          round_group(Format(), args.rounding, args.rounding_key, run, group, w, memory, true);
        }
        store_plain(args, group, w);
      });
    });
  }

 private:
  /// The weights stay in registers: none is chosen by an index that is known at run time only.
  static ZO2_HOST_DEVICE void add_one_by_one(const RunFactors& factors, const Group& group,
                                             GroupWeights& w) {
    ZO2_DO_NOT_UNROLL
    for (uint32_t i = 0; i < group.left; ++i) {
      float weight = 0;
      ZO2_UNROLL
      for (uint32_t j = 0; j < kGroupElements; ++j) weight = i == j ? w[j / 8][j % 8] : weight;
      factors.add<1>(group.i + i, &weight);
      ZO2_UNROLL
      for (uint32_t j = 0; j < kGroupElements; ++j) {
        w[j / 8][j % 8] = i == j ? weight : w[j / 8][j % 8];
      }
    }
  }
};

}  // namespace zo2ext
