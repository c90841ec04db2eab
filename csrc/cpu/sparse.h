// y += x S^T, of a sparse S whose rows hold numbers of 16 bits at columns of their own.

#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

struct SparseProduct {
  int64_t m, n, k;
  const void* x;  // [m][k], rows `x_stride` elements apart
  FloatType x_type;
  int64_t x_stride;
  const int32_t* ends;  // [n]: row r has the entries from ends[r - 1], or 0, to ends[r]
  const void* columns;  // [entries], in [0, k)
  bool short_columns;   // int16, else int32
  const void* values;   // [entries]
  FloatType value_type;
  void* y;  // [m][n]
  FloatType y_type;
};

// Sums are in fp32, and rounded once more to y's type when they are added to it. A row of y does
// not depend on the others.
void add_sparse_product(const SparseProduct& job, const Pool& pool);

}  // namespace qkernels::cpu
