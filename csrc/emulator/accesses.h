// What a thread of a kernel does to memory: checked, counted, and put in order with what the others
// do.

#pragma once

#include <cstdint>

#include "emulator/sites.h"

namespace qkernels::emulator {

void require_regions(bool required);
void check_races(bool checked);

// What follows is called by a thread of a kernel.

unsigned char* shared_memory();

// Before an access of `bytes` bytes: checks it, counts it, and may let other threads run. False
// where the site is disabled: then the access is not to be made.
bool before_shared(Kind kind, const void* address, int bytes, Place place);
bool before_global(Kind kind, const void* address, int bytes, Place place);

void copy_async_16(void* shared, const void* global, bool valid, Place place);
void copy_async_commit(Place place);
void copy_async_wait(int groups, Place place);

void start_next_kernel(Place place);
void wait_for_kernels_before(Place place);
void prefetch(const void* global, uint32_t bytes, Place place);

bool within(int64_t index, int64_t limit, Place place);

}  // namespace qkernels::emulator
