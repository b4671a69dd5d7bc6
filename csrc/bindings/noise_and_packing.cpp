// noise_and_packing.cpp -- directions, and conversions between float32 and the storage formats.
#include "bindings.h"
#include "checks.h"
#include "launch.h"

namespace zo2ext::bindings {
namespace {

void noise(const at::Tensor& out, int64_t offset, uint64_t key, uint32_t tensor_id,
           Distribution distribution, Domain domain, uintptr_t stream) {
  const DType dtype = check_weights(out, "out");
  check_range(offset, out.numel(), "offset", dtype);
  if (out.numel() == 0) return;
  const NoiseArgs args{out.data_ptr(), dtype,        out.numel(), offset, key,
                       tensor_id,      distribution, domain};
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
  const PackArgs args{weights.data_ptr<float>(),
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
  mark_written(scales);
  mark_written(low);
}

void unpack(const at::Tensor& packed, const std::optional<at::Tensor>& scales,
            const std::optional<at::Tensor>& low, const at::Tensor& weights, uintptr_t stream) {
  UpdatePerturbArgs args{};
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

}  // namespace

void bind_noise_and_packing(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("direction_key", &zo2ext::direction_key, py::arg("seed"), py::arg("step"),
        py::arg("direction"));
  m.def("noise", &noise, py::arg("out"), py::arg("offset"), py::arg("key"), py::arg("tensor_id"),
        py::arg("distribution"), py::arg("domain"), py::arg("stream"), no_gil);
  m.def("pack", &pack, py::arg("weights"), py::arg("packed"), py::arg("scales"), py::arg("low"),
        py::arg("offset"), py::arg("rounding"), py::arg("key"), py::arg("tensor_id"),
        py::arg("stream"), no_gil);
  m.def("unpack", &unpack, py::arg("packed"), py::arg("scales"), py::arg("low"), py::arg("weights"),
        py::arg("stream"), no_gil);
}

}  // namespace zo2ext::bindings
