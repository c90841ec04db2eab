// Products of integers on tensor cores: what the bindings call. Raw pointers and a stream, no
// torch. Every function returns null, or what went wrong in words.

#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/weight_only/config.h"
#include "cuda/weights/types.h"

namespace qkernels {

// A weight [n, k] in the integer fragment layout, whose numbers, multiplier * (code - zero), are
// int8. Padded columns, within groups and behind k, hold any codes whose numbers are int8 too.
struct Int8Weight {
  const void* words;
  // [groups, padded_rows(n)], the rows of a tile in the order 0, 8, 1, 9, ..., 7, 15: of scale_type
  // or, where there are two levels, uint8 multipliers.
  const void* scales;
  const uint8_t* zeros;         // the same shape, of 4 bits; or null: half the range of a code
  const float* channel_scales;  // [n] of two levels, which 4 bits may have; else null
  int64_t n, k;
  int64_t group_size;  // a multiple of 32, or k where one group spans all of it
  int64_t filled;      // columns of a group, the first ones, that are not padding
  int bits;            // 4 or 8
  FloatType scale_type;

  bool two_levels() const { return channel_scales != nullptr; }
  // Whether sums are integers over all of k, and not of each group.
  bool is_whole() const { return two_levels() || group_size >= k; }
};

// How the layer that reads y quantizes it.
struct Int8Reader {
  const float* scale;   // [1]
  const int32_t* zero;  // [1], or null for the numbers -127 to 127
  bool relu;            // it reads relu(y)
  float* row_scales;    // [m], `scale` each, where NaN is put for rows with NaN or infinity
};

struct Int8Arguments {
  Int8Weight weight;
  // [m, k], rows x_stride bytes apart, aligned to 16 bytes. Zero in padded columns, and up to a
  // multiple of 16 bytes behind k.
  const int8_t* x;
  int64_t x_stride;
  const float* x_scales;   // [m]
  const int32_t* x_zeros;  // [m], or null
  const float* addend;     // [m, n], added to y before it is rounded, or null
  const void* bias;        // [n] of bias_type, or null
  FloatType bias_type;
  FloatType y_type;  // that y is rounded to,
  void* y;           // [m, n] of it, or where there is a reader, of its int8
  const Int8Reader* reader;
  void* partials;
  uint32_t* counters;
  int64_t m;
};

// What the schedule of such a product depends on, less the device's facts.
WeightOnlyProblem int8_problem(const Int8Weight& weight, int64_t m);

// Why no product with the weight is exact, or null. `has_zeros`: x has zero points.
const char* why_not_exact(const Int8Weight& weight, bool has_zeros);

// y = x_scale * scale * ((x - x_zero) @ w.T) + bias with int32 sums, which are exact: over all of k
// or, where groups have floating scales, of each, and then in fp32. The same bits at every call.
const char* int8_mma(const Int8Arguments& arguments, const WeightOnlyConfig& config, Stream stream);

}  // namespace qkernels
