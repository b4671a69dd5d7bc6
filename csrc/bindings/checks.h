// checks.h -- what a binding requires of its tensors; each failure names the argument.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"
#include "../scaled_formats.h"

namespace zo2ext::bindings {

/// The compute dtype of `tensor`.
DType dtype_of(const at::Tensor& tensor, const char* name);

/// The storage dtype of `tensor`, which may be one that shares scales.
DType storage_of(const at::Tensor& tensor, const char* name);

/// On a CPU, or on a GPU if this build has the CUDA kernels.
void check_device(const at::Tensor& tensor, const char* name);

void check_contiguous(const at::Tensor& tensor, const char* name);

/// Any shape, contiguous, in a compute dtype: an argument of an operation on a single tensor.
DType check_weights(const at::Tensor& tensor, const char* name);

/// Contiguous and one-dimensional.
void check_slab(const at::Tensor& slab, const char* name);

/// The device and the number of elements of `like`.
void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& like,
                const char* like_name);

/// An int64 table of `columns` columns on the device of `stored`.
void check_table(const at::Tensor& table, const char* name, int64_t columns,
                 const at::Tensor& stored);

/// The planes beside the elements of a scaled dtype: scales, one per 32 elements, and the low plane
/// of the split format.
struct Planes {
  uint8_t* scales = nullptr;
  uint8_t* low = nullptr;
};

Planes check_planes(const at::Tensor& elements, const char* name, DType dtype,
                    const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& low);

/// Element counts and indices are int64, so a tensor ends below 2^63. If elements share scales,
/// groups of the tensor have to coincide with groups of the slab.
void check_range(int64_t offset, int64_t numel, const char* what, DType dtype);

/// Table rows in host memory. A table in GPU memory was checked when it was made.
void check_segments(const Segment* segments, int64_t count, int64_t slab_numel, DType storage);

/// A range of memory, and the name of its argument.
struct Memory {
  const char* begin;
  const char* end;
  std::string name;
};

Memory memory_of(const at::Tensor& tensor, std::string name);

/// The slab of a pass, put into `args`. Returns the memory of its planes.
std::vector<Memory> check_stored(const at::Tensor& stored, const std::optional<at::Tensor>& scales,
                                 const std::optional<at::Tensor>& low, SlabArgs& args);

/// Outputs, scales and the low plane share no memory, with each other or with `stored`. One output
/// may be `stored` itself if `may_alias`: if that loses nothing that is read or written there.
void check_overlap(const at::Tensor& stored, std::vector<Memory> outputs, bool may_alias);

}  // namespace zo2ext::bindings
