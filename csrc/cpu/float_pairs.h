// Few rows of bf16 x times codes of up to 4 bits: these become pairs of bf16, which hold small
// integers as they are and the numbers of a table rounded, and two columns are one product of
// float_rows.h. Only for source files after QK_TARGET.

#pragma once

#include "cpu/float_rows.h"

namespace qkernels::cpu {

template <class V>
struct Pairs {
  using X = int32_t;
  static constexpr int kColumns = 8, kFactors = 4;
  typename V::PairTable table;
  float offset;

  explicit Pairs(const Table4<V>& numbers)
      : table(V::pair_table(numbers.table)), offset(numbers.offset) {}

  // Shifted by as many codes, a word holds one in the low bits of each of its halves.
  template <int kFactor>
  QK_INLINE typename V::I value(typename V::I words) const {
    if constexpr (kFactor == 0) return V::lookup_pairs(table, words);
    return V::lookup_pairs(table, V::template right<4 * kFactor>(words));
  }
};

template <class V>
void float_pairs(const FloatJob& job, int64_t begin, int64_t end, GroupRange range) {
  float_range<V>(job, Pairs<V>(Table4<V>(job.weight)), begin, end, range);
}

}  // namespace qkernels::cpu
