// The fragment_int8 layout: weights [N, K] of integer products, in the order in which lanes take
// the A operand of mma.m16n8k32 with int8 numbers.
//
// N is padded to kRowMultiple rows, K to whole chunks of 64 columns. A *unit* is a tile of 16 rows
// by kUnitColumns<bits> columns, 64 of 4 bits or 32 of 8: 512 bytes, of which each lane of a warp
// owns 16, four words, in one load:
//
//     words [N / 16][K / unit columns][32 lanes][4]            32-bit
//
// For each step of 32 columns, lane 4g + t holds four columns in the bytes of each word:
//
//                columns 4t .. 4t + 3    columns 4t + 16 .. 4t + 19
//     row g             word 0                   word 2
//     row g + 8         word 1                   word 3
//
//     8 bits: byte i is code - 128 of column i, as two's complement (code ^ 0x80): the operand as
//     the instruction takes it
//
//     4 bits: byte i has the codes of column i of two steps, in the lower half that of the first
//     step, in the upper half that of the second
//
// A group is a multiple of 32 columns, or all of K. Padding columns, of a group and behind K, hold
// the code of the last column of their group in their row: decoding is arithmetic over four bytes
// of a word, right where each of them gives a number of int8, which zero codes might not. x is zero
// there. Padding rows are of code 0, with scale and zero point 0.
//
// Scales and zero points as in the fragment layout (fragment.cuh), whose sizes these are too.

#pragma once

#include "cuda/weights/fragment.cuh"

namespace qkernels {

constexpr int kInt8StepColumns = 32;

// What makes codes of 8 bits operands, four at a time.
constexpr uint32_t kInt8Sign = 0x80808080;

template <int kBits>
QK_HOST_DEVICE FragmentPlace fragment_int8_place(int64_t n, int64_t k, int64_t k_padded) {
  static_assert(kBits == 4 || kBits == 8);
  constexpr int kColumns = kUnitColumns<kBits>;
  const int64_t unit = n / kTileRows * (k_padded / kColumns) + k / kColumns;
  const int row = static_cast<int>(n % kTileRows), column = static_cast<int>(k % kColumns);
  const int step = column / kInt8StepColumns, rest = column % kInt8StepColumns;
  const int lane = row % 8 * 4 + rest % 16 / 4, word = row / 8 + rest / 16 * 2;
  return {(unit * kLanes + lane) * 4 + word, rest % 4 * 8 + step * 4};
}

}  // namespace qkernels
