// test_hooks.cpp -- steps of the noise contract and the choice of an instruction set, for tests and
// benchmarks.
#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "checks.h"

namespace zo2ext::bindings {
namespace {

std::vector<std::string> simd_variants() {
  std::vector<std::string> names;
  for (int i = 0; i < num_simd_variants(); ++i) {
    names.emplace_back(simd_variant_name(i));
  }
  return names;
}

void set_simd(const std::string& name) {
  TORCH_CHECK_VALUE(set_simd_variant(name.c_str()), "name must be one of ", simd_variants(),
                    ", got ", name);
}

std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> words, uint64_t key) {
  uint32_t counter[4] = {words[0], words[1], words[2], words[3]};
  zo2ext::philox4x32_10(counter, key);
  return {counter[0], counter[1], counter[2], counter[3]};
}

/// words: [n] int32. Returns [n] float32.
at::Tensor squared_radius(const at::Tensor& words) {
  check_contiguous(words, "words");
  at::Tensor out = at::empty(words.sizes(), at::kFloat);
  std::transform(words.data_ptr<int32_t>(), words.data_ptr<int32_t>() + words.numel(),
                 out.data_ptr<float>(),
                 [](int32_t word) { return zo2ext::squared_radius(static_cast<uint32_t>(word)); });
  return out;
}

/// words: [n] int32. Returns two of [n] float32.
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

void bind_test_hooks(py::module_& m) {
  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"));
  m.def("squared_radius", &squared_radius, py::arg("words"));
  m.def("scaled_cosine_sine", &scaled_cosine_sine, py::arg("words"));
  m.def("simd_variants", &simd_variants,
        "Names of the compiled instruction sets that this machine runs, fastest last.");
  m.def("simd", &current_simd_variant, "The instruction set in use.");
  m.def("set_simd", &set_simd, py::arg("name"), "Use another instruction set: the same bits.");
}

}  // namespace zo2ext::bindings
