// update_perturb.cpp -- perturb and update a tensor, and the fused pass over a slab.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "checks.h"
#include "launch.h"

namespace zo2ext::bindings {
namespace {

/// One direction: key, eps, plus, minus.
using DirectionTuple =
    std::tuple<uint64_t, float, std::optional<at::Tensor>, std::optional<at::Tensor>>;

/// A pass over one tensor, without any operation yet.
UpdatePerturbArgs pass_over(const at::Tensor& weights, const char* name, int64_t offset,
                            uint32_t tensor_id, Distribution distribution) {
  UpdatePerturbArgs args{};
  args.storage = args.compute = check_weights(weights, name);
  check_range(offset, weights.numel(), "offset", args.storage);
  args.stored = weights.data_ptr();
  args.numel = weights.numel();
  args.num_segments = 1;
  args.only_segment = {0, weights.numel(), offset, tensor_id, 1};
  args.distribution = distribution;
  return args;
}

void perturb(const at::Tensor& weights, int64_t offset, uint64_t key, uint32_t tensor_id, float eps,
             Distribution distribution, uintptr_t stream) {
  UpdatePerturbArgs args = pass_over(weights, "weights", offset, tensor_id, distribution);
  if (weights.numel() == 0) return;
  args.directions[0] = {key, eps, weights.data_ptr(), nullptr};
  args.num_directions = 1;
  ZO2_LAUNCH(update_perturb, weights, args, stream);
  mark_written(weights);
}

void update(const at::Tensor& weights, int64_t offset, uint64_t key, uint32_t tensor_id,
            float coefficient, float decay, Distribution distribution, Rounding rounding,
            uint64_t rounding_key, uintptr_t stream) {
  UpdatePerturbArgs args = pass_over(weights, "weights", offset, tensor_id, distribution);
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
                    Distribution distribution, Domain domain, uintptr_t stream) {
  UpdatePerturbArgs args{};
  std::vector<Memory> outputs = check_stored(stored, scales, low, args);
  check_table(segments, "segments", 4, stored);
  args.segments = reinterpret_cast<const Segment*>(segments.data_ptr());
  args.num_segments = segments.size(0);
  if (stored.is_cpu()) {
    check_segments(args.segments, args.num_segments, args.numel, args.storage);
  }
  if (updates.has_value()) {
    check_table(*updates, "updates", 4, stored);
    args.updates = reinterpret_cast<const Update*>(updates->data_ptr());
    args.num_updates = updates->size(0);
  }
  args.write_back = write_back.has_value();
  args.rounding = write_back.value_or(Rounding::kNearest);
  args.rounding_key = rounding_key;
  args.distribution = distribution;
  args.domain = domain;

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
  std::vector<Direction> all;
  for (const auto& [key, eps, plus, minus] : directions) {
    const std::string name = "directions[" + std::to_string(all.size()) + "]";
    Direction direction{key, eps, nullptr, nullptr};
    direction.plus = add_output(plus, [&] { return name + ".plus"; });
    direction.minus = add_output(minus, [&] { return name + ".minus"; });
    all.push_back(direction);
  }
  check_overlap(stored, outputs,
                compute == stored.scalar_type() && !args.write_back &&
                    all.size() <= static_cast<size_t>(kMaxDirections));
  if (args.numel == 0 || args.num_segments == 0) return;

  // What one launch has no room for, further ones do: they start from the written weights, or
  // replay the updates.
  size_t done = 0;
  do {
    const size_t count = std::min(all.size() - done, static_cast<size_t>(kMaxDirections));
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
    mark_written(scales);
    mark_written(low);
  }
  mark_written(plain);
  for (const auto& [key, eps, plus, minus] : directions) {
    mark_written(plus);
    mark_written(minus);
  }
}

}  // namespace

void bind_update_perturb(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("perturb", &perturb, py::arg("weights"), py::arg("offset"), py::arg("key"),
        py::arg("tensor_id"), py::arg("eps"), py::arg("distribution"), py::arg("stream"), no_gil);
  m.def("update", &update, py::arg("weights"), py::arg("offset"), py::arg("key"),
        py::arg("tensor_id"), py::arg("coefficient"), py::arg("decay"), py::arg("distribution"),
        py::arg("rounding"), py::arg("rounding_key"), py::arg("stream"), no_gil);
  m.def("update_perturb", &update_perturb, py::arg("stored"), py::arg("scales"), py::arg("low"),
        py::arg("segments"), py::arg("updates"), py::arg("plain"), py::arg("directions"),
        py::arg("write_back"), py::arg("rounding_key"), py::arg("distribution"), py::arg("domain"),
        py::arg("stream"), no_gil);
}

}  // namespace zo2ext::bindings
