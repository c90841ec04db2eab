// The schedule of weight_only_mma, chosen by pure functions that need no GPU and no CUDA header.

#pragma once

#include <cstdint>
#include <string>

namespace qkernels {

// What the schedule may depend on.
struct WeightOnlyProblem {
  int64_t m, n, k, group_size;
  int bits;
  int scale_bytes, zero_bytes;  // of one scale or zero point; zero_bytes 0 for none
  int multiprocessors;
  int shared_bytes;  // that a block can have
};

// Schedule of weight_only_mma. A block computes `tokens` columns of Y^T for block_rows() rows of
// the weight, over a part of K.
struct WeightOnlyConfig {
  int tokens;   // 8, 16, 32 or 64
  int split_k;  // parts of K, each of another block; at most as many as there are stages
  int stages;   // of the pipeline that brings weights and activations to shared memory

  // Warps side by side along N and along K: more along K for few tokens, where a block would
  // otherwise span more rows than small layers have; all along N for many, which share x.
  constexpr int warps_n() const { return tokens <= 16 ? 2 : tokens == 32 ? 4 : 8; }
  constexpr int warps_k() const { return 8 / warps_n(); }
  constexpr int block_rows() const { return 32 * warps_n(); }
  // Chunks of 64 columns that a warp takes of a stage. Two spread the costs of a stage, where there
  // is the shared memory for it.
  constexpr int warp_chunks(int bits) const { return bits == 4 && tokens == 8 ? 2 : 1; }
  constexpr int stage_chunks(int bits) const { return warps_k() * warp_chunks(bits); }
};

// The heuristic schedule: a pure function.
WeightOnlyConfig choose_config(const WeightOnlyProblem& problem);

// Groups whose scales a block holds at a time.
int64_t group_slots(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

std::string to_string(const WeightOnlyConfig& config);

// Null where the schedule can run the problem, or the reason why not.
const char* why_not(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// Bytes of shared memory of a block.
int64_t shared_bytes(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// Scratch that the product needs: fp32 partial sums, and counters that must be zero before the
// first call and are zero again after each.
int64_t partial_bytes(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);
int64_t counter_bytes(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

}  // namespace qkernels
