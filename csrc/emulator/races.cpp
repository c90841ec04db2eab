#include "emulator/races.h"

#include <algorithm>

#include "integers.h"

namespace qkernels::emulator {
namespace {

// What marks are kept for; a smaller access is not told from others within it.
constexpr uint32_t kUnitBytes = 2;
constexpr int kWarp = 32;

}  // namespace

void Races::start_block(int shared_bytes) {
  units_.assign(static_cast<size_t>(ceil_div(shared_bytes, kUnitBytes)), Unit{});
}

bool Races::in_order(const Mark& mark, const Moment& now) {
  if (mark.site == nullptr || mark.moment.block_barriers < now.block_barriers) return true;
  if (mark.warps || mark.moment.thread / kWarp != now.thread / kWarp) return false;
  if (mark.moment.warp_barriers < now.warp_barriers) return true;
  return !mark.threads && mark.moment.thread == now.thread;
}

std::string Races::describe(const Mark& mark, bool write) {
  return std::string(write ? "written" : "read") + " by thread " +
         std::to_string(mark.moment.thread) + (mark.threads ? " and others" : "") + " in " +
         name_of(mark.site->kind) + " at " + mark.site->where();
}

std::string Races::access(const Site& site, const Moment& now, uint32_t offset, int bytes,
                          bool write) {
  const bool narrow = static_cast<uint32_t>(bytes) < kUnitBytes;
  const uint32_t end = (offset + static_cast<uint32_t>(bytes) - 1) / kUnitBytes;
  for (uint32_t i = offset / kUnitBytes; i <= end; ++i) {
    Unit& unit = units_[i];
    // Two narrow accesses may be to different bytes of the unit.
    if (!(narrow && unit.write.narrow) && !in_order(unit.write, now)) {
      return describe(unit.write, true);
    }
    if (write && !(narrow && unit.read.narrow) && !in_order(unit.read, now)) {
      return describe(unit.read, false);
    }
    Mark& mark = write ? unit.write : unit.read;
    const Mark fresh{&site, now, false, false, narrow};
    if (in_order(mark, now)) {
      mark = fresh;
      continue;
    }
    mark.threads = true;
    mark.warps |= mark.moment.thread / kWarp != now.thread / kWarp;
    mark.narrow &= narrow;
    mark.moment.warp_barriers = std::max(mark.moment.warp_barriers, now.warp_barriers);
  }
  return {};
}

}  // namespace qkernels::emulator
