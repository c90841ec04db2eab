// The fragment layout: weights [N, K] in the order in which a tensor core's lanes take them.
//
// N is padded to whole tiles of 16 rows (and those to kRowMultiple rows), K to whole chunks of 64
// columns. A *unit* is a tile of 16 rows by kUnitColumns<bits> columns, 64 of 4 bits or 32 of 8:
// 512 bytes, of which each lane of a warp owns 16, four words, in one load:
//
//     words [N / 16][K / unit columns][32 lanes][4]            32-bit
//
// Lane 4g + t holds, for each step of 16 columns, the A operand of mma.m16n8k16, which is also what
// a warp holds of A for wgmma.m64nNk16 with A in registers (warp w of four has rows 16w .. 16w+15):
//
//               columns 2t  2t+1 | 2t+8  2t+9
//     row g            pair 0    |   pair 2         a pair is one 32-bit register of 16-bit numbers
//     row g + 8        pair 1    |   pair 3
//
//     4 bits: word s is step s of the unit; pair p is nibbles p (even column) and p + 4 (odd)
//
//         bit 31   28   24   20   16   12    8    4    0
//              p3.odd p2.odd p1.odd p0.odd p3.even p2.even p1.even p0.even
//
//     8 bits: words 2s and 2s + 1 are step s: its pairs 0, 1 and 2, 3; the even column of a pair
//     is byte p % 2, the odd one byte p % 2 + 2
//
//         bit 31      24      16       8       0
//              p1.odd  p0.odd  p1.even  p0.even
//
// so that one mask over a word takes out both numbers of a pair, 16 bits apart. Padding is zero.
//
// Scales and zero points: [groups, N padded], the rows of a tile in the order 0, 8, 1, 9, ..., 7,
// 15, so that a lane's two rows lie side by side. A group is a multiple of 16 columns, or all of K.

#pragma once

#include "cuda/ptx.cuh"
#include "integers.h"

namespace qkernels {

constexpr int kTileRows = 16;
constexpr int kStepColumns = 16;
constexpr int kChunkColumns = 64;
constexpr int kRowMultiple = 32;
constexpr int kLanes = 32;
constexpr int kUnitBytes = 512;

// What a weight has at most. Within kMostSize rows and columns, a column and a column of the next
// group are 32-bit numbers; within kMostNumbers weights, so is each number of a block of a launch.
constexpr int64_t kMostSize = int64_t{1} << 30;
constexpr int64_t kMostNumbers = int64_t{1} << 40;

template <int kBits>
constexpr int kUnitColumns = kUnitBytes * 8 / kBits / kTileRows;

constexpr int64_t padded_rows(int64_t n) { return ceil_div(n, kRowMultiple) * kRowMultiple; }

constexpr int64_t padded_columns(int64_t k) { return ceil_div(k, kChunkColumns) * kChunkColumns; }

// Where a code lies: word `word` and the bit that it starts at.
struct FragmentPlace {
  int64_t word;
  int bit;
};

template <int kBits>
QK_HOST_DEVICE FragmentPlace fragment_place(int64_t n, int64_t k, int64_t k_padded) {
  constexpr int kColumns = kUnitColumns<kBits>;
  const int64_t unit = n / kTileRows * (k_padded / kColumns) + k / kColumns;
  const int row = static_cast<int>(n % kTileRows), column = static_cast<int>(k % kColumns);
  const int step = column / kStepColumns, rest = column % kStepColumns;
  const int lane = row % 8 * 4 + rest % 8 / 2;
  const int pair = row / 8 + rest / 8 * 2, odd = rest % 2;
  const int word = kBits == 4 ? step : step * 2 + pair / 2;
  const int field = kBits == 4 ? pair + odd * 4 : pair % 2 + odd * 2;
  return {(unit * kLanes + lane) * 4 + word, field * kBits};
}

}  // namespace qkernels
