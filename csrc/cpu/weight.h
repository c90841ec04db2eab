// A quantized weight as the CPU kernels read it.
//
// words   [panels][steps][16]: a panel is 16 rows, a step 8 columns of up to 4 bits or 4 columns of
//         8 bits. Lane r of a step is row r of the panel:
//
//           up to 4 bits   bit 31  28  24  20  16  12   8   4   0
//                               c7  c3  c6  c2  c5  c1  c4  c0
//           8 bits         bit 31      24      16       8       0
//                               c3      c2      c1      c0
//
//         One AND (and one shift) thus leaves the four columns of an int8 dot product in each lane,
//         and 16 steps of 8 bits are a tile of AMX as they lie.
// scales, zeros, offsets   [panels][groups][16]
//
// N is padded to panels, K to 64 columns with zero codes; x is read as zero there.

#pragma once

#include <cstdint>

#include "integers.h"

namespace qkernels::cpu {

constexpr int64_t kLanes = 16;
constexpr int64_t kColumnMultiple = 64;

// How far ahead weights are asked for: the hardware's own prefetch stops at each page.
constexpr int64_t kPrefetchWords = 512;

constexpr int64_t padded_columns(int64_t k) {
  return ceil_div(k, kColumnMultiple) * kColumnMultiple;
}

enum class FloatType { kFp16, kBf16, kFp32 };

constexpr int64_t size_of(FloatType type) { return type == FloatType::kFp32 ? 4 : 2; }

enum class Code {
  kInt4,     // the code itself; codes of 2 and 3 bits too
  kTable4,   // table[code]
  kInt8,     // the code itself
  kFp8E4M3,  // the code's bits as a number
  kFp8E5M2,
};

constexpr bool is_nibble(Code code) { return code <= Code::kTable4; }

enum class GroupType {
  kNone,
  kFp16,
  kBf16,
  kFp32,
  kUint8,   // an integer
  kNested,  // table[code] * absmax[index / 256] + offset, of doubly quantized scales
  kBlocks,  // 4 bits each of the bytes of `scales`, in steps that a panel shares
};

struct Weight {
  const uint32_t* words;
  int64_t n, k;    // k with the columns that pad groups
  int64_t group;   // columns of a group: a multiple of 8, or all of K
  int64_t filled;  // of them, those that do not pad the group
  Code code;
  const void* scales;
  GroupType scale_type;
  const void* zeros;
  GroupType zero_type;
  const void* offsets;  // added to the numbers of a group after its scale; or null
  GroupType offset_type;
  float implied_zero;           // of integer codes, where no zero points are stored
  const float* channel_scales;  // [n], where the scales are integers; else null
  const float* table;           // [16], of kTable4
  const float* nested_table;    // [256]
  const float* nested_absmax;
  float nested_offset;
  // [panels][groups][4], of kBlocks: step and least scale, step and least zero point; a scale is
  // step * (byte & 15) + least, a zero point the same of byte >> 4.
  const float* block_ranges;

  // Follow from the above, by `prepare`: divisions are slow where they are asked for often.
  int64_t group_count, column_count, panel_stride;

  void prepare() {
    group_count = ceil_div(k, group);
    column_count = padded_columns(k);
    panel_stride = column_count / step_columns() * kLanes;
  }

  int64_t panels() const { return ceil_div(n, kLanes); }
  int64_t groups() const { return group_count; }
  int64_t columns() const { return column_count; }
  // The end of group g; the last takes what pads K.
  int64_t group_end(int64_t g) const {
    return g + 1 == group_count ? column_count : (g + 1) * group;
  }
  // The columns of group g that do not pad it, nor K.
  int64_t codes_of_group(int64_t g) const { return g + 1 == group_count ? k - g * group : filled; }
  int64_t step_columns() const { return is_nibble(code) ? 8 : 4; }
  // Whether zero points are to be taken off: without, decoders take off the implied zero
  // themselves.
  bool has_zeros() const { return zero_type != GroupType::kNone; }
  bool has_offsets() const { return offsets != nullptr; }
  int64_t panel_words() const { return panel_stride; }
  // Words before column `column` of a panel.
  int64_t words_before(int64_t column) const {
    return (is_nibble(code) ? column / 8 : column / 4) * kLanes;
  }
  // Two-level scales, or one scale a row: sums over all of K are integers.
  bool sums_are_integers() const { return channel_scales != nullptr || group_count == 1; }
};

}  // namespace qkernels::cpu
