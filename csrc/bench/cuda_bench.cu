// cuda_bench.cu -- CUDA kernels beside a copy on the same GPU, measured in the same run.
//
//   cuda_bench [elements, default 2^28] [runs of each, default 31]
//
// One line a case: median and fastest time, elements a second, bytes moved a second, and those as a
// share of the rate at which the device copies memory, reading and writing counted. Times are
// between two events around one launch; before each launch something else is written, more than any
// cache holds. The passes find their segments and their update in tables, as in training.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../kernels.h"
#include "../scaled_formats.h"

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

void* allocate(size_t bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, bytes), "cudaMalloc");
  require(cudaMemset(memory, 0, bytes), "cudaMemset");
  return memory;
}

template <class Row>
const Row* on_gpu(const std::vector<Row>& rows) {
  void* const table = allocate(rows.size() * sizeof(Row));
  require(cudaMemcpy(table, rows.data(), rows.size() * sizeof(Row), cudaMemcpyHostToDevice),
          "copy");
  return static_cast<const Row*>(table);
}

class Bench {
 public:
  Bench(int64_t numel, int runs) : numel_(numel), runs_(runs) {
    require(cudaStreamCreate(&stream_), "stream");
    require(cudaEventCreate(&begin_), "event");
    require(cudaEventCreate(&end_), "event");
    for (void*& slab : slabs_) slab = allocate(static_cast<size_t>(numel) * 4);
    scales_ = static_cast<uint8_t*>(allocate(static_cast<size_t>(numel + 31) / 32));
    low_ = static_cast<uint8_t*>(allocate(static_cast<size_t>(numel)));
    scrubbed_ = allocate(kScrubbed);
    one_ = {on_gpu(std::vector<Segment>{{0, numel, 0, 7, 1}}), 1, numel};
    blocks_ = decoder_blocks(4096);
    small_ = decoder_blocks(64);
    update_ = on_gpu(std::vector<Update>{{1, 1e-6f, 1.0f}});
    std::printf("%-46s %6s %9s %9s %8s %8s %8s\n", "case", "B/elem", "median us", "min us", "G/s",
                "GB/s", "of copy");
  }

  /// Rates count the bytes read and written.
  void copy() {
    const size_t bytes = static_cast<size_t>(numel_) * 4;
    const double rate = measure("copy, device to device", 8, numel_, [&] {
      require(cudaMemcpyAsync(slabs_[0], slabs_[1], bytes, cudaMemcpyDeviceToDevice, stream_),
              "copy");
    });
    copy_rate_ = std::max(copy_rate_, rate);
  }

  enum class Table { kOne, kBlocks, kSmallBlocks };

  /// One update, written back, and both perturbed slabs.
  void pass(DType storage, DType compute, Distribution distribution, Rounding rounding,
            Table table = Table::kOne) {
    UpdatePerturbArgs args = slab_args(storage, compute, distribution, table);
    args.updates = update_;
    args.num_updates = 1;
    args.write_back = true;
    args.rounding = rounding;
    args.rounding_key = 3;
    args.directions[0] = {2, 1e-3f, slabs_[1], slabs_[2]};
    args.num_directions = 1;
    static const char* const kTables[] = {"", ", decoder blocks", ", tiny decoder blocks"};
    run("pass" + names(args) + (rounding == Rounding::kStochastic ? ", stochastic" : "") +
            kTables[static_cast<int>(table)],
        2 * size_of(storage) + 2 * size_of(compute), args, segments_of(table).numel);
  }

  /// The same in storage of 8 bits, perturbed in bfloat16; `planes` 2: with a low plane. Without
  /// write-back, a step between two of the split format.
  void scaled_pass(DType storage, int planes, Distribution distribution, Rounding rounding,
                   bool write_back = true) {
    UpdatePerturbArgs args = slab_args(storage, DType::kBFloat16, distribution, Table::kOne);
    args.scales = scales_;
    if (planes == 2) args.low = low_;
    args.updates = update_;
    args.num_updates = 1;
    args.write_back = write_back;
    args.rounding = rounding;
    args.rounding_key = 3;
    args.directions[0] = {2, 1e-3f, slabs_[1], slabs_[2]};
    args.num_directions = 1;
    const double stored = planes + 1.0 / kScaleGroup;
    run("pass" + names(args) + (planes == 2 ? ", split" : "") +
            (!write_back                         ? ", not written back"
             : rounding == Rounding::kStochastic ? ", stochastic"
                                                 : ""),
        (write_back ? 2 : 1) * stored + 4, args, numel_);
  }

  /// As in the first step: no update yet.
  void perturb_both(DType dtype, Distribution distribution) {
    UpdatePerturbArgs args = slab_args(dtype, dtype, distribution, Table::kOne);
    args.directions[0] = {2, 1e-3f, slabs_[1], slabs_[2]};
    args.num_directions = 1;
    run("perturb both ways" + names(args), 3 * size_of(dtype), args, numel_);
  }

  void perturb_in_place(DType dtype, Distribution distribution) {
    UpdatePerturbArgs args = slab_args(dtype, dtype, distribution, Table::kOne);
    args.directions[0] = {2, 0.0f, slabs_[0], nullptr};
    args.num_directions = 1;
    run("perturb_" + names(args), 2 * size_of(dtype), args, numel_);
  }

  void update(DType dtype, Distribution distribution, Rounding rounding) {
    UpdatePerturbArgs args = slab_args(dtype, dtype, distribution, Table::kOne);
    args.updates = update_;
    args.num_updates = 1;
    args.write_back = true;
    args.rounding = rounding;
    run("update_" + names(args) + (rounding == Rounding::kStochastic ? ", stochastic" : ""),
        2 * size_of(dtype), args, numel_);
  }

  /// One direction of rank 4 added to rows of 4096, written back.
  void fold(DType storage, int planes, Rounding rounding) {
    constexpr int64_t kColumns = 4096, kRank = 4;
    const int64_t rows = (numel_ + kColumns - 1) / kColumns;
    FoldArgs args{};
    args.stored = slabs_[0];
    args.storage = args.compute = storage;
    if (is_scaled(storage)) args.compute = DType::kBFloat16, args.scales = scales_;
    if (planes == 2) args.low = low_;
    args.numel = numel_;
    args.segments = on_gpu(std::vector<FoldSegment>{{{0, numel_, 0, 7, 1}, rows, kColumns, 0, 0}});
    args.num_segments = 1;
    args.left = static_cast<const float*>(slabs_[1]);
    args.right = static_cast<const float*>(slabs_[2]);
    args.left_numel = kRank * rows;
    args.right_numel = kRank * kColumns;
    args.num_directions = 1;
    args.rank = kRank;
    args.decay = 1.0f;
    args.write_back = true;
    args.rounding = rounding;
    args.rounding_key = 3;
    const double stored =
        is_scaled(storage) ? planes + 1.0 / kScaleGroup : static_cast<double>(size_of(storage));
    measure("fold, " + name(storage) + (planes == 2 ? ", split" : "") +
                (rounding == Rounding::kStochastic ? ", stochastic" : ""),
            2 * stored, numel_, [&] { require(fold_cuda(args, stream_), "fold"); });
  }

  void noise(DType dtype, Distribution distribution) {
    const NoiseArgs args{slabs_[1], dtype, numel_, 0, 1, 7, distribution};
    measure(name(distribution) + ", " + name(dtype), size_of(dtype), numel_,
            [&] { require(noise_cuda(args, stream_), "noise"); });
  }

  void pack(DType dtype, Rounding rounding) {
    const PackArgs args{
        static_cast<const float*>(slabs_[0]), slabs_[1], dtype, numel_, 0, rounding, 3, 7, scales_};
    measure("pack to " + name(dtype) +
                (rounding == Rounding::kStochastic ? ", stochastic" : ", nearest"),
            4 + size_of(dtype), numel_, [&] { require(pack_cuda(args, stream_), "pack"); });
  }

 private:
  static constexpr size_t kScrubbed = size_t{1} << 29;

  static std::string name(DType dtype) {
    static const char* const kNames[] = {"float32", "bfloat16", "float16", "e4m3"};
    return kNames[static_cast<int>(dtype)];
  }

  static std::string name(Distribution distribution) {
    return distribution == Distribution::kGaussian ? "normal" : "rademacher";
  }

  static std::string names(const UpdatePerturbArgs& args) {
    std::string dtypes = ", " + name(args.storage);
    if (args.compute != args.storage) dtypes += " to " + name(args.compute);
    return dtypes + ", " + name(args.distribution);
  }

  struct Segments {
    const Segment* rows;
    int64_t count;
    int64_t numel;  // without the gaps between them
  };

  /// Decoder blocks of this width: 4 square matrices, 2 of four times the size, and vectors. The
  /// last is cut off where the slab ends.
  Segments decoder_blocks(int64_t width) const {
    const int64_t matrix = width * width;
    const int64_t lengths[] = {matrix, width,      matrix,    width,      matrix,
                               width,  matrix,     width,     width,      width,
                               width,  4 * matrix, 4 * width, 4 * matrix, width};
    std::vector<Segment> rows;
    int64_t numel = 0;
    for (int64_t at = 0;;) {
      for (int64_t length : lengths) {
        const int64_t fits = std::min(length, numel_ - at);
        rows.push_back({at, fits, 0, static_cast<uint32_t>(rows.size()), length != width});
        numel += fits;
        at += (length + 127) / 128 * 128;
        if (at >= numel_) return {on_gpu(rows), static_cast<int64_t>(rows.size()), numel};
      }
    }
  }

  const Segments& segments_of(Table table) const {
    return table == Table::kOne ? one_ : table == Table::kBlocks ? blocks_ : small_;
  }

  UpdatePerturbArgs slab_args(DType storage, DType compute, Distribution distribution,
                              Table table) const {
    UpdatePerturbArgs args{};
    args.stored = slabs_[0];
    args.storage = storage;
    args.compute = compute;
    args.numel = numel_;
    const Segments& segments = segments_of(table);
    args.segments = segments.rows;
    args.num_segments = segments.count;
    args.distribution = distribution;
    return args;
  }

  void run(const std::string& what, double bytes_an_element, const UpdatePerturbArgs& args,
           int64_t numel) {
    measure(what, bytes_an_element, numel,
            [&] { require(update_perturb_cuda(args, stream_), "update_perturb"); });
  }

  /// Prints a line; returns bytes a second.
  double measure(const std::string& what, double bytes_an_element, int64_t numel,
                 const std::function<void()>& launch) {
    std::vector<float> times;
    for (int i = -3; i < runs_; ++i) {  // the first warm up
      require(cudaMemsetAsync(scrubbed_, i, kScrubbed, stream_), "scrub");
      require(cudaEventRecord(begin_, stream_), "event");
      launch();
      require(cudaEventRecord(end_, stream_), "event");
      require(cudaEventSynchronize(end_), what.c_str());
      float milliseconds = 0;
      require(cudaEventElapsedTime(&milliseconds, begin_, end_), "event");
      if (i >= 0) times.push_back(milliseconds * 1e3f);
    }
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2] * 1e-6;
    const double elements = static_cast<double>(numel) / median;
    const double rate = elements * bytes_an_element;
    std::printf("%-46s %6.4g %9.1f %9.1f %8.1f %8.0f", what.c_str(), bytes_an_element, median * 1e6,
                times[0], elements * 1e-9, rate * 1e-9);
    if (copy_rate_ > 0) std::printf(" %7.1f%%", 100 * rate / copy_rate_);
    std::printf("\n");
    return rate;
  }

  int64_t numel_;
  int runs_;
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
  void* slabs_[3];
  uint8_t *scales_, *low_;
  void* scrubbed_;
  Segments one_, blocks_, small_;
  const Update* update_;
  double copy_rate_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t numel = argc > 1 ? std::atoll(argv[1]) : int64_t{1} << 28;
  const int runs = argc > 2 ? std::atoi(argv[2]) : 31;
  if (numel <= 0 || runs <= 0) {
    std::fprintf(stderr, "usage: %s [elements] [runs]\n", argv[0]);
    return 2;
  }
  cudaDeviceProp properties;
  int driver = 0, runtime = 0;
  require(cudaGetDeviceProperties(&properties, 0), "no GPU");
  require(cudaDriverGetVersion(&driver), "driver");
  require(cudaRuntimeGetVersion(&runtime), "runtime");
  std::printf("%s, %d multiprocessors, L2 %d MiB, driver %d, runtime %d; %lld elements, %d runs\n",
              properties.name, properties.multiProcessorCount, properties.l2CacheSize >> 20, driver,
              runtime, static_cast<long long>(numel), runs);

  constexpr auto kGaussian = Distribution::kGaussian, kRademacher = Distribution::kRademacher;
  constexpr auto kNearest = Rounding::kNearest, kStochastic = Rounding::kStochastic;
  constexpr auto kFloat32 = DType::kFloat32, kBFloat16 = DType::kBFloat16,
                 kFloat16 = DType::kFloat16, kE4M3 = DType::kFloat8E4M3;
  Bench bench(numel, runs);
  bench.copy();
  for (Distribution distribution : {kGaussian, kRademacher}) {
    for (DType dtype : {kBFloat16, kFloat16}) {
      bench.pass(dtype, dtype, distribution, kNearest);
      bench.pass(dtype, dtype, distribution, kStochastic);
    }
    bench.pass(kFloat32, kFloat32, distribution, kNearest);
    bench.pass(kFloat32, kBFloat16, distribution, kNearest);
    bench.pass(kBFloat16, kBFloat16, distribution, kNearest, Bench::Table::kBlocks);
    bench.pass(kBFloat16, kBFloat16, distribution, kNearest, Bench::Table::kSmallBlocks);
    for (Rounding rounding : {kNearest, kStochastic}) {
      bench.scaled_pass(kE4M3, 1, distribution, rounding);
      bench.scaled_pass(kE4M3, 2, distribution, rounding);
    }
    bench.scaled_pass(kE4M3, 1, distribution, kNearest, false);
    bench.perturb_both(kBFloat16, distribution);
    bench.perturb_in_place(kBFloat16, distribution);
    bench.update(kBFloat16, distribution, kStochastic);
    bench.noise(kFloat32, distribution);
    bench.noise(kBFloat16, distribution);
  }
  bench.fold(kFloat32, 1, kNearest);
  bench.fold(kE4M3, 1, kNearest);
  for (Rounding rounding : {kNearest, kStochastic}) {
    bench.fold(kBFloat16, 1, rounding);
    bench.fold(kE4M3, 2, rounding);
  }
  bench.pack(kBFloat16, kNearest);
  bench.pack(kBFloat16, kStochastic);
  bench.pack(kFloat16, kStochastic);
  bench.pack(kE4M3, kStochastic);
  bench.copy();  // once more: has the clock changed?
  return 0;
}
