// Runs the blocks of a launch one after another, in an order drawn from the seed.
//
// Blocks never run at the same time; what one leaves in global memory for another is checked by
// rule instead, see publishes() in accesses.cpp.

#pragma once

#include <cstdint>

#include "emulator/sites.h"

namespace qkernels::emulator {

struct Index3 {
  unsigned x, y, z;
};

// Runs `call(arguments)` for every thread of the grid. Returns null, or what went wrong, which the
// next launch overwrites. `early`: the kernels before it may not have ended, as long as a thread
// does not wait for them. `place` is where the kernel is launched.
const char* run_grid(Index3 grid, int threads, int shared_bytes, void (*call)(const void*),
                     const void* arguments, bool early, Place place);

void set_seed(uint64_t seed);
void skip_launches(bool skipped);
void run_last_blocks(bool alone);
void fail_launches(const char* file_suffix, const char* error);

}  // namespace qkernels::emulator
