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
// 2 and 3 bits: K is padded to whole spans of 128 columns, and 32 rows of a span are units behind
// each other: the low two bits of the first tile, those of the second one, and of 3 bits the third
// ones of both:
//
//     words [N / 32][K / 128][2 or 3][32 lanes][4]
//
//     low bits: word w is steps 2w and 2w + 1 of the span
//
//         bit 16 * odd + 8 * (step % 2) + 4 * (p / 2) + 2 * (p % 2)         two bits of pair p
//
//     third bits: words 2i and 2i + 1 are steps 0 to 3 and 4 to 7 of tile i
//
//         bit 16 * odd + 4 * (step % 4) + 2 * (p % 2) + p / 2               a bit of pair p
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

// Whether codes of so many bits lie in spans of two chunks and 32 rows.
constexpr bool in_spans(int bits) { return bits < 4; }
template <int kBits>
constexpr bool kLiesInSpans = in_spans(kBits);
constexpr int kSpanColumns = 128;

// Rows of a step of the first dimension of the words.
constexpr int words_rows(int bits) { return in_spans(bits) ? kRowMultiple : kTileRows; }

constexpr int64_t padded_columns(int64_t k, int bits) {
  const int multiple = in_spans(bits) ? kSpanColumns : kChunkColumns;
  return ceil_div(k, multiple) * multiple;
}

// Where a code lies: word `word` and the bit that it starts at. Of 3 bits that is of the lower two,
// and the third is bit third_bit of word third_word.
struct FragmentPlace {
  int64_t word;
  int bit;
  int64_t third_word = 0;
  int third_bit = 0;
};

template <int kBits>
QK_HOST_DEVICE FragmentPlace place_in_span(int64_t n, int64_t k, int64_t k_padded) {
  const int64_t first_unit =
      (n / kRowMultiple * (k_padded / kSpanColumns) + k / kSpanColumns) * kBits;
  const int row = static_cast<int>(n % kTileRows), column = static_cast<int>(k % kSpanColumns);
  const int tile = static_cast<int>(n / kTileRows % 2), half = row / 8;
  const int step = column / kStepColumns, rest = column % kStepColumns, odd = rest % 2;
  const int lane = row % 8 * 4 + rest % 8 / 2;
  FragmentPlace place;
  place.word = ((first_unit + tile) * kLanes + lane) * 4 + step / 2;
  place.bit = 16 * odd + 8 * (step % 2) + 4 * (rest / 8) + 2 * half;
  place.third_word = ((first_unit + 2) * kLanes + lane) * 4 + tile * 2 + step / 4;
  place.third_bit = 16 * odd + 4 * (step % 4) + 2 * half + rest / 8;
  return place;
}

template <int kBits>
QK_HOST_DEVICE FragmentPlace fragment_place(int64_t n, int64_t k, int64_t k_padded) {
  if constexpr (kLiesInSpans<kBits>) return place_in_span<kBits>(n, k, k_padded);
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

// What decoders of 2 and 3 bits take of step `step`, 0 to 3, of a chunk: from the word of the low
// bits of its two steps, and of 3 bits from that of the third ones of its four.
QK_DEVICE void span_words(uint32_t low, uint32_t third, int step, uint32_t (&words)[2]) {
  words[0] = low >> (8 * (step % 2));
  words[1] = step == 0 ? third << 2 : third >> (4 * step - 2);
}

}  // namespace qkernels
