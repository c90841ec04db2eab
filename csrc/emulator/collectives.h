// What a warp computes together once its 32 lanes have met.

#pragma once

#include <cstdint>
#include <cstring>

namespace qkernels::emulator {

struct MmaOperands {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};

struct LdmatrixOperands {
  uint32_t* r;  // [4]
  const void* row;
};

// c [16, 8] += a [16, 16] @ b [16, 8]: each product is exact in fp32, and they are added to c one
// by one in the order of k, in fp32. (Tensor cores add in an order of their own, with more bits.)
void multiply(float (&c)[16][8], const float (&a)[16][16], const float (&b)[16][8]);

template <class T>
void multiply_fragments(void* const* operands_of_lanes) {
  const auto operands = [&](int lane) -> MmaOperands& {
    return *static_cast<MmaOperands*>(operands_of_lanes[lane]);
  };
  const auto number = [](uint32_t word, int half) {
    return T::to_float(static_cast<uint16_t>(word >> (16 * half)));
  };
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& lane_operands = operands(lane);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8;
      for (int half = 0; half < 2; ++half) {
        a[row][2 * t + i / 2 * 8 + half] = number(lane_operands.a[i], half);
      }
      c[group + i / 2 * 8][2 * t + i % 2] = lane_operands.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        b[2 * t + i * 8 + half][group] = number(lane_operands.b[i], half);
      }
    }
  }
  multiply(c, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) operands(lane).c[i] = c[group + i / 2 * 8][2 * t + i % 2];
  }
}

// Four 8x8 matrices; lane 8i + j has the address of row j of matrix i.
void load_matrices(void* const* operands_of_lanes);

}  // namespace qkernels::emulator
