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

// Each lane's zero point in the place of each code of a step, and what keeps a lane from having
// only such codes: bits that are set where the zero point is no code.
template <class V>
struct ZeroCodes {
  typename V::I places, no_code;

  QK_INLINE ZeroCodes(const Weight& weight, int64_t panel, int64_t g) {
    const int64_t index = (panel * weight.groups() + g) * kLanes;
    if (weight.zero_type == GroupType::kUint8) {
      places = V::load_bytes(static_cast<const uint8_t*>(weight.zeros) + index);
      no_code = V::broadcast(int32_t{0});
    } else {
      // Plus zero, which makes 0 of -0.
      const auto zeros =
          V::add(load_as_float<V>(weight.zeros, weight.zero_type, index), V::broadcast(0.0f));
      places = V::round(zeros);
      no_code = V::xor_(V::bits(zeros), V::bits(V::to_float(places)));
    }
    if (is_nibble(weight.code)) {
      no_code = V::or_(no_code, V::template right<4>(places));
      places = V::or_(places, V::template left<4>(places));
    } else {
      no_code = V::or_(no_code, V::template right<8>(places));
    }
    places = V::or_(places, V::template left<8>(places));
    places = V::or_(places, V::template left<16>(places));
  }
};

// The bits of the first `count` columns of a step, in each lane.
template <class V>
QK_INLINE typename V::I first_columns(Code code, int64_t count) {
  if (!is_nibble(code)) return V::broadcast(static_cast<int32_t>((uint64_t{1} << 8 * count) - 1));
  // The low halves of the bytes come first, then the high ones.
  const int64_t low = count < 4 ? count : 4, high = count - low;
  const uint64_t low_bytes = (uint64_t{1} << 8 * low) - 1;
  const uint64_t high_bytes = (uint64_t{1} << 8 * high) - 1;
  return V::broadcast(static_cast<int32_t>((low_bytes & 0x0f0f0f0f) | (high_bytes & 0xf0f0f0f0)));
}

// The scales of group g of a panel, zero in lanes whose codes in the group are all zero points.
template <class V>
QK_INLINE typename V::F scales_without_zero_groups(const Weight& weight, int64_t panel, int64_t g) {
  const auto scales = group_scales<V>(weight, panel, g);
  const bool integers = weight.code == Code::kInt4 || weight.code == Code::kInt8;
  if (!weight.has_zeros() || !integers || QK_FAULT(zero_groups_keep_their_scale)) return scales;
  const ZeroCodes<V> zero(weight, panel, g);
  const int64_t step = weight.step_columns(), first = g * weight.group;
  int64_t left = weight.codes_of_group(g);
  if (QK_FAULT(padding_of_zero_groups_compared)) left = weight.group_end(g) - first;
  if (QK_FAULT(last_columns_of_zero_groups_not_compared)) left = left / step * step;
  const uint32_t* words = weight.words + panel * weight.panel_words() + weight.words_before(first);
  auto others = zero.no_code;
  if (QK_FAULT(real_zeros_taken_for_codes)) others = V::broadcast(int32_t{0});
  for (; left > 0; left -= step, words += kLanes) {
    auto differs = V::xor_(V::load(words), zero.places);
    if (left < step) differs = V::and_(differs, first_columns<V>(weight.code, left));
    others = V::or_(others, differs);
    // Nearly always at the first step.
    if (V::all(others)) return scales;
    if (QK_FAULT(zero_groups_by_their_first_step)) break;
  }
  return V::where(others, scales);
}

}  // namespace qkernels::cpu
