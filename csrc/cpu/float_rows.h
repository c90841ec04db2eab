// Few rows of x in floats: codes are decoded in registers and multiplied in fp32, or in pairs of
// bf16 whose products are added in fp32.
//
// A block of kRows rows and kPanels panels keeps its sums in registers over a group; each decoded
// vector of 16 weights meets all rows. A sum goes through the same additions whatever the sizes of
// the block, so a row's bits do not depend on the other rows.

#pragma once

#include "cpu/decode.h"
#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"
#include "cpu/zero_groups.h"

namespace qkernels::cpu {

// What a step of weights is multiplied with: kFactors elements of x, of type X. `value<i>(words)`
// is what the i-th of them meets.
template <class V, class Decoder>
struct Singles : Decoder {
  using X = float;
  static constexpr int kFactors = Decoder::kColumns;
};

template <class V, class Decoder, int kRows, int kPanels>
struct FloatBlock {
  using F = typename V::F;
  using I = typename V::I;
  using X = typename Decoder::X;

  const FloatJob& job;
  const Decoder& decoder;
  int64_t row, panel;
  F sums[kRows][kPanels];
  F parts[V::kSplit][kRows][kPanels];

  template <int kFactor>
  QK_INLINE void multiply_factor(const I (&words)[kPanels], const X* const (&x)[kRows]) {
    decltype(decoder.template value<kFactor>(words[0])) value[kPanels];
    QK_UNROLL for (int p = 0; p < kPanels; ++p) {
      value[p] = decoder.template value<kFactor>(words[p]);
    }
    QK_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto factor = V::broadcast(x[r][kFactor]);
      QK_UNROLL for (int p = 0; p < kPanels; ++p) {
        F& part = parts[kFactor % V::kSplit][r][p];
        part = V::fma(value[p], factor, part);
      }
    }
  }

  QK_INLINE void multiply_step(const I (&words)[kPanels], const X* const (&x)[kRows]) {
    multiply_factor<0>(words, x);
    multiply_factor<1>(words, x);
    if constexpr (Decoder::kFactors > 2) {
      multiply_factor<2>(words, x);
      multiply_factor<3>(words, x);
    }
    if constexpr (Decoder::kFactors > 4) {
      multiply_factor<4>(words, x);
      multiply_factor<5>(words, x);
      multiply_factor<6>(words, x);
      multiply_factor<7>(words, x);
    }
  }

  QK_INLINE void multiply_group(int64_t first, int64_t last) {
    if (QK_FAULT(last_step_of_group_missing)) last -= Decoder::kColumns;
    constexpr int64_t kColumnsOfFactor = Decoder::kColumns / Decoder::kFactors;
    const int64_t stride = job.weight.columns() / kColumnsOfFactor;
    QK_UNROLL for (int s = 0; s < V::kSplit; ++s) {
      QK_UNROLL for (int r = 0; r < kRows; ++r) {
        QK_UNROLL for (int p = 0; p < kPanels; ++p) parts[s][r][p] = V::broadcast(0.0f);
      }
    }
    const uint32_t* from[kPanels];
    const X* x[kRows];
    for (int p = 0; p < kPanels; ++p) {
      from[p] = job.weight.words + (panel + p) * job.weight.panel_words() +
                first / Decoder::kColumns * kLanes;
    }
    const X* const x_begin = static_cast<const X*>(job.x) + first / kColumnsOfFactor;
    for (int r = 0; r < kRows; ++r) x[r] = x_begin + (row + r) * stride;
    for (int64_t k = first; k < last; k += Decoder::kColumns) {
      I words[kPanels];
      QK_UNROLL for (int p = 0; p < kPanels; ++p) {
        words[p] = V::load(from[p]);
        QK_PREFETCH_FAR(from[p] + kPrefetchWords);
        from[p] += kLanes;
      }
      multiply_step(words, x);
      QK_UNROLL for (int r = 0; r < kRows; ++r) x[r] += Decoder::kFactors;
    }
  }

  QK_INLINE void run(GroupRange range) {
    const Weight& weight = job.weight;
    const bool zeros = weight.has_zeros(), offsets = weight.has_offsets();
    if (QK_FAULT(part_of_k_begins_late) && range.begin > 0) ++range.begin;
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) sums[r][p] = V::broadcast(0.0f);
    }
    for (int64_t g = range.begin; g < range.end; ++g) {
      multiply_group(g * weight.group, weight.group_end(g));
      QK_UNROLL for (int p = 0; p < kPanels; ++p) {
        const F scale = scales_without_zero_groups<V>(weight, panel + p, g);
        QK_UNROLL for (int r = 0; r < kRows; ++r) {
          F part = parts[0][r][p];
          if constexpr (V::kSplit == 2) part = V::add(part, parts[1][r][p]);
          if (V::kSplit == 2 && QK_FAULT(odd_columns_not_added)) part = parts[0][r][p];
          if (zeros) {
            const F zero = group_zeros<V>(weight, panel + p, g, decoder.offset);
            const F x_sum = V::broadcast(job.x_sums[(row + r) * weight.groups() + g]);
            part = V::fnma(zero, x_sum, part);
            if (offsets && !QK_FAULT(offsets_missing)) {
              const F offset = group_offsets<V>(weight, panel + p, g);
              sums[r][p] = V::fma(offset, x_sum, sums[r][p]);
            }
          }
          sums[r][p] = V::fma(scale, part, sums[r][p]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        if (range.sums == nullptr) {
          write_output<V>(job.out, weight, row + r, panel + p, sums[r][p], false);
        } else {
          const int64_t at = ((row + r) * weight.panels() + panel + p) * kLanes;
          V::store(static_cast<float*>(range.sums) + at, sums[r][p]);
        }
      }
    }
  }
};

template <class V, class Decoder, int kRows, int kPanels>
void float_block(const FloatJob& job, const Decoder& decoder, int64_t row, int64_t panel,
                 GroupRange range) {
  FloatBlock<V, Decoder, kRows, kPanels> block{job, decoder, row, panel, {}, {}};
  block.run(range);
}

template <class V, class Decoder, int kPanels>
void float_panels(const FloatJob& job, const Decoder& decoder, int64_t panel, GroupRange range) {
  int64_t row = 0;
  for (; row + 4 <= job.m; row += 4)
    float_block<V, Decoder, 4, kPanels>(job, decoder, row, panel, range);
  if (QK_FAULT(last_rows_missing)) return;
  switch (job.m - row) {
    case 3: return float_block<V, Decoder, 3, kPanels>(job, decoder, row, panel, range);
    case 2: return float_block<V, Decoder, 2, kPanels>(job, decoder, row, panel, range);
    case 1: return float_block<V, Decoder, 1, kPanels>(job, decoder, row, panel, range);
    default: return;
  }
}

template <class V, class Decoder>
void float_range(const FloatJob& job, const Decoder& decoder, int64_t begin, int64_t end,
                 GroupRange range) {
  if (QK_FAULT(last_panel_missing)) --end;
  int64_t panel = begin;
  // One row and few panels would leave the units waiting for their own last sums.
  if constexpr (V::kPanelsOfOneRow > 1) {
    for (; job.m == 1 && panel + V::kPanelsOfOneRow <= end; panel += V::kPanelsOfOneRow) {
      float_block<V, Decoder, 1, V::kPanelsOfOneRow>(job, decoder, 0, panel, range);
    }
  }
  if constexpr (V::kMostPanels == 2) {
    for (; panel + 2 <= end; panel += 2) float_panels<V, Decoder, 2>(job, decoder, panel, range);
  }
  for (; panel < end; ++panel) float_panels<V, Decoder, 1>(job, decoder, panel, range);
}

template <class V>
void float_rows(const FloatJob& job, int64_t begin, int64_t end, GroupRange range) {
  visit_decoder<V>(job.weight, [&](const auto& decoder) {
    using Decoder = std::decay_t<decltype(decoder)>;
    float_range<V>(job, Singles<V, Decoder>{decoder}, begin, end, range);
  });
}

template <class V>
void finish_float(const FloatJob& job, int64_t begin, int64_t end, const float* sums, int parts) {
  const int64_t width = job.weight.panels() * kLanes;
  for (int64_t row = 0; row < job.m; ++row) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* from = sums + row * width + panel * kLanes;
      auto sum = V::load(from);
      for (int part = 1; part < parts; ++part) {
        sum = V::add(sum, V::load(from + part * job.m * width));
      }
      write_output<V>(job.out, job.weight, row, panel, sum, false);
    }
  }
}

template <class V>
void widen_row(const void* x, FloatType type, const Weight& weight, int64_t k, float* out,
               float* sums) {
  for (int64_t at = 0; at < weight.columns(); at += kLanes) {
    V::store(out + at, at < k ? load_first<V>(x, type, at, k - at) : V::broadcast(0.0f));
  }
  if (QK_FAULT(padding_of_x_not_zeroed) && k < weight.columns()) out[k] = 1;
  if (sums == nullptr) return;
  for (int64_t g = 0; g < weight.groups(); ++g) {
    auto total = V::broadcast(0.0f);
    const int64_t last = weight.group_end(g);
    int64_t at = g * weight.group;
    for (; at + kLanes <= last; at += kLanes) total = V::add(total, V::load(out + at));
    if (at < last) total = V::add(total, load_first<V>(out, FloatType::kFp32, at, last - at));
    sums[g] = V::sum_lanes(total);
    if (QK_FAULT(sums_of_x_missing)) sums[g] = 0;
  }
}

}  // namespace qkernels::cpu
