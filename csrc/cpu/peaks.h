// What this machine can do at most, measured.

#pragma once

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace qkernels::cpu {

struct Peaks {
  double read;  // bytes a second, from memory
  // Operations a second; a multiplication and an addition are two. 0 where there is no such thing.
  double fp32, bf16, int8;
};

// Takes about `seconds`, and 512 MB of memory.
Peaks measure_peaks(Isa isa, double seconds, const Pool& pool);

}  // namespace qkernels::cpu
