#include "cpu/calibration.h"
#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__aarch64__)
#include <arm_neon.h>

QK_TARGET("arch=armv8.2-a+bf16")

#include "cpu/vector_neon.h"
//
#include "cpu/scaled_panels.h"

namespace qkernels::cpu {
namespace {

struct NeonBf16 : Neon {
  // bf16 of `even` in the low halves of lanes, and of `odd` in the high ones.
  static QK_INLINE I round_pairs(F even, F odd) {
    const auto op = [](auto low, auto high) QK_LAMBDA_INLINE {
      const uint16x8_t first = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(low));
      const uint16x8_t second = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(high));
      return vreinterpretq_s32_u16(vzip1q_u16(first, second));
    };
    return integers(op, even, odd);
  }
};

// Eight columns of x and twelve of y at a time. A register has the sums of two columns of x and two
// of y, and BFMMLA adds products of four rows to them: 24 of the 32 registers are sums.
constexpr int64_t kRows = 8, kColumns = 12;
constexpr int kRowPairs = 4, kFours = 3;
static_assert(kProductPanel % kRows == 0 && kProductPanel % kColumns == 0);

// Four columns of two steps, as two columns of four numbers each in `first` and in `second`.
QK_INLINE void load_columns(const uint32_t* step, bool has_next, bfloat16x8_t& first,
                            bfloat16x8_t& second) {
  const uint32x4_t here = vld1q_u32(step);
  const uint32x4_t next = has_next ? vld1q_u32(step + kProductPanel) : vdupq_n_u32(0);
  first = vreinterpretq_bf16_u32(vzip1q_u32(here, next));
  second = vreinterpretq_bf16_u32(vzip2q_u32(here, next));
}

QK_INLINE void add_steps(const uint32_t* x, const uint32_t* y, bool has_next,
                         float32x4_t (&sum)[kRowPairs][2 * kFours]) {
  bfloat16x8_t left[kRowPairs];
  load_columns(x, has_next, left[0], left[1]);
  load_columns(x + 4, has_next, left[2], left[3]);
  QK_UNROLL for (int v = 0; v < kFours; ++v) {
    bfloat16x8_t first, second;
    load_columns(y + 4 * v, has_next, first, second);
    QK_UNROLL for (int p = 0; p < kRowPairs; ++p) {
      sum[p][2 * v] = vbfmmlaq_f32(sum[p][2 * v], left[p], first);
      sum[p][2 * v + 1] = vbfmmlaq_f32(sum[p][2 * v + 1], left[p], second);
    }
  }
}

QK_INLINE void add_to(float* sums, float64x2_t more) {
  if (QK_FAULT(neon_sums_of_pairs_forgotten)) vst1q_f32(sums, vdupq_n_f32(0));
  vst1q_f32(sums, vaddq_f32(vld1q_f32(sums), vreinterpretq_f32_f64(more)));
}

QK_INLINE void multiply_block(const uint32_t* x, const uint32_t* y, int64_t steps, float* sums) {
  float32x4_t sum[kRowPairs][2 * kFours];
  QK_UNROLL for (int p = 0; p < kRowPairs; ++p) {
    QK_UNROLL for (int v = 0; v < 2 * kFours; ++v) sum[p][v] = vdupq_n_f32(0);
  }
  int64_t step = 0;
  for (; step + 2 <= steps; step += 2, x += 2 * kProductPanel, y += 2 * kProductPanel) {
    add_steps(x, y, true, sum);
  }
  if (step < steps && !QK_FAULT(neon_odd_pair_missing)) add_steps(x, y, false, sum);
  QK_UNROLL for (int p = 0; p < kRowPairs; ++p) {
    QK_UNROLL for (int v = 0; v < kFours; ++v) {
      const float64x2_t first = vreinterpretq_f64_f32(sum[p][2 * v]);
      const float64x2_t second = vreinterpretq_f64_f32(sum[p][2 * v + 1]);
      add_to(sums + 2 * p * kProductPanel + 4 * v, vzip1q_f64(first, second));
      add_to(sums + (2 * p + 1) * kProductPanel + 4 * v, vzip2q_f64(first, second));
    }
  }
}

void multiply_bf16(const uint32_t* x, const uint32_t* y, int64_t steps, int64_t columns,
                   float* sums) {
  // A panel of y and some columns of x stay in an L1 cache of 32 KB; even, for pairs of steps.
  constexpr int64_t kSteps = 128;
  for (int64_t step = 0; step < steps; step += kSteps) {
    const int64_t count = steps - step < kSteps ? steps - step : kSteps;
    for (int64_t row = 0; row < columns; row += kRows) {
      for (int64_t column = 0; column < kProductPanel; column += kColumns) {
        multiply_block(x + step * kProductPanel + row, y + step * kProductPanel + column, count,
                       sums + row * kProductPanel + column);
      }
    }
  }
}

// Eight columns of a row of x, zero from column k on.
QK_INLINE uint32x4_t load_pairs(const uint16_t* x, int64_t column, int64_t k) {
  if (QK_FAULT(neon_last_column_of_pairs_missing)) --k;
  if (column + 8 <= k) return vreinterpretq_u32_u16(vld1q_u16(x + column));
  uint16_t some[8] = {};
  if (column < k) __builtin_memcpy(some, x + column, static_cast<size_t>(k - column) * 2);
  return vreinterpretq_u32_u16(vld1q_u16(some));
}

// What row i has in place j comes to row j, in place i.
QK_INLINE void transpose(uint32x4_t (&rows)[4]) {
  uint64x2_t pairs[4];
  QK_UNROLL for (int i = 0; i < 4; i += 2) {
    pairs[i] = vreinterpretq_u64_u32(vtrn1q_u32(rows[i], rows[i + 1]));
    pairs[i + 1] = vreinterpretq_u64_u32(vtrn2q_u32(rows[i], rows[i + 1]));
  }
  QK_UNROLL for (int i = 0; i < 2; ++i) {
    rows[i] = vreinterpretq_u32_u64(vtrn1q_u64(pairs[i], pairs[i + 2]));
    rows[i + 2] = vreinterpretq_u32_u64(vtrn2q_u64(pairs[i], pairs[i + 2]));
  }
}

void pack_pairs(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t k, int64_t columns,
                uint32_t* out) {
  for (int64_t column = 0; column < columns; column += 8, out += 4 * kProductPanel) {
    for (int64_t row = 0; row < kProductPanel; row += 4) {
      uint32x4_t words[4];
      QK_UNROLL for (int i = 0; i < 4; ++i) {
        words[i] =
            row + i < rows ? load_pairs(x + (row + i) * x_stride, column, k) : vdupq_n_u32(0);
      }
      transpose(words);
      QK_UNROLL for (int i = 0; i < 4; ++i) vst1q_u32(out + i * kProductPanel + row, words[i]);
    }
  }
}

void scaled_panels(const ScaledJob& job, int64_t begin, int64_t end, void* scratch) {
  visit_decoder<NeonBf16>(job.weight, [&](const auto& decoder) {
    run_scaled_panels<NeonBf16>(job, decoder, multiply_bf16, begin, end, scratch);
  });
}

}  // namespace

void add_neon_bf16_kernels(Kernels& table) {
  table.bf16_product = multiply_bf16;
  table.scaled_panels = scaled_panels;
  table.scaled_scratch = scaled_scratch;
  table.pack_pairs = pack_pairs;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
