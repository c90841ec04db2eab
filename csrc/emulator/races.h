// Finds two accesses to shared memory, one of them a write, by threads that no barrier puts in
// order: whatever the order in which this run happened to make them.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/sites.h"

namespace qkernels::emulator {

// Who accesses memory, and after how many barriers. Only sync_threads and sync_warp are barriers:
// ldmatrix and mma order no other access.
struct Moment {
  int thread;
  uint32_t block_barriers;
  uint32_t warp_barriers;  // of the thread's warp, in the block so far
};

class Races {
 public:
  void start_block(int shared_bytes);

  // Notes an access, and returns what it races with in words, or nothing.
  std::string access(const Site& site, const Moment& now, uint32_t offset, int bytes, bool write);

 private:
  // The last access, or several that were not in order either: reads by many threads.
  struct Mark {
    const Site* site = nullptr;  // null for none
    Moment moment{};
    bool threads = false;  // not only moment.thread
    bool warps = false;    // not only its warp
    bool narrow = false;   // of less than a unit
  };
  struct Unit {
    Mark read, write;
  };

  static bool in_order(const Mark& mark, const Moment& now);
  static std::string describe(const Mark& mark, bool write);

  std::vector<Unit> units_;
};

}  // namespace qkernels::emulator
