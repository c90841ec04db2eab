// The schedule of weight_only_grad, chosen by pure functions that need no GPU and no CUDA header.

#pragma once

#include <cstdint>

namespace qkernels {

constexpr int kGradBlockColumns = 256;  // of the weight, which are those of dx
constexpr int kGradStageRows = 64;      // of the weight, which are columns of dy

// A tile is `tokens` rows of dx by kGradBlockColumns of its columns, summed over all N.
struct GradSchedule {
  int tokens;  // 16 or 64
  int parts;   // of N, each of another block, for each tile
};

// Tiles of dx [m, k].
constexpr int64_t grad_tiles(int64_t m, int64_t k, int tokens) {
  return (m + tokens - 1) / tokens * ((k + kGradBlockColumns - 1) / kGradBlockColumns);
}

// Stages of n rows.
constexpr int64_t grad_stages(int64_t n) { return (n + kGradStageRows - 1) / kGradStageRows; }

// Blocks of a multiprocessor that registers suffice for: the sums of 64 tokens take too many for
// two.
constexpr int grad_resident_blocks(int tokens) { return tokens == 64 ? 1 : 2; }

// How long a schedule takes, in quarters of what a block takes for a stage: its waves of blocks,
// and what the last block of a tile adds. Derived, not measured: the sums of a part are 1 KB a
// token, which a multiprocessor reads from the second-level cache while it would multiply a stage
// and a half of 64 tokens, or wait for a quarter of one of 16.
constexpr int64_t grad_cost(int64_t tiles, int64_t stages, const GradSchedule& c,
                            int multiprocessors) {
  const int64_t room = int64_t{multiprocessors} * grad_resident_blocks(c.tokens);
  const int64_t waves = (tiles * c.parts + room - 1) / room;
  const int64_t adding = c.parts == 1 ? 0 : c.parts * (c.tokens == 64 ? 6 : 1);
  return 4 * waves * ((stages + c.parts - 1) / c.parts) + adding;
}

// The number of parts that costs least, of such as fill the pipeline and a few waves at most.
constexpr GradSchedule choose_grad_schedule(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  constexpr int64_t kLeastStages = 4, kMostWaves = 4;
  GradSchedule best = {m <= 16 ? 16 : 64, 1}, next = best;
  const int64_t tiles = grad_tiles(m, k, best.tokens), stages = grad_stages(n);
  const int64_t room = int64_t{multiprocessors} * grad_resident_blocks(best.tokens);
  for (next.parts = 2; next.parts <= stages / kLeastStages; ++next.parts) {
    if (tiles * next.parts > kMostWaves * room) break;
    if (grad_cost(tiles, stages, next, multiprocessors) <
        grad_cost(tiles, stages, best, multiprocessors)) {
      best = next;
    }
  }
  return best;
}

}  // namespace qkernels
