// Many rows of x in int8, in products of two rows and two rows of eight columns (SMMLA): what tiles
// of AMX do, on vectors.
//
// A chunk of a panel is decoded into the L1 cache, as signed bytes, and multiplied with the same
// chunk of all rows of x, eight at a time. Both lie as [columns / 8][16][8], of which two rows are
// a register. Only for source files after QK_TARGET.

#pragma once

#include <arm_neon.h>

#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"

namespace qkernels::cpu {
namespace {

constexpr int64_t kMatrixColumns = 8, kMatrixBytes = kLanes * kMatrixColumns;
constexpr int64_t kMatrixChunk = 512;  // columns
constexpr int64_t kMatrixRows = 8;  // of x, whose sums are in registers with 8 rows of the weight
constexpr int64_t kTileRows = 16;

// Then sums of groups [m][16], int32, and sums of all [m][16], fp32.
struct MatrixScratch {
  int8_t weights[kMatrixChunk * kLanes];
  int32_t product[kMatrixRows][kLanes];
};

int64_t matrix_scratch(int64_t m, int64_t) {
  return static_cast<int64_t>(sizeof(MatrixScratch)) + 2 * m * kLanes * 4;
}

// A row of x [columns] into row `row` of a tile.
void pack_matrix_row(const int8_t* x, int64_t columns, int64_t row, int8_t* tile) {
  for (int64_t c = 0; c < columns; c += kMatrixColumns) {
    vst1_s8(tile + c * kTileRows + row * kMatrixColumns, vld1_s8(x + c));
  }
}

// Four lanes of four columns each, and of the four columns behind them, row by row.
QK_INLINE void store_rows(int8x16_t before, int8x16_t behind, int8_t* out) {
  const int32x4_t low = vreinterpretq_s32_s8(before), high = vreinterpretq_s32_s8(behind);
  vst1q_s8(out, vreinterpretq_s8_s32(vzip1q_s32(low, high)));
  vst1q_s8(out + 16, vreinterpretq_s8_s32(vzip2q_s32(low, high)));
}

QK_INLINE int8x16_t load_words(const uint32_t* words) {
  return vreinterpretq_s8_u32(vld1q_u32(words));
}

QK_INLINE int8x16_t upper_codes(int8x16_t words) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(words), 4));
}

// Of codes of 8 bits, less 128. All of these: columns [first, last) of a panel.
inline void decode_bytes(const uint32_t* from, int64_t first, int64_t last, int8_t* out) {
  const int8x16_t top = vdupq_n_s8(-128);
  for (; first < last; first += kMatrixColumns, from += 2 * kLanes) {
    QK_UNROLL for (int i = 0; i < kLanes; i += 4, out += 32) {
      store_rows(veorq_s8(load_words(from + i), top), veorq_s8(load_words(from + kLanes + i), top),
                 out);
    }
  }
}

inline void decode_nibbles(const uint32_t* from, int64_t first, int64_t last, int8_t* out) {
  const int8x16_t low = vdupq_n_s8(15);
  for (; first < last; first += kMatrixColumns, from += kLanes) {
    QK_UNROLL for (int i = 0; i < kLanes; i += 4, out += 32) {
      const int8x16_t words = load_words(from + i);
      store_rows(vandq_s8(words, low), upper_codes(words), out);
    }
  }
}

// multiplier * (code - zero), which fits a byte.
template <class V>
void decode_multiples(const Weight& weight, int64_t panel, int64_t first, int64_t last,
                      int8_t* out) {
  const uint32_t* from = weight.words + panel * weight.panel_words() + weight.words_before(first);
  const int8x16_t low = vdupq_n_s8(15);
  while (first < last) {
    const int64_t g = weight.groups() == 1 ? 0 : first / weight.group;
    const int64_t end = weight.group_end(g) < last ? weight.group_end(g) : last;
    const auto* scales = static_cast<const uint8_t*>(weight.scales);
    auto multiplier = V::load_bytes(scales + (panel * weight.groups() + g) * kLanes);
    if (QK_FAULT(neon_matrix_multipliers_missing)) multiplier = V::broadcast(int32_t{1});
    const auto zero = group_integer_zeros<V>(weight, panel, g);
    alignas(64) int32_t multipliers[kLanes], zeros[kLanes];
    V::store(multipliers, V::spread_byte(multiplier));
    V::store(zeros, V::spread_byte(zero));
    for (; first < end; first += kMatrixColumns, from += kLanes) {
      QK_UNROLL for (int i = 0; i < kLanes; i += 4, out += 32) {
        const int8x16_t words = load_words(from + i);
        const int8x16_t times = vreinterpretq_s8_s32(vld1q_s32(multipliers + i));
        const int8x16_t less = vreinterpretq_s8_s32(vld1q_s32(zeros + i));
        store_rows(vmulq_s8(vsubq_s8(vandq_s8(words, low), less), times),
                   vmulq_s8(vsubq_s8(upper_codes(words), less), times), out);
      }
    }
  }
}

// Sums of products of pairs of rows of x and a panel, [rows][16]. `x` is at its first row's first
// column.
template <int kPairs>
QK_INLINE void multiply_matrices(const int8_t* x, const int8_t* weights, int64_t steps,
                                 int32_t (*product)[kLanes]) {
  constexpr int kPairsOfHalf = kLanes / 4;
  if (QK_FAULT(neon_last_matrix_missing)) --steps;
  for (int half = 0; half < 2; ++half) {
    const int8_t *left = x, *right = weights + half * kMatrixBytes / 2;
    int32x4_t sums[kPairs][kPairsOfHalf];
    QK_UNROLL for (int p = 0; p < kPairs; ++p) {
      QK_UNROLL for (int j = 0; j < kPairsOfHalf; ++j) sums[p][j] = vdupq_n_s32(0);
    }
    for (int64_t step = 0; step < steps; ++step, left += kMatrixBytes, right += kMatrixBytes) {
      int8x16_t others[kPairsOfHalf];
      QK_UNROLL for (int j = 0; j < kPairsOfHalf; ++j) others[j] = vld1q_s8(right + 16 * j);
      QK_UNROLL for (int p = 0; p < kPairs; ++p) {
        const int8x16_t rows = vld1q_s8(left + 16 * p);
        QK_UNROLL for (int j = 0; j < kPairsOfHalf; ++j) {
          sums[p][j] = vmmlaq_s32(sums[p][j], rows, others[j]);
        }
      }
    }
    QK_UNROLL for (int p = 0; p < kPairs; ++p) {
      QK_UNROLL for (int j = 0; j < kPairsOfHalf; j += 2) {
        const int64x2_t first = vreinterpretq_s64_s32(sums[p][j]);
        const int64x2_t second = vreinterpretq_s64_s32(sums[p][j + 1]);
        const int64_t lane = half * kLanes / 2 + 2 * j;
        vst1q_s32(&product[2 * p][lane], vreinterpretq_s32_s64(vzip1q_s64(first, second)));
        vst1q_s32(&product[2 * p + 1][lane], vreinterpretq_s32_s64(vzip2q_s64(first, second)));
      }
    }
  }
}

template <class V>
class Int8Matrices {
  using F = typename V::F;
  using I = typename V::I;

 public:
  Int8Matrices(const Int8TileJob& job, void* scratch)
      : job_(job),
        weight_(job.weight),
        scratch_(*static_cast<MatrixScratch*>(scratch)),
        integers_(reinterpret_cast<int32_t*>(&scratch_ + 1)),
        floats_(reinterpret_cast<float*>(integers_ + job.m * kLanes)) {}

  void run(int64_t panel) {
    if (multiplied()) return run_span(panel, {0, weight_.columns(), 0, true});
    const int64_t groups = weight_.groups();
    for (int64_t g = 0; g < groups; ++g) {
      run_span(panel, {g * weight_.group, weight_.group_end(g), g, g + 1 == groups});
    }
  }

 private:
  // Columns whose sums are integers.
  struct Span {
    int64_t first, last, group;
    bool is_last;
  };

  // Whether the scales and zero points of groups are multiplied into the weights.
  bool multiplied() const { return weight_.channel_scales != nullptr; }

  void decode(int64_t panel, int64_t first, int64_t last) {
    const uint32_t* from =
        weight_.words + panel * weight_.panel_words() + weight_.words_before(first);
    if (multiplied())
      decode_multiples<V>(weight_, panel, first, last, scratch_.weights);
    else if (is_nibble(weight_.code))
      decode_nibbles(from, first, last, scratch_.weights);
    else
      decode_bytes(from, first, last, scratch_.weights);
  }

  // Into the scratch, for rows [row, row + rows).
  void multiply(int64_t row, int64_t rows, int64_t first, int64_t last) {
    const int8_t* x = job_.x + row / kTileRows * kTileRows * weight_.columns() + first * kTileRows +
                      row % kTileRows * kMatrixColumns;
    const int64_t steps = (last - first) / kMatrixColumns;
    switch (ceil_div(rows, 2)) {
      case 1: return multiply_matrices<1>(x, scratch_.weights, steps, scratch_.product);
      case 2: return multiply_matrices<2>(x, scratch_.weights, steps, scratch_.product);
      case 3: return multiply_matrices<3>(x, scratch_.weights, steps, scratch_.product);
      default: return multiply_matrices<4>(x, scratch_.weights, steps, scratch_.product);
    }
  }

  void run_span(int64_t panel, const Span& span) {
    I zero = V::broadcast(int32_t{0});
    F scale = V::broadcast(0.0f);
    if (!multiplied()) zero = group_integer_zeros<V>(weight_, panel, span.group);
    if (!is_nibble(weight_.code)) zero = V::sub(zero, V::broadcast(int32_t{128}));
    if (!weight_.sums_are_integers()) scale = group_scales<V>(weight_, panel, span.group);
    for (int64_t first = span.first; first < span.last;) {
      const int64_t next = first + kMatrixChunk, last = next < span.last ? next : span.last;
      decode(panel, first, last);
      for (int64_t row = 0; row < job_.m; row += kMatrixRows) {
        const int64_t rows = job_.m - row < kMatrixRows ? job_.m - row : kMatrixRows;
        multiply(row, rows, first, last);
        for (int64_t r = 0; r < rows; ++r) {
          I part = V::load(scratch_.product[r]);
          int32_t* sums = integers_ + (row + r) * kLanes;
          if (first > span.first && !QK_FAULT(neon_matrix_sums_begin_anew)) {
            part = V::add(part, V::load(sums));
          }
          if (last < span.last)
            V::store(sums, part);
          else
            finish(panel, row + r, span, part, zero, scale);
        }
      }
      first = last;
    }
  }

  // With the sum of a whole span.
  QK_INLINE void finish(int64_t panel, int64_t row, const Span& span, I sum, I zero, F scale) {
    const I x_sum = V::broadcast(job_.x_sums[row * weight_.groups() + span.group]);
    sum = V::sub(sum, V::mul(zero, x_sum));
    if (weight_.sums_are_integers()) return write_output<V>(job_.out, weight_, row, panel, sum);
    // In the order of groups, products rounded before they are added, as the reference does.
    float* sums = floats_ + row * kLanes;
    const F before = span.group == 0 ? V::broadcast(0.0f) : V::load(sums);
    const F total = V::add(before, V::mul(scale, V::to_float(sum)));
    if (span.is_last)
      write_output<V>(job_.out, weight_, row, panel, total, false);
    else
      V::store(sums, total);
  }

  const Int8TileJob& job_;
  const Weight& weight_;
  MatrixScratch& scratch_;
  int32_t* integers_;
  float* floats_;
};

template <class V>
void int8_matrices(const Int8TileJob& job, int64_t begin, int64_t end, void* scratch) {
  Int8Matrices<V> matrices(job, scratch);
  for (int64_t panel = begin; panel < end; ++panel) matrices.run(panel);
}

}  // namespace
}  // namespace qkernels::cpu
