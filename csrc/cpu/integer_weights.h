// Integer weights as bytes, and what comes off sums of products with them over all of K. Only for
// source files after QK_TARGET.

#pragma once

#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"

namespace qkernels::cpu {

// Makes bytes of the codes of up to 4 bits in the low halves of bytes, for the rows of a panel: the
// codes themselves or, with two-level scales, multiplier * (code - zero) + 128.
template <class V>
struct ByteDecoder {
  using I = typename V::I;
  I multiplier, offset;

  ByteDecoder() = default;
  QK_INLINE ByteDecoder(const Weight& weight, int64_t panel, int64_t g) {
    multiplier = V::broadcast(int32_t{1});
    offset = V::broadcast(int32_t{0});
    if (weight.channel_scales == nullptr) return;
    const int64_t at = (panel * weight.groups() + g) * kLanes;
    if (!QK_FAULT(decoded_multipliers_missing)) {
      multiplier = V::load_bytes(static_cast<const uint8_t*>(weight.scales) + at);
    }
    // All four bytes of a lane at once: what one borrows of the next, the sum of all gives back,
    // since each byte of the result is within 0 and 255.
    const I zero = V::mul(group_integer_zeros<V>(weight, panel, g), multiplier);
    offset =
        V::sub(V::broadcast(int32_t(0x80808080)), V::mul(zero, V::broadcast(int32_t{0x01010101})));
  }

  QK_INLINE I bytes(I words) const {
    const I codes = V::and_(words, V::broadcast(int32_t{0x0f0f0f0f}));
    return V::add(V::mul(codes, multiplier), offset);
  }
};

// What each byte of a panel is more than the weight it stands for.
template <class V>
QK_INLINE typename V::I byte_zeros(const Weight& weight, int64_t panel) {
  // Decoded with two-level scales, the zero point is what keeps bytes unsigned.
  if (weight.channel_scales != nullptr) return V::broadcast(int32_t{128});
  return group_integer_zeros<V>(weight, panel, 0);
}

// The sums of the rows of x, [m], of those of their groups.
inline void add_up_groups(const int32_t* x_sums, int64_t m, int64_t groups, int32_t* totals) {
  for (int64_t row = 0; row < m; ++row) {
    int32_t total = 0;
    for (int64_t g = 0; g < groups; ++g) total += x_sums[row * groups + g];
    if (QK_FAULT(x_totals_of_first_group)) total = x_sums[row * groups];
    totals[row] = total;
  }
}

}  // namespace qkernels::cpu
