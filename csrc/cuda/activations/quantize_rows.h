// Rows of activations to 8 bits: what the bindings call. Raw pointers and a stream, no torch. Every
// function returns null, or what went wrong in words.

#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

// What is quantized: x; x (+ residual) over its root mean square, times a gain; silu(x) * up;
// x (+ residual) without its mean, over its standard deviation, times a gain, and a bias;
// gelu(x) * up, of the error function or of tanh.
enum class RowKind : int { kPlain, kRmsNorm, kSiluMul, kLayerNorm, kGeluMul, kGeluTanhMul };

constexpr bool is_norm(RowKind kind) {
  return kind == RowKind::kRmsNorm || kind == RowKind::kLayerNorm;
}

constexpr bool is_gate(RowKind kind) { return kind != RowKind::kPlain && !is_norm(kind); }

// int8 of -largest..largest, int8 of -128..127 with a zero point, or fp8 E4M3.
enum class RowCode : int { kInt8, kInt8WithZero, kFp8E4M3 };

constexpr int64_t kMostRowColumns = int64_t{1} << 30;
constexpr int64_t kMostRows = 0x7fffffff;  // blocks of a grid

struct RowArguments {
  const void* x;  // [m, k] of `type`, rows x_stride elements apart
  int64_t x_stride;
  const void* other;  // the same: the residual, or null; what the gate multiplies
  int64_t other_stride;
  const void* gain;           // [k] of gain_type, or null
  const void* bias;           // [k] of bias_type, or null
  const float* given_scale;   // of all rows, or null for one of each
  const int32_t* given_zero;  // goes with it, of kInt8WithZero
  // Of plain rows to kInt8: columns that are zeros, a bit each as find_outliers gives them; or
  // null.
  const uint8_t* left_out;
  // [m, k], a byte each, rows codes_stride bytes apart: k, or a multiple of 16 up to which zeros
  // fill each row.
  void* codes;
  int64_t codes_stride;
  float* scales;   // [m]
  int32_t* zeros;  // [m] of kInt8WithZero, else null
  void* total;     // [m, k] of `type`: x + residual; null where there is none
  // [m, k] of `type`: the rows, which are then quantized as rounded; or null, as for plain ones.
  void* rounded;
  int64_t m, k;
  float epsilon;  // of norms
  float largest;  // number of kInt8: 127, or 7 for 4 bits
  FloatType type, gain_type, bias_type;
  RowKind kind;
  RowCode code;
  int shared_bytes;  // that a block can have
};

// Each row read once from global memory, as far as it fits the shared memory of a block. kFp8E4M3
// is for plain rows alone. With a given scale, a row with NaN or infinity has the scale NaN.
const char* quantize_rows(const RowArguments& arguments, Stream stream);

struct TensorScaleArguments {
  const void* x;  // [m, k] of `type`, rows x_stride elements apart
  int64_t x_stride;
  int64_t m, k;
  FloatType type;
  float largest;      // number of the 8-bit type
  float* scale;       // [1]: max|x| / largest, or 1 where that is 0
  uint32_t* tops;     // [blocks], scratch
  uint32_t* counter;  // [1], zero before the call and after it
  int blocks;
};

const char* tensor_scale(const TensorScaleArguments& arguments, Stream stream);

}  // namespace qkernels
