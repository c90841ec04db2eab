// Runs the blocks of a launch one after another, and the threads of a block as fibers, both in an
// order drawn from the seed.
//
// A thread gives way to another where it waits, and now and then where it touches memory that
// others touch. Blocks never run at the same time; what one leaves in global memory for another is
// checked by rule instead, see publishes() in scheduler.cpp. Whichever warp ran goes on with a
// chance that is drawn for each block, so that warps run side by side in some blocks and far ahead
// of each other in some.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator/sites.h"

namespace qkernels::emulator {

// Thrown through a kernel to end it.
struct Cancelled {};

struct Index3 {
  unsigned x, y, z;
};

// Runs `call(arguments)` for every thread of the grid. Returns null, or what went wrong.
const char* run_grid(Index3 grid, int threads, int shared_bytes, void (*call)(const void*),
                     const void* arguments);

void set_seed(uint64_t seed);
void require_regions(bool required);
void check_races(bool checked);

// What follows is called by a thread of a kernel.

unsigned char* shared_memory();

// Ends the launch with this error.
[[noreturn]] void fail(const Site& site, const std::string& what);

// Before an access of `bytes` bytes: checks it, counts it, and may let other threads run.
void before_shared(Kind kind, const void* address, int bytes, Place place);
void before_global(Kind kind, const void* address, int bytes, Place place);

void copy_async_16(void* shared, const void* global, bool valid, Place place);
void copy_async_commit(Place place);
void copy_async_wait(int groups, Place place);

// All lanes of the warp wait for each other; then `work` runs once on the operands they brought.
// Lanes that have returned are not waited for if there is no work.
void meet_warp(Kind kind, void* operands, void (*work)(void* const* operands_of_lanes),
               Place place);
void sync_threads(Place place);
void thread_fence(Place place);

bool within(int64_t index, int64_t limit, Place place);

}  // namespace qkernels::emulator
