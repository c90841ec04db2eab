// What calibrating a weight on the CPU spends its time on: the scales of groups, codes column by
// column, and x^T y. What bindings call, and the jobs of the kernels behind it.

#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

// Scales and zero points of groups of linear weights, where rounding costs least:
//
//     cost = sum_c diagonal[c] e[c]^2, or e^T gram e, of e[c] = w[c] - scale (code[c] - zero)
//
// Those given are where the search begins; qkernels/quantizers/grids.py says what is tried.
struct ScaleSearch {
  const void* weight;  // [n][k], rows `stride` elements apart
  FloatType type;
  int64_t n, k, stride;
  int64_t length;         // columns of a group; the last may have fewer
  const float* diagonal;  // [k], or null: all 1
  const float* gram;      // [k][k], rows `gram_stride` apart, symmetric, instead; or null
  int64_t gram_stride;
  int bits;
  float implied_zero;  // where there are no zero points
  // [n][groups], read and written: floats or, with `channel_scales` [n], integers from 1 on whose
  // products with code - zero fit int8.
  void* scales;
  GroupType scale_type;
  float least_scale;  // of floats, above zero
  const float* channel_scales;
  float most_multiplier;
  uint8_t* zeros;  // [n][groups] or null

  int64_t groups() const { return ceil_div(k, length); }
  // Floats that a kernel needs.
  int64_t scratch() const { return kLanes * (length < k ? length : k) * (gram == nullptr ? 1 : 2); }
};

void search_scales(const ScaleSearch& job, Isa isa, const Pool& pool);

// Rounds columns one after the other, each after what those before it have left:
//
//     left[j] -= sum_{i < j} moved[i] factors[i][j]
//     moved[j] = (left[j] - nearest(left[j])) / factors[j][j]
//
// or, where there are `values`, those that stand there before,
//
//     moved[j] = nearest(left[j] / factors[j][j] + values[j]) - values[j]
struct ColumnRounding {
  int64_t n, columns;
  const float* left;      // [columns][n]
  const float* factors;   // [columns][columns], rows `stride` elements apart; those below the
  int64_t stride;         // diagonal are not read
  const float* values;    // [columns][n] or null
  const int64_t* places;  // [columns]: where each lies among the codes
  const int64_t* groups;  // [columns]: the group of each
  const float* scales;    // [groups][n], as all of the following
  const float* zeros;     // or null: `implied_zero`
  float implied_zero;
  const float *low, *high;  // the least and the largest code
  uint8_t* codes;           // [.][n]
  float* moved;             // [columns][n]
  // [columns][n], or null: above 0 where a number is kept as it is, beside its code.
  const float* kept;
  float* beyond;  // [columns][n], with `kept`: what such numbers are beyond their codes; else 0
};

void round_columns(const ColumnRounding& job, Isa isa, const Pool& pool);

// out = x^T y, fp32 [x_columns][y_columns], of rows that follow each other without gaps.
struct TransposedProduct {
  int64_t rows, x_columns, y_columns;
  const void *x, *y;  // fp32, or bf16 where there are kernels for it; one address: out is symmetric
  FloatType type;
  float* out;
};

// Whether there are kernels with these instructions.
bool multiplies_transposed(FloatType type, Isa isa);

void multiply_transposed(const TransposedProduct& job, Isa isa, const Pool& pool);

// Columns that a kernel of products takes at once.
constexpr int64_t kProductPanel = 48;

// Adds to sums [kProductPanel][kProductPanel] the products of two panels of columns,
// [steps][kProductPanel] each: fp32, or pairs of bf16 with the earlier row in the low half. Of x,
// the first `columns`, and it may be more.
using ProductKernel = void (*)(const uint32_t* x, const uint32_t* y, int64_t steps, int64_t columns,
                               float* sums);

}  // namespace qkernels::cpu
