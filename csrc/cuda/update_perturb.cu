// update_perturb.cu -- the launchers of kernels.h on a GPU.
#include <cuda_runtime.h>

#include "dispatch.h"

namespace zo2ext {
namespace {

template <class Body, class Grid>
__global__ void __launch_bounds__(kThreads, Body::kMinBlocks)
    run_threads(const __grid_constant__ Grid grid) {
  Body::thread(grid, {blockIdx.x, threadIdx.x, blockDim.x});
}

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

/// Launches the body of a plan.
struct Launch {
  cudaStream_t stream;

  template <class Body, class Grid>
  void operator()(Body, const Grid& grid, int64_t numel) const {
    const uint32_t count = blocks(numel, grid.division);
    run_threads<Body><<<count, kThreads, 0, stream>>>(grid);
  }
};

}  // namespace

const char* update_perturb_cuda(const UpdatePerturbArgs& args, void* stream) {
  if (args.numel == 0) return nullptr;  // an empty grid would be an error
  dispatch_update_perturb(args, Launch{static_cast<cudaStream_t>(stream)});
  return text_of(cudaGetLastError());
}

const char* fold_cuda(const FoldArgs& args, void* stream) {
  if (args.numel == 0) return nullptr;
  dispatch_fold(args, Launch{static_cast<cudaStream_t>(stream)});
  return text_of(cudaGetLastError());
}

void clear_error_cuda() { static_cast<void>(cudaGetLastError()); }

const char* noise_cuda(const NoiseArgs& args, void* stream) {
  if (args.numel == 0) return nullptr;
  dispatch_noise(args, Launch{static_cast<cudaStream_t>(stream)});
  return text_of(cudaGetLastError());
}

const char* pack_cuda(const PackArgs& args, void* stream) {
  if (args.numel == 0) return nullptr;
  if (args.dtype == DType::kFloat32) {
    const size_t bytes = static_cast<size_t>(args.numel) * sizeof(float);
    return text_of(cudaMemcpyAsync(args.packed, args.weights, bytes, cudaMemcpyDeviceToDevice,
                                   static_cast<cudaStream_t>(stream)));
  }
  dispatch_pack(args, Launch{static_cast<cudaStream_t>(stream)});
  return text_of(cudaGetLastError());
}

}  // namespace zo2ext
