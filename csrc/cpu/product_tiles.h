// Sums of products of two panels of columns, in registers. See ProductKernel in calibration.h.

#pragma once

#include "cpu/calibration.h"
#include "cpu/faults.h"
#include "cpu/target.h"

namespace qkernels::cpu {

// `Step` multiplies: Step::add(sums, a number of x, numbers of y), and kRows rows of sums with what
// they take fill the registers.
template <class V, class Step, int kRows>
void multiply_panels(const uint32_t* x, const uint32_t* y, int64_t steps, int64_t columns,
                     float* sums) {
  using F = typename V::F;
  constexpr int kVectors = 3;
  // A panel of y and some columns of x stay in an L1 cache of 32 KB.
  constexpr int64_t kSteps = 128;
  static_assert(kProductPanel == kVectors * kLanes && kProductPanel % kRows == 0);
  for (int64_t begin = 0; begin < steps; begin += kSteps) {
    const int64_t end = begin + kSteps < steps ? begin + kSteps : steps;
    for (int64_t row = 0; row < columns; row += kRows) {
      F sum[kRows][kVectors];
      QK_UNROLL
      for (int i = 0; i < kRows; ++i) {
        QK_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[i][v] = V::broadcast(0.0f);
      }
      for (int64_t step = begin; step < end; ++step) {
        const uint32_t* from = x + step * kProductPanel + row;
        F right[kVectors];
        QK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          right[v] = V::from_bits(V::load(y + step * kProductPanel + v * kLanes));
        }
        QK_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const F left = V::from_bits(V::broadcast(static_cast<int32_t>(from[i])));
          QK_UNROLL
          for (int v = 0; v < kVectors; ++v) sum[i][v] = Step::add(sum[i][v], left, right[v]);
        }
      }
      QK_UNROLL
      for (int i = 0; i < kRows; ++i) {
        QK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          float* to = sums + (row + i) * kProductPanel + v * kLanes;
          if (QK_FAULT(sums_of_products_forgotten)) V::store(to, V::broadcast(0.0f));
          V::store(to, V::add(V::load(to), sum[i][v]));
        }
      }
    }
  }
}

template <class V>
struct Fp32Step {
  static QK_INLINE typename V::F add(typename V::F sum, typename V::F x, typename V::F y) {
    return V::fma(x, y, sum);
  }
};

}  // namespace qkernels::cpu
