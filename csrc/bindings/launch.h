// launch.h -- run a kernel on the CPU, or queue it on a CUDA stream.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <functional>
#include <optional>

#include "../kernels.h"

namespace zo2ext::bindings {

/// Tell autograd that the tensor was written.
inline void mark_written(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

inline void mark_written(const std::optional<at::Tensor>& tensor) {
  if (tensor.has_value()) mark_written(*tensor);
}

/// Loop in torch's thread pool.
inline void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kGrain = 32768 / kShare;  // elements worth waking a thread for
  at::parallel_for(0, count, kGrain, body);
}

/// Run `operation` where `tensor` is. On a GPU it is queued on `stream` and not waited for.
#if defined(ZO2EXT_CUDA_CODES)
#define ZO2_LAUNCH(operation, tensor, args, stream)                                              \
  do {                                                                                           \
    if ((tensor).is_cpu()) {                                                                     \
      zo2ext::operation##_cpu(args, parallel_for);                                               \
    } else {                                                                                     \
      const char* error = zo2ext::operation##_cuda(args, reinterpret_cast<void*>(stream));       \
      TORCH_CHECK(error == nullptr, "CUDA error in " #operation " on ", (tensor).device(), ": ", \
                  error);                                                                        \
    }                                                                                            \
  } while (false)
#else
#define ZO2_LAUNCH(operation, tensor, args, stream) \
  static_cast<void>(stream);                        \
  zo2ext::operation##_cpu(args, parallel_for)
#endif

}  // namespace zo2ext::bindings
