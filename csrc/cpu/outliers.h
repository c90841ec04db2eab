// Columns of x with outliers, and those of a weight that they meet (LLM.int8(), Dettmers et al.
// 2022).

#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

struct OutlierSearch {
  const void* x;  // [m][k], rows x_stride elements apart
  FloatType type;
  int64_t m, k, x_stride;
  // A magnitude of `type`, by its bits, above 0: what has these or more is an outlier, and with
  // that infinity and NaN.
  uint32_t threshold;
};

// In their order.
std::vector<int64_t> find_outliers(const OutlierSearch& search, const Pool& pool);

// out[i][row] is the weight of a row in column columns[i], as it dequantizes: of integer codes with
// scales of floats, or of two levels. Columns are counted without those that pad groups.
void take_columns(const Weight& weight, const int64_t* columns, int64_t count, float* out,
                  const Pool& pool);

// y [m][n] += x [m][count] times weight [count][n]. A number of y is summed in the order of the
// columns, wherever it lies: how many others there are changes none of its bits.
void add_columns(const float* x, const float* weight, int64_t m, int64_t n, int64_t count, float* y,
                 const Pool& pool);

}  // namespace qkernels::cpu
