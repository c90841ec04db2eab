#include "emulator/accesses.h"

#include <cstring>

#include "emulator/machine.h"

namespace qkernels::emulator {
namespace {

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

// By count_block, which releases and acquires, a block tells others that what it has stored is
// there for them, and learns whether theirs is. For the other threads of the block, barriers do the
// rest: their stores come before one, and what other blocks have stored is read after one.
void publishes(const Site& site) {
  for (int t = 0; t < machine.threads; ++t) {
    const Thread& thread = machine.pool[static_cast<size_t>(t)];
    const std::string stores = "a store to global memory by thread " + std::to_string(t);
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
  } else if (site.kind == Kind::kLoadGlobalWritten) {
    if (machine.counter != nullptr && machine.counter != running &&
        machine.counted_at == machine.barriers) {
      fail(site, "no barrier orders it with the count_block before it");
    }
  }
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

void check_region(const Site& site, const void* address, size_t bytes) {
  if (machine.regions_required && !in_a_region(address, bytes)) {
    fail(site, "an address outside of every registered region");
  }
}

void check_global(const Site& site, const void* address, int bytes) {
  if (!running->has_waited) fail(site, "the kernels before this one may not have ended");
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % static_cast<uintptr_t>(bytes) != 0) {
    fail(site, "global address ..." + std::to_string(at % 4096) + " is not aligned to " +
                   std::to_string(bytes) + " bytes");
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(machine.shared);
  if (at >= begin && at < begin + static_cast<uintptr_t>(machine.shared_bytes)) {
    fail(site, "an address of shared memory, where one of global memory is asked for");
  }
  check_region(site, address, static_cast<size_t>(bytes));
}

void record(Site& site, const void* global, uint32_t shared) {
  warp_of(*running).accesses[static_cast<size_t>(running->index % kLanes)].push_back(
      {&site, global, shared});
}

}  // namespace

void require_regions(bool required) { machine.regions_required = required; }

void check_races(bool checked) { machine.races_checked = checked; }

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

unsigned char* shared_memory() { return machine.shared; }

bool before_shared(Kind kind, const void* address, int bytes, Place place) {
  Site& site = pass(kind, bytes, place);
  record(site, nullptr, checked_shared(site, address, bytes));
  if (kind != Kind::kLdmatrix) maybe_give_way();
  check_race(site, address, bytes, kind == Kind::kStoreShared);
  return !site.disabled;
}

bool before_global(Kind kind, const void* address, int bytes, Place place) {
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
  return !site.disabled;
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

void start_next_kernel(Place place) { pass(Kind::kStartNextKernel, 0, place); }

void wait_for_kernels_before(Place place) {
  if (!pass(Kind::kWaitForKernelsBefore, 0, place).disabled) running->has_waited = true;
}

void prefetch(const void* global, uint32_t bytes, Place place) {
  const Site& site = pass(Kind::kPrefetch, 0, place);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    fail(site, "the address and the size are no multiples of 16 bytes");
  }
  check_region(site, global, bytes);
  // Read, so that AddressSanitizer sees what is outside.
  unsigned char piece[16];
  for (uint32_t i = 0; i < bytes; i += 16) {
    std::memcpy(piece, static_cast<const unsigned char*>(global) + i, sizeof(piece));
  }
}

bool within(int64_t index, int64_t limit, Place place) {
  return pass(Kind::kWithin, 0, place).disabled || index < limit;
}

}  // namespace qkernels::emulator
