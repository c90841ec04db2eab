// Quotients of floats.

#pragma once

#include "cpu/faults.h"

namespace qkernels::cpu {

// x / scale, rounded as a division, by three operations that are faster than one: the product with
// the reciprocal, and what it misses (Markstein 1990). Where those might leave the range of floats,
// and where the machine has no fused product, by a division. x must be finite.
template <class V>
class Quotient {
 public:
  explicit Quotient(float scale) : Quotient(scale, 1.0f / scale) {}

  Quotient(float scale, float reciprocal)
      : scale_(V::broadcast(scale)),
        reciprocal_(V::broadcast(reciprocal)),
        divides_(!is_exact(scale)) {}

  static bool is_exact(float scale) { return V::kFused && scale > 0x1p-60f && scale < 0x1p60f; }

  // With a scale for which that holds, and its reciprocal.
  static QK_INLINE typename V::F exact(typename V::F x, typename V::F scale,
                                       typename V::F reciprocal) {
    const auto near = V::mul(x, reciprocal);
    if (QK_FAULT(quotient_not_corrected)) return near;
    return V::fma(V::fnma(near, scale, x), reciprocal, near);
  }

  QK_INLINE typename V::F operator()(typename V::F x) const {
    if (divides_) return V::div(x, scale_);
    return exact(x, scale_, reciprocal_);
  }

 private:
  typename V::F scale_, reciprocal_;
  bool divides_;
};

}  // namespace qkernels::cpu
