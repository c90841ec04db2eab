// Groups whose codes are all their zero point: weights that are zero whatever their scale, such as
// the rows of padding in a vocabulary.
//
// Floats are multiplied by codes, and the zero point times the sum of x comes off afterwards. The
// two sums round differently, and what is left of them is as large as the scale makes it. So such
// a group is given a scale of zero, which leaves nothing. All other groups keep theirs.

#pragma once

#include "cpu/decode.h"
#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

// The zero points of a group; of real ones, the integers next to them.
template <class V>
QK_INLINE typename V::I nearest_codes(const Weight& weight, int64_t panel, int64_t g) {
  if (weight.zero_type == GroupType::kUint8) {
    const int64_t index = (panel * weight.groups() + g) * kLanes;
    return V::load_bytes(static_cast<const uint8_t*>(weight.zeros) + index);
  }
  return V::round(stored_zeros<V>(weight, panel, g));
}

// Bits in the lanes whose zero point is no code.
template <class V>
typename V::I lanes_without_code(const Weight& weight, int64_t panel, int64_t g,
                                 typename V::I codes) {
  auto beyond = is_nibble(weight.code) ? V::template right<4>(codes) : V::template right<8>(codes);
  if (weight.zero_type != GroupType::kUint8 && !QK_FAULT(real_zeros_taken_for_codes)) {
    // Plus zero, which makes 0 of -0.
    const auto zeros = V::add(stored_zeros<V>(weight, panel, g), V::broadcast(0.0f));
    beyond = V::or_(beyond, V::xor_(V::bits(zeros), V::bits(V::to_float(codes))));
  }
  return beyond;
}

// The bits of the first `count` columns of a step, in each lane.
template <class V>
typename V::I first_columns(Code code, int64_t count) {
  if (!is_nibble(code)) return V::broadcast(static_cast<int32_t>((uint64_t{1} << 8 * count) - 1));
  // The low halves of the bytes come first, then the high ones.
  const int64_t low = count < 4 ? count : 4, high = count - low;
  const uint64_t low_bytes = (uint64_t{1} << 8 * low) - 1;
  const uint64_t high_bytes = (uint64_t{1} << 8 * high) - 1;
  return V::broadcast(static_cast<int32_t>((low_bytes & 0x0f0f0f0f) | (high_bytes & 0xf0f0f0f0)));
}

// `scales`, zero in the lanes whose codes in group g of a panel are all their zero point.
template <class V>
__attribute__((noinline)) typename V::F zero_in_zero_groups(const Weight& weight, int64_t panel,
                                                            int64_t g, typename V::F scales) {
  const auto codes = nearest_codes<V>(weight, panel, g);
  auto places = V::spread_byte(codes), others = lanes_without_code<V>(weight, panel, g, codes);
  if (is_nibble(weight.code)) places = V::or_(places, V::template left<4>(places));
  const int64_t step = weight.step_columns(), first = g * weight.group;
  int64_t left = weight.codes_of_group(g);
  if (QK_FAULT(padding_of_zero_groups_compared)) left = weight.group_end(g) - first;
  if (QK_FAULT(last_columns_of_zero_groups_not_compared)) left = left / step * step;
  const uint32_t* words = weight.words + panel * weight.panel_words() + weight.words_before(first);
  for (; left > 0; left -= step, words += kLanes) {
    auto differs = V::xor_(V::load(words), places);
    if (left < step) differs = V::and_(differs, first_columns<V>(weight.code, left));
    others = V::or_(others, differs);
    if (V::all(others)) return scales;
    if (QK_FAULT(zero_groups_by_their_first_step)) break;
  }
  return V::where(others, scales);
}

// The same of the group's own scales.
template <class V>
QK_INLINE typename V::F scales_without_zero_groups(const Weight& weight, int64_t panel, int64_t g) {
  const auto scales = group_scales<V>(weight, panel, g);
  const bool integers = weight.code == Code::kInt4 || weight.code == Code::kInt8;
  if (!weight.has_zeros() || !integers || QK_FAULT(zero_groups_keep_their_scale)) return scales;
  // These leave something of such a group, and are as large as what it would have left.
  if (weight.has_offsets()) return scales;
  constexpr int64_t kCompared = 4;
  if (weight.codes_of_group(g) >= kCompared || QK_FAULT(short_zero_groups_keep_their_scale)) {
    // The first codes, the low halves or all of a word's bytes, tell nearly always.
    const uint32_t* words = weight.words + panel * weight.panel_words();
    const auto zeros = nearest_codes<V>(weight, panel, g);
    const auto differs =
        V::xor_(V::load(words + weight.words_before(g * weight.group)), V::spread_byte(zeros));
    const auto compared = V::broadcast(is_nibble(weight.code) ? 0x0f0f0f0f : -1);
    if (V::all(V::and_(differs, compared))) return scales;
  }
  return zero_in_zero_groups<V>(weight, panel, g, scales);
}

}  // namespace qkernels::cpu
