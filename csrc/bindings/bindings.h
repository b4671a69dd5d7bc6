// bindings.h -- the families of functions that zo2ext.ops._C has. Only this folder sees torch.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

namespace zo2ext::bindings {

void bind_noise_and_packing(py::module_& m);
void bind_update_perturb(py::module_& m);
void bind_fold(py::module_& m);
void bind_thread_state(py::module_& m);
void bind_test_hooks(py::module_& m);

}  // namespace zo2ext::bindings
