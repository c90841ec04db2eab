#include "emulator/scheduler.h"

#include <exception>
#include <sstream>

#include "emulator/builtins.h"
#include "emulator/machine.h"

// What CUDA gives every thread; set at each switch.
uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace qkernels::emulator {

Machine machine;
Thread* running = nullptr;

namespace {

// Accesses, on average, between two places where a thread gives way without having to.
constexpr uint32_t kAccessesPerSwitch = 64;

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

std::string describe(const Thread& thread) {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "), thread "
       << thread.index;
  return text.str();
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
    thread.stored_at = -1;
    thread.has_waited = !machine.early;
    warp_of(thread).lanes |= lane_bit(thread);
    make_ready(thread);
  }
}

}  // namespace

void set_error(const std::string& text) {
  if (machine.error.empty()) machine.error = text;
  machine.cancelled = true;
}

void fail(const Site& site, const std::string& what) {
  set_error(describe(site) + ": " + what + "; " + describe(*running));
  throw Cancelled{};
}

std::string describe(const Site& site) {
  return std::string(name_of(site.kind)) + " at " + site.where();
}

void maybe_give_way() {
  if (--machine.until_switch > 0) return;
  machine.until_switch = 1 + machine.random.below(2 * kAccessesPerSwitch);
  make_ready(*running);
  give_way();
}

void run_threads() {
  while (machine.pool.size() < static_cast<size_t>(machine.threads)) {
    Thread& thread = machine.pool.emplace_back();
    thread.index = static_cast<int>(machine.pool.size()) - 1;
    make_fiber(thread.fiber, fiber_main);
  }
  start_block();
  switch_to(nullptr, take_ready());
  if (machine.alive > 0 && !machine.cancelled) report_deadlock();
  if (machine.cancelled) cancel_block();
  for (int w = 0; w * kLanes < machine.threads; ++w) count_accesses(machine.warps[w].accesses);
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

}  // namespace qkernels::emulator
