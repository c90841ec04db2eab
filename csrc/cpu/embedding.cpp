#include "cpu/embedding.h"

#include <algorithm>

#include "cpu/faults.h"
#include "cpu/pack.h"
#include "cpu/scratch.h"
#include "cpu/vector_portable.h"
#include "cpu/vnni.h"

namespace qkernels::cpu {

namespace {

// Starting threads costs about as much as looking up this many codes.
constexpr int64_t kCodesWorthThreads = 1 << 15;
constexpr int64_t kRowsOfTask = 8;

// Of each thread at work: a row's numbers before they are rounded, and its codes.
thread_local Scratch row_scratch;

float number(const GroupNumbers& numbers, int64_t index) {
  switch (numbers.type) {
    case GroupType::kFp16: return half_to_float(static_cast<const uint16_t*>(numbers.data)[index]);
    case GroupType::kBf16: return bf16_to_float(static_cast<const uint16_t*>(numbers.data)[index]);
    case GroupType::kFp32: return static_cast<const float*>(numbers.data)[index];
    default: return static_cast<const uint8_t*>(numbers.data)[index];
  }
}

int64_t index_of(const EmbeddingTable& table, int64_t row, int64_t g) {
  if (table.order == RowOrder::kPanels) {
    const int64_t lane = QK_FAULT(groups_of_first_lane_looked_up) ? 0 : row % kLanes;
    return (row / kLanes * table.groups + g) * kLanes + lane;
  }
  return table.one_scale ? 0 : row * table.groups + g;
}

float scale_of(const EmbeddingTable& table, int64_t row, int64_t g) {
  const float scale = number(table.scales, index_of(table, row, g));
  if (table.scales.type == GroupType::kNested) {
    // Blocks of 256 go along rows, whatever the order of the codes.
    if (QK_FAULT(nested_block_of_first_group_looked_up)) g = 0;
    const int64_t index = table.one_scale ? 0 : row * table.groups + g;
    const float largest = table.nested_absmax[index / 256];
    return table.nested_table[static_cast<int>(scale)] * largest + table.nested_offset;
  }
  return table.channel_scales == nullptr ? scale : scale * table.channel_scales[row];
}

void unpack_row(const EmbeddingTable& table, int64_t row, uint8_t* codes) {
  if (table.order == RowOrder::kDense) {
    const int64_t stride = dense_words(table.k, table.bits);
    unpack_dense(table.words + row * stride, codes, 1, table.k, table.bits, 1);
    return;
  }
  const Pool alone{1, nullptr};
  unpack_vnni(table.words, codes, row, 1, table.columns, table.bits <= 4, alone);
}

void dequantize_row(const EmbeddingTable& table, int64_t row, const uint8_t* codes, float* out) {
  for (int64_t g = 0; g < table.groups; ++g) {
    const float scale = scale_of(table, row, g);
    const int64_t index = index_of(table, row, g), first = g * table.group;
    int64_t count = std::min(table.group, table.k - first);
    if (QK_FAULT(short_group_not_looked_up) && count < table.group) count = 0;
    const uint8_t* from = codes + g * table.padded_group;
    float* to = out + first;
    if (table.zeros.data == nullptr) {
      for (int64_t c = 0; c < count; ++c) to[c] = table.values[from[c]] * scale;
    } else {
      const bool first_zero = QK_FAULT(zeros_of_first_group_looked_up);
      const float zero = number(table.zeros, first_zero ? index_of(table, row, 0) : index);
      for (int64_t c = 0; c < count; ++c) to[c] = (table.values[from[c]] - zero) * scale;
    }
    if (table.offsets.data != nullptr) {
      const float offset = number(table.offsets, index);
      for (int64_t c = 0; c < count; ++c) to[c] += offset;
    }
  }
}

void store_row(const float* from, int64_t k, void* out, int64_t first, FloatType type) {
  auto* to = static_cast<uint16_t*>(out) + first;
  if (type == FloatType::kFp16)
    for (int64_t c = 0; c < k; ++c) to[c] = float_to_half(from[c]);
  else
    for (int64_t c = 0; c < k; ++c) to[c] = float_to_bf16(from[c]);
}

}  // namespace

const int64_t* out_of_range(const int64_t* rows, int64_t count, int64_t n) {
  const int64_t* last = rows + count;
  const int64_t* found = std::find_if(rows, last, [n](int64_t row) { return row < 0 || row >= n; });
  return found == last ? nullptr : found;
}

void look_up(const EmbeddingTable& table, const int64_t* rows, int64_t count, void* out,
             FloatType type, const Pool& pool) {
  const bool few = count * table.k < kCodesWorthThreads;
  const Pool own{few ? 1 : pool.threads, pool.run};
  parallel_for(own, ceil_div(count, kRowsOfTask), [&](int64_t task) {
    const auto bytes = static_cast<size_t>(table.k) * sizeof(float);
    auto* numbers =
        static_cast<float*>(row_scratch.reserve(bytes + static_cast<size_t>(table.columns)));
    auto* codes = reinterpret_cast<uint8_t*>(numbers + table.k);
    const int64_t last = std::min(count, (task + 1) * kRowsOfTask);
    for (int64_t i = task * kRowsOfTask; i < last; ++i) {
      unpack_row(table, rows[i], codes);
      if (type == FloatType::kFp32) {
        dequantize_row(table, rows[i], codes, static_cast<float*>(out) + i * table.k);
      } else {
        dequantize_row(table, rows[i], codes, numbers);
        store_row(numbers, table.k, out, i * table.k, type);
      }
    }
  });
}

}  // namespace qkernels::cpu
