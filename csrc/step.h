// step.h -- the arithmetic of one element: a pending update, a perturbation.
#pragma once

#include "simd.h"

namespace zo2ext {

/// w <- w * decay - coefficient * z. `minus_coefficient` and `decay` are splat to the lanes.
template <class Float>
ZO2_HOST_DEVICE Float updated(Float w, Float z, Float minus_coefficient, Float decay) {
  return fused(minus_coefficient, z, w * decay);
}

/// w + eps * z; the other side of the dual forward takes -eps.
template <class Float>
ZO2_HOST_DEVICE Float perturbed(Float w, Float z, Float eps) {
  return fused(eps, z, w);
}

}  // namespace zo2ext
