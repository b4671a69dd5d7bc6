// bindings.cpp -- the one file that sees torch: check, unwrap to pointers, launch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "scaled_formats.h"

namespace {

using zo2ext::Distribution;
using zo2ext::DType;
using zo2ext::Rounding;
using zo2ext::Segment;

// One direction: key, eps, plus, minus.
using DirectionTuple =
    std::tuple<uint64_t, float, std::optional<at::Tensor>, std::optional<at::Tensor>>;

DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

/// Of slabs in storage, which may share scales.
DType storage_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
      return dtype_of(tensor, name);
    case at::kFloat8_e4m3fn:
      return DType::kFloat8E4M3;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16, float16 or float8_e4m3fn, got ",
                       tensor.scalar_type());
  }
}

void check_device(const at::Tensor& tensor, const char* name) {
#if defined(ZO2EXT_WITH_CUDA)
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.is_cuda(), name, " must be on a CPU or a GPU, got ",
                    tensor.device());
#else
  TORCH_CHECK(!tensor.is_cuda(), name, " is on ", tensor.device(),
              ", but zo2ext was built without CUDA; reinstall it with ZO2EXT_CUDA=1 where torch "
              "has CUDA and the CUDA toolkit is installed");
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, " must be on the CPU, got ", tensor.device());
#endif
}

void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got shape ", tensor.sizes(),
                    " with strides ", tensor.strides());
}

/// Any shape, contiguous: what the operations on single tensors take.
DType check_weights(const at::Tensor& tensor, const char* name) {
  check_device(tensor, name);
  const DType dtype = dtype_of(tensor, name);
  check_contiguous(tensor, name);
  return dtype;
}

void check_slab(const at::Tensor& slab, const char* name) {
  TORCH_CHECK_VALUE(slab.dim() == 1, name, " must be a 1-D slab, got shape ", slab.sizes());
  check_contiguous(slab, name);
}

void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& like,
                const char* like_name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on ", like.device(), " as ",
                    like_name, ", got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.numel() == like.numel(), name, " must have ", like.numel(),
                    " elements as ", like_name, ", got ", tensor.numel());
}

void check_table(const at::Tensor& table, const char* name, int64_t columns,
                 const at::Tensor& stored) {
  TORCH_CHECK_TYPE(table.scalar_type() == at::kLong, name, " must be an int64 table, got ",
                   table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == columns, name, " must have shape (n, ",
                    columns, "), got ", table.sizes());
  check_contiguous(table, name);
  TORCH_CHECK_VALUE(table.device() == stored.device(), name, " must be on ", stored.device(),
                    " as stored, got ", table.device());
}

/// The bytes that belong to elements of `dtype`: scales, one for 32 elements, and the low plane of
/// the split format.
struct Planes {
  uint8_t* scales = nullptr;
  uint8_t* low = nullptr;
};

Planes check_planes(const at::Tensor& elements, const char* name, DType dtype,
                    const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& low) {
  const bool scaled = zo2ext::is_scaled(dtype);
  TORCH_CHECK_VALUE(scaled || !scales.has_value(),
                    "scales belong to float8_e4m3fn only, got them with ", name, " of ",
                    elements.scalar_type());
  TORCH_CHECK_VALUE(scaled || !low.has_value(), "low belongs to float8_e4m3fn only, got it with ",
                    name, " of ", elements.scalar_type());
  TORCH_CHECK_VALUE(!scaled || scales.has_value(), "scales are missing: ", name, " of ",
                    elements.scalar_type(), " has one for each ", zo2ext::kScaleGroup, " elements");
  const auto bytes = [&](const at::Tensor& plane, const char* plane_name, int64_t numel) {
    TORCH_CHECK_TYPE(plane.scalar_type() == at::kByte, plane_name, " must be bytes, got ",
                     plane.scalar_type());
    check_slab(plane, plane_name);
    TORCH_CHECK_VALUE(plane.device() == elements.device(), plane_name, " must be on ",
                      elements.device(), " as ", name, ", got ", plane.device());
    TORCH_CHECK_VALUE(plane.numel() == numel, plane_name, " must have ", numel, " elements for ",
                      elements.numel(), " of ", name, ", got ", plane.numel());
    return plane.data_ptr<uint8_t>();
  };
  Planes planes;
  constexpr int64_t kGroup = zo2ext::kScaleGroup;
  if (scales.has_value()) {
    planes.scales = bytes(*scales, "scales", (elements.numel() + kGroup - 1) / kGroup);
  }
  if (low.has_value()) planes.low = bytes(*low, "low", elements.numel());
  return planes;
}

/// Counts of elements and indices of elements are int64; a tensor ends below 2^63. Of elements that
/// share scales, groups of the tensor are groups of the slab.
void check_range(int64_t offset, int64_t numel, const char* what, DType dtype) {
  const int64_t multiple = zo2ext::is_scaled(dtype) ? zo2ext::kScaleGroup : 4;
  TORCH_CHECK_VALUE(offset >= 0 && offset % multiple == 0, what, " must be a multiple of ",
                    multiple, " and not negative, got ", offset);
  TORCH_CHECK_VALUE(numel <= std::numeric_limits<int64_t>::max() - offset, what, " + numel is ",
                    offset, " + ", numel, ", past the counter's range, 2^63 - 1");
}

/// Table rows in host memory; those of a GPU are checked where the table is made.
void check_segments(const Segment* segments, int64_t count, int64_t slab_numel, DType storage) {
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    TORCH_CHECK_VALUE(s.numel >= 0, "segments[", i, "].numel must not be negative, got ", s.numel);
    TORCH_CHECK_VALUE(s.begin % 128 == 0, "segments[", i, "].begin must be a multiple of 128, got ",
                      s.begin);
    TORCH_CHECK_VALUE(s.begin >= end, "segments[", i, "].begin is ", s.begin,
                      ", inside the segment before it, which ends at ", end);
    TORCH_CHECK_VALUE(s.begin <= slab_numel && s.numel <= slab_numel - s.begin, "segments[", i,
                      "] ends at ", s.begin, " + ", s.numel, ", beyond stored, which has ",
                      slab_numel, " elements");
    check_range(s.offset, s.numel, "segment offset", storage);
    end = s.begin + s.numel;
  }
}

struct Memory {
  const char* begin;
  const char* end;
  std::string name;
};

Memory memory_of(const at::Tensor& tensor, std::string name) {
  const char* begin = static_cast<const char*>(tensor.data_ptr());
  return {begin, begin + tensor.nbytes(), std::move(name)};
}

/// Outputs, scales and the low plane share no memory, with each other or with `stored`. One may be
/// `stored` itself, where that does not lose what is read or written there.
void check_overlap(const at::Tensor& stored, std::vector<Memory> outputs, bool may_alias) {
  std::sort(outputs.begin(), outputs.end(),
            [](const Memory& a, const Memory& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < outputs.size(); ++i) {
    TORCH_CHECK_VALUE(outputs[i].begin >= outputs[i - 1].end, outputs[i - 1].name, " and ",
                      outputs[i].name, " overlap in memory");
  }
  const Memory source = memory_of(stored, "stored");
  for (const Memory& output : outputs) {
    if (output.end <= source.begin || source.end <= output.begin) continue;
    const bool same = output.begin == source.begin && output.end == source.end;
    TORCH_CHECK_VALUE(
        same && may_alias, output.name, " and stored overlap in memory",
        same ? ", which needs equal dtypes, no write_back and at most 8 directions" : "");
  }
}

/// Tells autograd that the tensor was written.
void mark_written(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kGrain = 32768 / zo2ext::kShare;  // elements worth waking a thread for
  at::parallel_for(0, count, kGrain, body);
}

#if defined(ZO2EXT_WITH_CUDA)
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

void noise(const at::Tensor& out, int64_t offset, uint64_t key, uint32_t tensor_id,
           Distribution distribution, uintptr_t stream) {
  const DType dtype = check_weights(out, "out");
  check_range(offset, out.numel(), "offset", dtype);
  if (out.numel() == 0) return;
  const zo2ext::NoiseArgs args{out.data_ptr(), dtype,       out.numel(), offset, key,
                               tensor_id,      distribution};
  ZO2_LAUNCH(noise, out, args, stream);
  mark_written(out);
}

void pack(const at::Tensor& weights, const at::Tensor& packed,
          const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& low,
          int64_t offset, Rounding rounding, uint64_t key, uint32_t tensor_id, uintptr_t stream) {
  check_weights(weights, "weights");
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat, "weights must be float32, got ",
                   weights.scalar_type());
  check_device(packed, "packed");
  const DType dtype = storage_of(packed, "packed");
  check_contiguous(packed, "packed");
  check_like(packed, "packed", weights, "weights");
  check_range(offset, weights.numel(), "offset", dtype);
  const Planes planes = check_planes(packed, "packed", dtype, scales, low);
  if (weights.numel() == 0) return;
  const zo2ext::PackArgs args{weights.data_ptr<float>(),
                              packed.data_ptr(),
                              dtype,
                              weights.numel(),
                              offset,
                              rounding,
                              key,
                              tensor_id,
                              planes.scales,
                              planes.low};
  ZO2_LAUNCH(pack, weights, args, stream);
  mark_written(packed);
  if (scales.has_value()) mark_written(*scales);
  if (low.has_value()) mark_written(*low);
}

/// A pass over one whole tensor, with nothing in it yet.
zo2ext::UpdatePerturbArgs whole_tensor(const at::Tensor& weights, const char* name, int64_t offset,
                                       uint32_t tensor_id, Distribution distribution) {
  zo2ext::UpdatePerturbArgs args{};
  args.storage = args.compute = check_weights(weights, name);
  check_range(offset, weights.numel(), "offset", args.storage);
  args.stored = weights.data_ptr();
  args.numel = weights.numel();
  args.num_segments = 1;
  args.only_segment = {0, weights.numel(), offset, tensor_id, 1};
  args.distribution = distribution;
  return args;
}

void unpack(const at::Tensor& packed, const std::optional<at::Tensor>& scales,
            const std::optional<at::Tensor>& low, const at::Tensor& weights, uintptr_t stream) {
  zo2ext::UpdatePerturbArgs args{};
  check_device(packed, "packed");
  args.storage = storage_of(packed, "packed");
  check_contiguous(packed, "packed");
  const Planes planes = check_planes(packed, "packed", args.storage, scales, low);
  if (packed.numel() == 0) return;
  args.stored = packed.data_ptr();
  args.scales = planes.scales;
  args.low = planes.low;
  args.compute = DType::kFloat32;
  args.numel = packed.numel();
  args.num_segments = 1;
  args.only_segment = {0, packed.numel(), 0, 0, 1};
  args.plain = weights.data_ptr<float>();
  ZO2_LAUNCH(update_perturb, packed, args, stream);
  mark_written(weights);
}

void perturb(const at::Tensor& weights, int64_t offset, uint64_t key, uint32_t tensor_id, float eps,
             Distribution distribution, uintptr_t stream) {
  zo2ext::UpdatePerturbArgs args =
      whole_tensor(weights, "weights", offset, tensor_id, distribution);
  if (weights.numel() == 0) return;
  args.directions[0] = {key, eps, weights.data_ptr(), nullptr};
  args.num_directions = 1;
  ZO2_LAUNCH(update_perturb, weights, args, stream);
  mark_written(weights);
}

void update(const at::Tensor& weights, int64_t offset, uint64_t key, uint32_t tensor_id,
            float coefficient, float decay, Distribution distribution, Rounding rounding,
            uint64_t rounding_key, uintptr_t stream) {
  zo2ext::UpdatePerturbArgs args =
      whole_tensor(weights, "weights", offset, tensor_id, distribution);
  if (weights.numel() == 0) return;
  args.only_update = {key, coefficient, decay};
  args.num_updates = 1;
  args.write_back = true;
  args.rounding = rounding;
  args.rounding_key = rounding_key;
  ZO2_LAUNCH(update_perturb, weights, args, stream);
  mark_written(weights);
}

void update_perturb(const at::Tensor& stored, const std::optional<at::Tensor>& scales,
                    const std::optional<at::Tensor>& low, const at::Tensor& segments,
                    const std::optional<at::Tensor>& updates,
                    const std::optional<at::Tensor>& plain,
                    const std::vector<DirectionTuple>& directions,
                    std::optional<Rounding> write_back, uint64_t rounding_key,
                    Distribution distribution, uintptr_t stream) {
  zo2ext::UpdatePerturbArgs args{};
  check_device(stored, "stored");
  args.storage = storage_of(stored, "stored");
  check_slab(stored, "stored");
  args.stored = stored.data_ptr();
  const Planes planes = check_planes(stored, "stored", args.storage, scales, low);
  args.scales = planes.scales;
  args.low = planes.low;
  args.numel = stored.numel();
  check_table(segments, "segments", 4, stored);
  args.segments = reinterpret_cast<const Segment*>(segments.data_ptr());
  args.num_segments = segments.size(0);
  if (stored.is_cpu()) {
    check_segments(args.segments, args.num_segments, args.numel, args.storage);
  }
  if (updates.has_value()) {
    check_table(*updates, "updates", 4, stored);
    args.updates = reinterpret_cast<const zo2ext::Update*>(updates->data_ptr());
    args.num_updates = updates->size(0);
  }
  args.write_back = write_back.has_value();
  args.rounding = write_back.value_or(Rounding::kNearest);
  args.rounding_key = rounding_key;
  args.distribution = distribution;

  std::vector<Memory> outputs;
  if (scales.has_value()) outputs.push_back(memory_of(*scales, "scales"));
  if (low.has_value()) outputs.push_back(memory_of(*low, "low"));
  std::optional<at::ScalarType> compute;
  const auto add_output = [&](const std::optional<at::Tensor>& output, auto name) -> void* {
    if (!output.has_value()) return nullptr;
    const std::string text = name();
    args.compute = dtype_of(*output, text.c_str());
    TORCH_CHECK_TYPE(compute.value_or(output->scalar_type()) == output->scalar_type(), text,
                     " must be ", *compute, " as the other outputs, got ", output->scalar_type());
    compute = output->scalar_type();
    check_slab(*output, text.c_str());
    check_like(*output, text.c_str(), stored, "stored");
    outputs.push_back(memory_of(*output, text));
    return output->data_ptr();
  };
  args.plain = add_output(plain, [] { return std::string("plain"); });
  std::vector<zo2ext::Direction> all;
  for (const auto& [key, eps, plus, minus] : directions) {
    const std::string name = "directions[" + std::to_string(all.size()) + "]";
    zo2ext::Direction direction{key, eps, nullptr, nullptr};
    direction.plus = add_output(plus, [&] { return name + ".plus"; });
    direction.minus = add_output(minus, [&] { return name + ".minus"; });
    all.push_back(direction);
  }
  check_overlap(stored, outputs,
                compute == stored.scalar_type() && !args.write_back &&
                    all.size() <= static_cast<size_t>(zo2ext::kMaxDirections));
  if (args.numel == 0 || args.num_segments == 0) return;

  // What one launch has no room for, further ones do: they start from the written weights, or
  // replay the updates.
  size_t done = 0;
  do {
    const size_t count = std::min(all.size() - done, static_cast<size_t>(zo2ext::kMaxDirections));
    std::copy_n(all.begin() + static_cast<std::ptrdiff_t>(done), count, args.directions);
    args.num_directions = static_cast<int>(count);
    ZO2_LAUNCH(update_perturb, stored, args, stream);
    if (args.write_back) args.num_updates = 0;
    args.write_back = false;
    args.plain = nullptr;
    done += count;
  } while (done < all.size());

  if (write_back.has_value()) {
    mark_written(stored);
    if (scales.has_value()) mark_written(*scales);
    if (low.has_value()) mark_written(*low);
  }
  if (plain.has_value()) mark_written(*plain);
  for (const auto& [key, eps, plus, minus] : directions) {
    if (plus.has_value()) mark_written(*plus);
    if (minus.has_value()) mark_written(*minus);
  }
}

std::vector<std::string> simd_variants() {
  std::vector<std::string> names;
  for (int i = 0; i < zo2ext::num_simd_variants(); ++i) {
    names.emplace_back(zo2ext::simd_variant_name(i));
  }
  return names;
}

void set_simd(const std::string& name) {
  TORCH_CHECK_VALUE(zo2ext::set_simd_variant(name.c_str()), "name must be one of ", simd_variants(),
                    ", got ", name);
}

// Pieces of the noise contract, for tests.

std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> words, uint64_t key) {
  uint32_t counter[4] = {words[0], words[1], words[2], words[3]};
  zo2ext::philox4x32_10(counter, key);
  return {counter[0], counter[1], counter[2], counter[3]};
}

/// words: [n] int32 -> [n] float32.
at::Tensor squared_radius(const at::Tensor& words) {
  check_contiguous(words, "words");
  at::Tensor out = at::empty(words.sizes(), at::kFloat);
  std::transform(words.data_ptr<int32_t>(), words.data_ptr<int32_t>() + words.numel(),
                 out.data_ptr<float>(),
                 [](int32_t word) { return zo2ext::squared_radius(static_cast<uint32_t>(word)); });
  return out;
}

/// words: [n] int32 -> two of [n] float32.
std::tuple<at::Tensor, at::Tensor> scaled_cosine_sine(const at::Tensor& words) {
  check_contiguous(words, "words");
  at::Tensor cosine = at::empty(words.sizes(), at::kFloat), sine = at::empty_like(cosine);
  for (int64_t i = 0; i < words.numel(); ++i) {
    zo2ext::scaled_cosine_sine(static_cast<uint32_t>(words.data_ptr<int32_t>()[i]),
                               cosine.data_ptr<float>()[i], sine.data_ptr<float>()[i]);
  }
  return {cosine, sine};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Kernels of zo2ext; zo2ext.ops checks and documents what they take.";
#if defined(ZO2EXT_WITH_CUDA)
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  py::enum_<Distribution>(m, "Distribution")
      .value("GAUSSIAN", Distribution::kGaussian)
      .value("RADEMACHER", Distribution::kRademacher);
  py::enum_<Rounding>(m, "Rounding")
      .value("NEAREST", Rounding::kNearest)
      .value("STOCHASTIC", Rounding::kStochastic);

  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("direction_key", &zo2ext::direction_key, py::arg("seed"), py::arg("step"),
        py::arg("direction"));
  m.def("noise", &noise, py::arg("out"), py::arg("offset"), py::arg("key"), py::arg("tensor_id"),
        py::arg("distribution"), py::arg("stream"), no_gil);
  m.def("pack", &pack, py::arg("weights"), py::arg("packed"), py::arg("scales"), py::arg("low"),
        py::arg("offset"), py::arg("rounding"), py::arg("key"), py::arg("tensor_id"),
        py::arg("stream"), no_gil);
  m.def("unpack", &unpack, py::arg("packed"), py::arg("scales"), py::arg("low"), py::arg("weights"),
        py::arg("stream"), no_gil);
  m.def("perturb", &perturb, py::arg("weights"), py::arg("offset"), py::arg("key"),
        py::arg("tensor_id"), py::arg("eps"), py::arg("distribution"), py::arg("stream"), no_gil);
  m.def("update", &update, py::arg("weights"), py::arg("offset"), py::arg("key"),
        py::arg("tensor_id"), py::arg("coefficient"), py::arg("decay"), py::arg("distribution"),
        py::arg("rounding"), py::arg("rounding_key"), py::arg("stream"), no_gil);
  m.def("update_perturb", &update_perturb, py::arg("stored"), py::arg("scales"), py::arg("low"),
        py::arg("segments"), py::arg("updates"), py::arg("plain"), py::arg("directions"),
        py::arg("write_back"), py::arg("rounding_key"), py::arg("distribution"), py::arg("stream"),
        no_gil);
  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"));
  m.def("squared_radius", &squared_radius, py::arg("words"));
  m.def("scaled_cosine_sine", &scaled_cosine_sine, py::arg("words"));
  m.def("simd_variants", &simd_variants,
        "Instruction sets compiled in that this machine runs, fastest last.");
  m.def("simd", &zo2ext::current_simd_variant, "The instruction set in use.");
  m.def("set_simd", &set_simd, py::arg("name"), "Use another instruction set: the same bits.");
}
