// Quantized weights as the kernels take them: what a code is, its scales and its zero points. Raw
// pointers and sizes, no torch.

#pragma once

#include <cstdint>

namespace qkernels {

enum class FloatType : int { kHalf, kBfloat16, kFloat };

constexpr int size_of(FloatType type) { return type == FloatType::kFloat ? 4 : 2; }

// How a code becomes a number.
enum class WeightCode : int { kInt2, kInt3, kInt4, kInt8, kTable4, kFp4E2M1, kFp8E4M3, kFp8E5M2 };

constexpr int code_bits(WeightCode code) {
  if (code == WeightCode::kInt2) return 2;
  if (code == WeightCode::kInt3) return 3;
  return code == WeightCode::kInt4 || code == WeightCode::kTable4 || code == WeightCode::kFp4E2M1
             ? 4
             : 8;
}

// Zero points: none (then integer codes have an implied one, half their range), integers, or real
// numbers.
enum class ZeroType : int { kNone, kInteger, kHalf, kBfloat16, kFloat };

constexpr int size_of(ZeroType type) {
  return type == ZeroType::kNone      ? 0
         : type == ZeroType::kInteger ? 1
         : type == ZeroType::kFloat   ? 4
                                      : 2;
}

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

}  // namespace qkernels
