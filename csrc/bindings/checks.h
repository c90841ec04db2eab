// Checks of what a caller passes in. A mistake is a ValueError that names the values.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace qkernels::bindings {

using Optional = std::optional<at::Tensor>;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  TORCH_CHECK_VALUE(condition, parts...);
}

// A tensor that lies where the weight does, without gaps.
inline void check(const char* name, const at::Tensor& tensor, at::Device device,
                  at::IntArrayRef shape) {
  require(tensor.device() == device, name, " is on ", tensor.device(), ", the weight on ", device);
  require(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  require(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

inline void check(const char* name, const at::Tensor& tensor, at::Device device,
                  at::IntArrayRef shape, at::ScalarType type) {
  check(name, tensor, device, shape);
  require(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
}

}  // namespace qkernels::bindings
