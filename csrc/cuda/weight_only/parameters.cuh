// Between mma.cu, which reads arguments, and the kernels: one function for each decoder,
// instantiated in a source file of its own (instantiate.py) so that they compile side by side.

#pragma once

#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "cuda/weights/decode.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

// How a span is shared out: `share` units of it for each block, and one more for the first
// `longer`.
struct Shares {
  int share, longer;
  Divisor by_share, by_longer_share;  // by_share: where share is not 0

  Shares() = default;
  QK_HOST_DEVICE Shares(int units, int blocks)
      : share(units / blocks),
        longer(units % blocks),
        by_share(share > 0 ? share : 1),
        by_longer_share(share + 1) {}
};

// What experts have to do: written by plan.cu for each call, since how many rows each of them has
// is known to the device alone.
struct Plan {
  Shares shares;
  int tiles;  // that there are
  int unused;
};
static_assert(sizeof(Plan) == 32);

// A tile of tokens of one expert; an array of them follows the plan.
struct PlannedTokens {
  int expert;
  int first, end;  // rows of x
  int unused;
};
static_assert(sizeof(PlannedTokens) == 16);

struct WeightOnlyParameters {
  FragmentWeight weight;
  const unsigned char* x;
  const void* bias;
  void* y;  // of x's type, or of fp32
  bool y_is_float;
  float* partials;
  uint32_t* counters;
  int64_t x_stride;
  int64_t m;
  int64_t rows;  // padded n
  int chunks;    // of 64 columns
  // The line of work (config.h). Spans of it are shared out alike, each by `span_blocks` blocks:
  // all of it, or a tile.
  int units, unit_chunks;  // of a tile; of a unit
  int row_tiles, token_tiles, span_tiles, span_blocks;
  Shares shares;
  const Plan* plan;  // of experts, whose weights lie one behind the other; or null
  int stages;
  // Columns of a group; of a single one, more than there are. A stage is so many groups, and the
  // rest of it.
  int group_columns, stage_groups, stage_rest;
  int groups, slots, scale_bytes, zero_bytes;
  FloatType bias_type;
  Divisor by_units, by_row_tiles, by_token_tiles, by_span_blocks, by_group_columns;
};

// Starts `blocks` blocks of weight_only_mma_kernel for `tokens` tokens. Defined in mma.cuh.
template <template <class> class Decoder, bool kRealZeros>
const char* launch_decoder(const WeightOnlyParameters& parameters, FloatType x_type, int tokens,
                           unsigned blocks, int shared_bytes, Stream stream);

}  // namespace qkernels
