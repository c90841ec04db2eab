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

// Parts of N only where tiles leave multiprocessors idle, and none of fewer stages than fill the
// pipeline.
constexpr GradSchedule choose_grad_schedule(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  constexpr int64_t kLeastStages = 4;
  const int tokens = m <= 16 ? 16 : 64;
  const int64_t room = int64_t{multiprocessors} * grad_resident_blocks(tokens);
  const int64_t parts = room / grad_tiles(m, k, tokens), most = grad_stages(n) / kLeastStages;
  const int64_t least = parts < most ? parts : most;
  return {tokens, static_cast<int>(least > 1 ? least : 1)};
}

}  // namespace qkernels
