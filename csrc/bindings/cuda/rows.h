// What the bindings share of rows that are quantized.

#pragma once

#include <ATen/core/Tensor.h>

#include "bindings/cuda/device.h"
#include "cuda/activations/quantize_rows.h"

namespace qkernels::bindings {

// fp32 [], for all rows of x [M, K], whose columns are adjacent. largest: number of kInt8.
at::Tensor scale_of_tensor(const at::Tensor& x, RowCode code, double largest,
                           const DeviceScope& scope);

}  // namespace qkernels::bindings
