// What each expert has to do: tiles of tokens, one behind the other, and how they are shared out.

#include <climits>

#include "cuda/weight_only/parameters.cuh"
#include "cuda/weight_only/weight_only.h"

namespace qkernels {

namespace {

constexpr int kThreads = 256;

struct PlanParameters {
  const int32_t* ends;
  Plan* plan;
  uint16_t* y;
  int64_t n;
  int experts, m;
  int tokens, most_tiles;  // of a tile; of all experts
  int row_units;           // units of a tile of tokens, over all rows of a weight
  int row_tiles, blocks;
};

// Rows of an expert: whatever `ends` says, rows that there are.
struct ExpertRows {
  int begin, end;
};

QK_DEVICE int clamp(int value, int least, int most) {
  return value < least ? least : value > most ? most : value;
}

QK_DEVICE ExpertRows rows_of(const PlanParameters& p, int expert) {
  ExpertRows rows;
  rows.begin = expert == 0 ? 0 : clamp(ptx::load_global<int>(p.ends + expert - 1), 0, p.m);
  rows.end = clamp(ptx::load_global<int>(p.ends + expert), rows.begin, p.m);
  return rows;
}

QK_DEVICE int tiles_of(const PlanParameters& p, ExpertRows rows) {
  return (rows.end - rows.begin + p.tokens - 1) / p.tokens;
}

// One block. A thread plans experts that follow each other.
QK_KERNEL void plan_kernel(const QK_GRID_CONSTANT PlanParameters p) {
  const int thread = threadIdx.x, each = (p.experts + kThreads - 1) / kThreads;
  const int first = thread * each, last = first + each;
  const ptx::Shared counts(ptx::shared_memory());
  int own = 0;
  for (int e = first; ptx::within(e, last) && ptx::within(e, p.experts); ++e) {
    own += tiles_of(p, rows_of(p, e));
  }
  ptx::store_shared<int>(counts + thread * 4, own);
  ptx::sync_threads();
  int64_t at = 0, all = 0;
  for (int t = 0; t < kThreads; ++t) {
    const int count = ptx::load_shared<int>(counts + t * 4);
    if (t < thread) at += count;
    all += count;
  }
  const int tiles = all < p.most_tiles ? static_cast<int>(all) : p.most_tiles;
  auto* planned = reinterpret_cast<PlannedTokens*>(p.plan + 1);
  for (int e = first; ptx::within(e, last) && ptx::within(e, p.experts); ++e) {
    const ExpertRows rows = rows_of(p, e);
    for (int row = rows.begin; row < rows.end; row += p.tokens, ++at) {
      if (!ptx::within(at, tiles)) break;
      const uint4 tokens = {static_cast<unsigned>(e), static_cast<unsigned>(row),
                            static_cast<unsigned>(rows.end), 0};
      ptx::store_global<uint4>(planned + at, tokens);
    }
  }
  if (thread == 0) {
    const Shares shares(tiles * p.row_units, p.blocks);
    const uint4 begin = {static_cast<unsigned>(shares.share), static_cast<unsigned>(shares.longer),
                         shares.by_share.factor, static_cast<unsigned>(shares.by_share.shift)};
    const uint4 end = {shares.by_longer_share.factor,
                       static_cast<unsigned>(shares.by_longer_share.shift),
                       static_cast<unsigned>(tiles * p.row_tiles), 0};
    ptx::store_global<uint4>(p.plan, begin);
    ptx::store_global<uint4>(&p.plan->shares.by_longer_share, end);
  }
  // Rows of no expert. Who sorts rows has none of them, so that a block is enough.
  const int64_t from = rows_of(p, p.experts - 1).end * p.n, to = p.m * p.n;
#pragma unroll 1
  for (int64_t i = from + thread; ptx::within(i, to); i += kThreads) {
    ptx::store_global<uint16_t>(p.y + i, 0);
  }
}

}  // namespace

const char* plan_experts(const WeightOnlyArguments& arguments, const WeightOnlyProblem& problem,
                         const WeightOnlyConfig& config, Stream stream) {
  const WeightOnlyWork work = work_of(problem, config);
  PlanParameters p;
  p.ends = arguments.ends;
  p.plan = static_cast<Plan*>(arguments.plan);
  p.y = static_cast<uint16_t*>(arguments.y);
  p.n = problem.n;
  p.experts = static_cast<int>(arguments.experts);
  p.m = static_cast<int>(arguments.m);
  p.tokens = config.tokens;
  p.most_tiles = static_cast<int>(work.token_tiles);
  p.row_units = static_cast<int>(work.row_tiles * work.units);
  p.row_tiles = static_cast<int>(work.row_tiles);
  p.blocks = config.blocks;
  return launch(plan_kernel, dim3{1, 1, 1}, kThreads, kThreads * 4, stream, p);
}

}  // namespace qkernels
