// The columns of x with outliers (LLM.int8(), Dettmers et al. 2022): what the bindings call. Raw
// pointers and a stream, no torch.

#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

constexpr int kOutlierTileColumns = 256;  // of a block
constexpr int kOutlierRows = 8;           // that a block reads at a time

struct OutlierArguments {
  const void* x;  // [m][k] of `type`, rows x_stride elements apart
  int64_t x_stride;
  int64_t m, k;
  FloatType type;
  float threshold;
  uint8_t* flags;     // [ceil(k / 8)]: bit i of byte b is that of column 8 b + i
  int32_t* columns;   // [k], of which the first [count] are written, in their order
  int32_t* count;     // [1]
  uint8_t* partial;   // [parts][ceil(k / 8)], scratch
  uint32_t* counter;  // [1], zero before the call and after it
  int parts;          // of the rows, each of another block
};

// Finds the columns that hold a magnitude of `threshold` or more, or what is not finite. Returns
// null, or what went wrong in words.
const char* find_outliers(const OutlierArguments& arguments, Stream stream);

}  // namespace qkernels
