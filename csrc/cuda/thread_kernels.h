// thread_kernels.h -- what one GPU thread does, as plain functions of where it stands in the grid.
//
// Host code too: csrc/tests runs every thread of a grid one by one and compares bits with the CPU
// kernels. Threads do not speak to each other.
//
// A warp finds the segments in its share of the slab and walks through each in runs, octet by
// octet. What is not an ordinary octet, the end of a segment, pointers that are not aligned, a NaN,
// is done element by element.
#pragma once

#include "../kernels.h"
#include "../step.h"
#include "runs.h"

namespace zo2ext {

// Update and perturbation.

struct UpdatePerturbGrid {
  UpdatePerturbArgs args;
  Division division;
  bool finite;  // whether every eps is: only then is no result NaN where the weight is none
  RoundKeys rounding_keys;
};

ZO2_HOST_DEVICE Update update_at(const UpdatePerturbArgs& args, int64_t k) {
  return args.updates == nullptr ? args.only_update : args.updates[k];
}

/// How weights are rounded before `update`, where they are.
ZO2_HOST_DEVICE Rounding rounding_before(const Update& update) {
  return update.round_first == RoundFirst::kNearest ? Rounding::kNearest : Rounding::kStochastic;
}

ZO2_HOST_DEVICE Segment segment_at(const UpdatePerturbArgs& args, int64_t s) {
  return args.segments == nullptr ? args.only_segment : args.segments[s];
}

/// The last segment that begins at or before `at`; 0 where there is none.
template <class Args>
ZO2_HOST_DEVICE int64_t find_segment(const Args& args, int64_t at) {
  int64_t first = 0, last = args.num_segments;
  while (last - first > 1) {
    const int64_t middle = first + (last - first) / 2;
    if (args.segments[middle].begin <= at) {
      first = middle;
    } else {
      last = middle;
    }
  }
  return first;
}

/// Calls f(run, segment) for each run of the warp's share of the slab.
template <class Grid, class Function>
ZO2_HOST_DEVICE void for_each_run(const Grid& grid, const Place& place, const Function& f) {
  const auto& args = grid.args;
  const int64_t begin = place.warp() * grid.division.share;
  int64_t end = begin + grid.division.share;
  if (end > args.numel) end = args.numel;
  if (begin >= end) return;
  int64_t s = args.segments == nullptr ? 0 : find_segment(args, begin);
  for (; s < args.num_segments; ++s) {
    const auto segment = segment_at(args, s);
    if (segment.begin >= end) break;
    const int64_t from = begin > segment.begin ? begin : segment.begin;
    int64_t to = segment.begin + segment.numel;
    if (to > end) to = end;
    for_each_run(from, to, segment.offset + (from - segment.begin), segment.tensor_id,
                 grid.division, [&](const Run& run) { f(run, segment); });
  }
}

/// The random word with which element `i` of a run is rounded.
ZO2_HOST_DEVICE uint32_t random_word(const Run& run, uint32_t i, Rounding rounding, uint64_t key) {
  if (rounding == Rounding::kNearest) return 0;
  return random_element(key, run.tensor_id, run.quad * 4 + i);
}

/// The end of a pass for element `i` of a run. Returns the weight, rounded where it was written
/// back.
ZO2_HOST_DEVICE float finish_element(const SlabArgs& args, const Run& run, uint32_t i, float w) {
  const int64_t at = run.at + i;
  if (args.write_back) {
    const uint32_t word = random_word(run, i, args.rounding, args.rounding_key);
    w = store_element(args.storage, args.rounding, word, w, args.stored, at);
  }
  if (args.plain != nullptr) {
    store_element(args.compute, Rounding::kNearest, 0, w, args.plain, at);
  }
  return w;
}

/// All there is to do for one element.
ZO2_HOST_DEVICE void update_perturb_element(const UpdatePerturbArgs& args, const Run& run,
                                            bool decays, uint32_t i) {
  const int64_t at = run.at + i;
  const uint64_t element = run.quad * 4 + i;
  const auto noise = [&](uint64_t key) {
    return noise_element(args.distribution, key, args.domain, run.tensor_id, element);
  };
  const auto store = [&](float weight, void* to) {
    if (to != nullptr) store_element(args.compute, Rounding::kNearest, 0, weight, to, at);
  };
  float w = load_element(args.storage, args.stored, at);
  for (int64_t k = 0; k < args.num_updates; ++k) {
    const Update update = update_at(args, k);
    if (update.round_first != RoundFirst::kNo) {
      const Rounding rounding = rounding_before(update);
      const uint32_t word = random_word(run, i, rounding, update.rounding_key);
      w = round_element(args.storage, rounding, word, w);
    }
    w = updated(w, noise(update.key), -update.coefficient, decays ? update.decay : 1.0f);
  }
  w = finish_element(args, run, i, w);
  ZO2_DO_NOT_UNROLL
  for (int k = 0; k < args.num_directions; ++k) {
    const Direction& direction = args.directions[k];
    const float z = noise(direction.key);
    store(perturbed(w, z, direction.eps), direction.plus);
    store(perturbed(w, z, -direction.eps), direction.minus);
  }
}

ZO2_HOST_DEVICE void update_octet(const float (&z)[8], const Update& update, bool decays,
                                  float (&w)[8]) {
  const float decay = decays ? update.decay : 1.0f;
  ZO2_UNROLL
  for (int j = 0; j < 8; ++j) w[j] = updated(w[j], z[j], -update.coefficient, decay);
}

template <class Format>
ZO2_HOST_DEVICE PackedOctet<Format> perturb_octet(Format format, const float (&w)[8],
                                                  const float (&z)[8], float eps) {
  float moved[8];
  ZO2_UNROLL
  for (int j = 0; j < 8; ++j) moved[j] = perturbed(w[j], z[j], eps);
  return pack_octet(format, moved);
}

/// What most launches are: one update, written back, and one direction both ways.
template <class StoredFormat, class ComputedFormat, Distribution kDistribution, Rounding kRounding>
struct UpdateDual {
  static constexpr bool kApart = kQuadsApart<StoredFormat, ComputedFormat>;
  /// Gaussian noise keeps the arithmetic busy, signs wait for memory: the more warps, the better
  /// that is hidden, as long as registers suffice.
  static constexpr int kMinBlocks =
      kDistribution == Distribution::kRademacher && kRounding == Rounding::kNearest && !kApart ? 5
                                                                                               : 4;

  static ZO2_HOST_DEVICE void thread(const UpdatePerturbGrid& grid, const Place& place) {
    using Noise = RunNoise<kDistribution, kApart>;
    using Stored = typename StoredFormat::Storage;
    using Computed = typename ComputedFormat::Storage;
    const UpdatePerturbArgs& args = grid.args;
    const Update update = update_at(args, 0);
    const RoundKeys update_keys = round_keys(update.key, args.domain);
    const RoundKeys direction_keys = round_keys(in_registers(args.directions[0].key), args.domain);
    const float eps = args.directions[0].eps;
    for_each_run(grid, place, [&](const Run& run, const Segment& segment) {
      const bool decays = segment.decays != 0;
      const Noise update_noise = kept(Noise(update_keys, run));
      const Noise direction_noise = kept(Noise(direction_keys, run));
      [[maybe_unused]] const RunRandom<kApart> run_random(grid.rounding_keys, run);
      auto* const stored = kept(static_cast<Stored*>(args.stored) + run.at);
      auto* const plus = kept(static_cast<Computed*>(args.directions[0].plus) + run.at);
      auto* const minus = kept(static_cast<Computed*>(args.directions[0].minus) + run.at);
      const uint32_t whole = run.whole<kApart>();
      uint32_t i = first_octet<kApart>(place.lane());
      while (i < run.count) {
        if (i < whole) {
          PackedOctet<StoredFormat> next = load_octet<kApart>(StoredFormat(), stored, i);
          do {
            float w[8], z[8];
            unpack_octet(next, w);
            // One octet ahead; the last is loaded twice.
            const uint32_t ahead = i + kWarpStep < whole ? i + kWarpStep : i;
            next = load_octet<kApart>(StoredFormat(), stored, ahead);
            update_noise.octet(i, z);
            update_octet(z, update, decays, w);
            constexpr bool kBounded = kRounding == Rounding::kStochastic;
            if (!(kBounded ? all_bounded(w) : all_numbers(w))) break;
            PackedOctet<StoredFormat> packed;
            if constexpr (kRounding == Rounding::kStochastic) {
              uint32_t random[8];
              run_random.octet(i, random);
              packed = pack_octet(StoredFormat(), w, random);
            } else {
              packed = pack_octet(StoredFormat(), w);
            }
            store_octet<kApart>(packed, stored, i);
            unpack_octet(packed, w);
            direction_noise.octet(i, z);
            store_octet<kApart>(perturb_octet(ComputedFormat(), w, z, eps), plus, i);
            store_octet<kApart>(perturb_octet(ComputedFormat(), w, z, -eps), minus, i);
            i += kWarpStep;
          } while (i < whole);
        }
        if (i < run.count) {
          run.for_each_element<kApart>(
              i, [&](uint32_t j) { update_perturb_element(args, run, decays, j); });
          i += kWarpStep;
        }
      }
    });
  }
};

/// The octets of a slab whose formats are known at run time.
template <bool kApart>
struct Octets {
  static ZO2_HOST_DEVICE void load(const SlabArgs& args, const Run& run, uint32_t i,
                                   float (&w)[8]) {
    with_compute_format<kApart>(args.storage, [&](auto format) {
      using Element = typename decltype(format)::Storage;
      const auto* const stored = static_cast<const Element*>(args.stored) + run.at;
      unpack_octet(load_octet<kApart>(format, stored, i), w);
    });
  }

  static ZO2_HOST_DEVICE void store(DType dtype, const float (&w)[8], void* to, int64_t at,
                                    uint32_t i) {
    with_compute_format<kApart>(dtype, [&](auto format) {
      using Element = typename decltype(format)::Storage;
      store_octet<kApart>(pack_octet(format, w), static_cast<Element*>(to) + at, i);
    });
  }

  /// Whether an octet can be rounded as one.
  static ZO2_HOST_DEVICE bool is_ordinary(Rounding rounding, const float (&w)[8]) {
    return rounding == Rounding::kStochastic ? all_bounded(w) : all_numbers(w);
  }

  /// Rounds an ordinary octet to storage, and stores it where `stored` is not null.
  static ZO2_HOST_DEVICE void round(DType storage, Rounding rounding, const RoundKeys& keys,
                                    const Run& run, uint32_t i, float (&w)[8], void* stored) {
    with_compute_format<kApart>(storage, [&](auto format) {
      using Format = decltype(format);
      PackedOctet<Format> packed;
      if (Format::kDType == DType::kFloat32 || rounding == Rounding::kNearest) {
        packed = pack_octet(format, w);
      } else if constexpr (Format::kDType != DType::kFloat32) {
        uint32_t random[8];
        RunRandom<kApart>(keys, run).octet(i, random);
        packed = pack_octet(format, w, random);
      }
      if (stored != nullptr) {
        auto* const to = static_cast<typename Format::Storage*>(stored) + run.at;
        store_octet<kApart>(packed, to, i);
      }
      unpack_octet(packed, w);
    });
  }

  /// Whether the end of a pass can do an octet as one.
  static ZO2_HOST_DEVICE bool can_finish(const SlabArgs& args, const float (&w)[8]) {
    return is_ordinary(args.write_back ? args.rounding : Rounding::kNearest, w);
  }

  /// The end of a pass. The weights are rounded where they are written back.
  static ZO2_HOST_DEVICE void finish(const SlabArgs& args, const RoundKeys& rounding_keys,
                                     const Run& run, uint32_t i, float (&w)[8]) {
    if (args.write_back) {
      round(args.storage, args.rounding, rounding_keys, run, i, w, args.stored);
    }
    if (args.plain != nullptr) store(args.compute, w, args.plain, run.at, i);
  }
};

/// Any number of updates and directions.
template <bool kApart, Distribution kDistribution>
struct UpdatePerturb {
  static constexpr int kMinBlocks = 5;
  using Noise = RunNoise<kDistribution, kApart>;
  using Slab = Octets<kApart>;

  /// Applies the updates in order. False where they came upon weights that are not ordinary: `w` is
  /// then of no use.
  static ZO2_HOST_DEVICE bool apply(const UpdatePerturbArgs& args, const Run& run, bool decays,
                                    uint32_t i, float (&w)[8]) {
    float z[8];
    ZO2_DO_NOT_UNROLL
    for (int64_t k = 0; k < args.num_updates; ++k) {
      const Update update = update_at(args, k);
      if (update.round_first != RoundFirst::kNo) {
        const Rounding rounding = rounding_before(update);
        if (!Slab::is_ordinary(rounding, w)) return false;
        Slab::round(args.storage, rounding, round_keys(update.rounding_key, Domain::kRounding), run,
                    i, w, nullptr);
      }
      Noise(round_keys(update.key, args.domain), run).octet(i, z);
      update_octet(z, update, decays, w);
    }
    return Slab::can_finish(args, w);
  }

  static ZO2_HOST_DEVICE void thread(const UpdatePerturbGrid& grid, const Place& place) {
    const UpdatePerturbArgs& args = grid.args;
    for_each_run(grid, place, [&](const Run& run, const Segment& segment) {
      const bool decays = segment.decays != 0;
      const uint32_t whole = run.whole<kApart>();
      for (uint32_t i = first_octet<kApart>(place.lane()); i < run.count; i += kWarpStep) {
        if (i < whole && grid.finite) {
          float w[8], z[8];
          Slab::load(args, run, i, w);
          if (apply(args, run, decays, i, w)) {
            Slab::finish(args, grid.rounding_keys, run, i, w);
            ZO2_DO_NOT_UNROLL
            for (int k = 0; k < args.num_directions; ++k) {
              const Direction& direction = args.directions[k];
              Noise(round_keys(direction.key, args.domain), run).octet(i, z);
              ZO2_DO_NOT_UNROLL
              for (int side = 0; side < 2; ++side) {
                void* const to = side == 0 ? direction.plus : direction.minus;
                const float eps = side == 0 ? direction.eps : -direction.eps;
                if (to == nullptr) continue;
                float moved[8];
                ZO2_UNROLL
                for (int j = 0; j < 8; ++j) moved[j] = perturbed(w[j], z[j], eps);
                Slab::store(args.compute, moved, to, run.at, i);
              }
            }
            continue;
          }
        }
        run.for_each_element<kApart>(
            i, [&](uint32_t j) { update_perturb_element(args, run, decays, j); });
      }
    });
  }
};

// A direction itself.

struct NoiseGrid {
  NoiseArgs args;
  Division division;
  RoundKeys keys;
};

template <class Format, Distribution kDistribution>
struct MakeNoise {
  static constexpr int kMinBlocks = 5;

  static ZO2_HOST_DEVICE void thread(const NoiseGrid& grid, const Place& place) {
    constexpr bool kApart = kQuadsApart<Format>;
    const NoiseArgs& args = grid.args;
    for_each_run(
        place, args.numel, args.offset, args.tensor_id, grid.division, [&](const Run& run) {
          const RunNoise<kDistribution, kApart> noise(grid.keys, run);
          const uint32_t whole = run.whole<kApart>();
          for (uint32_t i = first_octet<kApart>(place.lane()); i < run.count; i += kWarpStep) {
            if (i < whole) {
              float z[8];
              noise.octet(i, z);
              auto* const out = static_cast<typename Format::Storage*>(args.out) + run.at;
              store_octet<kApart>(pack_octet(Format(), z), out, i);
              continue;
            }
            run.for_each_element<kApart>(i, [&](uint32_t j) {
              const float z = noise_element(kDistribution, args.key, args.domain, run.tensor_id,
                                            run.quad * 4 + j);
              store_element(args.dtype, Rounding::kNearest, 0, z, args.out, run.at + j);
            });
          }
        });
  }
};

// float32 weights rounded to another dtype.

struct PackGrid {
  PackArgs args;
  Division division;
  RoundKeys keys;
};

template <class Format, Rounding kRounding>
struct Pack {
  static constexpr int kMinBlocks = 8;

  static ZO2_HOST_DEVICE void thread(const PackGrid& grid, const Place& place) {
    constexpr bool kApart = true;
    const PackArgs& args = grid.args;
    for_each_run(
        place, args.numel, args.offset, args.tensor_id, grid.division, [&](const Run& run) {
          const RunRandom<kApart> run_random(grid.keys, run);
          const uint32_t whole = run.whole<kApart>();
          for (uint32_t i = first_octet<kApart>(place.lane()); i < run.count; i += kWarpStep) {
            if (i < whole) {
              float w[8];
              unpack_octet(load_octet<kApart>(Float32(), args.weights + run.at, i), w);
              constexpr bool kBounded = kRounding == Rounding::kStochastic;
              if (kBounded ? all_bounded(w) : all_numbers(w)) {
                auto* const packed = static_cast<typename Format::Storage*>(args.packed) + run.at;
                if constexpr (kRounding == Rounding::kStochastic) {
                  uint32_t random[8];
                  run_random.octet(i, random);
                  store_octet<kApart>(pack_octet(Format(), w, random), packed, i);
                } else {
                  store_octet<kApart>(pack_octet(Format(), w), packed, i);
                }
                continue;
              }
            }
            run.for_each_element<kApart>(i, [&](uint32_t j) {
              uint32_t random = 0;
              if (kRounding == Rounding::kStochastic) {
                random = random_element(args.key, run.tensor_id, run.quad * 4 + j);
              }
              store_element(args.dtype, kRounding, random, args.weights[run.at + j], args.packed,
                            run.at + j);
            });
          }
        });
  }
};

}  // namespace zo2ext
