// What the walk (walk.cuh) goes by: read from arguments and a schedule on the host.

#pragma once

#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "cuda/weight_only/config.h"
#include "cuda/weights/fragment.cuh"
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

// Columns of a group that spans all of K: more than any weight has, and whole chunks.
constexpr int kOneGroup = 0x7fffff80;

struct WalkParameters {
  FragmentWeight weight;
  const unsigned char* x;
  void* partials;  // sums of 4 bytes
  uint32_t* counters;
  int64_t x_stride;  // in numbers
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
  Divisor by_units, by_row_tiles, by_token_tiles, by_span_blocks, by_group_columns;

  // All but x, its stride, the scratch and the plan.
  void set(const FragmentWeight& of, const WeightOnlyProblem& problem,
           const WeightOnlyConfig& config) {
    const WeightOnlyWork work = work_of(problem, config);
    weight = of;
    m = problem.m;
    rows = padded_rows(of.n);
    chunks = static_cast<int>(padded_columns(of.k, problem.bits) / kChunkColumns);
    units = static_cast<int>(work.units);
    unit_chunks = config.unit;
    row_tiles = static_cast<int>(work.row_tiles);
    token_tiles = static_cast<int>(work.token_tiles);
    span_tiles = static_cast<int>(config.each_tile ? 1 : work.tiles());
    span_blocks = config.blocks;
    shares =
        Shares(static_cast<int>(config.each_tile ? work.units : work.all_units()), config.blocks);
    stages = config.stages;
    groups = static_cast<int>(ceil_div(of.k, of.group_size));
    slots = static_cast<int>(group_slots(problem, config));
    scale_bytes = problem.scale_bytes;
    zero_bytes = problem.zero_bytes;
    group_columns = groups == 1 ? kOneGroup : static_cast<int>(of.group_size);
    const int stage_columns = config.stage_chunks(problem.bits, problem.x_bytes) * kChunkColumns;
    stage_groups = stage_columns / group_columns;
    stage_rest = stage_columns % group_columns;
    by_units = Divisor(units);
    by_row_tiles = Divisor(row_tiles);
    by_token_tiles = Divisor(token_tiles);
    by_span_blocks = Divisor(span_blocks);
    by_group_columns = Divisor(group_columns);
  }
};

// Blocks of a launch.
inline unsigned grid_blocks(const WeightOnlyProblem& problem, const WeightOnlyConfig& config) {
  const int64_t tiles = config.each_tile ? work_of(problem, config).tiles() : 1;
  return static_cast<unsigned>(tiles * config.blocks);
}

}  // namespace qkernels
