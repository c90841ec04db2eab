// The state of the launch that runs: its threads, and who waits for whom. It is shared by
// launches.cpp, which runs blocks, scheduler.cpp, which runs their threads, and accesses.cpp, which
// checks what threads do to memory; nobody else includes this.

#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "emulator/counters.h"
#include "emulator/fiber.h"
#include "emulator/races.h"
#include "emulator/random.h"
#include "emulator/sites.h"

namespace qkernels::emulator {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;

struct Copy {
  unsigned char bytes[16];
  void* shared;
  const void* global;  // null: zeros
  Site* site;
};

enum class State : uint8_t { kReady, kWaiting, kDone };

struct Thread {
  Fiber fiber;
  int index = 0;
  State state = State::kDone;
  const Site* waits_at = nullptr;
  std::vector<Copy> copies;       // in the order of their start
  std::deque<size_t> group_ends;  // in `copies`, of the groups that have not landed
  int64_t stored_at = -1;         // barriers before its last store to global memory
  bool has_waited = false;        // for the kernels before this one
};

struct Warp {
  uint32_t lanes = 0;  // that exist and have not returned
  uint32_t ready = 0;  // that could run, but for the one that runs
  uint32_t waiting = 0;
  const Site* site = nullptr;  // where `waiting` wait
  void* operands[kLanes];
  WarpAccesses accesses;
  uint32_t barriers = 0;  // in this block
};

struct Machine {
  Fiber main;
  std::deque<Thread> pool;
  Warp warps[kMaxWarps];
  uint32_t ready_warps = 0;
  int warp = 0;  // that runs

  void (*call)(const void*) = nullptr;
  const void* arguments = nullptr;
  int threads = 0;
  int alive = 0;

  unsigned char* shared = nullptr;
  int shared_bytes = 0;
  bool early = false;  // the kernels before may not have ended

  int in_barrier = 0;
  const Site* barrier = nullptr;
  uint32_t barriers = 0;            // in this block
  const Thread* counter = nullptr;  // that called count_block last, after so many barriers:
  int64_t counted_at = -1;

  Races races;
  bool races_checked = false;

  Random random;
  uint32_t stay = 0;  // out of 2^32: the chance that the warp that runs goes on
  uint32_t until_switch = 1;
  bool regions_required = false;

  bool cancelled = false;
  std::string error;
};

extern Machine machine;
extern Thread* running;

inline Warp& warp_of(const Thread& thread) { return machine.warps[thread.index / kLanes]; }

inline uint32_t lane_bit(const Thread& thread) { return uint32_t{1} << (thread.index % kLanes); }

// Thrown through a kernel to end it.
struct Cancelled {};

// Ends the launch with this error, as soon as the thread that runs gives way.
void set_error(const std::string& text);

// Ends it here, with what is wrong at a site.
[[noreturn]] void fail(const Site& site, const std::string& what);

std::string describe(const Site& site);

// Counts a pass of the thread that runs.
inline Site& pass(Kind kind, int bytes, Place place) {
  Site& site = find_site(kind, bytes, place);
  ++site.passes;
  return site;
}

// Lets other threads run now and then.
void maybe_give_way();

// Runs the threads of block blockIdx from their start to their end.
void run_threads();

// The first `count` copies of a thread land in shared memory.
void land(Thread& thread, size_t count);

}  // namespace qkernels::emulator
