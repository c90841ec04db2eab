// Scales and zero points of a group, and what becomes of sums.

#pragma once

#include "cpu/faults.h"
#include "cpu/kernels.h"
#include "cpu/quotient.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

template <class V>
QK_INLINE typename V::F load_as_float(const void* p, GroupType type, int64_t index) {
  switch (type) {
    case GroupType::kFp16: return V::load_half(static_cast<const uint16_t*>(p) + index);
    case GroupType::kBf16: return V::load_bf16(static_cast<const uint16_t*>(p) + index);
    case GroupType::kFp32: return V::load(static_cast<const float*>(p) + index);
    default: return V::to_float(V::load_bytes(static_cast<const uint8_t*>(p) + index));
  }
}

template <class V>
QK_INLINE typename V::F load_as_float(const void* p, FloatType type, int64_t index) {
  switch (type) {
    case FloatType::kFp16: return V::load_half(static_cast<const uint16_t*>(p) + index);
    case FloatType::kBf16: return V::load_bf16(static_cast<const uint16_t*>(p) + index);
    default: return V::load(static_cast<const float*>(p) + index);
  }
}

template <class V>
QK_INLINE void store_as(void* p, FloatType type, int64_t index, typename V::F value) {
  switch (type) {
    case FloatType::kFp16: return V::store_half(static_cast<uint16_t*>(p) + index, value);
    case FloatType::kBf16: return V::store_bf16(static_cast<uint16_t*>(p) + index, value);
    default: return V::store(static_cast<float*>(p) + index, value);
  }
}

// Up to 16 numbers, the others zero.
template <class V>
__attribute__((noinline)) typename V::F load_some(const void* p, FloatType type, int64_t index,
                                                  int64_t count) {
  alignas(64) unsigned char lanes[64] = {};
  if (QK_FAULT(last_element_not_read)) --count;
  const auto bytes = static_cast<size_t>(count * size_of(type));
  __builtin_memcpy(lanes, static_cast<const char*>(p) + index * size_of(type), bytes);
  return load_as_float<V>(lanes, type, 0);
}

template <class V>
__attribute__((noinline)) void store_some(void* p, FloatType type, int64_t index, int64_t count,
                                          typename V::F value) {
  alignas(64) unsigned char lanes[64];
  store_as<V>(lanes, type, 0, value);
  if (QK_FAULT(last_element_not_written)) --count;
  const auto bytes = static_cast<size_t>(count * size_of(type));
  __builtin_memcpy(static_cast<char*>(p) + index * size_of(type), lanes, bytes);
}

// As many of 16 as there are.
template <class V>
QK_INLINE typename V::F load_first(const void* p, FloatType type, int64_t index, int64_t count) {
  if (count >= kLanes) return load_as_float<V>(p, type, index);
  return load_some<V>(p, type, index, count);
}

template <class V>
QK_INLINE void store_first(void* p, FloatType type, int64_t index, int64_t count,
                           typename V::F value) {
  if (count >= kLanes)
    store_as<V>(p, type, index, value);
  else
    store_some<V>(p, type, index, count, value);
}

template <class V>
QK_INLINE void store_first_bytes(int8_t* out, int64_t at, int64_t count, typename V::I value) {
  if (count >= kLanes) return V::store_bytes(out + at, value);
  int8_t lanes[16];
  V::store_bytes(lanes, value);
  __builtin_memcpy(out + at, lanes, static_cast<size_t>(count));
}

// Numbers of 4 bits in steps that a panel shares: kBlocks.
template <class V>
QK_INLINE typename V::F in_steps(typename V::I codes, const float* range) {
  if (QK_FAULT(least_of_a_block_missing)) return V::mul(V::to_float(codes), V::broadcast(range[0]));
  return V::add(V::mul(V::to_float(codes), V::broadcast(range[0])), V::broadcast(range[1]));
}

// The scales of group g of a panel, as floats.
template <class V>
QK_INLINE typename V::F group_scales(const Weight& weight, int64_t panel, int64_t g) {
  if (QK_FAULT(scales_of_first_group)) g = 0;
  const int64_t groups = weight.groups(), index = (panel * groups + g) * kLanes;
  if (weight.scale_type == GroupType::kBlocks) {
    const auto both = V::load_bytes(static_cast<const uint8_t*>(weight.scales) + index);
    const float* range = weight.block_ranges + (panel * groups + g) * 4;
    return in_steps<V>(V::and_(both, V::broadcast(15)), range);
  }
  if (weight.scale_type != GroupType::kNested) {
    return load_as_float<V>(weight.scales, weight.scale_type, index);
  }
  const auto* codes = static_cast<const uint8_t*>(weight.scales) + index;
  alignas(64) float lanes[16];
  for (int64_t i = 0; i < kLanes; ++i) {
    // Blocks of 256 scales follow each other row by row.
    int64_t row = panel * kLanes + i < weight.n ? panel * kLanes + i : weight.n - 1;
    if (QK_FAULT(nested_block_of_first_row)) row = panel * kLanes;
    if (QK_FAULT(nested_block_of_first_group)) g = 0;
    const float product =
        weight.nested_table[codes[i]] * weight.nested_absmax[(row * groups + g) / 256];
    lanes[i] = product + weight.nested_offset;
  }
  return V::load(lanes);
}

// The zero points that are stored for group g of a panel, as floats.
template <class V>
QK_INLINE typename V::F stored_zeros(const Weight& weight, int64_t panel, int64_t g) {
  const int64_t place = panel * weight.groups() + g, index = place * kLanes;
  if (weight.zero_type == GroupType::kBlocks) {
    const auto both = V::load_bytes(static_cast<const uint8_t*>(weight.scales) + index);
    const float* range = weight.block_ranges + place * 4;
    const auto codes = QK_FAULT(zeros_of_a_block_from_scales) ? V::and_(both, V::broadcast(15))
                                                              : V::template right<4>(both);
    return in_steps<V>(codes, range + 2);
  }
  return load_as_float<V>(weight.zeros, weight.zero_type, index);
}

// What group g's numbers are less, beyond the decoder's offset.
template <class V>
QK_INLINE typename V::F group_zeros(const Weight& weight, int64_t panel, int64_t g, float offset) {
  if (QK_FAULT(zeros_of_first_group)) g = 0;
  if (QK_FAULT(zeros_off_by_one)) offset += 1;
  if (weight.zero_type == GroupType::kNone) return V::broadcast(weight.implied_zero - offset);
  return V::sub(stored_zeros<V>(weight, panel, g), V::broadcast(offset));
}

// What is added to group g's numbers after its scale.
template <class V>
QK_INLINE typename V::F group_offsets(const Weight& weight, int64_t panel, int64_t g) {
  if (QK_FAULT(offsets_of_first_group)) g = 0;
  const int64_t index = (panel * weight.groups() + g) * kLanes;
  return load_as_float<V>(weight.offsets, weight.offset_type, index);
}

template <class V>
QK_INLINE typename V::I group_integer_zeros(const Weight& weight, int64_t panel, int64_t g) {
  if (QK_FAULT(integer_zeros_of_first_group)) g = 0;
  if (weight.zero_type == GroupType::kNone) {
    return V::broadcast(static_cast<int32_t>(weight.implied_zero));
  }
  const int64_t index = (panel * weight.groups() + g) * kLanes;
  return V::load_bytes(static_cast<const uint8_t*>(weight.zeros) + index);
}

template <class V>
typename V::F channel_scales(const Weight& weight, int64_t panel) {
  if (QK_FAULT(channel_scales_of_first_panel)) panel = 0;
  if (weight.channel_scales == nullptr) return group_scales<V>(weight, panel, 0);
  const int64_t first = panel * kLanes;
  return load_first<V>(weight.channel_scales, FloatType::kFp32, first, weight.n - first);
}

constexpr int32_t kInfinityBits = 0x7f800000;

template <class V>
QK_INLINE bool are_finite(typename V::F x) {
  const auto magnitude = V::and_(V::bits(x), V::broadcast(int32_t{0x7fffffff}));
  return V::all(V::template right_signed<31>(V::sub(magnitude, V::broadcast(kInfinityBits))));
}

// What int8 numbers are made of where y holds NaN or infinity; tells of it.
template <class V>
__attribute__((noinline)) typename V::F tell_of_row(const Int8Output& to, int64_t row,
                                                    typename V::F y) {
  // Operands in this order: where y is NaN, so is the result.
  const auto read = to.relu ? V::max(V::broadcast(0.0f), y) : y;
  if (!are_finite<V>(read) && !QK_FAULT(nan_of_output_not_told)) {
    // Other threads, which have other columns of this row, may write the same.
    const float nan = __builtin_nanf("");
    __atomic_store(to.row_scales + row, &nan, __ATOMIC_RELAXED);
  }
  return V::zero_nan(y);
}

// Writes 16 results of a row, or as many as there are, from element `at` of the output on, as the
// int8 numbers that the layer which reads them makes of them.
template <class V>
__attribute__((noinline)) void write_int8(const Output& out, int64_t row, int64_t at, int64_t count,
                                          typename V::F value) {
  const Int8Output& to = out.int8;
  alignas(64) unsigned char lanes[64];
  store_as<V>(lanes, out.y_type, 0, value);
  auto y = load_first<V>(lanes, out.y_type, 0, count);  // as rounded, and 0 beyond the end
  if (QK_FAULT(int8_of_unrounded_output) && count >= kLanes) y = value;
  if (!are_finite<V>(y)) y = tell_of_row<V>(to, row, y);
  y = V::max(V::min(y, V::broadcast(to.high)), V::broadcast(to.low));
  const auto near = V::round(Quotient<V>(to.scale, to.reciprocal)(y));
  store_first_bytes<V>(to.values, at, count, V::add(near, V::broadcast(to.zero)));
}

// Writes 16 results of a row. `scaled` says that row scales have been applied.
template <class V>
void write_output(const Output& out, const Weight& weight, int64_t row, int64_t panel,
                  typename V::F value, bool scaled) {
  const int64_t first = panel * kLanes, count = weight.n - first;
  if (out.row_scales != nullptr && !scaled) {
    value = V::mul(V::broadcast(out.row_scales[QK_FAULT(row_scale_of_first_row) ? 0 : row]), value);
  }
  if (out.bias != nullptr && !QK_FAULT(bias_missing)) {
    value = V::add(value, load_first<V>(out.bias, out.bias_type, first, count));
  }
  const int64_t at = row * weight.n + first;
  if (out.int8.values != nullptr) return write_int8<V>(out, row, at, count, value);
  store_first<V>(out.y, out.y_type, at, count, value);
}

// The same for an integer sum over all of K.
template <class V>
void write_output(const Output& out, const Weight& weight, int64_t row, int64_t panel,
                  typename V::I sum) {
  const auto scale = V::mul(V::broadcast(out.row_scales[row]), channel_scales<V>(weight, panel));
  write_output<V>(out, weight, row, panel, V::mul(scale, V::to_float(sum)), true);
}

}  // namespace qkernels::cpu
