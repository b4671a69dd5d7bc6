// fold_chunks.h -- the fold on a chunk: factors multiplied out onto its weights, row by row.
//
// Compiled once for each instruction set, as chunk_kernels.h.
#pragma once

#include "chunk_kernels.h"

namespace zo2ext {
namespace {

/// One rank of one direction, as a piece of a row sees it.
struct Term {
  float left;          // of the row
  const float* right;  // of the piece's first column on
};

/// Terms that one pass over a piece adds.
constexpr int kTerms = 32;

/// Adds terms in their order to weights from `i` on, as long as so many vectors are left. Returns
/// where it ends.
template <int kVectors>
int64_t add_terms(const Term* terms, int count, int64_t i, int64_t numel, float* weights) {
  constexpr int64_t kStep = kVectors * Lanes::kCount;
  for (; i + kStep <= numel; i += kStep) {
    Float w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = Lanes::load(weights + i + v * Lanes::kCount);
    for (int t = 0; t < count; ++t) {
      const Float left(terms[t].left);
      for (int v = 0; v < kVectors; ++v) {
        w[v] = fused(left, Lanes::load(terms[t].right + i + v * Lanes::kCount), w[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) Lanes::store(weights + i + v * Lanes::kCount, w[v]);
  }
  return i;
}

void add_terms(const Term* terms, int count, int64_t numel, float* weights) {
  int64_t i = add_terms<4>(terms, count, 0, numel, weights);
  i = add_terms<1>(terms, count, i, numel, weights);
  for (; i < numel; ++i) {
    for (int t = 0; t < count; ++t)
      weights[i] = fused(terms[t].left, terms[t].right[i], weights[i]);
  }
}

/// All directions, row by row.
void add_directions(const FoldArgs& args, const FoldSegment& segment, const Chunk& chunk,
                    float* weights) {
  const int64_t rows = segment.rows, columns = segment.columns;
  Term terms[kTerms];
  for (int64_t i = 0, numel = 0; i < chunk.numel; i += numel) {
    const int64_t line = (chunk.element + i) / columns, column = (chunk.element + i) % columns;
    const int64_t matrix = line / rows, row = line % rows;
    const int64_t left_at = segment.left_begin + matrix * args.rank * rows + row;
    const int64_t right_at = segment.right_begin + matrix * args.rank * columns + column;
    numel = columns - column < chunk.numel - i ? columns - column : chunk.numel - i;
    int held = 0;
    for (int64_t k = 0; k < args.num_directions; ++k) {
      for (int64_t q = 0; q < args.rank; ++q) {
        terms[held++] = {args.left[k * args.left_numel + left_at + q * rows],
                         args.right + k * args.right_numel + right_at + q * columns};
        if (held < kTerms) continue;
        add_terms(terms, held, numel, weights + i);
        held = 0;
      }
    }
    add_terms(terms, held, numel, weights + i);
  }
}

void fold(const FoldArgs& args, const FoldSegment& segment, int64_t first, int64_t numel,
          bool streamed) {
  const auto change = [&](const Chunk& chunk, float* weights) {
    const Float decay(segment.decays ? args.decay : 1.0f);
    for (int64_t i = 0; i < chunk.numel; i += Lanes::kCount) {
      Lanes::store(weights + i, Lanes::load(weights + i) * decay);
    }
    add_directions(args, segment, chunk, weights);
  };
  pass(args, segment, first, numel, streamed, change, [](auto&&...) {});
}

}  // namespace
}  // namespace zo2ext
