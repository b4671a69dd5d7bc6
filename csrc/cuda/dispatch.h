// dispatch.h -- choose the grid and the kernel body for a launch.
#pragma once

#include <cmath>

#include "fold_kernels.h"

namespace zo2ext {

constexpr uint32_t kThreads = 128;  // in a block

/// Steps a warp walks at most: enough that finding its segments costs little, and few enough that
/// the last warps of a grid do not keep it waiting.
constexpr int64_t kMaxSteps = 16;

/// Grids of fewer warps are not made coarser: a few times what a large GPU runs at once.
constexpr int64_t kManyWarps = 8192;

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

/// `step`: elements that a warp holds at a time.
inline Division divide(int64_t numel, bool aligned, uint32_t step = kWarpStep) {
  int64_t steps = numel / (step * kManyWarps);
  if (steps < 1) steps = 1;
  if (steps > kMaxSteps) steps = kMaxSteps;
  return {static_cast<uint32_t>(steps) * step, aligned};
}

inline uint32_t blocks(int64_t numel, const Division& division) {
  const int64_t block = int64_t{division.share} * (kThreads / kWarp);
  return static_cast<uint32_t>((numel + block - 1) / block);
}

/// f(format) for the 16-bit formats.
template <class Function>
void with_packed_format(DType dtype, const Function& f) {
  return dtype == DType::kBFloat16 ? f(BFloat16()) : f(Float16());
}

/// Calls f(body, grid, numel).
template <class Function>
void dispatch_update_perturb(const UpdatePerturbArgs& args, Function&& f) {
  UpdatePerturbGrid grid{};
  grid.args = args;
  if (args.segments == nullptr) grid.args.num_segments = 1;
  bool aligned = is_aligned(args.stored) && is_aligned(args.low) && is_aligned(args.plain);
  grid.finite = true;
  for (int k = 0; k < args.num_directions; ++k) {
    const Direction& direction = args.directions[k];
    aligned = aligned && is_aligned(direction.plus) && is_aligned(direction.minus);
    grid.finite = grid.finite && std::isfinite(direction.eps);
  }
  const bool scaled = is_scaled(args.storage);
  grid.division = divide(args.numel, aligned, scaled ? kGroupStep : kWarpStep);
  grid.rounding_keys = round_keys(args.rounding_key, Domain::kRounding);

  const Direction& direction = args.directions[0];
  const bool dual = args.num_updates == 1 && args.write_back && args.plain == nullptr &&
                    args.num_directions == 1 && direction.plus != nullptr &&
                    direction.minus != nullptr && grid.finite;
  const auto run = [&](auto body) { f(body, grid, args.numel); };
  const auto run_either = [&](auto gaussian, auto rademacher) {
    args.distribution == Distribution::kGaussian ? run(gaussian) : run(rademacher);
  };
  constexpr auto kGaussian = Distribution::kGaussian, kRademacher = Distribution::kRademacher;
  if (scaled) {
    with_scaled_format(args.low != nullptr, [&](auto format) {
      using F = decltype(format);
      run_either(UpdatePerturbGroups<F, kGaussian>(), UpdatePerturbGroups<F, kRademacher>());
    });
  } else if (dual && args.storage == DType::kFloat32) {
    const auto run_dual = [&](auto format) {
      using F = decltype(format);
      run_either(UpdateDual<Float32, F, kGaussian, Rounding::kNearest>(),
                 UpdateDual<Float32, F, kRademacher, Rounding::kNearest>());
    };
    args.compute == DType::kFloat32 ? run_dual(Float32())
                                    : with_packed_format(args.compute, run_dual);
  } else if (dual && args.storage == args.compute) {
    with_packed_format(args.storage, [&](auto format) {
      using F = decltype(format);
      if (args.rounding == Rounding::kNearest) {
        run_either(UpdateDual<F, F, kGaussian, Rounding::kNearest>(),
                   UpdateDual<F, F, kRademacher, Rounding::kNearest>());
      } else {
        run_either(UpdateDual<F, F, kGaussian, Rounding::kStochastic>(),
                   UpdateDual<F, F, kRademacher, Rounding::kStochastic>());
      }
    });
  } else if (args.storage == DType::kFloat32 || args.compute == DType::kFloat32) {
    run_either(UpdatePerturb<true, kGaussian>(), UpdatePerturb<true, kRademacher>());
  } else {
    run_either(UpdatePerturb<false, kGaussian>(), UpdatePerturb<false, kRademacher>());
  }
}

template <class Function>
void dispatch_fold(const FoldArgs& args, Function&& f) {
  const bool scaled = is_scaled(args.storage);
  const bool aligned = is_aligned(args.stored) && is_aligned(args.low) && is_aligned(args.plain);
  const FoldGrid grid{args, divide(args.numel, aligned, scaled ? kGroupStep : kWarpStep),
                      round_keys(args.rounding_key, Domain::kRounding)};
  if (scaled) {
    with_scaled_format(args.low != nullptr,
                       [&](auto format) { f(FoldGroups<decltype(format)>(), grid, args.numel); });
  } else if (args.storage == DType::kFloat32 || args.compute == DType::kFloat32) {
    f(Fold<true>(), grid, args.numel);
  } else {
    f(Fold<false>(), grid, args.numel);
  }
}

template <class Function>
void dispatch_noise(const NoiseArgs& args, Function&& f) {
  const NoiseGrid grid{args, divide(args.numel, is_aligned(args.out)),
                       round_keys(args.key, args.domain)};
  const auto run = [&](auto format) {
    using F = decltype(format);
    if (args.distribution == Distribution::kGaussian) {
      f(MakeNoise<F, Distribution::kGaussian>(), grid, args.numel);
    } else {
      f(MakeNoise<F, Distribution::kRademacher>(), grid, args.numel);
    }
  };
  args.dtype == DType::kFloat32 ? run(Float32()) : with_packed_format(args.dtype, run);
}

/// To a format of 8 or 16 bits.
template <class Function>
void dispatch_pack(const PackArgs& args, Function&& f) {
  const bool scaled = is_scaled(args.dtype);
  const bool aligned = is_aligned(args.weights) && is_aligned(args.packed) && is_aligned(args.low);
  const PackGrid grid{args, divide(args.numel, aligned, scaled ? kGroupStep : kWarpStep),
                      round_keys(args.key, Domain::kRounding)};
  if (scaled) {
    with_scaled_format(args.low != nullptr,
                       [&](auto format) { f(PackGroups<decltype(format)>(), grid, args.numel); });
    return;
  }
  with_packed_format(args.dtype, [&](auto format) {
    using F = decltype(format);
    if (args.rounding == Rounding::kNearest) {
      f(Pack<F, Rounding::kNearest>(), grid, args.numel);
    } else {
      f(Pack<F, Rounding::kStochastic>(), grid, args.numel);
    }
  });
}

}  // namespace zo2ext
