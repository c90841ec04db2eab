// What the bindings share of rows that are quantized.

#pragma once

#include <ATen/core/Tensor.h>

#include "bindings/cuda/device.h"
#include "cuda/activations/quantize_rows.h"

namespace qkernels::bindings {

// fp32 [], for all rows of x [M, K], whose columns are adjacent. largest: number of int8.
at::Tensor scale_of_tensor(const at::Tensor& x, RowCode code, double largest,
                           const DeviceScope& scope);

// See cuda/activations/outliers.h.
struct Outliers {
  at::Tensor flags;    // uint8 [ceil(K / 8)]
  at::Tensor columns;  // int32 [K]
  at::Tensor count;    // int32 [1]
};

// The columns of x [M, K], themselves adjacent, that hold a magnitude of `threshold` or more, which
// is rounded to x's type, as torch compares. parts: of the rows, each of another block, or 0 for as
// many as the device wants.
Outliers find_outliers(const at::Tensor& x, double threshold, int64_t parts,
                       const DeviceScope& scope);

}  // namespace qkernels::bindings
