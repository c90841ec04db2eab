// torch.ops.qkernels.linear, linear_grouped, linear_quantized and linear_to_int8 on the CPU and on
// CUDA: from x to a route.
//
// A weight crosses the operator's boundary as its list of buffers and a string, its spec, that says
// what they are. The route for a spec, a device, a type of y and a range of rows is asked for once.

#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string_view>

#include "bindings/route.h"

namespace qkernels::bindings {

// The route for least_rows to most_rows rows of x.
struct Answer {
  std::shared_ptr<Route> route;
  int64_t least_rows, most_rows;
};

// What is asked where no route is known, or where x or the buffers are not what the spec says:
// throws then. row_scales is null for x that is not quantized.
struct Question {
  const at::Tensor& x;
  const at::Tensor* row_scales;
  at::TensorList buffers;
  std::string_view spec;
  at::ScalarType y_type;
};

void answer_with(Answer (*answer)(const Question&));

// Asks anew for every route. Calls that run go on with theirs.
void forget_routes();

}  // namespace qkernels::bindings
