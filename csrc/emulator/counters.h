// Counts memory traffic as a GPU makes it: by instructions of a warp, from the accesses of lanes.
//
// The k-th call of each lane from one site, since the warp last met, is one instruction. It touches
// each 32-byte sector of global memory once. Shared memory has 32 banks of 4 bytes and answers, in
// one wavefront, any lanes that ask for at most one word of each bank; 8-byte accesses go by half
// warps and 16-byte ones by quarter warps, each with wavefronts of their own.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/sites.h"

namespace qkernels::emulator {

constexpr int kLanes = 32;
constexpr uintptr_t kSectorBytes = 32;

// One access of one lane.
struct Access {
  Site* site;
  const void* global;  // null for none
  uint32_t shared;     // offset in shared memory, or kNoShared
};
constexpr uint32_t kNoShared = 0xffffffff;

using WarpAccesses = std::array<std::vector<Access>, kLanes>;

// Counts the accesses since the warp last met, and forgets them.
void count_accesses(WarpAccesses& accesses);

// A buffer in global memory whose sectors are counted one by one.
void register_region(const char* name, const void* begin, size_t bytes);
bool in_a_region(const void* address, size_t bytes);

struct Totals {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t switches = 0;
  int64_t mma = 0;           // of a warp
  int64_t sync_warp = 0;     // of a warp
  int64_t sync_threads = 0;  // of a block
  int64_t atomic_add = 0;    // of a thread
};
Totals& totals();

// Sets all counts to zero, those of the sites too, and forgets the regions.
void reset_counters();

std::string counters_json();
std::string sites_json();

}  // namespace qkernels::emulator
