// runtime.cpp -- stands in for the CUDA runtime in programs that nvcc 12 or 13 compiled: what they
// launch is looked up by its name, and its translation runs on this CPU.
//
// The environment chooses:
//   PTX_ARCHITECTURE=75   whose PTX runs
//   PTX_RANDOM=1          what the PTX ISA leaves open is chosen at random: which NaN arithmetic
//                         makes, and estimates of 1 / sqrt(x); blocks run backwards
//   PTX_MUTANT=n          a deliberate fault of mutants.py runs
//
// A program that looked for GPUs fails if one of the kernels was never launched.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

#include "grid.h"

namespace {

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
Configuration configuration;  // of the launch that the program is about to make
cudaError_t last_error = cudaSuccess;

uint32_t setting(const char* name, uint32_t otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : static_cast<uint32_t>(std::strtoul(value, nullptr, 10));
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle = binary;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  const auto name = names().find(host);
  if (name == names().end()) return last_error = cudaErrorInvalidDeviceFunction;
  ptx::Entry* const entry = ptx::find_entry(name->second);
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (entry == nullptr || !flat || shared != 0) {
    std::fprintf(stderr, "ptx: cannot launch %s\n", name->second.c_str());
    std::_Exit(1);
  }
  const char* const wrong = ptx::run_grid(*entry, grid.x, block.x, arguments);
  return last_error = wrong == nullptr ? cudaSuccess : cudaErrorInvalidConfiguration;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared,
                          stream);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in for CUDA"; }
cudaError_t cudaGetDeviceCount(int* count) {
  ptx::Machine& m = ptx::machine();
  m.architecture = setting("PTX_ARCHITECTURE", 80);
  const uint32_t mutant = setting("PTX_MUTANT", 0);
  if (mutant != 0) ptx::choose_mutant(static_cast<int>(mutant));
  m.random_choices = setting("PTX_RANDOM", 0) != 0;
  std::atexit([] {
    if (ptx::all_launched()) return;
    std::fflush(nullptr);
    std::_Exit(1);
  });
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  // Aligned as cudaMalloc aligns, and each an allocation of its own, exact to the byte.
  auto* const begin = static_cast<uint8_t*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  auto* const threads = static_cast<uint32_t*>(std::malloc(2 * bytes * sizeof(uint32_t)));
  if (begin == nullptr || threads == nullptr) return cudaErrorMemoryAllocation;
  ptx::machine().allocations[begin + bytes] = {begin, begin + bytes, threads, threads + bytes};
  *memory = begin;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  auto& all = ptx::machine().allocations;
  const auto found = all.upper_bound(static_cast<uint8_t*>(memory));
  if (found == all.end() || found->second.begin != memory) return cudaErrorInvalidValue;
  std::free(found->second.writers);
  all.erase(found);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

}  // extern "C"
