// Runs the threads of a block as fibers, in an order drawn from the seed.
//
// A thread gives way to another where it waits, and now and then where it touches memory that
// others touch. Whichever warp ran goes on with a chance that is drawn for each block, so that
// warps run side by side in some blocks and far ahead of each other in some.

#pragma once

#include "emulator/sites.h"

namespace qkernels::emulator {

// Called by a thread of a kernel.

// All lanes of the warp wait for each other; then `work` runs once on the operands they brought.
// Lanes that have returned are not waited for if there is no work.
void meet_warp(Kind kind, void* operands, void (*work)(void* const* operands_of_lanes),
               Place place);
void sync_threads(Place place);

}  // namespace qkernels::emulator
