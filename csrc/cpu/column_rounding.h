// Columns rounded one after the other, a lane a row. See calibration.h.

#pragma once

#include "cpu/calibration.h"
#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/scale_search.h"

namespace qkernels::cpu {

// Columns [j, j + kWide) of 16 rows. `moved` [columns][16] has those before, and takes these.
template <class V, int kWide>
QK_INLINE void round_some(const ColumnRounding& job, int64_t first, int64_t j, float* moved) {
  using F = typename V::F;
  const int64_t count = job.n - first;
  const auto load = [&](const float* from, int64_t row) {
    return load_first<V>(from, FloatType::kFp32, row * job.n + first, count);
  };
  F left[kWide];
  for (int i = 0; i < kWide; ++i) left[i] = load(job.left, j + i);
  for (int64_t before = QK_FAULT(first_column_leaves_nothing) ? 1 : 0; before < j; ++before) {
    const float* factors = job.factors + before * job.stride + j;
    const F step = V::load(moved + before * kLanes);
    QK_UNROLL
    for (int i = 0; i < kWide; ++i) left[i] = V::fnma(step, V::broadcast(factors[i]), left[i]);
  }
  for (int i = 0; i < kWide; ++i) {
    const float* factors = job.factors + (j + i) * job.stride + j;
    const F pivot = V::broadcast(factors[i]);
    F wanted = left[i], present{};
    if (job.values != nullptr) {
      present = load(job.values, j + i);
      wanted = V::add(V::div(wanted, pivot), present);
    }
    const int64_t group = QK_FAULT(columns_of_first_group) ? 0 : job.groups[j + i];
    const F scale = load(job.scales, group);
    const F zero = job.zeros == nullptr ? V::broadcast(job.implied_zero) : load(job.zeros, group);
    const F scaled = V::add(V::div(wanted, nonzero<V>(scale)), zero);
    const F limited = V::min(load(job.high, group), V::nearest(scaled));
    // NaN has code 0.
    const F code = V::zero_nan(V::max(load(job.low, group), limited));
    F found = V::mul(V::sub(code, zero), scale);
    if (job.kept != nullptr) {
      const F none = V::broadcast(0.0f), kept = load(job.kept, j + i);
      const F beyond = V::select_less(none, kept, V::sub(wanted, found), none);
      store_first<V>(job.beyond, FloatType::kFp32, (j + i) * job.n + first, count, beyond);
      if (!QK_FAULT(kept_numbers_leave_errors)) found = V::select_less(none, kept, wanted, found);
    }
    const F step =
        job.values == nullptr ? V::div(V::sub(wanted, found), pivot) : V::sub(found, present);
    V::store(moved + (j + i) * kLanes, step);
    store_first<V>(job.moved, FloatType::kFp32, (j + i) * job.n + first, count, step);
    // As signed bytes, to which some instructions saturate.
    const auto byte = V::template right_signed<24>(V::template left<24>(V::round(code)));
    store_first_bytes<V>(reinterpret_cast<int8_t*>(job.codes), job.places[j + i] * job.n + first,
                         count, byte);
    for (int later = i + (QK_FAULT(neighbour_leaves_nothing) ? 2 : 1); later < kWide; ++later) {
      left[later] = V::fnma(step, V::broadcast(factors[later]), left[later]);
    }
  }
}

// `scratch` holds 16 * columns floats at a multiple of 64 bytes.
template <class V>
void round_columns(const ColumnRounding& job, int64_t panel, float* scratch) {
  // Sums that do not wait for each other.
  constexpr int kWide = 8;
  const int64_t first = panel * kLanes;
  int64_t j = 0;
  for (; j + kWide <= job.columns; j += kWide) round_some<V, kWide>(job, first, j, scratch);
  for (; j < job.columns; ++j) round_some<V, 1>(job, first, j, scratch);
}

}  // namespace qkernels::cpu
