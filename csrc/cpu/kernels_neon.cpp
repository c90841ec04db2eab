#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__aarch64__)
#include "cpu/vector_neon.h"
//
#include "cpu/vector_kernels.h"

namespace qkernels::cpu {
namespace {

// Eight columns of x and twelve of y at a time, whose sums are 24 of the 32 registers.
constexpr int64_t kRows = 8, kColumns = 12;
constexpr int kVectors = 3;
static_assert(kProductPanel % kRows == 0 && kProductPanel % kColumns == 0);

template <int kLane>
QK_INLINE void add_row(float32x4_t (&sum)[kVectors], float32x4_t x,
                       const float32x4_t (&y)[kVectors]) {
  QK_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] = vfmaq_laneq_f32(sum[v], y[v], x, kLane);
}

QK_INLINE void multiply_block(const float* x, const float* y, int64_t steps, float* sums) {
  float32x4_t sum[kRows][kVectors];
  QK_UNROLL for (int i = 0; i < kRows; ++i) {
    QK_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = vdupq_n_f32(0);
  }
  for (int64_t step = 0; step < steps; ++step, x += kProductPanel, y += kProductPanel) {
    const float32x4_t low = vld1q_f32(x), high = vld1q_f32(x + 4);
    float32x4_t right[kVectors];
    QK_UNROLL for (int v = 0; v < kVectors; ++v) right[v] = vld1q_f32(y + 4 * v);
    add_row<0>(sum[0], low, right);
    add_row<1>(sum[1], low, right);
    add_row<2>(sum[2], low, right);
    add_row<3>(sum[3], low, right);
    add_row<0>(sum[4], high, right);
    add_row<1>(sum[5], high, right);
    add_row<2>(sum[6], high, right);
    add_row<3>(sum[7], high, right);
  }
  QK_UNROLL for (int i = 0; i < kRows; ++i) {
    QK_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* to = sums + i * kProductPanel + 4 * v;
      if (QK_FAULT(neon_sums_of_products_forgotten)) vst1q_f32(to, vdupq_n_f32(0));
      vst1q_f32(to, vaddq_f32(vld1q_f32(to), sum[i][v]));
    }
  }
}

void multiply_fp32(const uint32_t* x, const uint32_t* y, int64_t steps, int64_t columns,
                   float* sums) {
  // A panel of y and some columns of x stay in an L1 cache of 32 KB.
  constexpr int64_t kSteps = 128;
  const auto* left = reinterpret_cast<const float*>(x);
  const auto* right = reinterpret_cast<const float*>(y);
  for (int64_t step = 0; step < steps; step += kSteps) {
    const int64_t count = steps - step < kSteps ? steps - step : kSteps;
    for (int64_t row = 0; row < columns; row += kRows) {
      for (int64_t column = 0; column < kProductPanel; column += kColumns) {
        multiply_block(left + step * kProductPanel + row, right + step * kProductPanel + column,
                       count, sums + row * kProductPanel + column);
      }
    }
  }
}

}  // namespace

Kernels neon_kernels() {
  Kernels table = vector_kernels<Neon>();
  table.fp32_product = multiply_fp32;
  return table;
}

}  // namespace qkernels::cpu
#endif
