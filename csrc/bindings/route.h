// How one kernel runs one weight: made once, by the backend of the kernel, and run at each call.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>

#include "bindings/checks.h"

namespace qkernels::bindings {

// The tensors of a packed weight by name; null where it has none.
struct Buffers {
  const at::Tensor* words = nullptr;
  const at::Tensor* scales = nullptr;
  const at::Tensor* zeros = nullptr;
  const at::Tensor* offsets = nullptr;
  const at::Tensor* channel_scales = nullptr;
  const at::Tensor* nested_absmax = nullptr;
  const at::Tensor* nested_offset = nullptr;
  const at::Tensor* block_ranges = nullptr;
  const at::Tensor* input_factor = nullptr;
  const at::Tensor* perm = nullptr;
  const at::Tensor* activation_scale = nullptr;
  const at::Tensor* activation_zero = nullptr;
};

using Field = const at::Tensor* Buffers::*;

// The field of that name, or null where only Python knows it.
constexpr Field field_of(std::string_view name) {
  if (name == "words") return &Buffers::words;
  if (name == "scales") return &Buffers::scales;
  if (name == "zeros") return &Buffers::zeros;
  if (name == "offsets") return &Buffers::offsets;
  if (name == "channel_scales") return &Buffers::channel_scales;
  if (name == "nested_absmax") return &Buffers::nested_absmax;
  if (name == "nested_offset") return &Buffers::nested_offset;
  if (name == "block_ranges") return &Buffers::block_ranges;
  if (name == "input_factor") return &Buffers::input_factor;
  if (name == "perm") return &Buffers::perm;
  if (name == "activation_scale") return &Buffers::activation_scale;
  if (name == "activation_zero") return &Buffers::activation_zero;
  return nullptr;
}

// How the layer that reads y quantizes it, with a scale that it was calibrated with.
struct Reader {
  const at::Tensor& scale;       // fp32 []
  const Optional& zero;          // int32 [], or nothing for the numbers -127 to 127
  bool relu;                     // it reads relu(y)
  const at::Tensor& row_scales;  // fp32 [..., 1], for the route to write: `scale`, or NaN
};

struct Call {
  const at::Tensor& x;           // [..., K]
  const at::Tensor* row_scales;  // of int8 x: one a row, fp32; else null
  const Buffers& buffers;
  at::TensorList list;  // the buffers in the order of the weight's description
  const Optional& bias;
  at::ScalarType y_type;
  const Reader* reader = nullptr;  // for routes that give int8
  const at::Tensor* y = nullptr;   // for routes that fill it: where y goes, or null
};

// A product with a weight for each expert, of one description.
struct GroupedCall {
  const at::Tensor& x;     // [M, K], rows sorted by their expert
  const at::Tensor& ends;  // int32 [E], where x is: the row behind the last one of each expert
  const Buffers& buffers;  // each [E, ...]
  at::TensorList list;     // the same in the order of the weight's description
};

class Route {
 public:
  virtual ~Route() = default;

  // y [..., N]; where there is a reader, the int8 numbers that it makes of y. What is wrong with x
  // was said before; what is wrong with the buffers is said here.
  virtual at::Tensor run(const Call& call) const = 0;

  // Whether x may be int8 already, with a scale for each row.
  virtual bool takes_quantized() const { return false; }

  // Whether it gives the int8 numbers that a reader makes of y.
  virtual bool gives_int8() const { return false; }

  // Whether it writes y where a call says, and gives that.
  virtual bool fills_y() const { return false; }

  // Whether it runs all experts of a call at once, without reading `ends` on the host, with stacks
  // of these buffers. The others are run expert by expert.
  virtual bool takes_groups(const Buffers&) const { return false; }

  // y [M, N] of x's type, with zeros behind the last of the ends. What is wrong with x and with the
  // shape of `ends` was said before. For routes that take groups.
  virtual at::Tensor run_grouped(const GroupedCall&) const {
    TORCH_INTERNAL_ASSERT(false, "this route takes no groups");
  }

  // Whether it reads fields of a weight that `Buffers` has no name for.
  virtual bool reads_any_field() const { return false; }
};

}  // namespace qkernels::bindings
