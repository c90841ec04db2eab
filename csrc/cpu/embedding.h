// Rows of a packed weight by their numbers, dequantized: what an embedding looks up.
//
//     out[i, c] = (value(code[row_i, c]) - zero[row_i, g]) * scale[row_i, g] + offset[row_i, g]
//
// in fp32, each step rounded, then rounded to the type of `out`: the numbers of the reference.

#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

// How the codes lie: as dense words (see pack.h) or as panels of 16 rows (see weight.h).
enum class RowOrder { kDense, kPanels };

// A number for each group of each row, or one for all; in the order of the codes.
struct GroupNumbers {
  const void* data = nullptr;
  GroupType type = GroupType::kNone;
};

struct EmbeddingTable {
  RowOrder order;
  const uint32_t* words;
  int bits;
  int64_t n, k;
  int64_t columns;              // k with what pads its groups, in panels
  int64_t group, padded_group;  // columns of a group, and its distance to the next
  int64_t groups;
  bool one_scale;       // for the whole weight; panels hold it for each row
  const float* values;  // [16], or [256] of 8 bits: what codes stand for
  GroupNumbers scales, zeros, offsets;
  const float* channel_scales;  // [n], where scales are integers; else null
  const float* nested_table;    // [256], of scales of kNested
  const float* nested_absmax;
  float nested_offset;
};

// The first of `rows` [count] that is not in [0, n), or null.
const int64_t* out_of_range(const int64_t* rows, int64_t count, int64_t n);

// out [count, k]; every row is in range.
void look_up(const EmbeddingTable& table, const int64_t* rows, int64_t count, void* out,
             FloatType type, const Pool& pool);

}  // namespace qkernels::cpu
