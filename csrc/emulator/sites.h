// The places in the kernels' source from which a function of ptx.cuh is called, and what is counted
// for each.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace qkernels::emulator {

// What a call is: a function of ptx.cuh.
enum class Kind : uint8_t {
  kLoadGlobal,
  kLoadGlobalWritten,
  kStoreGlobal,
  kAtomicAdd,
  kCountBlock,
  kCopyAsync16,
  kCopyAsyncCommit,
  kCopyAsyncWait,
  kLoadShared,
  kStoreShared,
  kLdmatrix,
  kMma,
  kMovmatrix,
  kShuffle,
  kSyncThreads,
  kSyncWarp,
  kStartNextKernel,
  kWaitForKernelsBefore,
  kPrefetch,
  kWithin,
};
constexpr int kKinds = static_cast<int>(Kind::kWithin) + 1;

const char* name_of(Kind kind);

struct Place {
  const char* file;
  int line;
};

bool ends_with(const std::string& path, const std::string& suffix);

struct Site {
  Kind kind;
  int bytes;  // that a lane reads or writes; 0 where it does not access memory
  std::string file;
  int line;
  bool disabled = false;

  int64_t passes = 0;        // by threads
  int64_t instructions = 0;  // of a warp
  // Of global memory.
  int64_t global_bytes = 0;
  int64_t sectors = 0;
  // Of shared memory.
  int64_t wavefronts = 0;
  int64_t ideal_wavefronts = 0;

  // While the accesses of a warp are put together (counters.cpp).
  std::vector<int> instructions_seen;
  uint64_t seen_at = 0;
  uint64_t lane_seen_at = 0;
  uint32_t next = 0;

  std::string where() const;
};

// The one record of a place. Calls on one line of the same kind and size share it.
Site& find_site(Kind kind, int bytes, Place place);

// In the order in which they were first passed.
const std::vector<Site*>& all_sites();

// Disables the sites of `kind` in files whose path ends in `file_suffix`, at `line`; those found
// later too. A null kind enables every site again.
void disable_site(const char* kind, const char* file_suffix, int line);

}  // namespace qkernels::emulator
