// module.cpp -- the Python module zo2ext.ops._C.
#include "../kernels.h"
#include "bindings.h"

#define ZO2EXT_TEXT_OF(...) #__VA_ARGS__
#define ZO2EXT_TEXT(...) ZO2EXT_TEXT_OF(__VA_ARGS__)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using zo2ext::Distribution;
  using zo2ext::Domain;
  using zo2ext::Rounding;
  m.doc() = "Kernels of zo2ext; zo2ext.ops checks and documents their arguments.";
#if defined(ZO2EXT_CUDA_CODES)
  m.attr("cuda_codes") = ZO2EXT_TEXT(ZO2EXT_CUDA_CODES);
  m.def("clear_cuda_error", &zo2ext::clear_error_cuda);
#else
  m.attr("cuda_codes") = "";
  m.def("clear_cuda_error", [] {});
#endif
  py::enum_<Distribution>(m, "Distribution")
      .value("GAUSSIAN", Distribution::kGaussian)
      .value("RADEMACHER", Distribution::kRademacher);
  py::enum_<Domain>(m, "Domain")
      .value("DIRECTION", Domain::kDirection)
      .value("LEFT", Domain::kLeft)
      .value("RIGHT", Domain::kRight);
  py::enum_<Rounding>(m, "Rounding")
      .value("NEAREST", Rounding::kNearest)
      .value("STOCHASTIC", Rounding::kStochastic);
  zo2ext::bindings::bind_noise_and_packing(m);
  zo2ext::bindings::bind_update_perturb(m);
  zo2ext::bindings::bind_fold(m);
  zo2ext::bindings::bind_thread_state(m);
  zo2ext::bindings::bind_test_hooks(m);
}
