// What a set of instructions has to offer: one table of functions for each `Isa`.
//
// They work on a range of panels, on the calling thread. `linear.cpp` shares the work out among
// threads.

#pragma once

#include <cstdint>

#include "cpu/calibration.h"
#include "cpu/isa.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

// y as the layer that reads it quantizes it: y / scale, rounded half to even, + zero.
struct Int8Output {
  int8_t* values;  // [m][n], or null where y itself is written
  // [m]: `scale`, and NaN where a row of y holds NaN or infinity, which int8 cannot tell.
  float* row_scales;
  float scale;
  int32_t zero;
  bool relu;  // numbers of y below 0 count as 0
  // What `limit` makes of these: 1 / scale, and between which numbers y counts as it is.
  float reciprocal, low, high;

  // For the numbers `least` to 127.
  void limit(int32_t least);
};

// y[row][n] = (row_scale[row] *) sum + bias[n], rounded to y's type.
struct Output {
  void* y;  // [m][n], or null where its int8 numbers are written
  FloatType y_type;
  const float* row_scales;  // [m] or null
  const void* bias;         // [n] or null
  FloatType bias_type;
  Int8Output int8{};
};

// x is fp32 [m][weight.columns()] or, of `float_pairs`, pairs of bf16 [m][weight.columns() / 2] as
// `pair_row` orders them; zero in the columns that pad.
struct FloatJob {
  Weight weight;
  int64_t m;
  const void* x;
  const float* x_sums;  // [m][groups], where the weight has zero points
  Output out;
};

// x is int8 [m][weight.columns()], zero in the columns that pad.
struct Int8Job {
  Weight weight;
  int64_t m;
  const int8_t* x;
  const int32_t* x_sums;  // [m][groups]
  Output out;             // with row scales
};

// Groups [begin, end). Where `sums` is not null the kernel stores its sums there, and writes no y:
// [m][panels * 16], fp32, or int32 where the sums of the weight's groups are integers.
struct GroupRange {
  int64_t begin, end;
  void* sums;
};

// x for the tiles: [tile of 16 rows][step of 32 columns][term][16][32] bf16, columns in the
// order that exact codes are decoded in; or
// int8 as [tile of 16 rows][step of 64 columns][16][64], or for I8MM of
// [tile of 16 rows][step of 8 columns][16][8], or for AVX-512 of
// [tile of 8 rows][step of 4 columns][8][4]. Rows from m on are zero.
struct FloatTileJob {
  Weight weight;
  int64_t m;
  const uint16_t* x;
  int terms;            // bf16 numbers whose sum is an element of x: 1, 2 or 3
  int table_terms;      // and a number of a table, at most
  bool rounds_weights;  // weights are scaled and rounded to bf16; with one term
  const float* x_sums;
  Output out;
};

// x in pairs of bf16: [chunk of columns][panel of 48 rows][columns of the chunk / 2][48], zero from
// m and from k on.
struct ScaledJob {
  Weight weight;
  int64_t m;
  const uint32_t* x;
  Output out;
};

constexpr int64_t kScaledPanels = 3;   // that its kernel takes at once
constexpr int64_t kScaledChunk = 256;  // columns

struct Int8TileJob {
  Weight weight;
  int64_t m;
  const int8_t* x;
  const int32_t* x_sums;
  Output out;
};

// The rows that are quantized: x; or norm(x (+ residual)) * gain (+ bias); or gate(x) * up. The
// last two are rounded where a model that keeps them in x's type rounds, and are stored to `y`: x *
// factor * gain and x * up.
struct RowSource {
  enum class Kind {
    kPlain,
    kRmsNorm,
    kSiluMul,
    kScaled,
    kProduct,
    kLayerNorm,
    kGeluMul,
    kGeluTanhMul
  } kind;

  bool is_norm() const { return kind == Kind::kRmsNorm || kind == Kind::kLayerNorm; }
  bool is_gate() const {
    return kind == Kind::kSiluMul || kind == Kind::kGeluMul || kind == Kind::kGeluTanhMul;
  }

  const void* x;  // [m][k], `x_stride` elements apart
  FloatType type;
  int64_t k, x_stride;
  const void* residual;  // [m][k] or null, of x's type; x + residual is stored to `sum`
  void* sum;
  const void* gain;  // [k] or null
  FloatType gain_type;
  const void* bias;  // [k] of a layer norm, or null
  FloatType bias_type;
  float epsilon;
  const void* up;  // [m][k], `up_stride` elements apart
  int64_t up_stride;
  const float* factors;  // [m]
  bool rounds_first;     // x * factor is rounded before it is multiplied by the gain
  bool adds_one;         // the gain is 1 + gain
  // [m][k], of x's type. Of norms and gates it may be null, and what is quantized is then not
  // rounded before.
  void* y;
};

struct Kernels {
  // Sums of all panels [begin, end) and all rows.
  void (*float_rows)(const FloatJob&, int64_t begin, int64_t end, GroupRange groups);
  void (*int8_rows)(const Int8Job&, int64_t begin, int64_t end, GroupRange groups);
  // Adds the `parts` sums of parts of K, [parts][m][panels * 16], in order, for panels [begin,
  // end).
  void (*finish_float)(const FloatJob&, int64_t begin, int64_t end, const float* sums, int parts);
  void (*finish_int8)(const Int8Job&, int64_t begin, int64_t end, const int32_t* sums, int parts);

  // A row of x to fp32 [columns], zero from k on, and the sums of its groups where `sums` is not
  // null.
  void (*widen_row)(const void* x, FloatType type, const Weight& weight, int64_t k, float* out,
                    float* sums);
  // The sums of the groups of an int8 row [columns].
  void (*int8_sums)(const int8_t* x, const Weight& weight, int32_t* sums);

  // Row `row` of a source as fp32 [k]; `values` has room for k rounded up to 16.
  void (*load_row)(const RowSource& source, int64_t row, float* values);
  // fp32 [k] to int8; returns the scale, which is NaN or infinity where the row is not finite.
  // Infinity and numbers beyond the range saturate, NaN becomes 0.
  float (*quantize_row)(const float* values, int64_t k, const float* given_scale, int8_t* out);
  // The same with a zero point of its own: value = scale * (q - zero), q in [-128, 127].
  float (*quantize_row_asymmetric)(const float* values, int64_t k, int8_t* out, int32_t* zero);
  // The bits of max|value|, of which more is larger and NaN the largest.
  int32_t (*largest_bits)(const float* values, int64_t k);

  // Null without tiles; AVX-512 and I8MM have those of int8 alone. `scratch` holds
  // tile_scratch(m, end - begin) bytes at a multiple of 64. A range of panels is best a multiple of
  // `tile_panels`.
  void (*float_tiles)(const FloatTileJob&, int64_t begin, int64_t end, void* scratch);
  void (*int8_tiles)(const Int8TileJob&, int64_t begin, int64_t end, void* scratch);
  int64_t (*tile_scratch)(int64_t m, int64_t panels);
  int64_t tile_panels;
  // 16 rows of x from `row` on into the order of tiles.
  void (*pack_float_tile)(const void* x, FloatType type, int64_t x_stride, int64_t row, int64_t m,
                          int64_t k, const Weight& weight, int terms, bool in_order, uint16_t* out);
  // A row of int8 x [columns] into row `row` of the 16 from `tile` on.
  void (*pack_int8_row)(const int8_t* x, int64_t columns, int64_t row, int8_t* tile);

  // Null without products of pairs of bf16. The first two are `float_rows` for x of bf16, and what
  // brings a row of it, as `widen_row` leaves it, into their order. `scratch` holds
  // scaled_scratch(m) bytes at a multiple of 64.
  void (*float_pairs)(const FloatJob&, int64_t begin, int64_t end, GroupRange groups);
  void (*pair_row)(const float* x, int64_t columns, int32_t* out);
  void (*scaled_panels)(const ScaledJob&, int64_t begin, int64_t end, void* scratch);
  int64_t (*scaled_scratch)(int64_t m);
  // Up to 48 rows of bf16 x into pairs, [columns / 2][48].
  void (*pack_pairs)(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t k, int64_t columns,
                     uint32_t* out);

  // 16 rows of one group; `scratch` holds job.scratch() floats at a multiple of 64 bytes.
  void (*search_scales)(const ScaleSearch& job, int64_t panel, int64_t group, float* scratch);
  // 16 rows; `scratch` holds 16 * columns floats at a multiple of 64 bytes.
  void (*round_columns)(const ColumnRounding& job, int64_t panel, float* scratch);
  // Null in plain C++, and the second without products of pairs of bf16.
  ProductKernel fp32_product, bf16_product;

  // See bursts.h; bf16_burst is null without tiles.
  int64_t (*fp32_burst)(int64_t repeats);
  int64_t (*int8_burst)(int64_t repeats);
  int64_t (*bf16_burst)(int64_t repeats);
  int64_t (*read_burst)(const void* memory, int64_t bytes);
};

// The table of a level that this machine runs.
const Kernels& kernels(Isa isa);

}  // namespace qkernels::cpu
