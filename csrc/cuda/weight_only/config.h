// The schedule of weight_only_mma and int8_mma, chosen by pure functions that need no GPU and no
// CUDA header.

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
  int shared_bytes;                 // that a block can have
  int multiprocessor_shared_bytes;  // that all blocks of a multiprocessor can have
  bool each_tile = false;           // see WeightOnlyConfig
  bool y_is_float = false;          // then a block computes 16 tokens at most
  int64_t experts = 0;  // that the rows go to, nobody knows how many to which; 0: one weight
  int x_bytes = 2;      // of a number of x: 1 for int8_mma
};

// Schedule of a product. A tile is `tokens` columns of Y^T by block_rows() rows of the
// weight, over all of K. The tiles, one after the other, are a line of work, and each block takes
// an equal share of it: the end of one tile, perhaps, some whole ones and the beginning of another.
struct WeightOnlyConfig {
  int tokens;  // 8, 16, 32 or 64
  int blocks;  // that share the work: all of it, or with `each_tile` that of a tile
  int stages;  // of the pipeline that brings weights and activations to shared memory
  int unit;    // chunks of 64 columns that shares are whole numbers of: 1, or 2
  // Every tile is shared out in the same way, so that how a sum is added does not depend on M.
  bool each_tile = false;

  // Warps side by side along N and along K: more along K for few tokens, where a block would
  // otherwise span more rows than small layers have; all along N for many, which share x.
  constexpr int warps_n() const { return tokens <= 16 ? 2 : tokens == 32 ? 4 : 8; }
  constexpr int warps_k() const { return 8 / warps_n(); }
  constexpr int block_rows() const { return 32 * warps_n(); }
  // Chunks of 64 columns that a warp takes of a stage. Two spread the costs of a stage, and fill
  // 128 bytes of a row of int8. Codes of 2 and 3 bits lie in spans of two.
  constexpr int warp_chunks(int bits, int x_bytes) const {
    if (x_bytes == 1) return bits == 4 || tokens == 64 ? 2 : 1;
    return bits < 4 || (bits == 4 && tokens <= 16) ? 2 : 1;
  }
  constexpr int stage_chunks(int bits, int x_bytes) const {
    return warps_k() * warp_chunks(bits, x_bytes);
  }
};

// The work of a product in a schedule; with experts, the most that it can be.
struct WeightOnlyWork {
  int64_t row_tiles, token_tiles;
  int64_t units;  // of a tile

  int64_t tiles() const { return row_tiles * token_tiles; }
  int64_t all_units() const { return tiles() * units; }
};

WeightOnlyWork work_of(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// The heuristic schedule: a pure function.
WeightOnlyConfig choose_config(const WeightOnlyProblem& problem);

// The share of a GPU's multiprocessors that are at work on average until the last one is done.
double busy_share(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// Blocks that a multiprocessor has room for at a time.
int resident_blocks(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// Groups whose scales a block holds at a time.
int64_t group_slots(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// The least unit for codes of so many bits.
constexpr int least_unit(int bits) { return bits < 4 ? 2 : 1; }

std::string to_string(const WeightOnlyConfig& config);

// Null where the schedule can run the problem, or the reason why not.
const char* why_not(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// Scratch for what the experts have to do.
int64_t plan_bytes(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// Bytes of shared memory of a block.
int64_t shared_bytes(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

// Scratch that the product needs: fp32 partial sums, and counters, which must be zero before a call
// and are zero again after it.
int64_t partial_bytes(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);
int64_t counter_bytes(const WeightOnlyProblem& problem, const WeightOnlyConfig& config);

}  // namespace qkernels
