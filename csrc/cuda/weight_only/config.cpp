#include "cuda/weight_only/config.h"

#include <algorithm>
#include <cstdio>

#include "integers.h"

namespace qkernels {

namespace {

constexpr int64_t kChunk = 64, kWarps = 8;
constexpr int kLeastStages = 2, kMostStages = 6;
constexpr int kMostResident = 2;
constexpr int64_t kReservedBytes = 1024;  // of shared memory, by the system for each block
constexpr int64_t kMostColumns = 1 << 30, kMostUnits = 0x7fffffff;
constexpr int64_t kPlanBytes = 32, kPlannedBytes = 16;  // see parameters.cuh

int64_t stage_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const int64_t x = c.tokens * kChunk * p.x_bytes * c.stage_chunks(p.bits, p.x_bytes);
  return x + kWarps * 32 * kChunk * p.bits / 8 * c.warp_chunks(p.bits, p.x_bytes);
}

int64_t unit_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  return c.block_rows() * kChunk * c.unit * p.bits / 8;
}

// Whether int32 sums are of groups, beside fp32 ones of all: twice the registers.
bool has_group_sums(const WeightOnlyProblem& p) { return p.x_bytes == 1 && p.scale_bytes > 1; }

// Blocks of all tiles.
int64_t all_blocks(const WeightOnlyWork& work, const WeightOnlyConfig& c) {
  return c.each_tile ? c.blocks * work.tiles() : c.blocks;
}

// The largest share of the work that a block takes, in units.
int64_t largest_share(const WeightOnlyWork& work, const WeightOnlyConfig& c) {
  return c.each_tile ? ceil_div(work.units, c.blocks) : ceil_div(work.all_units(), c.blocks);
}

bool is_split(const WeightOnlyProblem& p, const WeightOnlyWork& work, const WeightOnlyConfig& c) {
  if (c.each_tile) return c.blocks > 1;
  // Else each block has whole tiles.
  return p.experts > 0 || work.tiles() % c.blocks != 0;
}

// Blocks of the multiprocessor that has most of them, and their units.
int64_t longest(const WeightOnlyProblem& p, const WeightOnlyWork& work, const WeightOnlyConfig& c) {
  return ceil_div(all_blocks(work, c), p.multiprocessors) * largest_share(work, c);
}

// How long a product takes, in bytes of weights that a multiprocessor reads in that time: what the
// busiest one reads, and what stands still beside it. Derived, not measured: a microsecond is 25 KB
// of an H100's multiprocessor and 6 KB of an L40S's, and adding what several blocks have of a tile
// takes about one; starting over with another tile takes less, and less still where another block
// goes on meanwhile.
double cost(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  constexpr double kAdding = 12 << 10, kStartingOver = 3 << 10;
  // One block of eight warps a multiprocessor waits for its own instructions more often, and shares
  // that begin within what a warp takes at a time have its groups in two pieces.
  constexpr double kAlone = 1.1, kGroupsApart = 1.05;
  const WeightOnlyWork work = work_of(p, c);
  const int64_t blocks = all_blocks(work, c), share = largest_share(work, c);
  const int64_t resident = ceil_div(blocks, p.multiprocessors);
  double time = static_cast<double>(longest(p, work, c) * unit_bytes(p, c));
  if (resident == 1 && share * c.unit > 2 * c.stage_chunks(p.bits, p.x_bytes)) time *= kAlone;
  if (c.unit < c.warp_chunks(p.bits, p.x_bytes)) time *= kGroupsApart;
  if (is_split(p, work, c)) time += kAdding;
  if (!c.each_tile) {
    const bool whole =
        work.all_units() % c.blocks == 0 && (share % work.units == 0 || work.units % share == 0);
    const int64_t pieces =
        whole ? std::max<int64_t>(1, share / work.units) : ceil_div(share - 1, work.units) + 1;
    time += kStartingOver * static_cast<double>(pieces - 1) / static_cast<double>(resident);
  }
  return time;
}

}  // namespace

WeightOnlyWork work_of(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  // Each expert that has rows may leave a tile of tokens unfilled.
  const int64_t token_tiles =
      p.experts == 0 ? ceil_div(p.m, c.tokens) : p.m / c.tokens + std::min(p.experts, p.m);
  return {ceil_div(p.n, c.block_rows()), token_tiles, ceil_div(ceil_div(p.k, kChunk), c.unit)};
}

int64_t plan_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  return p.experts == 0 ? 0 : kPlanBytes + work_of(p, c).token_tiles * kPlannedBytes;
}

int64_t group_slots(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  if (p.group_size >= p.k) return 1;
  const int64_t touched =
      ceil_div(c.stages * kChunk * c.stage_chunks(p.bits, p.x_bytes), p.group_size) + 1;
  // An even number: integer zero points of 64 rows fill half of the banks, and those of two groups
  // that are copied together must not fall on the same half where the slots start over.
  return ceil_div(touched, 2) * 2;
}

int64_t shared_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const int64_t groups = group_slots(p, c) * c.block_rows() * (p.scale_bytes + p.zero_bytes);
  const int64_t stages = c.stages * stage_bytes(p, c) + groups;
  // The sums of a block take the place of its stages; whether it is the last one follows them.
  const int64_t sums = int64_t{c.warps_k()} * c.tokens * (c.block_rows() + 4) * 4 + 16;
  return std::max(stages, sums);
}

int resident_blocks(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const int64_t fit = p.multiprocessor_shared_bytes / (shared_bytes(p, c) + kReservedBytes);
  // What the registers suffice for: kResidentBlocks in mma.cuh, kInt8Blocks in
  // int8/mma.cuh. Integer zero points are bytes.
  const bool wide =
      p.x_bytes == 1 ? p.scale_bytes + p.zero_bytes > 0 : p.bits != 4 || p.zero_bytes > 1;
  const bool widest = has_group_sums(p) && p.zero_bytes > 0;
  const bool alone = c.tokens == 64 || (c.tokens == 32 && wide) || (c.tokens == 16 && widest);
  const int64_t most = alone ? 1 : kMostResident;
  return static_cast<int>(std::clamp<int64_t>(fit, 1, most));
}

int64_t partial_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const WeightOnlyWork work = work_of(p, c);
  if (!is_split(p, work, c)) return 0;
  // A block leaves the sums of two tiles at most, its first and its last.
  return 2 * all_blocks(work, c) * c.tokens * c.block_rows() * 4;
}

int64_t counter_bytes(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const WeightOnlyWork work = work_of(p, c);
  return is_split(p, work, c) ? work.tiles() * 4 : 0;
}

const char* why_not(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  if (c.tokens != 8 && c.tokens != 16 && c.tokens != 32 && c.tokens != 64) {
    return "a block computes 8, 16, 32 or 64 tokens";
  }
  if (p.y_is_float && c.tokens > 16) return "a block computes 8 or 16 tokens of fp32";
  if (has_group_sums(p) && c.tokens > 32) {
    return "a block computes 8, 16 or 32 tokens of int8 with floating scales of groups";
  }
  if (c.stages < kLeastStages || c.stages > kMostStages) return "the pipeline has 2 to 6 stages";
  if (c.unit != 1 && c.unit != 2) return "a unit of work is 1 or 2 chunks of columns";
  if (c.unit < least_unit(p.bits)) return "a unit of 2 or 3 bits is 2 chunks of columns";
  const WeightOnlyWork work = work_of(p, c);
  if (p.k > kMostColumns) return "K is 2^30 at most";
  if (p.experts > 0 && p.m > kMostColumns) return "experts take 2^30 rows at most";
  if ((c.each_tile ? all_blocks(work, c) : work.all_units()) > kMostUnits) {
    return "x and the weight have more tiles than a launch can count";
  }
  if (c.blocks < 1 || c.blocks > (c.each_tile ? work.units : work.all_units())) {
    return "there is a block for each unit of work at most, and at least one";
  }
  if (shared_bytes(p, c) > p.shared_bytes) return "a block does not fit the shared memory";
  return nullptr;
}

WeightOnlyConfig choose_config(const WeightOnlyProblem& p) {
  if (p.experts > 0 && p.each_tile) {
    // A row is what it would be with the expert's weight alone.
    WeightOnlyProblem alone = p;
    alone.experts = 0;
    return choose_config(alone);
  }
  WeightOnlyConfig c;
  // Of experts that have rows, as many as each has on average.
  const int64_t m = p.experts == 0 ? p.m : ceil_div(p.m, std::min(p.experts, p.m));
  c.tokens = m <= 8 ? 8 : m <= 16 || p.y_is_float ? 16 : m <= 32 || has_group_sums(p) ? 32 : 64;
  c.each_tile = p.each_tile;
  c.unit = c.warp_chunks(p.bits, p.x_bytes);
  // Four stages hide the latency of memory, and three where two blocks then fit; one block alone
  // takes as many as there is room for.
  const auto fits = [&](int stages, int resident) {
    c.stages = stages;
    return shared_bytes(p, c) <= p.shared_bytes && resident_blocks(p, c) >= resident;
  };
  if (!fits(4, kMostResident) && !fits(3, kMostResident)) {
    c.stages = kMostStages;
    while (shared_bytes(p, c) > p.shared_bytes && c.stages > kLeastStages) --c.stages;
    while (shared_bytes(p, c) > p.shared_bytes && c.tokens > 8) {
      c.tokens /= 2;
      c.unit = c.warp_chunks(p.bits, p.x_bytes);
    }
  }
  const int resident = resident_blocks(p, c), widest = c.unit;
  WeightOnlyConfig best = c;
  double least = -1;
  const auto consider = [&](int64_t blocks) {
    const WeightOnlyWork work = work_of(p, c);
    c.blocks = static_cast<int>(
        std::clamp<int64_t>(blocks, 1, c.each_tile ? work.units : work.all_units()));
    const double time = cost(p, c);
    if (least < 0 || time < least) {
      least = time;
      best = c;
    }
  };
  if (p.experts > 0) {
    // How much there is to do is not known, and shares are equal whatever it is.
    consider(int64_t{resident} * p.multiprocessors);
    return best;
  }
  for (c.unit = widest; c.unit >= least_unit(p.bits); --c.unit) {
    const int64_t tiles = work_of(p, c).tiles(), slots = resident * p.multiprocessors;
    if (c.each_tile) {
      for (int64_t blocks = 1; blocks == 1 || blocks * tiles <= slots; ++blocks) consider(blocks);
      continue;
    }
    for (int64_t parts = 1; parts == 1 || parts * tiles <= slots; ++parts) consider(parts * tiles);
    for (int i = 1; i <= resident; ++i) consider(i * p.multiprocessors);
  }
  return best;
}

double busy_share(const WeightOnlyProblem& p, const WeightOnlyConfig& c) {
  const WeightOnlyWork work = work_of(p, c);
  return static_cast<double>(work.all_units()) /
         static_cast<double>(longest(p, work, c) * p.multiprocessors);
}

std::string to_string(const WeightOnlyConfig& c) {
  char text[128];
  std::snprintf(text, sizeof(text), "tokens %d, rows %d, warps %dx%d, blocks %d%s, stages %d",
                c.tokens, c.block_rows(), c.warps_n(), c.warps_k(), c.blocks,
                c.each_tile ? " a tile" : "", c.stages);
  return text;
}

}  // namespace qkernels
