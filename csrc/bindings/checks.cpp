// checks.cpp -- see checks.h.
#include "checks.h"

#include <algorithm>
#include <limits>

namespace zo2ext::bindings {

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
#if defined(ZO2EXT_CUDA_CODES)
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.is_cuda(), name, " must be on a CPU or a GPU, got ",
                    tensor.device());
#else
  TORCH_CHECK(!tensor.is_cuda(), name, " is on ", tensor.device(),
              ", but zo2ext was built without CUDA; reinstall it in the clone: ZO2EXT_CUDA=1 pip "
              "install --no-build-isolation -e .");
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, " must be on the CPU, got ", tensor.device());
#endif
}

void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got shape ", tensor.sizes(),
                    " with strides ", tensor.strides());
}

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

Planes check_planes(const at::Tensor& elements, const char* name, DType dtype,
                    const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& low) {
  const bool scaled = is_scaled(dtype);
  TORCH_CHECK_VALUE(scaled || !scales.has_value(),
                    "scales belong to float8_e4m3fn only, got them with ", name, " of ",
                    elements.scalar_type());
  TORCH_CHECK_VALUE(scaled || !low.has_value(), "low belongs to float8_e4m3fn only, got it with ",
                    name, " of ", elements.scalar_type());
  TORCH_CHECK_VALUE(!scaled || scales.has_value(), "scales are missing: ", name, " of ",
                    elements.scalar_type(), " has one for each ", kScaleGroup, " elements");
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
  constexpr int64_t kGroup = kScaleGroup;
  if (scales.has_value()) {
    planes.scales = bytes(*scales, "scales", (elements.numel() + kGroup - 1) / kGroup);
  }
  if (low.has_value()) planes.low = bytes(*low, "low", elements.numel());
  return planes;
}

void check_range(int64_t offset, int64_t numel, const char* what, DType dtype) {
  const int64_t multiple = is_scaled(dtype) ? kScaleGroup : 4;
  TORCH_CHECK_VALUE(offset >= 0 && offset % multiple == 0, what, " must be a multiple of ",
                    multiple, " and not negative, got ", offset);
  TORCH_CHECK_VALUE(numel <= std::numeric_limits<int64_t>::max() - offset, what, " + numel is ",
                    offset, " + ", numel, ", past the counter's range, 2^63 - 1");
}

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

Memory memory_of(const at::Tensor& tensor, std::string name) {
  const char* begin = static_cast<const char*>(tensor.data_ptr());
  return {begin, begin + tensor.nbytes(), std::move(name)};
}

std::vector<Memory> check_stored(const at::Tensor& stored, const std::optional<at::Tensor>& scales,
                                 const std::optional<at::Tensor>& low, SlabArgs& args) {
  check_device(stored, "stored");
  args.storage = storage_of(stored, "stored");
  check_slab(stored, "stored");
  args.stored = stored.data_ptr();
  const Planes planes = check_planes(stored, "stored", args.storage, scales, low);
  args.scales = planes.scales;
  args.low = planes.low;
  args.numel = stored.numel();
  std::vector<Memory> memories;
  if (scales.has_value()) memories.push_back(memory_of(*scales, "scales"));
  if (low.has_value()) memories.push_back(memory_of(*low, "low"));
  return memories;
}

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

}  // namespace zo2ext::bindings
