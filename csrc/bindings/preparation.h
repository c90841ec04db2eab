// What happens to x between a layer's input and a kernel: all of it, for every compiled route.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

#include "bindings/route.h"

namespace qkernels::bindings {

// Numbers of float8 E4M3 in bf16, which holds them exactly, with a scale for each row.
enum class Float8 { kNone, kPerToken, kPerTensor, kStatic };

// How a kernel takes x.
struct Preparation {
  int64_t k = 0;                        // columns of x
  int64_t group = 0, padded_group = 0;  // columns that share a scale; zeros fill each group up
  int64_t column_multiple = 1;          // zeros fill a row up to a multiple of so many columns,
  int64_t row_bytes = 1;                // and rows begin at multiples of so many bytes
  Float8 float8 = Float8::kNone;

  // Columns of the weight: those of x, and those that fill groups up.
  int64_t columns() const {
    const int64_t last = (k - 1) / group;
    return last * padded_group + k - last * group;
  }
};

// Throws ValueError for sizes that describe no weight.
void check(const Preparation& preparation);

// Rows [m][k] of a tensor of any shape; the elements of a row are side by side.
struct Rows {
  at::Tensor tensor;
  int64_t m, k, stride;
  Optional scales;  // fp32 [m], where preparation quantized x

  // The same as a tensor [m, k].
  at::Tensor matrix() const;
};

// x [..., K]: flattened to rows, multiplied by the input factor, its columns put into the order of
// the codes, quantized, padded and aligned, each where it is asked for. Where nothing is, the rows
// are those of x itself.
Rows prepare(const at::Tensor& x, const Buffers& buffers, const Preparation& wanted);

// [..., n] for x [..., K].
c10::SmallVector<int64_t, 5> output_shape(const at::Tensor& x, int64_t n);

// y [..., n], uninitialized.
at::Tensor empty_output(const at::Tensor& x, int64_t n, at::ScalarType type);

}  // namespace qkernels::bindings
