// LLM.int8() (Dettmers et al. 2022): columns of x that are not among its integers, times those of
// the weight. Raw pointers and a stream, no torch.

#pragma once

#include "cuda/int8/int8.h"

namespace qkernels {

struct OutlierProduct {
  Int8Weight weight;
  const void* x;  // [m, k] of x_type, rows x_stride numbers apart, its columns those of the weight
  FloatType x_type;
  int64_t x_stride;
  int64_t m;
  const int32_t* columns;  // [count], as find_outliers gives them
  const int32_t* count;    // [1]
  float* y;                // [m, n]
};

// y = x[:, columns] @ w[:, columns].T in fp32, with the weight as it dequantizes. A row of y
// depends neither on the others nor on their number, but for the list. Returns null, or what went
// wrong in words.
const char* multiply_outliers(const OutlierProduct& product, Stream stream);

}  // namespace qkernels
