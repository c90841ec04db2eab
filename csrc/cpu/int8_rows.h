// Few rows of x in int8: exact int32 sums of products of codes, which are unsigned, and of x.
//
// Zero points are taken off afterwards: sum (code - zero) x = sum code x - zero * sum x. Where
// codes of 8 bits must be signed, they are multiplied less 128, and zero points are less 128 too.

#pragma once

#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"

namespace qkernels::cpu {

template <class V, bool kNibbles, int kRows, int kPanels>
struct Int8Block {
  using F = typename V::F;
  using I = typename V::I;

  const Int8Job& job;
  int64_t row, panel;
  I parts[kRows][kPanels];

  QK_INLINE void multiply_group(int64_t first, int64_t last) {
    constexpr int kColumns = kNibbles ? 8 : 4;
    if (QK_FAULT(last_step_of_int8_group_missing)) last -= kColumns;
    const int64_t columns = job.weight.columns();
    QK_UNROLL for (int r = 0; r < kRows; ++r) {
      QK_UNROLL for (int p = 0; p < kPanels; ++p) parts[r][p] = V::broadcast(int32_t{0});
    }
    const uint32_t* from[kPanels];
    const int8_t* x[kRows];
    for (int p = 0; p < kPanels; ++p) {
      from[p] =
          job.weight.words + (panel + p) * job.weight.panel_words() + first / kColumns * kLanes;
    }
    for (int r = 0; r < kRows; ++r) x[r] = job.x + (row + r) * columns + first;
    for (int64_t k = first; k < last; k += kColumns) {
      I words[kPanels], upper[kPanels];
      QK_UNROLL for (int p = 0; p < kPanels; ++p) {
        words[p] = V::load(from[p]);
        QK_PREFETCH(from[p] + kPrefetchWords);
        from[p] += kLanes;
        if constexpr (kNibbles) {
          const I low = V::broadcast(int32_t{0x0f0f0f0f});
          upper[p] = V::and_(V::template right<4>(words[p]), low);
          words[p] = V::and_(words[p], low);
        } else if constexpr (V::kByteOffset != 0) {
          words[p] = V::xor_(words[p], V::broadcast(int32_t(0x80808080)));
        }
      }
      QK_UNROLL for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, x[r], 4);
        const I factor = V::broadcast(four);
        QK_UNROLL for (int p = 0; p < kPanels; ++p) {
          parts[r][p] = V::template dot<kNibbles>(parts[r][p], words[p], factor);
        }
        if constexpr (kNibbles) {
          __builtin_memcpy(&four, x[r] + 4, 4);
          const I next = V::broadcast(four);
          QK_UNROLL for (int p = 0; p < kPanels; ++p) {
            parts[r][p] = V::template dot<true>(parts[r][p], upper[p], next);
          }
        }
        x[r] += kColumns;
      }
    }
  }

  // What a group adds for one row and panel, before its scale.
  QK_INLINE I group_sum(int r, int p, int64_t g) const {
    const I x_sum = V::broadcast(job.x_sums[(row + r) * job.weight.groups() + g]);
    I zero = group_integer_zeros<V>(job.weight, panel + p, g);
    if constexpr (!kNibbles && V::kByteOffset != 0) {
      zero = V::sub(zero, V::broadcast(V::kByteOffset));
    }
    return V::sub(parts[r][p], V::mul(zero, x_sum));
  }

  QK_INLINE void run_integers(GroupRange range) {
    const Weight& weight = job.weight;
    I sums[kRows][kPanels];
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) sums[r][p] = V::broadcast(int32_t{0});
    }
    for (int64_t g = range.begin; g < range.end; ++g) {
      multiply_group(g * weight.group, weight.group_end(g));
      QK_UNROLL for (int p = 0; p < kPanels; ++p) {
        I multiplier = V::broadcast(int32_t{1});
        if (weight.channel_scales != nullptr) {
          const int64_t at = ((panel + p) * weight.groups() + g) * kLanes;
          multiplier = V::load_bytes(static_cast<const uint8_t*>(weight.scales) + at);
          if (QK_FAULT(multipliers_missing)) multiplier = V::broadcast(int32_t{1});
        }
        QK_UNROLL for (int r = 0; r < kRows; ++r) {
          sums[r][p] = V::add(sums[r][p], V::mul(multiplier, group_sum(r, p, g)));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        if (range.sums == nullptr) {
          write_output<V>(job.out, weight, row + r, panel + p, sums[r][p]);
        } else {
          const int64_t at = ((row + r) * weight.panels() + panel + p) * kLanes;
          V::store(static_cast<int32_t*>(range.sums) + at, sums[r][p]);
        }
      }
    }
  }

  // The floats of groups are added in order, each product rounded, as the reference does.
  QK_INLINE void run_floats(GroupRange range) {
    const Weight& weight = job.weight;
    F sums[kRows][kPanels];
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) sums[r][p] = V::broadcast(0.0f);
    }
    for (int64_t g = range.begin; g < range.end; ++g) {
      multiply_group(g * weight.group, weight.group_end(g));
      QK_UNROLL for (int p = 0; p < kPanels; ++p) {
        const F scale = group_scales<V>(weight, panel + p, g);
        QK_UNROLL for (int r = 0; r < kRows; ++r) {
          sums[r][p] = V::add(sums[r][p], V::mul(scale, V::to_float(group_sum(r, p, g))));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        write_output<V>(job.out, weight, row + r, panel + p, sums[r][p], false);
      }
    }
  }
};

template <class V, bool kNibbles, int kRows, int kPanels>
void int8_block(const Int8Job& job, int64_t row, int64_t panel, GroupRange range) {
  Int8Block<V, kNibbles, kRows, kPanels> block{job, row, panel, {}};
  if (job.weight.sums_are_integers())
    block.run_integers(range);
  else
    block.run_floats(range);
}

template <class V, bool kNibbles, int kPanels>
void int8_panels(const Int8Job& job, int64_t panel, GroupRange range) {
  int64_t row = 0;
  if constexpr (V::kMostPanels == 2) {
    for (; row + 8 <= job.m; row += 8) int8_block<V, kNibbles, 8, kPanels>(job, row, panel, range);
  }
  for (; row + 4 <= job.m; row += 4) int8_block<V, kNibbles, 4, kPanels>(job, row, panel, range);
  if (row + 2 <= job.m) {
    int8_block<V, kNibbles, 2, kPanels>(job, row, panel, range);
    row += 2;
  }
  if (row < job.m) int8_block<V, kNibbles, 1, kPanels>(job, row, panel, range);
}

template <class V, bool kNibbles>
void int8_range(const Int8Job& job, int64_t begin, int64_t end, GroupRange range) {
  int64_t panel = begin;
  if constexpr (V::kMostPanels == 2) {
    for (; panel + 2 <= end; panel += 2) int8_panels<V, kNibbles, 2>(job, panel, range);
  }
  for (; panel < end; ++panel) int8_panels<V, kNibbles, 1>(job, panel, range);
}

template <class V>
void int8_rows(const Int8Job& job, int64_t begin, int64_t end, GroupRange range) {
  if (is_nibble(job.weight.code))
    int8_range<V, true>(job, begin, end, range);
  else
    int8_range<V, false>(job, begin, end, range);
}

template <class V>
void finish_int8(const Int8Job& job, int64_t begin, int64_t end, const int32_t* sums, int parts) {
  const int64_t width = job.weight.panels() * kLanes;
  for (int64_t row = 0; row < job.m; ++row) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int32_t* from = sums + row * width + panel * kLanes;
      auto sum = V::load(from);
      for (int part = 1; part < parts; ++part) {
        sum = V::add(sum, V::load(from + part * job.m * width));
      }
      write_output<V>(job.out, job.weight, row, panel, sum);
    }
  }
}

template <class V>
void int8_sums(const int8_t* x, const Weight& weight, int32_t* sums) {
  const auto ones = V::broadcast(int32_t{0x01010101});
  for (int64_t g = 0; g < weight.groups(); ++g) {
    int64_t at = g * weight.group;
    const int64_t last = weight.group_end(g);
    auto total = V::broadcast(int32_t{0});
    for (; at + 64 <= last; at += 64) {
      const auto bytes = V::load(reinterpret_cast<const int32_t*>(x + at));
      total = V::template dot<true>(total, ones, bytes);
    }
    int32_t rest = 0;
    for (; at < last; ++at) rest += x[at];
    if (QK_FAULT(tail_of_int8_sums_missing)) rest = 0;
    sums[g] = V::sum_lanes(total) + rest;
    if (QK_FAULT(int8_sums_of_x_missing)) sums[g] = 0;
  }
}

}  // namespace qkernels::cpu
