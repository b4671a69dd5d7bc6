// plain.cpp -- the kernels for any processor.
#include <cstring>

#include "simd_plain.h"

namespace zo2ext {
using Lanes = PlainLanes;
}  // namespace zo2ext

#include "chunk_kernels.h"

namespace zo2ext {
const Variant kPlain{"plain", update_perturb, noise, pack};
}  // namespace zo2ext
