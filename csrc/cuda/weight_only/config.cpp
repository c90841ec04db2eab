#include "cuda/weight_only/config.h"

#include <algorithm>
#include <cstdio>

#include "integers.h"

namespace qkernels {

namespace {

constexpr int64_t kChunk = 64, kWarps = 8;
constexpr int kMostStages = 6;

int64_t stage_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const int64_t x = c.tokens * kChunk * 2 * c.stage_chunks(p.bits);
  return x + kWarps * 32 * kChunk * p.bits / 8 * c.warp_chunks(p.bits);
}

}  // namespace

int64_t group_slots(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const int64_t groups = ceil_div(p.k, p.group_size);
  const int64_t touched = ceil_div(c.stages * kChunk * c.stage_chunks(p.bits), p.group_size) + 1;
  // An even number: integer zero points of 64 rows fill half of the banks, and those of two groups
  // that are copied together must not fall on the same half where the slots start over.
  return groups == 1 ? 1 : ceil_div(std::min(groups, touched), 2) * 2;
}

int64_t shared_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const int64_t groups = group_slots(p, c) * c.block_rows() * (p.scale_bytes + p.zero_bytes);
  const int64_t stages = c.stages * stage_bytes(p, c) + groups;
  // The sums of a block take the place of its stages; the count of arrived blocks follows them.
  const int64_t sums = int64_t{c.warps_k()} * c.tokens * (c.block_rows() + 4) * 4 + 16;
  return std::max(stages, sums);
}

int64_t partial_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  if (c.split_k == 1) return 0;
  const int64_t tiles = ceil_div(p.n, c.block_rows()) * ceil_div(p.m, c.tokens);
  return tiles * c.split_k * c.tokens * c.block_rows() * 4;
}

int64_t counter_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  return ceil_div(p.n, c.block_rows()) * ceil_div(p.m, c.tokens) * 4;
}

const char* why_not(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  if (c.tokens != 8 && c.tokens != 16 && c.tokens != 32 && c.tokens != 64) {
    return "a block computes 8, 16, 32 or 64 tokens";
  }
  if (c.stages < 2 || c.stages > kMostStages) return "the pipeline has 2 to 6 stages";
  if (c.split_k < 1) return "K is split into 1 part or more";
  if (shared_bytes(p, c) > p.shared_bytes) return "a block does not fit the shared memory";
  return nullptr;
}

WeightOnlyConfig choose_config(const WeightOnlyProblem& p) {
  WeightOnlyConfig c;
  c.tokens = p.m <= 8 ? 8 : p.m <= 16 ? 16 : p.m <= 32 ? 32 : 64;
  c.split_k = 1;
  // Weights under way hide the latency of memory; four stages of two blocks are 48 KB of them.
  c.stages = 4;
  while (shared_bytes(p, c) > p.shared_bytes && c.stages > 2) --c.stages;
  while (shared_bytes(p, c) > p.shared_bytes && c.tokens > 8) c.tokens /= 2;
  const int64_t resident = c.tokens < 64 && 2 * shared_bytes(p, c) <= p.shared_bytes ? 2 : 1;
  const int64_t slots = resident * p.multiprocessors;
  const int64_t blocks = ceil_div(p.n, c.block_rows()) * ceil_div(p.m, c.tokens);
  const int64_t steps = ceil_div(ceil_div(p.k, kChunk), c.stage_chunks(p.bits));
  // Waves of blocks times the steps of each, a start of about three steps included, and for each
  // part of K a little for adding it. Not measured on a GPU.
  double best = 0;
  for (int64_t split = 1; split <= std::max<int64_t>(1, steps / 2); ++split) {
    if (split > 1 && blocks * split > 2 * slots) break;
    const double waves = static_cast<double>(ceil_div(blocks * split, slots));
    const double time = waves * (static_cast<double>(ceil_div(steps, split)) + 3) +
                        (split > 1 ? 1 + 0.1 * static_cast<double>(split) : 0);
    if (split == 1 || time < best) {
      best = time;
      c.split_k = static_cast<int>(split);
    }
  }
  return c;
}

std::string to_string(const WeightOnlyConfig& c) {
  char text[96];
  std::snprintf(text, sizeof(text), "tokens %d, rows %d, warps %dx%d, split_k %d, stages %d",
                c.tokens, c.block_rows(), c.warps_n(), c.warps_k(), c.split_k, c.stages);
  return text;
}

}  // namespace qkernels
