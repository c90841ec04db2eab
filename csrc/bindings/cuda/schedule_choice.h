// Which schedule a product runs by: one for rows that x does not have, a given one, or the choice
// of config.h.

#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "bindings/checks.h"
#include "bindings/cuda/device.h"
#include "bindings/cuda/last_choice.h"
#include "cuda/weight_only/config.h"

namespace qkernels::bindings {

// The schedule of the last call, by all that it depends on and that can change from call to call of
// a shape: rows, device, and bytes of a scale and of a zero point. Choosing tries every number of
// blocks that may share a tile: for layers of few rows that would take longer than all else here.
using LastSchedule =
    LastChoice<std::tuple<int64_t, const DeviceFacts*, int, int>, WeightOnlyConfig>;

// The rows that the schedule is chosen for, where they are not those of x: a fixed number of them
// makes a row's result independent of how many there are. Or the schedule itself. `last`, where
// there is one, is of this shape.
struct ScheduleChoice {
  int64_t m = 0;
  std::optional<WeightOnlyConfig> config;
  LastSchedule* last = nullptr;

  // `problem`, less what the device says and this choice: it gets these.
  WeightOnlyConfig of(WeightOnlyProblem& problem, const DeviceFacts& facts) const {
    if (m > 0) problem.m = m;
    problem.each_tile = m > 0;
    problem.multiprocessors = facts.multiprocessors;
    problem.shared_bytes = facts.shared_bytes;
    problem.multiprocessor_shared_bytes = facts.multiprocessor_shared_bytes;
    if (config) return *config;
    const auto choose = [&] { return choose_config(problem); };
    if (last == nullptr) return choose();
    return last->get({problem.m, &facts, problem.scale_bytes, problem.zero_bytes}, choose);
  }
};

inline int as_int(const char* name, int64_t value) {
  require(value >= 0 && value <= std::numeric_limits<int>::max(), name,
          " must be 0 or more, and fit 32 bits, got ", value);
  return static_cast<int>(value);
}

// Of an operator's arguments: `m` is that of ScheduleChoice, and the others are a schedule where
// `tokens` is not 0, whose unit, where that is 0, is the least.
inline ScheduleChoice given_schedule(int64_t m, int64_t tokens, int64_t blocks, int64_t stages,
                                     int64_t unit, bool each_tile, int least_unit) {
  ScheduleChoice choice;
  choice.m = m;
  if (tokens > 0) {
    choice.config = WeightOnlyConfig{as_int("tokens", tokens), as_int("blocks", blocks),
                                     as_int("stages", stages),
                                     unit == 0 ? least_unit : as_int("unit", unit), each_tile};
  }
  return choice;
}

}  // namespace qkernels::bindings
