// What a weight has in 16 bits beside its codes, added to a product: what the bindings call. Raw
// pointers and a stream, no torch. Every function returns null, or what went wrong in words.

#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

// x of floats, or int8 with a scale, and perhaps a zero point, for each row.
enum class BesideX : int { kHalf, kBfloat16, kFloat, kInt8 };

struct BesideArguments {
  const void* x;  // [m][k], rows x_stride elements apart
  BesideX x_type;
  int64_t x_stride;
  const float* row_scales;   // [m] of int8 x, else null
  const int32_t* row_zeros;  // [m] of int8 x, or null
  // Columns: [count] numbers of them, and values [n][count]; or 0 and null.
  const int64_t* columns;
  const void* column_values;
  FloatType column_type;
  int64_t column_count;
  // Single numbers: row r has those from ends[r - 1], or 0, to ends[r]; or null.
  const int32_t* ends;  // [n]
  const void* entry_columns;
  bool short_columns;  // int16, else int32
  const void* entry_values;
  FloatType entry_type;
  const void* from;  // [m][n], the product so far
  FloatType from_type;
  void* to;  // [m][n], may be `from`
  FloatType to_type;
  int64_t m, n;
};

// to = from + scale * ((x - zero) S^T), S being columns and single numbers together: in fp32, and
// rounded once. A row of y depends neither on the others nor on their number.
const char* add_beside(const BesideArguments& arguments, Stream stream);

}  // namespace qkernels
