// Weight-only products on tensor cores: what the bindings call. Raw pointers and a stream, no
// torch. Every function returns null, or what went wrong in words.

#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/weight_only/config.h"
#include "cuda/weight_only/grad.h"
#include "cuda/weights/types.h"

namespace qkernels {

struct WeightOnlyArguments {
  FragmentWeight weight;
  const void* x;  // [m, k] of x_type, rows x_stride elements apart, aligned to 16 bytes
  int64_t x_stride;
  const void* bias;  // [n] of bias_type, or null
  void* y;           // [m, n] of y_type, contiguous
  float* partials;
  uint32_t* counters;
  int64_t m;
  // y_type: x's, or fp32 with x of bf16 and a schedule of up to 16 tokens.
  FloatType x_type, bias_type, y_type;
  // Where rows of x go to experts: so many weights alike, one behind the other, as are their scales
  // and zero points. Rows ends[e - 1] to ends[e] go to expert e; where the ends are no such numbers
  // y is not defined. Rows behind the last end are 0 in y.
  int64_t experts = 0;
  const int32_t* ends = nullptr;
  void* plan = nullptr;  // of plan_bytes()
};

// y = x @ w.T + bias, accumulated in fp32, the same bits at every call. Up to 16 tokens a tile, the
// sums of a group are scaled, in fp32. With more, the scales are rounded to x's type, and the
// weights once more, as dequantize() rounds them. What is left of real zero points after their
// integer part is rounded to x's type in either case.
const char* weight_only_mma(const WeightOnlyArguments& arguments, const WeightOnlyConfig& config,
                            Stream stream);

// Rows 3 i to 3 i + 2 of `out`, bf16 [3 m, columns], add up to row i of x, fp32 [m, columns], whose
// rows are `stride` numbers apart: all three in all of its bits, where the exponent of the last is
// one that bf16 has. columns is a multiple of 8, and addresses and strides are of 16 bytes.
const char* split_floats(const float* x, int64_t stride, int64_t m, int64_t columns, void* out,
                         Stream stream);

// plan.cu: what weight_only_mma does first where there are experts.
const char* plan_experts(const WeightOnlyArguments& arguments, const WeightOnlyProblem& problem,
                         const WeightOnlyConfig& config, Stream stream);

// w [n, k] of out_type from the fragment layout: scales are rounded to it, and weights once more.
const char* dequantize(const FragmentWeight& weight, void* out, FloatType out_type, Stream stream);

struct GradArguments {
  FragmentWeight weight;
  // [m, n] of `type`, rows dy_stride elements apart, aligned to 16 bytes. What lies behind n in the
  // last 16 bytes of a row is zero.
  const void* dy;
  int64_t dy_stride;
  void* dx;            // [m, k] of `type`, contiguous
  float* partials;     // of grad_partial_bytes, where there are parts of N; else null
  uint32_t* counters;  // one for each of grad_tiles: zero before the call, and after it
  int64_t m;
  FloatType type;
};

// dx = dy @ w, the gradient of x, accumulated in fp32, the same bits at every call. Scales are
// rounded to the type of dy, and weights once more, as dequantize() rounds them.
const char* weight_only_grad(const GradArguments& arguments, const GradSchedule& schedule,
                             Stream stream);

// Bytes of partial sums that a schedule leaves.
int64_t grad_partial_bytes(int64_t m, int64_t k, const GradSchedule& schedule);

}  // namespace qkernels
