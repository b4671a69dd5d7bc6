// plain.cpp -- the kernels for any processor.
#include <cstring>

#include "simd_plain.h"

namespace zo2ext {
using Lanes = PlainLanes;
}  // namespace zo2ext

#include "fold_chunks.h"

namespace zo2ext {
const Variant kPlain{"plain", update_perturb, fold, noise, pack};
}  // namespace zo2ext
