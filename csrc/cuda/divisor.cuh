// Division by a number that the host knows: a multiplication and a shift, where a division takes
// about 25 instructions.

#pragma once

#include "cuda/ptx.cuh"

namespace qkernels {

// Divides numbers from 0 to 2^31 - 1. Source: Granlund and Montgomery 1994, "Division by Invariant
// Integers using Multiplication": `factor` is 2^shift / divisor, rounded up, with the least shift
// for which 2^shift >= 2^31 * divisor: it is too much by less than 1, and so a quotient by less
// than 2^31 / 2^shift <= 1 / divisor.
struct Divisor {
  uint32_t factor;
  int shift;

  Divisor() = default;
  // From 1 to 2^31 - 1.
  QK_HOST_DEVICE explicit Divisor(int divisor) : shift(31) {
    while (int64_t{divisor} << 31 > int64_t{1} << shift) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  QK_HOST_DEVICE int quotient(int value) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(value)) * factor >> shift);
  }
};

}  // namespace qkernels
