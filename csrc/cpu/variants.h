// variants.h -- what each instruction set provides. All variants give the same bits.
#pragma once

#include "../kernels.h"

namespace zo2ext {

/// Serial work on elements [first, first + numel) of a tensor; `first` is a multiple of 128.
/// `streamed`: results are too many to stay in a cache until they are read.
struct Variant {
  const char* name;
  void (*update_perturb)(const UpdatePerturbArgs& args, const Segment& segment, int64_t first,
                         int64_t numel, bool streamed);
  void (*fold)(const FoldArgs& args, const FoldSegment& segment, int64_t first, int64_t numel,
               bool streamed);
  void (*noise)(const NoiseArgs& args, int64_t first, int64_t numel, bool streamed);
  void (*pack)(const PackArgs& args, int64_t first, int64_t numel, bool streamed);
};

extern const Variant kPlain;
#if defined(__x86_64__)
extern const Variant kAvx2;    // with FMA and F16C
extern const Variant kAvx512;  // F, BW, DQ, VL
#endif

}  // namespace zo2ext
