// fold.cpp -- directions in factors, added to a slab.
#include <string>
#include <vector>

#include "bindings.h"
#include "checks.h"
#include "launch.h"

namespace zo2ext::bindings {
namespace {

/// factors: [directions, numel] float32. Returns where they begin.
const float* check_factors(const at::Tensor& factors, const char* name, const at::Tensor& stored) {
  TORCH_CHECK_TYPE(factors.scalar_type() == at::kFloat, name, " must be float32, got ",
                   factors.scalar_type());
  TORCH_CHECK_VALUE(factors.dim() == 2, name, " must have shape (directions, numel), got ",
                    factors.sizes());
  check_contiguous(factors, name);
  TORCH_CHECK_VALUE(factors.device() == stored.device(), name, " must be on ", stored.device(),
                    " as stored, got ", factors.device());
  return factors.data_ptr<float>();
}

void fold(const at::Tensor& stored, const std::optional<at::Tensor>& scales,
          const std::optional<at::Tensor>& low, const at::Tensor& segments, const at::Tensor& left,
          const at::Tensor& right, int64_t rank, float decay,
          const std::optional<at::Tensor>& plain, std::optional<Rounding> write_back,
          uint64_t rounding_key, uintptr_t stream) {
  FoldArgs args{};
  std::vector<Memory> memories = check_stored(stored, scales, low, args);
  check_table(segments, "segments", 8, stored);
  args.segments = reinterpret_cast<const FoldSegment*>(segments.data_ptr());
  args.num_segments = segments.size(0);
  args.left = check_factors(left, "left", stored);
  args.right = check_factors(right, "right", stored);
  TORCH_CHECK_VALUE(left.size(0) == right.size(0), "left has ", left.size(0),
                    " directions, but right has ", right.size(0));
  args.left_numel = left.size(1);
  args.right_numel = right.size(1);
  args.num_directions = left.size(0);
  args.rank = rank;
  args.decay = decay;
  args.write_back = write_back.has_value();
  args.rounding = write_back.value_or(Rounding::kNearest);
  args.rounding_key = rounding_key;
  memories.push_back(memory_of(left, "left"));
  memories.push_back(memory_of(right, "right"));
  bool may_alias = false;
  if (plain.has_value()) {
    args.compute = dtype_of(*plain, "plain");
    check_slab(*plain, "plain");
    check_like(*plain, "plain", stored, "stored");
    args.plain = plain->data_ptr();
    memories.push_back(memory_of(*plain, "plain"));
    may_alias = plain->scalar_type() == stored.scalar_type() && !args.write_back;
  } else if (!is_scaled(args.storage)) {
    args.compute = args.storage;
  }
  check_overlap(stored, std::move(memories), may_alias);
  if (args.numel == 0 || args.num_segments == 0) return;
  ZO2_LAUNCH(fold, stored, args, stream);
  if (args.write_back) {
    mark_written(stored);
    mark_written(scales);
    mark_written(low);
  }
  mark_written(plain);
}

}  // namespace

void bind_fold(py::module_& m) {
  m.def("fold", &fold, py::arg("stored"), py::arg("scales"), py::arg("low"), py::arg("segments"),
        py::arg("left"), py::arg("right"), py::arg("rank"), py::arg("decay"), py::arg("plain"),
        py::arg("write_back"), py::arg("rounding_key"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace zo2ext::bindings
