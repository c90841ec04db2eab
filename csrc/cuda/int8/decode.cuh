// From words of the integer fragment layout to operand A of mma.m16n8k32: four signed bytes a
// register, at one integer operation a weight or less.
//
// A decoder's `decode` gives register j of step `step` of a chunk, from the words that the lane has
// of its units.

#pragma once

#include "cuda/int8/int8.h"
#include "cuda/ptx.cuh"
#include "cuda/weights/groups.cuh"

namespace qkernels {

constexpr int kLop3AndXor = (0xf0 & 0xcc) ^ 0xaa;  // (a & b) ^ c
constexpr uint32_t kEachByte = 0x01010101;

// Multiplier and zero point of a row and group: code * multiplier + (128 - zero * multiplier) in
// each byte, as one number of 32 bits.
struct ByteGroup {
  uint32_t multiplier, offset;

  ByteGroup() = default;
  QK_DEVICE ByteGroup(uint32_t multiplier, uint32_t zero)
      : multiplier(multiplier), offset((128 - zero * multiplier) * kEachByte) {}
};

// 8 bits: the words are the operand.
struct SignedBytes {
  static constexpr int kBits = 8;
  static constexpr bool kHasGroups = false;
  static constexpr int kShift = 0;  // bits that sums are too large by

  static QK_DEVICE uint32_t decode(const uint32_t (&words)[2][4], int step, int j,
                                   const ByteGroup&) {
    return words[step][j];
  }
};

// 4 bits without zero points: 16 (code - 8), in 3 operations for 8 weights.
struct SignedNibbles {
  static constexpr int kBits = 4;
  static constexpr bool kHasGroups = false;
  static constexpr int kShift = 4;

  static QK_DEVICE uint32_t decode(const uint32_t (&words)[1][4], int step, int j,
                                   const ByteGroup&) {
    const uint32_t word = step == 0 ? words[0][j] << 4 : words[0][j];
    return ptx::lop3<kLop3AndXor>(word, 0xf0 * kEachByte, 0x80 * kEachByte);
  }
};

// 4 bits with zero points, multipliers or both, in 7 operations for 8 weights. A product and a sum
// of 32 bits do four bytes at once: as they are linear, what bytes carry into each other on the way
// cancels where each one's result is a byte. Source: LiquidGEMM (Hu et al. 2025).
struct ScaledNibbles {
  static constexpr int kBits = 4;
  static constexpr bool kHasGroups = true;
  static constexpr int kShift = 0;

  static QK_DEVICE uint32_t decode(const uint32_t (&words)[1][4], int step, int j,
                                   const ByteGroup& group) {
    const uint32_t codes = words[0][j] >> (4 * step) & 0x0f * kEachByte;
    return (codes * group.multiplier + group.offset) ^ 0x80 * kEachByte;
  }
};

// kGrouped: sums are of each group.
template <class Decoder, bool kGrouped>
struct Int8Tag {};

// `visit(Int8Tag<Decoder, kGrouped>())` for what a weight takes.
template <class Visit>
const char* visit_int8(const Int8Weight& weight, Visit visit) {
  const bool grouped = !weight.is_whole();
  if (weight.bits == 8) {
    return grouped ? visit(Int8Tag<SignedBytes, true>()) : visit(Int8Tag<SignedBytes, false>());
  }
  if (weight.zeros == nullptr && !weight.two_levels()) {
    return grouped ? visit(Int8Tag<SignedNibbles, true>()) : visit(Int8Tag<SignedNibbles, false>());
  }
  return grouped ? visit(Int8Tag<ScaledNibbles, true>()) : visit(Int8Tag<ScaledNibbles, false>());
}

}  // namespace qkernels
