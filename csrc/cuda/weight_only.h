// Weight-only products on tensor cores: what the bindings call. Raw pointers and a stream, no
// torch. Every function returns null, or what went wrong in words.

#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/config.h"
#include "cuda/launch.cuh"

namespace qkernels {

enum class FloatType : int { kHalf, kBfloat16, kFloat };

// How a code becomes a number.
enum class WeightCode : int { kInt4, kInt8, kTable4, kFp4E2M1, kFp8E4M3, kFp8E5M2 };

constexpr int code_bits(WeightCode code) {
  return code == WeightCode::kInt4 || code == WeightCode::kTable4 || code == WeightCode::kFp4E2M1
             ? 4
             : 8;
}

// Zero points: none (then a symmetric integer code is shifted by half its range), integers, or real
// numbers.
enum class ZeroType : int { kNone, kInteger, kHalf, kBfloat16, kFloat };

// A weight [n, k] in the fragment layout (fragment.cuh).
struct FragmentWeight {
  const void* words;
  const void* scales;  // [groups, padded_rows(n)] of scale_type
  const void* zeros;   // the same shape, or null
  const float* table;  // 16 numbers of WeightCode::kTable4, else null
  int64_t n, k;
  int64_t group_size;  // a multiple of 16, or k where one group spans all of it
  WeightCode code;
  FloatType scale_type;
  ZeroType zero_type;
};

struct WeightOnlyArguments {
  FragmentWeight weight;
  const void* x;  // [m, k] of x_type, rows x_stride elements apart, aligned to 16 bytes
  int64_t x_stride;
  const void* bias;  // [n] of bias_type, or null
  void* y;           // [m, n] of x_type, contiguous
  float* partials;
  uint32_t* counters;
  int64_t m;
  FloatType x_type, bias_type;
};

// y = x @ w.T + bias, accumulated in fp32, the same bits at every call. The scales, and what is
// left of real zero points after their integer part, are rounded to x's type; the weights once
// more, as dequantize() rounds them.
const char* weight_only_mma(const WeightOnlyArguments& arguments, const WeightOnlyConfig& config,
                            Stream stream);

// w [n, k] of out_type from the fragment layout, with the roundings of weight_only_mma.
const char* dequantize(const FragmentWeight& weight, void* out, FloatType out_type, Stream stream);

// Where packing takes codes from.
enum class CodeSource : int {
  kCodes,  // uint8 [rows, k]
  kAwq,    // int32 [k, n / 8]: AutoAWQ's order, 4 bits
  kGptq,   // int32 [k * bits / 32, n]: little-endian along k
};

struct PackArguments {
  const void* source;
  const int32_t* perm;      // column j of the layout is column perm[j] of the source; or null
  void* words;              // the whole weight's
  int64_t n, k;             // of the whole weight
  int64_t first_row, rows;  // what to pack; first_row a multiple of 32; kCodes holds just these
  int bits;
  CodeSource kind;
};

const char* pack_fragment(const PackArguments& arguments, Stream stream);

// codes uint8 [rows, k] of the rows from first_row on, any row.
const char* unpack_fragment(const void* words, uint8_t* codes, int64_t k, int64_t first_row,
                            int64_t rows, int bits, Stream stream);

}  // namespace qkernels
