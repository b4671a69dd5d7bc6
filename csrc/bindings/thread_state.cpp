// thread_state.cpp -- torch's thread-local state as an object, for passes that take turns on a
// thread.
#include <ATen/ThreadLocalState.h>

#include "bindings.h"

namespace zo2ext::bindings {

void bind_thread_state(py::module_& m) {
  py::class_<at::ThreadLocalState>(m, "ThreadLocalState")
      .def(py::init<>())
      .def("restore", &at::ThreadLocalState::setThreadLocalState);
}

}  // namespace zo2ext::bindings
