// kernels.h -- the kernels: pointers, segment tables, sizes, a stream. No torch here.
#pragma once

#include <cstdint>
#include <functional>

#include "formats.h"
#include "noise.h"

namespace zo2ext {

/// One tensor, or a slice of one, in a slab. A row of the table that Python packs.
struct Segment {
  int64_t begin;       // its first element in the slab; a multiple of 128
  int64_t numel;       // elements
  int64_t offset;      // index of its first element within the tensor; a multiple of 4, and of
                       // 32 where elements share scales
  uint32_t tensor_id;  // position in named_parameters(), tied weights counted once
  uint32_t decays;     // 1: weight decay applies, 0: it does not
};
static_assert(sizeof(Segment) == 32, "four int64 per row");

/// Whether weights are rounded to storage before an update, and how.
enum class RoundFirst : int32_t { kNo = 0, kNearest = 1, kStochastic = 2 };

/// A pending update: w <- fma(-coefficient, z, w * decay), decay being 1 where a segment does not
/// decay. A write-back that fell due before it has rounded the weights, wherever they were: so they
/// are rounded here. A row of the table that Python packs.
struct Update {
  uint64_t key;
  float coefficient;          // lr * projected_grad / directions
  float decay;                // 1 - lr * weight_decay
  uint64_t rounding_key = 0;  // of stochastic rounding
  RoundFirst round_first = RoundFirst::kNo;
  uint32_t unused = 0;
};
static_assert(sizeof(Update) == 32, "four int64 per row");

/// One direction to perturb along, and the slabs that receive w + eps z and w - eps z.
struct Direction {
  uint64_t key;
  float eps;
  void* plus;   // compute dtype, laid out as the slab; null: not wanted
  void* minus;  // the same
};

constexpr int kMaxDirections = 8;  // of one launch

/// A slab, and what every pass over it does: unpack to float32, change the weights, round and write
/// back where requested (continuing from the rounded value), then write the plain weights, rounded
/// to nearest. Elements outside the segments are neither read nor written. Segments are sorted by
/// `begin` and do not overlap. Pointers are aligned to their element, no more. One output may be
/// `stored` itself where the dtypes match and nothing is written back; apart from that no memory
/// overlaps. On CUDA tables are device memory.
///
/// Dtypes of 8 bits are for storage only. Elements 32 i to 32 i + 31 of the slab share scales[i].
/// In the split format `stored` has the top bytes and `low` the others; without `low` the top bytes
/// are weights in e4m3.
struct SlabArgs {
  void* stored;     // [numel] storage dtype
  uint8_t* scales;  // [(numel + 31) / 32]; null: the storage dtype has none
  uint8_t* low;     // [numel]; null: not the split format
  DType storage;
  DType compute;
  int64_t numel;  // of the slab: no segment reaches beyond it
  bool write_back;
  Rounding rounding;      // of the write-back
  uint64_t rounding_key;  // of stochastic rounding
  void* plain;            // [numel] compute dtype: changed, unperturbed; null: not wanted
};

/// A pass that applies the updates in order, and at its end writes the perturbed weights, rounded
/// to nearest.
struct UpdatePerturbArgs : SlabArgs {
  const Segment* segments;  // [num_segments]; null: the slab is `only_segment`
  int64_t num_segments;
  Segment only_segment;
  const Update* updates;  // [num_updates]; null with num_updates == 1: `only_update`
  int64_t num_updates;
  Update only_update;
  Distribution distribution;
  Direction directions[kMaxDirections];
  int num_directions;
  Domain domain = Domain::kDirection;  // of the noise of updates and directions
};

/// A tensor in factors, or a slice of one, in a slab: matrices of rows x columns, one behind the
/// other. A row of the table that Python packs.
struct FoldSegment : Segment {
  int64_t rows, columns;            // of each matrix; below 2^31
  int64_t left_begin, right_begin;  // where the tensor's factors begin among those of a direction
};
static_assert(sizeof(FoldSegment) == 64, "eight int64 per row");

/// A pass that adds directions which are held as factors. In each, a tensor has U as
/// [matrices, rank, rows] and V as [matrices, rank, columns], and the weight in row i and column j
/// of matrix s becomes w * decay (where its segment decays) and then, direction by direction and
/// rank by rank, fma(U[s, q, i], V[s, q, j], w).
struct FoldArgs : SlabArgs {
  const FoldSegment* segments;  // [num_segments]
  int64_t num_segments;
  const float* left;   // [num_directions, left_numel]
  const float* right;  // [num_directions, right_numel]
  int64_t left_numel;
  int64_t right_numel;
  int64_t num_directions;
  int64_t rank;
  float decay;
};

/// A direction itself: `numel` elements of tensor `tensor_id` from element `offset` on.
struct NoiseArgs {
  void* out;  // [numel]
  DType dtype;
  int64_t numel;
  int64_t offset;  // a multiple of 4
  uint64_t key;
  uint32_t tensor_id;
  Distribution distribution;
  Domain domain = Domain::kDirection;
};

/// float32 weights rounded to another dtype.
struct PackArgs {
  const float* weights;  // [numel]
  void* packed;          // [numel]
  DType dtype;
  int64_t numel;
  int64_t offset;  // as of a segment
  Rounding rounding;
  uint64_t key;  // of stochastic rounding
  uint32_t tensor_id;
  uint8_t* scales = nullptr;  // as in UpdatePerturbArgs
  uint8_t* low = nullptr;
};

/// How the caller runs a parallel loop: body(begin, end) on disjoint ranges that cover [0, count).
using ParallelFor = void (*)(int64_t count, const std::function<void(int64_t, int64_t)>& body);

/// Elements a loop step stands for: the unit in which work is shared out to threads.
constexpr int64_t kShare = 2048;

void update_perturb_cpu(const UpdatePerturbArgs& args, ParallelFor parallel_for);
void fold_cpu(const FoldArgs& args, ParallelFor parallel_for);
void noise_cpu(const NoiseArgs& args, ParallelFor parallel_for);
void pack_cpu(const PackArgs& args, ParallelFor parallel_for);

/// The same on the current CUDA device, queued on `stream` (a cudaStream_t) and not waited for; the
/// caller keeps the memory alive until the stream is past. Null, or what went wrong.
const char* update_perturb_cuda(const UpdatePerturbArgs& args, void* stream);
const char* fold_cuda(const FoldArgs& args, void* stream);
const char* noise_cuda(const NoiseArgs& args, void* stream);
const char* pack_cuda(const PackArgs& args, void* stream);

/// Forgets the error of this thread's last call of the CUDA runtime.
void clear_error_cuda();

/// Instruction sets: names of those compiled in that this machine runs, fastest last; the one in
/// use; and a way to force one. All give the same bits. Returns false for an unknown name.
int num_simd_variants();
const char* simd_variant_name(int i);
const char* current_simd_variant();
bool set_simd_variant(const char* name);

}  // namespace zo2ext
