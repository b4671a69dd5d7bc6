// chunk_kernels.h -- the kernels on a chunk small enough for the first-level cache.
//
// Compiled once for each instruction set: the including file names its lanes (`Lanes`) first. A
// chunk is unpacked to float32 once, each update is a pass over it, and each output is one more
// pass; so formats and distributions do not multiply.
#pragma once

#include "../step.h"
#include "scaled_chunks.h"

namespace zo2ext {
namespace {

/// The normals of a chunk, made where they are used.
class Gaussian {
 public:
  Gaussian(uint64_t key, Domain domain, const Chunk& chunk)
      : key_(key), domain_(domain), chunk_(chunk) {}

  /// Elements i to i + kGroup - 1 of the chunk, in memory order; i is a multiple of kGroup.
  ZO2_HOST_DEVICE void group(int64_t i, Float (&z)[4]) const {
    Word words[4];
    random_words(key_, static_cast<uint64_t>(chunk_.element + i) / kGaussianBlock, chunk_.tensor_id,
                 domain_, words, Lanes());
    gaussian_pair(words[0], words[1], z[0], z[1]);
    gaussian_pair(words[2], words[3], z[2], z[3]);
    Lanes::to_memory_order(z);
  }

 private:
  uint64_t key_;
  Domain domain_;
  Chunk chunk_;
};

/// The signs of a chunk: a few Philox calls serve all of it.
class Rademacher {
 public:
  Rademacher(uint64_t key, Domain domain, const Chunk& chunk) {
    const int64_t skipped = chunk.element % kRademacherBlock;
    const uint64_t first_block = static_cast<uint64_t>(chunk.element) / kRademacherBlock;
    const int64_t blocks = (skipped + chunk.numel + kRademacherBlock - 1) / kRademacherBlock;
    for (int64_t block = 0; block < blocks; block += Lanes::kCount) {
      Word words[4];
      random_words(key, first_block + static_cast<uint64_t>(block), chunk.tensor_id, domain, words,
                   Lanes());
      to_memory_order(words);
      for (int i = 0; i < 4; ++i) Lanes::store(words_ + 4 * block + i * Lanes::kCount, words[i]);
    }
    // Bit 0 of the first word becomes the chunk's first element.
    const int64_t first_word = skipped / 32;
    const int bits = static_cast<int>(skipped % 32);
    if (skipped == 0) return;
    for (int64_t i = 0; i < (chunk.numel + 31) / 32; ++i) {
      const uint64_t pair = words_[first_word + i] | uint64_t{words_[first_word + i + 1]} << 32;
      words_[i] = static_cast<uint32_t>(pair >> bits);
    }
  }

  ZO2_HOST_DEVICE void group(int64_t i, Float (&z)[4]) const {
    for (int j = 0; j < 4; ++j) {
      const int64_t bit = i + j * Lanes::kCount;
      z[j] =
          from_bits(Word(0x3f800000u) | Lanes::signs(words_[bit / 32], static_cast<int>(bit % 32)));
    }
  }

 private:
  // Whole blocks of an unaligned chunk, rounded up to whole Philox calls, and one word to read
  // past.
  uint32_t words_[kChunk / 32 + 4 * Lanes::kCount + 4] = {};
};

/// Calls f(Float32()), f(BFloat16()) or f(Float16()).
template <class Function>
void with_format(DType dtype, const Function& f) {
  if (dtype == DType::kFloat32) return f(Float32());
  return dtype == DType::kBFloat16 ? f(BFloat16()) : f(Float16());
}

/// Calls f with any format; `split`: whether there is a low plane.
template <class Function>
void with_storage(DType dtype, bool split, const Function& f) {
  is_scaled(dtype) ? with_scaled_format(split, f) : with_format(dtype, f);
}

/// Calls f with the chunk's noise.
template <class Function>
void with_noise(Distribution distribution, uint64_t key, Domain domain, const Chunk& chunk,
                const Function& f) {
  if (distribution == Distribution::kGaussian) {
    f(Gaussian(key, domain, chunk));
  } else {
    f(Rademacher(key, domain, chunk));
  }
}

ZO2_HOST_DEVICE Float load(Float32, const float* from) { return Lanes::load(from); }

template <class Format>
ZO2_HOST_DEVICE Float load(Format format, const uint16_t* from) {
  return unpack(format, Lanes::load(from));
}

/// Where a chunk's results go, in their format. `streamed`: past the caches, which spares reading
/// the memory first; for results that would not stay in a cache until they are read.
template <class Format>
class Output {
 public:
  using Storage = typename Format::Storage;

  Output(Storage* to, bool streamed)
      : to_(to), streamed_(streamed && reinterpret_cast<uintptr_t>(to) % 64 == 0) {}

  /// Stores elements i to i + kGroup - 1 of the chunk, or only the `left` first of them.
  ZO2_HOST_DEVICE void group(int64_t i, int64_t left, const Float (&weights)[4]) const {
    if (left < kGroup) {
      Storage tail[kGroup];
      for (int j = 0; j < 4; ++j) Lanes::store(tail + j * Lanes::kCount, packed(weights[j]));
      std::memcpy(to_ + i, tail, static_cast<size_t>(left) * sizeof(Storage));
    } else if (streamed_) {
      for (int j = 0; j < 4; ++j) Lanes::stream(to_ + i + j * Lanes::kCount, packed(weights[j]));
    } else {
      for (int j = 0; j < 4; ++j) Lanes::store(to_ + i + j * Lanes::kCount, packed(weights[j]));
    }
  }

 private:
  static ZO2_HOST_DEVICE auto packed(Float weight) {
    if constexpr (Format::kDType == DType::kFloat32) {
      return weight;
    } else {
      return pack_nearest(Format(), weight);
    }
  }

  Storage* to_;
  bool streamed_;
};

ZO2_HOST_DEVICE void load_group(const float* from, Float (&weights)[4]) {
  for (int j = 0; j < 4; ++j) weights[j] = Lanes::load(from + j * Lanes::kCount);
}

/// Fills `weights` up to a whole group; what lies beyond `numel` is zero.
template <class Format>
void unpack_chunk(Format format, const typename Format::Storage* packed, int64_t numel,
                  float* weights) {
  int64_t i = 0;
  for (; i + kGroup <= numel; i += kGroup) {
    for (int64_t j = i; j < i + kGroup; j += Lanes::kCount) {
      Lanes::store(weights + j, load(format, packed + j));
    }
  }
  if (i == numel) return;
  typename Format::Storage tail[kGroup] = {};
  std::memcpy(tail, packed + i, static_cast<size_t>(numel - i) * sizeof(*packed));
  for (int64_t j = 0; j < kGroup; j += Lanes::kCount) {
    Lanes::store(weights + i + j, load(format, tail + j));
  }
}

template <class Noise>
void update_chunk(const Noise& noise, float minus_coefficient, float decay, int64_t numel,
                  float* weights) {
  for (int64_t i = 0; i < numel; i += kGroup) {
    Float z[4], w[4];
    noise.group(i, z);
    load_group(weights + i, w);
    for (int j = 0; j < 4; ++j) {
      Lanes::store(weights + i + j * Lanes::kCount,
                   updated(w[j], z[j], Float(minus_coefficient), Float(decay)));
    }
  }
}

template <class Format>
void pack_chunk(const float* weights, int64_t numel, const Output<Format>& packed) {
  for (int64_t i = 0; i < numel; i += kGroup) {
    Float w[4];
    load_group(weights + i, w);
    packed.group(i, numel - i, w);
  }
}

template <class Format>
void pack_chunk_stochastic(Format format, uint64_t key, const Chunk& chunk, const float* weights,
                           typename Format::Storage* packed) {
  if constexpr (Format::kDType == DType::kFloat32) {
    pack_chunk(weights, chunk.numel, Output<Format>(packed, false));
  } else {
    for (int64_t i = 0; i < chunk.numel; i += kGroup) {
      Word random[4];
      random_words(key, static_cast<uint64_t>(chunk.element + i) / 4, chunk.tensor_id,
                   Domain::kRounding, random, Lanes());
      to_memory_order(random);
      uint16_t group[kGroup];
      for (int j = 0; j < 4; ++j) {
        const int64_t at = j * Lanes::kCount;
        Lanes::store(group + at, pack_stochastic(format, Lanes::load(weights + i + at), random[j]));
      }
      const int64_t left = chunk.numel - i < kGroup ? chunk.numel - i : kGroup;
      std::memcpy(packed + i, group, static_cast<size_t>(left) * sizeof(*packed));
    }
  }
}

template <class Noise, class Format>
void perturb_chunk(const Noise& noise, float eps, const float* weights, int64_t numel,
                   const Output<Format>* plus, const Output<Format>* minus) {
  for (int64_t i = 0; i < numel; i += kGroup) {
    Float z[4], w[4], moved[4];
    noise.group(i, z);
    load_group(weights + i, w);
    if (plus != nullptr) {
      for (int j = 0; j < 4; ++j) moved[j] = perturbed(w[j], z[j], Float(eps));
      plus->group(i, numel - i, moved);
    }
    if (minus != nullptr) {
      for (int j = 0; j < 4; ++j) moved[j] = perturbed(w[j], z[j], Float(-eps));
      minus->group(i, numel - i, moved);
    }
  }
}

/// Calls f(chunk, position of its first element) for each chunk of [first, first + numel).
template <class Function>
void for_each_chunk(int64_t offset, uint32_t tensor_id, int64_t first, int64_t numel,
                    const Function& f) {
  for (int64_t i = first; i < first + numel;) {
    const int64_t element = offset + i;
    const int64_t room = kChunk - element % kChunk;
    const int64_t left = first + numel - i;
    const Chunk chunk{element, left < room ? left : room, tensor_id};
    f(chunk, i);
    i += chunk.numel;
  }
}

template <class Format>
void unpack_stored(Format format, const Stored& stored, int64_t numel, float* weights) {
  if constexpr (is_scaled(Format::kDType)) {
    unpack_groups(format, stored, numel, weights);
  } else {
    using Storage = typename Format::Storage;
    unpack_chunk(format, static_cast<const Storage*>(stored.elements), numel, weights);
  }
}

/// Rounds `weights` to `format` into `stored`.
template <class Format>
void round_chunk(Format format, Rounding rounding, uint64_t key, const Chunk& chunk, float* weights,
                 const Stored& stored, bool streamed) {
  if constexpr (is_scaled(Format::kDType)) {
    round_groups(format, rounding, key, chunk, weights, stored);
  } else {
    auto* const packed = static_cast<typename Format::Storage*>(stored.elements);
    if (rounding == Rounding::kNearest) {
      pack_chunk(weights, chunk.numel, Output<Format>(packed, streamed));
    } else {
      pack_chunk_stochastic(format, key, chunk, weights, packed);
    }
  }
}

/// Rounds `weights` into `stored`, and takes them back from there.
void write_back_chunk(const SlabArgs& args, Rounding rounding, uint64_t key, const Chunk& chunk,
                      float* weights, const Stored& stored) {
  with_storage(args.storage, args.low != nullptr, [&](auto format) {
    round_chunk(format, rounding, key, chunk, weights, stored, false);
    if (args.storage != DType::kFloat32) unpack_stored(format, stored, chunk.numel, weights);
  });
}

/// The rounding of a write-back that an update comes after; float32 is never rounded.
void round_before(const UpdatePerturbArgs& args, const Update& update, const Chunk& chunk,
                  float* weights) {
  if (update.round_first == RoundFirst::kNo || args.storage == DType::kFloat32) return;
  const bool nearest = update.round_first == RoundFirst::kNearest;
  alignas(64) uint16_t elements[kChunk];
  uint8_t scales[kChunk / kScaleGroup], low[kChunk];
  write_back_chunk(args, nearest ? Rounding::kNearest : Rounding::kStochastic, update.rounding_key,
                   chunk, weights, {elements, scales, low});
}

/// Where the chunk is stored that begins with element `at` of a slab.
Stored stored_at(void* elements, DType dtype, uint8_t* scales, uint8_t* low, int64_t at) {
  return {static_cast<char*>(elements) + at * size_of(dtype),
          scales == nullptr ? nullptr : scales + at / kScaleGroup,
          low == nullptr ? nullptr : low + at};
}

/// A pass over part of a segment: change(chunk, weights) after a chunk was unpacked, and
/// write(chunk, weights, output) at its end, where output(slab) is the chunk in a slab of results.
template <class Change, class Write>
void pass(const SlabArgs& args, const Segment& segment, int64_t first, int64_t numel, bool streamed,
          const Change& change, const Write& write) {
  alignas(64) float weights[kChunk];
  for_each_chunk(segment.offset, segment.tensor_id, first, numel, [&](Chunk chunk, int64_t i) {
    const int64_t at = segment.begin + i;
    const Stored stored = stored_at(args.stored, args.storage, args.scales, args.low, at);
    with_storage(args.storage, args.low != nullptr,
                 [&](auto format) { unpack_stored(format, stored, chunk.numel, weights); });
    change(chunk, weights);
    if (args.write_back) {
      write_back_chunk(args, args.rounding, args.rounding_key, chunk, weights, stored);
    }
    with_format(args.compute, [&](auto format) {
      using Out = Output<decltype(format)>;
      const auto output = [&](void* slab) {
        return Out(static_cast<typename Out::Storage*>(slab) + at, streamed && slab != args.stored);
      };
      if (args.plain != nullptr) pack_chunk(weights, chunk.numel, output(args.plain));
      write(chunk, weights, output);
    });
  });
}

void update_perturb(const UpdatePerturbArgs& args, const Segment& segment, int64_t first,
                    int64_t numel, bool streamed) {
  const Update* updates = args.updates == nullptr ? &args.only_update : args.updates;
  const auto change = [&](const Chunk& chunk, float* weights) {
    for (int64_t k = 0; k < args.num_updates; ++k) {
      const Update& update = updates[k];
      round_before(args, update, chunk, weights);
      with_noise(args.distribution, update.key, args.domain, chunk, [&](const auto& noise) {
        update_chunk(noise, -update.coefficient, segment.decays ? update.decay : 1.0f, chunk.numel,
                     weights);
      });
    }
  };
  const auto write = [&](const Chunk& chunk, const float* weights, const auto& output) {
    for (int k = 0; k < args.num_directions; ++k) {
      const Direction& direction = args.directions[k];
      if (direction.plus == nullptr && direction.minus == nullptr) continue;
      const auto plus = output(direction.plus), minus = output(direction.minus);
      with_noise(args.distribution, direction.key, args.domain, chunk, [&](const auto& noise) {
        perturb_chunk(noise, direction.eps, weights, chunk.numel,
                      direction.plus == nullptr ? nullptr : &plus,
                      direction.minus == nullptr ? nullptr : &minus);
      });
    }
  };
  pass(args, segment, first, numel, streamed, change, write);
}

void noise(const NoiseArgs& args, int64_t first, int64_t numel, bool streamed) {
  for_each_chunk(args.offset, args.tensor_id, first, numel, [&](Chunk chunk, int64_t at) {
    with_noise(args.distribution, args.key, args.domain, chunk, [&](const auto& noise) {
      with_format(args.dtype, [&](auto format) {
        using Out = Output<decltype(format)>;
        const Out out(static_cast<typename Out::Storage*>(args.out) + at, streamed);
        for (int64_t i = 0; i < chunk.numel; i += kGroup) {
          Float z[4];
          noise.group(i, z);
          out.group(i, chunk.numel - i, z);
        }
      });
    });
  });
}

void pack(const PackArgs& args, int64_t first, int64_t numel, bool streamed) {
  alignas(64) float weights[kChunk];
  for_each_chunk(args.offset, args.tensor_id, first, numel, [&](Chunk chunk, int64_t at) {
    unpack_chunk(Float32(), args.weights + at, chunk.numel, weights);
    const Stored stored = stored_at(args.packed, args.dtype, args.scales, args.low, at);
    with_storage(args.dtype, args.low != nullptr, [&](auto format) {
      round_chunk(format, args.rounding, args.key, chunk, weights, stored, streamed);
    });
  });
}

}  // namespace
}  // namespace zo2ext
