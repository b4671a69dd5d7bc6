// module.cpp -- the Python module zo2ext.ops._C.
#include "../kernels.h"
#include "bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using zo2ext::Distribution;
  using zo2ext::Rounding;
  m.doc() = "Kernels of zo2ext; zo2ext.ops checks and documents their arguments.";
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
  zo2ext::bindings::bind_noise_and_packing(m);
  zo2ext::bindings::bind_update_perturb(m);
  zo2ext::bindings::bind_thread_state(m);
  zo2ext::bindings::bind_test_hooks(m);
}
