// Numbers that a seed decides.

#pragma once

#include <cstdint>

namespace qkernels::emulator {

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

}  // namespace qkernels::emulator
