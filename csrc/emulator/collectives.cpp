#include "emulator/collectives.h"

namespace qkernels::emulator {

void multiply(float (&c)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
}

void load_matrices(void* const* operands_of_lanes) {
  uint32_t words[4][8][4];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<LdmatrixOperands*>(operands_of_lanes[lane]);
    std::memcpy(words[lane / 8][lane % 8], operands.row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<LdmatrixOperands*>(operands_of_lanes[lane]);
    for (int i = 0; i < 4; ++i) operands.r[i] = words[i][lane / 4][lane % 4];
  }
}

}  // namespace qkernels::emulator
