#include "emulator/scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <numeric>
#include <sstream>
#include <vector>

#include "emulator/builtins.h"
#include "emulator/counters.h"
#include "emulator/fiber.h"
#include "emulator/races.h"

// What CUDA gives every thread; set at each switch.
uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace qkernels::emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kMaxSharedBytes = 227 * 1024;  // sm_90 and sm_100; sm_80 has 163 KB, sm_86 99 KB
// Accesses, on average, between two places where a thread gives way without having to.
constexpr uint32_t kAccessesPerSwitch = 64;

// xorshift64*
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed * 0x9e3779b97f4a7c15 + 0x853c49e6748fea9b) {}

  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
  }

  uint32_t below(uint32_t limit) {
    return static_cast<uint32_t>(static_cast<uint64_t>(next()) * limit >> 32);
  }

  // One of the bits that are set.
  int bit_of(uint32_t mask) {
    for (uint32_t k = below(static_cast<uint32_t>(__builtin_popcount(mask))); k > 0; --k) {
      mask &= mask - 1;
    }
    return __builtin_ctz(mask);
  }

 private:
  uint64_t state_;
};

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
  int64_t fenced_at = -1;         // and before its last fence
  bool stores_fenced = true;
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

Machine machine;
Thread* running = nullptr;

Warp& warp_of(const Thread& thread) { return machine.warps[thread.index / kLanes]; }

uint32_t lane_bit(const Thread& thread) { return uint32_t{1} << (thread.index % kLanes); }

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  warp_of(thread).ready |= lane_bit(thread);
  machine.ready_warps |= uint32_t{1} << (thread.index / kLanes);
}

// Takes one of the threads that could run; null where there is none.
Thread* take_ready() {
  if (machine.ready_warps == 0) return nullptr;
  const bool can_stay = (machine.ready_warps >> machine.warp & 1) != 0;
  if (!can_stay || machine.random.next() >= machine.stay) {
    machine.warp = machine.random.bit_of(machine.ready_warps);
  }
  Warp& warp = machine.warps[machine.warp];
  const int lane = machine.random.bit_of(warp.ready);
  warp.ready &= ~(uint32_t{1} << lane);
  if (warp.ready == 0) machine.ready_warps &= ~(uint32_t{1} << machine.warp);
  return &machine.pool[static_cast<size_t>(machine.warp * kLanes + lane)];
}

// `from` is null where the launching thread starts or cancels a block.
void switch_to(Thread* from, Thread* to) {
  ++totals().switches;
  running = to;
  if (to != nullptr) threadIdx.x = static_cast<unsigned>(to->index);
  switch_fiber(from == nullptr ? machine.main : from->fiber,
               to == nullptr ? machine.main : to->fiber);
}

// Runs others until someone has made this thread ready and it is chosen.
void give_way() {
  Thread* const self = running;
  Thread* const next = take_ready();
  if (next == self) return;
  switch_to(self, next);
  if (machine.cancelled) throw Cancelled{};
}

void wait_at(const Site& site) {
  running->state = State::kWaiting;
  running->waits_at = &site;
  give_way();
}

void maybe_give_way() {
  if (--machine.until_switch > 0) return;
  machine.until_switch = 1 + machine.random.below(2 * kAccessesPerSwitch);
  make_ready(*running);
  give_way();
}

std::string describe(const Thread& thread) {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "), thread "
       << thread.index;
  return text.str();
}

void set_error(const std::string& text) {
  if (machine.error.empty()) machine.error = text;
  machine.cancelled = true;
}

std::string describe(const Site& site) {
  return std::string(name_of(site.kind)) + " at " + site.where();
}

Site& pass(Kind kind, int bytes, Place place) {
  Site& site = find_site(kind, bytes, place);
  ++site.passes;
  return site;
}

void check_race(const Site& site, const void* address, int bytes, bool write) {
  if (!machine.races_checked) return;
  const auto offset =
      static_cast<uint32_t>(static_cast<const unsigned char*>(address) - machine.shared);
  const Moment now{running->index, machine.barriers, warp_of(*running).barriers};
  const std::string race = machine.races.access(site, now, offset, bytes, write);
  if (!race.empty()) {
    fail(site, std::string(write ? "writes" : "reads") + " offset " + std::to_string(offset) +
                   " of shared memory, with no barrier after it was " + race);
  }
}

// By count_block a block tells others that what it has stored is there for them, and learns whether
// theirs is. So every thread's stores must be fenced and behind a barrier by then, and what the
// others have stored is read behind a barrier and a fence.
void publishes(const Site& site) {
  for (int t = 0; t < machine.threads; ++t) {
    const Thread& thread = machine.pool[static_cast<size_t>(t)];
    const std::string stores = "a store to global memory by thread " + std::to_string(t);
    if (!thread.stores_fenced) fail(site, stores + " has no fence behind it");
    if (&thread != running && thread.stored_at == machine.barriers) {
      fail(site, "no barrier orders it with " + stores);
    }
  }
  machine.counter = running;
  machine.counted_at = machine.barriers;
}

void check_publication(const Site& site) {
  if (site.kind == Kind::kCountBlock) {
    publishes(site);
  } else if (site.kind == Kind::kStoreGlobal) {
    if (machine.counter != nullptr && machine.counter != running &&
        machine.counted_at == machine.barriers) {
      fail(site, "no barrier orders it with the count_block of another thread");
    }
    running->stored_at = machine.barriers;
    running->stores_fenced = false;
  } else if (site.kind == Kind::kLoadGlobalWritten) {
    if (machine.counter != nullptr && running->fenced_at <= machine.counted_at) {
      fail(site, "no barrier and fence order it with the count_block before it");
    }
  }
}

void land(Thread& thread, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = thread.copies[i];
    // The hardware reads the source at any time before this.
    if (copy.global != nullptr && std::memcmp(copy.bytes, copy.global, sizeof(copy.bytes)) != 0) {
      fail(*copy.site, "the source changed while the copy was under way");
    }
    check_race(*copy.site, copy.shared, 16, true);
    std::memcpy(copy.shared, copy.bytes, sizeof(copy.bytes));
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(count));
}

void finish_barrier() {
  for (int w = 0; w * kLanes < machine.threads; ++w) count_accesses(machine.warps[w].accesses);
  ++totals().sync_threads;
  ++machine.barriers;
  machine.in_barrier = 0;
  for (int t = 0; t < machine.threads; ++t) {
    Thread& thread = machine.pool[static_cast<size_t>(t)];
    if (thread.state == State::kWaiting && thread.waits_at == machine.barrier) make_ready(thread);
  }
}

void finish_meeting(Warp& warp, uint32_t but) {
  count_accesses(warp.accesses);
  if (warp.site->kind == Kind::kSyncWarp) {
    ++totals().sync_warp;
    ++warp.barriers;
  }
  const int first = static_cast<int>(&warp - machine.warps) * kLanes;
  for (uint32_t rest = warp.waiting & ~but; rest != 0; rest &= rest - 1) {
    make_ready(machine.pool[static_cast<size_t>(first + __builtin_ctz(rest))]);
  }
  warp.waiting = 0;
}

// A thread that has returned counts as arrived wherever others wait.
void leave_block(Thread& thread) {
  Warp& warp = warp_of(thread);
  thread.state = State::kDone;
  warp.lanes &= ~lane_bit(thread);
  --machine.alive;
  if (machine.cancelled) return;
  if (warp.waiting != 0 && warp.waiting == warp.lanes) {
    if (warp.site->kind == Kind::kSyncWarp) {
      finish_meeting(warp, 0);
    } else {
      set_error(describe(*warp.site) + ": " + describe(thread) +
                " has returned, and the other lanes of its warp wait for it");
      return;
    }
  }
  if (machine.in_barrier > 0 && machine.in_barrier == machine.alive) finish_barrier();
}

// What a fiber runs for ever: a thread of one block after another.
void fiber_main() {
  entered_fiber();
  Thread& self = *running;
  while (true) {
    try {
      if (!machine.cancelled) {
        machine.call(machine.arguments);
        land(self, self.copies.size());
      }
    } catch (const Cancelled&) {
    } catch (const std::exception& error) {
      set_error(describe(self) + ": " + error.what());
    }
    leave_block(self);
    switch_to(&self, machine.cancelled ? nullptr : take_ready());
  }
}

void report_deadlock() {
  const Thread* first = nullptr;
  const Thread* other = nullptr;
  int waiting = 0;
  for (int t = 0; t < machine.threads; ++t) {
    const Thread& thread = machine.pool[static_cast<size_t>(t)];
    if (thread.state != State::kWaiting) continue;
    ++waiting;
    if (first == nullptr) first = &thread;
    if (other == nullptr && thread.waits_at != first->waits_at) other = &thread;
  }
  std::string text = "deadlock of " + std::to_string(waiting) + " threads: " + describe(*first) +
                     " waits for " + describe(*first->waits_at);
  if (other != nullptr) {
    text += ", thread " + std::to_string(other->index) + " for " + describe(*other->waits_at);
  }
  set_error(text);
}

void cancel_block() {
  for (int t = 0; t < machine.threads; ++t) {
    Thread& thread = machine.pool[static_cast<size_t>(t)];
    if (thread.state != State::kDone) switch_to(nullptr, &thread);
  }
}

void start_block() {
  // A chance of its own for each block: see the head of the header.
  static constexpr uint32_t kStay[] = {0, 0xc0000000, 0xf8000000, 0xffc00000};
  machine.stay = kStay[machine.random.below(4)];
  machine.ready_warps = 0;
  machine.in_barrier = 0;
  machine.barriers = 0;
  machine.counter = nullptr;
  machine.counted_at = -1;
  if (machine.races_checked) machine.races.start_block(machine.shared_bytes);
  machine.alive = machine.threads;
  machine.until_switch = 1 + machine.random.below(2 * kAccessesPerSwitch);
  for (Warp& warp : machine.warps) {
    warp.lanes = warp.ready = warp.waiting = warp.barriers = 0;
    for (auto& accesses : warp.accesses) accesses.clear();
  }
  for (int t = 0; t < machine.threads; ++t) {
    Thread& thread = machine.pool[static_cast<size_t>(t)];
    thread.copies.clear();
    thread.group_ends.clear();
    thread.stored_at = thread.fenced_at = -1;
    thread.stores_fenced = true;
    warp_of(thread).lanes |= lane_bit(thread);
    make_ready(thread);
  }
}

void run_block() {
  // An allocation of its own for each block, of just these bytes, so that AddressSanitizer sees
  // accesses beyond; the bytes are NaN in every type.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, static_cast<size_t>(machine.shared_bytes)) != 0) {
    return set_error("no memory for the block's shared memory");
  }
  machine.shared = static_cast<unsigned char*>(memory);
  std::memset(memory, 0xff, static_cast<size_t>(machine.shared_bytes));
  start_block();
  switch_to(nullptr, take_ready());
  if (machine.alive > 0 && !machine.cancelled) report_deadlock();
  if (machine.cancelled) cancel_block();
  for (int w = 0; w * kLanes < machine.threads; ++w) count_accesses(machine.warps[w].accesses);
  std::free(memory);
  machine.shared = nullptr;
  ++totals().blocks;
}

std::string wrong_launch(Index3 grid, int threads, int shared_bytes) {
  std::ostringstream text;
  if (threads < 1 || threads > kMaxThreads) {
    text << threads << " threads a block; 1 to " << kMaxThreads << " are possible";
  } else if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 0xffff || grid.z < 1 ||
             grid.z > 0xffff) {
    text << "a grid of (" << grid.x << ", " << grid.y << ", " << grid.z
         << "); 1 to (2147483647, 65535, 65535) are possible";
  } else if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    text << shared_bytes << " bytes of shared memory; 0 to " << kMaxSharedBytes << " are possible";
  }
  return text.str();
}

// Offset of an access in shared memory; fails where it is not all inside, or not aligned.
uint32_t checked_shared(const Site& site, const void* address, int bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(machine.shared);
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const auto offset = static_cast<intptr_t>(at - begin);
  const auto outside = [&] { return "offset " + std::to_string(offset) + " of shared memory"; };
  if (offset < 0 || offset + bytes > machine.shared_bytes) {
    fail(site, outside() + " is outside of its " + std::to_string(machine.shared_bytes) +
                   " bytes (" + std::to_string(bytes) + " bytes accessed)");
  }
  if (at % static_cast<uintptr_t>(bytes) != 0) {
    fail(site, outside() + " is not aligned to " + std::to_string(bytes) + " bytes");
  }
  return static_cast<uint32_t>(offset);
}

void check_global(const Site& site, const void* address, int bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % static_cast<uintptr_t>(bytes) != 0) {
    fail(site, "global address ..." + std::to_string(at % 4096) + " is not aligned to " +
                   std::to_string(bytes) + " bytes");
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(machine.shared);
  if (at >= begin && at < begin + static_cast<uintptr_t>(machine.shared_bytes)) {
    fail(site, "an address of shared memory, where one of global memory is asked for");
  }
  if (machine.regions_required && !in_a_region(address, static_cast<size_t>(bytes))) {
    fail(site, "an address outside of every registered region");
  }
}

void record(Site& site, const void* global, uint32_t shared) {
  warp_of(*running).accesses[static_cast<size_t>(running->index % kLanes)].push_back(
      {&site, global, shared});
}

}  // namespace

const char* run_grid(Index3 grid, int threads, int shared_bytes, void (*call)(const void*),
                     const void* arguments) {
  static std::mutex one_at_a_time;
  static std::string last_error;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  machine.error = wrong_launch(grid, threads, shared_bytes);
  machine.cancelled = !machine.error.empty();
  machine.call = call;
  machine.arguments = arguments;
  machine.threads = threads;
  machine.shared_bytes = shared_bytes;
  gridDim = dim3(grid.x, grid.y, grid.z);
  blockDim = dim3(static_cast<unsigned>(threads));
  if (!machine.cancelled) {
    while (machine.pool.size() < static_cast<size_t>(threads)) {
      Thread& thread = machine.pool.emplace_back();
      thread.index = static_cast<int>(machine.pool.size()) - 1;
      make_fiber(thread.fiber, fiber_main);
    }
    std::vector<uint64_t> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), uint64_t{0});
    for (size_t i = blocks.size(); i > 1; --i) {
      std::swap(blocks[i - 1], blocks[machine.random.below(static_cast<uint32_t>(i))]);
    }
    for (const uint64_t block : blocks) {
      blockIdx = {static_cast<unsigned>(block % grid.x),
                  static_cast<unsigned>(block / grid.x % grid.y),
                  static_cast<unsigned>(block / grid.x / grid.y)};
      run_block();
      if (machine.cancelled) break;
    }
  }
  ++totals().launches;
  last_error = machine.error;
  return last_error.empty() ? nullptr : last_error.c_str();
}

void set_seed(uint64_t seed) { machine.random = Random(seed); }

void require_regions(bool required) { machine.regions_required = required; }

void check_races(bool checked) { machine.races_checked = checked; }

unsigned char* shared_memory() { return machine.shared; }

void fail(const Site& site, const std::string& what) {
  set_error(describe(site) + ": " + what + "; " + describe(*running));
  throw Cancelled{};
}

void before_shared(Kind kind, const void* address, int bytes, Place place) {
  Site& site = pass(kind, bytes, place);
  record(site, nullptr, checked_shared(site, address, bytes));
  if (kind != Kind::kLdmatrix) maybe_give_way();
  check_race(site, address, bytes, kind == Kind::kStoreShared);
}

void before_global(Kind kind, const void* address, int bytes, Place place) {
  Site& site = pass(kind, bytes, place);
  check_global(site, address, bytes);
  if (kind == Kind::kAtomicAdd || kind == Kind::kCountBlock) {
    ++totals().atomic_add;
  } else {
    record(site, address, kNoShared);
  }
  // Nobody writes what load_global reads, so its time does not matter.
  if (kind != Kind::kLoadGlobal) maybe_give_way();
  check_publication(site);
}

void copy_async_16(void* shared, const void* global, bool valid, Place place) {
  Site& site = pass(Kind::kCopyAsync16, 16, place);
  Copy copy{{}, shared, valid || site.disabled ? global : nullptr, &site};
  const uint32_t offset = checked_shared(site, shared, 16);
  if (copy.global != nullptr) {
    check_global(site, global, 16);
    // Read now, so that AddressSanitizer's report names this call, and again when it lands.
    std::memcpy(copy.bytes, global, sizeof(copy.bytes));
  }
  // The hardware writes at any time from now on until it lands.
  check_race(site, shared, 16, true);
  record(site, copy.global, offset);
  running->copies.push_back(copy);
  maybe_give_way();
}

void copy_async_commit(Place place) {
  pass(Kind::kCopyAsyncCommit, 0, place);
  running->group_ends.push_back(running->copies.size());
}

void copy_async_wait(int groups, Place place) {
  if (pass(Kind::kCopyAsyncWait, 0, place).disabled) return;
  auto& ends = running->group_ends;
  size_t landed = 0;
  while (ends.size() > static_cast<size_t>(groups)) {
    landed = ends.front();
    ends.pop_front();
  }
  land(*running, landed);
  for (size_t& end : ends) end -= landed;
  maybe_give_way();
}

void meet_warp(Kind kind, void* operands, void (*work)(void* const* operands_of_lanes),
               Place place) {
  Site& site = pass(kind, 0, place);
  if (site.disabled) return;
  Warp& warp = warp_of(*running);
  if (warp.waiting != 0 && warp.site != &site) {
    fail(site, "other lanes of the warp wait for " + describe(*warp.site));
  }
  if (work != nullptr && warp.lanes != 0xffffffff) {
    fail(site, "some lanes of the warp have returned or do not exist");
  }
  warp.site = &site;
  warp.operands[running->index % kLanes] = operands;
  warp.waiting |= lane_bit(*running);
  if (warp.waiting != warp.lanes) return wait_at(site);
  if (kind == Kind::kMma) ++totals().mma;
  if (work != nullptr) work(warp.operands);
  finish_meeting(warp, lane_bit(*running));
}

void sync_threads(Place place) {
  Site& site = pass(Kind::kSyncThreads, 0, place);
  if (site.disabled) return;
  if (machine.in_barrier > 0 && machine.barrier != &site) {
    fail(site, "other threads of the block wait for " + describe(*machine.barrier));
  }
  machine.barrier = &site;
  if (++machine.in_barrier == machine.alive) {
    finish_barrier();
    make_ready(*running);
    give_way();
  } else {
    wait_at(site);
  }
}

void thread_fence(Place place) {
  if (pass(Kind::kThreadFence, 0, place).disabled) return;
  running->stores_fenced = true;
  running->fenced_at = machine.barriers;
}

bool within(int64_t index, int64_t limit, Place place) {
  return pass(Kind::kWithin, 0, place).disabled || index < limit;
}

}  // namespace qkernels::emulator
