// cuda_check.cu -- a GPU gives the bits that the CPU gives.
//
//   cuda_check         all of it: about 2^34 elements
//   cuda_check small   all but the rounding of every float32, and fewer launches: for
//                      compute-sanitizer, and for csrc/tests/ptx
//
// Every radius that noise can have, every float32 rounded to every smaller format in both ways,
// every 16-bit number unpacked and every byte under every scale, and the launches of cuda_cases.h,
// fold_cases.h and sensitive_cases.h. Exits with 77 where there is no GPU.
#include <cuda_runtime.h>

#include <cstdlib>

#include "cuda_cases.h"
#include "fold_cases.h"
#include "sensitive_cases.h"

using namespace zo2ext;

namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void require(const char* error, const char* what) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s: %s\n", what, error);
  std::exit(1);
}

/// A copy of host memory on the GPU.
class Mirror {
 public:
  Mirror(const void* host, size_t bytes) : bytes_(bytes) {
    require(cudaMalloc(&device_, bytes), "cudaMalloc");
    require(cudaMemcpy(device_, host, bytes, cudaMemcpyHostToDevice), "copy to the GPU");
  }
  ~Mirror() { cudaFree(device_); }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  char* data() const { return static_cast<char*>(device_); }
  void copy_to(void* host) const {
    require(cudaMemcpy(host, device_, bytes_, cudaMemcpyDeviceToHost), "copy from the GPU");
  }

 private:
  void* device_ = nullptr;
  size_t bytes_;
};

/// Runs launches on copies of their memory, on a stream of its own.
class Gpu {
 public:
  Gpu() { require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  ~Gpu() { cudaStreamDestroy(stream_); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  void update_perturb(UpdatePerturbArgs args, const Memories& memories) {
    const auto segments = rows_on_gpu(args.segments, args.num_segments);
    const auto updates = rows_on_gpu(args.updates, args.num_updates);
    run(memories, [&](auto on_gpu) {
      slab_on_gpu(args, on_gpu);
      for (Direction& direction : args.directions) {
        direction.plus = on_gpu(direction.plus);
        direction.minus = on_gpu(direction.minus);
      }
      require(update_perturb_cuda(args, stream_), "update_perturb");
    });
  }

  void fold(FoldArgs args, const Memories& memories) {
    const auto segments = rows_on_gpu(args.segments, args.num_segments);
    run(memories, [&](auto on_gpu) {
      slab_on_gpu(args, on_gpu);
      args.left = static_cast<const float*>(on_gpu(const_cast<float*>(args.left)));
      args.right = static_cast<const float*>(on_gpu(const_cast<float*>(args.right)));
      require(fold_cuda(args, stream_), "fold");
    });
  }

  void noise(NoiseArgs args, const Memories& memories) {
    run(memories, [&](auto on_gpu) {
      args.out = on_gpu(args.out);
      require(noise_cuda(args, stream_), "noise");
    });
  }

  void pack(PackArgs args, const Memories& memories) {
    run(memories, [&](auto on_gpu) {
      args.weights = static_cast<const float*>(on_gpu(const_cast<float*>(args.weights)));
      args.packed = on_gpu(args.packed);
      args.scales = static_cast<uint8_t*>(on_gpu(args.scales));
      args.low = static_cast<uint8_t*>(on_gpu(args.low));
      require(pack_cuda(args, stream_), "pack");
    });
  }

 private:
  /// A copy of a table, to which its pointer then points; null: there is none.
  template <class Row>
  static std::unique_ptr<Mirror> rows_on_gpu(const Row*& rows, int64_t count) {
    if (rows == nullptr) return nullptr;
    auto copy = std::make_unique<Mirror>(rows, static_cast<size_t>(count) * sizeof(Row));
    rows = reinterpret_cast<const Row*>(copy->data());
    return copy;
  }

  template <class OnGpu>
  static void slab_on_gpu(SlabArgs& args, const OnGpu& on_gpu) {
    args.stored = on_gpu(args.stored);
    args.scales = static_cast<uint8_t*>(on_gpu(args.scales));
    args.low = static_cast<uint8_t*>(on_gpu(args.low));
    args.plain = on_gpu(args.plain);
  }

  template <class Launch>
  void run(const Memories& memories, const Launch& launch) {
    std::vector<std::unique_ptr<Mirror>> mirrors;
    const bool exact = launches_++ % 2 == 0;
    for (Memory* memory : memories) {
      // Every other launch is on memory that ends with the slab, so that a tool sees accesses
      // beyond it; the rest show what was written there.
      const size_t size = exact ? static_cast<size_t>(memory->end()) : memory->bytes().size();
      mirrors.push_back(std::make_unique<Mirror>(memory->bytes().data(), size));
    }
    require(cudaDeviceSynchronize(), "copies");  // the stream does not wait for them
    launch([&](void* pointer) -> void* {
      for (size_t i = 0; i < memories.size(); ++i) {
        if (memories[i]->data() == pointer) return mirrors[i]->data() + memories[i]->begin();
      }
      return nullptr;
    });
    require(cudaStreamSynchronize(stream_), "launch");
    for (size_t i = 0; i < memories.size(); ++i) mirrors[i]->copy_to(memories[i]->bytes().data());
  }

  cudaStream_t stream_;
  int launches_ = 0;
};

constexpr uint32_t kRadii = 1u << 23;

__global__ void all_radii(float* squared, float* radius) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  squared[i] = squared_radius(i << 9);
  radius[i] = square_root(squared[i]);
}

int check_radii() {
  std::vector<float> squared(kRadii), radius(kRadii);
  const Mirror squared_mirror(squared.data(), kRadii * sizeof(float));
  const Mirror radius_mirror(radius.data(), kRadii * sizeof(float));
  all_radii<<<kRadii / 256, 256>>>(reinterpret_cast<float*>(squared_mirror.data()),
                                   reinterpret_cast<float*>(radius_mirror.data()));
  require(cudaGetLastError(), "all_radii");
  squared_mirror.copy_to(squared.data());
  radius_mirror.copy_to(radius.data());
  int wrong = 0;
  for (uint32_t i = 0; i < kRadii; ++i) {
    const float expected = squared_radius(i << 9);
    wrong += to_bits(squared[i]) != to_bits(expected);
    wrong += to_bits(radius[i]) != to_bits(square_root(expected));
  }
  std::printf("radii: %u, %d wrong\n", kRadii, wrong);
  return wrong;
}

/// A format smaller than float32.
struct Small {
  DType dtype;
  bool split;
};
constexpr Small kSmall[] = {{DType::kBFloat16, false},
                            {DType::kFloat16, false},
                            {DType::kFloat8E4M3, false},
                            {DType::kFloat8E4M3, true}};

uint8_t* bytes_of(Memory& memory, bool wanted) {
  return wanted ? reinterpret_cast<uint8_t*>(memory.data()) : nullptr;
}

int check_every_pack(Gpu& gpu) {
  constexpr int64_t kChunk = 1 << 26;
  int wrong = 0;
  Memory weights(DType::kFloat32, kChunk);
  for (const auto& [dtype, split] : kSmall) {
    const bool scaled = is_scaled(dtype);
    for (Rounding rounding : kRoundings) {
      for (int64_t first = 0; first < int64_t{1} << 32; first += kChunk) {
        for (int64_t i = 0; i < kChunk; ++i) {
          const uint32_t bits = static_cast<uint32_t>(first + i);
          std::memcpy(weights.data() + 4 * i, &bits, 4);
        }
        Memory packed(dtype, kChunk), expected(dtype, kChunk);
        Memory scales(dtype, kChunk / kScaleGroup), expected_scales(dtype, kChunk / kScaleGroup);
        Memory low(dtype, split ? kChunk : 0), expected_low(dtype, split ? kChunk : 0);
        PackArgs args{reinterpret_cast<const float*>(weights.data()),
                      expected.data(),
                      dtype,
                      kChunk,
                      first,
                      rounding,
                      99,
                      1,
                      bytes_of(expected_scales, scaled),
                      bytes_of(expected_low, split)};
        pack_cpu(args, parallel_for);
        args.packed = packed.data();
        args.scales = bytes_of(scales, scaled);
        args.low = bytes_of(low, split);
        gpu.pack(args, {&weights, &packed, &scales, &low});
        wrong += !(packed == expected && scales == expected_scales && low == expected_low);
      }
    }
  }
  std::printf("every float32 packed: %d chunks of 2^26 wrong\n", wrong);
  return wrong;
}

/// Every number of 16 bits; of the split format every two bytes, under scales of every kind; of 8
/// bits every byte under every scale.
int check_every_unpack(Gpu& gpu) {
  constexpr int64_t kAll = 1 << 16;
  int wrong = 0;
  for (const auto& [dtype, split] : kSmall) {
    const bool scaled = is_scaled(dtype);
    Memory packed(dtype, kAll), scales(dtype, kAll / kScaleGroup), low(dtype, kAll);
    Memory weights(DType::kFloat32, kAll), expected(DType::kFloat32, kAll);
    for (int64_t i = 0; i < kAll; ++i) {
      std::memcpy(packed.data() + size_of(dtype) * i, &i, static_cast<size_t>(size_of(dtype)));
      low.data()[i] = static_cast<char>(i >> 8);
      if (i < kAll / kScaleGroup) scales.data()[i] = static_cast<char>(i / 8);
    }
    UpdatePerturbArgs args{};
    args.stored = packed.data();
    args.scales = bytes_of(scales, scaled);
    args.low = bytes_of(low, split);
    args.storage = dtype;
    args.compute = DType::kFloat32;
    args.numel = kAll;
    args.num_segments = 1;
    args.only_segment = {0, kAll, 0, 0, 0};
    args.plain = expected.data();
    update_perturb_cpu(args, parallel_for);
    args.plain = weights.data();
    gpu.update_perturb(args, {&packed, &scales, &low, &weights});
    weights.unify_nan();
    expected.unify_nan();
    wrong += !(weights == expected);
  }
  std::printf("every packed number unpacked: %d formats wrong\n", wrong);
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::strcmp(argv[1], "small") == 0;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU\n");
    return 77;
  }
  Gpu gpu;
  int wrong = check_cases(small ? 400 : 3000, small ? 100 : 600, gpu);
  wrong += check_fold_cases(small ? 300 : 1500, gpu);
  std::printf("random launches: %d wrong\n", wrong);
  const int sensitive = check_sensitive_cases(small ? 1 << 16 : 1 << 20, gpu);
  std::printf("launches that show the last bit of z: %d wrong\n", sensitive);
  wrong += sensitive + check_radii() + check_every_unpack(gpu);
  if (!small) wrong += check_every_pack(gpu);
  return wrong != 0;
}
