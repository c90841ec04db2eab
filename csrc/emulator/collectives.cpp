#include "emulator/collectives.h"

#include <cstring>
#include <vector>

#include "emulator/numbers.h"

// Most of the time goes here, all of it on arrays of fixed size: without checks, ten times less.
#define QK_FAST __attribute__((no_sanitize("address", "undefined"), optimize("O3")))

namespace qkernels::emulator {
namespace {

const float* table_of_halves() {
  static const std::vector<float> table = [] {
    std::vector<float> table(1 << 16);
    for (size_t bits = 0; bits < table.size(); ++bits) {
      table[bits] = half_to_float(static_cast<uint16_t>(bits));
    }
    return table;
  }();
  return table.data();
}

// 16-bit numbers as fp32: by the table of fp16, or with none, from bf16.
template <int kCount>
QK_FAST void to_floats(const uint16_t (&bits)[kCount], const float* table,
                       float (&numbers)[kCount]) {
  for (int i = 0; i < kCount; ++i) {
    if (table != nullptr) {
      numbers[i] = table[bits[i]];
    } else {
      const uint32_t word = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(&numbers[i], &word, sizeof(word));
    }
  }
}

QK_FAST void multiply(void* const* operands_of_lanes, const float* table) {
  uint16_t a_bits[16 * 16], b_bits[16 * 8];
  float a[16 * 16], b[16 * 8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* operands = static_cast<const MmaOperands*>(operands_of_lanes[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = 2 * t + i / 2 * 8;
      std::memcpy(&a_bits[row * 16 + column], &operands->a[i], 4);
      c[group + i / 2 * 8][2 * t + i % 2] = operands->c[i];
    }
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * t + i * 8;
      b_bits[row * 8 + group] = static_cast<uint16_t>(operands->b[i] & 0xffff);
      b_bits[(row + 1) * 8 + group] = static_cast<uint16_t>(operands->b[i] >> 16);
    }
  }
  to_floats(a_bits, table, a);
  to_floats(b_bits, table, b);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float left = a[row * 16 + k];
      for (int column = 0; column < 8; ++column) c[row][column] += left * b[k * 8 + column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* operands = static_cast<const MmaOperands*>(operands_of_lanes[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) operands->c[i] = c[group + i / 2 * 8][2 * t + i % 2];
  }
}

}  // namespace

void multiply_half(void* const* operands_of_lanes) {
  multiply(operands_of_lanes, table_of_halves());
}

void multiply_bfloat16(void* const* operands_of_lanes) { multiply(operands_of_lanes, nullptr); }

QK_FAST void multiply_bytes(void* const* operands_of_lanes) {
  int8_t a[16][32], b[8][32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* operands = static_cast<const IntegerMmaOperands*>(operands_of_lanes[lane]);
    const int group = lane / 4, column = lane % 4 * 4;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&a[group + i % 2 * 8][column + i / 2 * 16], &operands->a[i], 4);
    }
    for (int i = 0; i < 2; ++i) std::memcpy(&b[group][column + i * 16], &operands->b[i], 4);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* operands = static_cast<const IntegerMmaOperands*>(operands_of_lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      auto sum = static_cast<uint32_t>(operands->c[i]);
      for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[row][k] * b[column][k]);
      operands->c[i] = static_cast<int32_t>(sum);
    }
  }
}

void load_matrices(void* const* operands_of_lanes) {
  uint32_t words[4][8][4];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<const LdmatrixOperands*>(operands_of_lanes[lane]);
    std::memcpy(words[lane / 8][lane % 8], operands.row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<const LdmatrixOperands*>(operands_of_lanes[lane]);
    for (int i = 0; i < 4; ++i) operands.r[i] = words[i][lane / 4][lane % 4];
  }
}

void transpose_matrix(void* const* operands_of_lanes) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<const MovmatrixOperands*>(operands_of_lanes[lane]);
    matrix[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(operands.a & 0xffff);
    matrix[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(operands.a >> 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<const MovmatrixOperands*>(operands_of_lanes[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    *operands.d = static_cast<uint32_t>(matrix[column + 1][row]) << 16 | matrix[column][row];
  }
}

void shuffle(void* const* operands_of_lanes) {
  uint32_t values[32];
  for (int lane = 0; lane < 32; ++lane) {
    values[lane] = static_cast<const ShuffleOperands*>(operands_of_lanes[lane])->value;
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& operands = *static_cast<ShuffleOperands*>(operands_of_lanes[lane]);
    operands.value = values[lane ^ operands.mask];
  }
}

}  // namespace qkernels::emulator
