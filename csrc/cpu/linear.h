// y = x W^T + b on the CPU: what the bindings call. Nothing here or below knows torch.

#pragma once

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qkernels::cpu {

// How a product is computed. Results are the same for each number of threads.
struct Schedule {
  Isa isa;
  bool tiles;  // of AMX; or int8 for many rows, on AVX-512 and I8MM; else few rows
  // Weights are scaled and rounded to bf16 as a dense product of that type has them: faster for
  // many rows. x and y are bf16.
  bool rounds_weights;
  // Few rows are multiplied in pairs of bf16, numbers of tables rounded to it. Codes have up to 4
  // bits, x and y are bf16.
  bool pairs = false;
};

// Whether there are tiles of floats, or of int8.
bool has_float_tiles(Isa isa);
bool has_int8_tiles(Isa isa);

// Whether vectors of `isa` multiply pairs of bf16 here: of rounded weights, of few rows.
bool rounds_on_vectors(Isa isa);
bool has_pairs(Isa isa);

// Whether a group of so many columns, of several, falls into whole tiles. Integer sums over all of
// K need no whole groups.
constexpr bool fits_float_tiles(int64_t group) { return group % 32 == 0; }
constexpr bool fits_int8_tiles(Isa isa, int64_t group) {
  if (isa == Isa::kNeonI8mm) return group % 16 == 0;
  return isa == Isa::kAmx && group % 64 == 0;
}

struct FloatArguments {
  Weight weight;
  int64_t m, k;  // x is [m][k], k <= weight.k
  const void* x;
  FloatType x_type;
  int64_t x_stride;
  Output out;
};

void linear_float(const FloatArguments& arguments, const Schedule& schedule, const Pool& pool);

enum class ScaleOf { kRow, kTensor, kGiven };

struct Int8Arguments {
  Weight weight;
  int64_t m, k;
  // Either rows to quantize,
  RowSource source;
  ScaleOf scale_of;
  const float* given_scale;
  // or, where not null, rows that are quantized already, and the row scales in `out`.
  const int8_t* quantized;
  int64_t quantized_stride;
  Output out;
};

void linear_int8(const Int8Arguments& arguments, const Schedule& schedule, const Pool& pool);

// Rows of `source` to int8 [m][k] and scales [m]. With `zeros` [m] not null they are asymmetric.
void quantize_rows(const RowSource& source, int64_t m, ScaleOf scale_of, const float* given_scale,
                   int8_t* out, float* scales, int32_t* zeros, Isa isa, const Pool& pool);

}  // namespace qkernels::cpu
