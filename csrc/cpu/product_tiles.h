// Sums of products of two panels of columns, in registers. See ProductKernel in calibration.h.

#pragma once

#include "cpu/calibration.h"
#include "cpu/target.h"

namespace qkernels::cpu {

// `Step` multiplies: Step::add(sum, pointer to the number of a row of sums, vector of the others).
template <class V, class Step>
void multiply_panels(const uint32_t* x, const uint32_t* y, int64_t steps, float* sums) {
  using F = typename V::F;
  // 24 sums and what they take fill the registers of AVX-512; panels of so many steps its L1 cache.
  constexpr int kRows = 8, kVectors = 3;
  constexpr int64_t kSteps = 128;
  static_assert(kProductPanel == kVectors * kLanes && kProductPanel % kRows == 0);
  for (int64_t begin = 0; begin < steps; begin += kSteps) {
    const int64_t end = begin + kSteps < steps ? begin + kSteps : steps;
    for (int64_t row = 0; row < kProductPanel; row += kRows) {
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
