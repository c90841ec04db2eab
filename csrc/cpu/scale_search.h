// The search for scales, a lane a row: 16 rows of one group at a time. See calibration.h.

#pragma once

#include "cpu/calibration.h"
#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/quantize_rows.h"

namespace qkernels::cpu {

constexpr int kNarrower = 19;   // ranges, each a 32nd narrower than the last
constexpr int kZerosTried = 5;  // beside each
constexpr float kZeroMoves[kZerosTried] = {0, -1, 1, -2, 2};
constexpr int kRefits = 3;

constexpr float kLeastFloat = 0x1p-149f;

QK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V>
QK_INLINE typename V::F magnitude(typename V::F x) {
  return V::from_bits(V::and_(V::bits(x), V::broadcast(int32_t{0x7fffffff})));
}

// Scales to divide by: 1 in place of 0.
template <class V>
QK_INLINE typename V::F nonzero(typename V::F scale) {
  const auto least = V::broadcast(kLeastFloat);
  return V::select_less(magnitude<V>(scale), least, V::broadcast(1.0f), scale);
}

// The rows of a group, [length][16], and what is known of all its candidates.
template <class V>
class GroupRows {
 public:
  using F = typename V::F;

  GroupRows(const ScaleSearch& job, int64_t panel, int64_t group, float* rows)
      : job_(job),
        rows_(rows),
        first_(panel * kLanes),
        group_(group),
        length_(smaller(job.length, job.k - group * job.length)),
        largest_(V::broadcast(static_cast<float>((1 << job.bits) - 1))) {
    transpose();
    if (job.channel_scales != nullptr) {
      channels_ = load_first<V>(job.channel_scales, FloatType::kFp32, first_, job.n - first_);
      // Lanes that pad divide by it.
      channels_ = nonzero<V>(channels_);
    }
  }

  void search() {
    F best = first_scale(), zero = first_zero(), least;
    costs<1>(best, &zero, &least);
    const F from = best, around = zero;
    for (int step = 0; step < (QK_FAULT(narrowest_range_not_tried) ? 9 : kNarrower); ++step) {
      const F narrower = V::mul(from, V::broadcast(1.0f - static_cast<float>(step) / 32));
      const F scale = nearest_scale(narrower);
      if (job_.zeros == nullptr) {
        F found;
        costs<1>(scale, &zero, &found);
        best = V::select_less(found, least, scale, best);
        least = V::select_less(found, least, found, least);
        continue;
      }
      F zeros[kZerosTried], found[kZerosTried];
      for (int i = 0; i < kZerosTried; ++i) {
        const float move = QK_FAULT(zeros_not_moved) ? 0.0f : kZeroMoves[i];
        const F moved = V::add(around, V::broadcast(move));
        zeros[i] = V::max(V::broadcast(0.0f), V::min(largest_, moved));
      }
      costs<kZerosTried>(scale, zeros, found);
      for (int i = 0; i < kZerosTried; ++i) {
        best = V::select_less(found[i], least, scale, best);
        zero = V::select_less(found[i], least, zeros[i], zero);
        least = V::select_less(found[i], least, found[i], least);
      }
    }
    for (int i = 0; i < (QK_FAULT(scales_not_fitted) ? 0 : kRefits); ++i) {
      const F scale = nearest_scale(fitting_scale(best, zero));
      F found;
      costs<1>(scale, &zero, &found);
      // Infinity is no scale, whatever its cost.
      const F finite = magnitude<V>(scale), most = V::broadcast(kLargestFloat);
      found = V::select_less(most, finite, V::broadcast(float_of_bits(0x7fc00000)), found);
      best = V::select_less(found, least, scale, best);
      least = V::select_less(found, least, found, least);
    }
    store(best, zero);
  }

 private:
  static constexpr float kLargestFloat = 0x1.fffffep127f;

  int64_t lanes() const { return smaller(kLanes, job_.n - first_); }
  int64_t index(int64_t lane) const {
    const int64_t group = QK_FAULT(scales_of_first_group_searched) ? 0 : group_;
    return (first_ + lane) * job_.groups() + group;
  }

  void transpose() {
    alignas(64) float row[16];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t start = (first_ + lane) * job_.stride + group_ * job_.length;
      for (int64_t c = 0; c < length_; c += kLanes) {
        const int64_t count = smaller(kLanes, length_ - c);
        auto values = V::broadcast(0.0f);
        if (lane < lanes()) values = load_first<V>(job_.weight, job_.type, start + c, count);
        V::store(row, values);
        for (int64_t i = 0; i < count; ++i) rows_[(c + i) * kLanes + lane] = row[i];
      }
    }
  }

  F first_scale() const {
    alignas(64) unsigned char gathered[64] = {};
    const auto bytes = static_cast<size_t>(bytes_of(job_.scale_type));
    for (int64_t i = 0; i < kLanes; ++i) {
      // Lanes that pad take those of the last row.
      const int64_t from = index(smaller(i, lanes() - 1)) * static_cast<int64_t>(bytes);
      __builtin_memcpy(gathered + static_cast<size_t>(i) * bytes,
                       static_cast<const char*>(job_.scales) + from, bytes);
    }
    const F stored = load_as_float<V>(gathered, job_.scale_type, 0);
    return job_.channel_scales == nullptr ? stored : V::mul(stored, channels_);
  }

  static int64_t bytes_of(GroupType type) {
    return type == GroupType::kFp32 ? 4 : type == GroupType::kUint8 ? 1 : 2;
  }

  F first_zero() const {
    if (job_.zeros == nullptr) return V::broadcast(job_.implied_zero);
    alignas(64) float zero[16] = {};
    for (int64_t i = 0; i < lanes(); ++i) zero[i] = job_.zeros[index(i)];
    return V::load(zero);
  }

  F multiplier(F scale) const {
    const F rounded = V::nearest(V::div(scale, channels_));
    return V::max(V::broadcast(1.0f), V::min(V::broadcast(job_.most_multiplier), rounded));
  }

  // The nearest scale that can be stored.
  F nearest_scale(F wanted) const {
    alignas(64) uint16_t halves[16];
    F stored = wanted;
    if (job_.channel_scales != nullptr) return V::mul(multiplier(wanted), channels_);
    if (job_.scale_type == GroupType::kFp16) {
      V::store_half(halves, wanted);
      stored = V::load_half(halves);
    } else if (job_.scale_type == GroupType::kBf16) {
      V::store_bf16(halves, wanted);
      stored = V::load_bf16(halves);
    }
    stored = V::max(V::broadcast(job_.least_scale), stored);
    // A group that is zero has scales of zero where nothing else keeps it so.
    const auto least = V::broadcast(kLeastFloat);
    return V::select_less(magnitude<V>(wanted), least, V::broadcast(0.0f), stored);
  }

  void limits(F scale, F zero, F& low, F& high) const {
    low = V::broadcast(0.0f);
    high = largest_;
    if (job_.channel_scales == nullptr || QK_FAULT(products_beyond_int8_tried)) return;
    const F times = multiplier(scale);
    const F below = V::floor(V::div(V::broadcast(128.0f), times));
    const F above = V::floor(V::div(V::broadcast(127.0f), times));
    low = V::max(low, V::sub(zero, below));
    high = V::min(high, V::add(zero, above));
  }

  static bool is_exact(F scale) {
    alignas(64) float lanes[16];
    V::store(lanes, scale);
    bool all = true;
    for (float lane : lanes) all = all && Quotient<V>::is_exact(lane);
    return all;
  }

  // body(c, the weights of column c by their scales, those weights) for each column.
  template <class Body>
  QK_INLINE void each_column(F scale, const Body& body) const {
    const F divisor = nonzero<V>(scale);
    if (is_exact(divisor)) {
      const F reciprocal = V::div(V::broadcast(1.0f), divisor);
      for (int64_t c = 0; c < length_; ++c) {
        const F w = V::load(rows_ + c * kLanes);
        body(c, Quotient<V>::exact(w, divisor, reciprocal), w);
      }
    } else {
      for (int64_t c = 0; c < length_; ++c) {
        const F w = V::load(rows_ + c * kLanes);
        body(c, V::div(w, divisor), w);
      }
    }
  }

  template <int kZeros>
  void costs(F scale, const F* zeros, F* sums) const {
    if (job_.gram != nullptr)
      for (int i = 0; i < kZeros; ++i) sums[i] = block_cost(scale, zeros[i]);
    else if (job_.diagonal == nullptr)
      costs_of<kZeros, false>(scale, zeros, sums);
    else
      costs_of<kZeros, true>(scale, zeros, sums);
  }

  template <int kZeros, bool kWeighted>
  __attribute__((noinline)) void costs_of(F scale, const F* given, F* found) const {
    F zeros[kZeros], low[kZeros], high[kZeros], sums[kZeros];
    for (int i = 0; i < kZeros; ++i) {
      zeros[i] = given[i];
      limits(scale, zeros[i], low[i], high[i]);
      sums[i] = V::broadcast(0.0f);
    }
    const int64_t first = QK_FAULT(diagonal_of_first_group) ? 0 : group_ * job_.length;
    const float* diagonal = kWeighted ? job_.diagonal + first : nullptr;
    each_column(scale, [&](int64_t c, F scaled, F w) QK_LAMBDA_INLINE {
      QK_UNROLL
      for (int i = 0; i < kZeros; ++i) {
        const F code = V::nearest(V::add(scaled, zeros[i]));
        const F value = V::sub(V::max(low[i], V::min(high[i], code)), zeros[i]);
        const F error = V::sub(V::mul(value, scale), w);
        const F square = kWeighted ? V::mul(error, V::broadcast(diagonal[c])) : error;
        sums[i] = V::fma(square, error, sums[i]);
      }
    });
    for (int i = 0; i < kZeros; ++i) found[i] = sums[i];
  }

  float* others() const { return rows_ + length_ * kLanes; }

  __attribute__((noinline)) F block_cost(F scale, F zero) const {
    F low, high;
    limits(scale, zero, low, high);
    each_column(scale, [&](int64_t c, F scaled, F w) QK_LAMBDA_INLINE {
      const F code = V::nearest(V::add(scaled, zero));
      const F value = V::sub(V::max(low, V::min(high, code)), zero);
      V::store(others() + c * kLanes, V::sub(V::mul(value, scale), w));
    });
    return product<true>(others(), others());
  }

  // x^T gram y of the columns x and y, [length][16].
  template <bool kSame>
  F product(const float* x, const float* y) const {
    // Sums that do not wait for each other.
    constexpr int64_t kWide = 8;
    F total = V::broadcast(0.0f);
    int64_t row = 0;
    for (; row + kWide <= length_; row += kWide) total = add_rows<kSame, kWide>(row, x, y, total);
    for (; row < length_; ++row) total = add_rows<kSame, 1>(row, x, y, total);
    return total;
  }

  // What rows [row, row + kWide) of the block have in that product. Where x is y, these rows stand
  // for the columns that they cross further on too.
  template <bool kSame, int64_t kWide>
  QK_INLINE F add_rows(int64_t row, const float* x, const float* y, F total) const {
    const int64_t first = group_ * job_.length, stride = job_.gram_stride;
    const float* gram = job_.gram + (first + row) * stride + first;
    F sums[kWide];
    for (int64_t i = 0; i < kWide; ++i) sums[i] = V::broadcast(0.0f);
    for (int64_t c = kSame ? row + kWide : 0; c < length_; ++c) {
      const F other = V::load(y + c * kLanes);
      QK_UNROLL
      for (int64_t i = 0; i < kWide; ++i) {
        sums[i] = V::fma(V::broadcast(gram[i * stride + c]), other, sums[i]);
      }
    }
    if (kSame && !QK_FAULT(columns_crossed_once)) {
      for (int64_t i = 0; i < kWide; ++i) sums[i] = V::add(sums[i], sums[i]);
    }
    for (int64_t c = row; kSame && c < row + kWide; ++c) {
      const F other = V::load(y + c * kLanes);
      for (int64_t i = 0; i < kWide; ++i) {
        sums[i] = V::fma(V::broadcast(gram[i * stride + c]), other, sums[i]);
      }
    }
    for (int64_t i = 0; i < kWide; ++i) {
      total = V::fma(V::load(x + (row + i) * kLanes), sums[i], total);
    }
    return total;
  }

  // The scale that the codes under this one fit best; this one where none does.
  F fitting_scale(F scale, F zero) const {
    F low, high, top = V::broadcast(0.0f), bottom = top;
    limits(scale, zero, low, high);
    const float* diagonal = job_.diagonal;
    if (diagonal != nullptr) diagonal += group_ * job_.length;
    each_column(scale, [&](int64_t c, F scaled, F w) QK_LAMBDA_INLINE {
      const F code = V::nearest(V::add(scaled, zero));
      const F value = V::sub(V::max(low, V::min(high, code)), zero);
      F weighted = value;
      if (job_.gram != nullptr) V::store(others() + c * kLanes, value);
      if (diagonal != nullptr) weighted = V::mul(value, V::broadcast(diagonal[c]));
      top = V::fma(weighted, w, top);
      bottom = V::fma(weighted, value, bottom);
    });
    if (job_.gram != nullptr) {
      top = product<false>(rows_, others());
      bottom = product<true>(others(), others());
    }
    const F none = V::broadcast(0.0f), fitted = V::div(top, bottom);
    const F positive = V::select_less(none, top, V::select_less(none, bottom, fitted, none), none);
    const F finite = V::select_less(positive, V::broadcast(float_of_bits(kInfinityBits)), positive,
                                    V::broadcast(0.0f));
    return V::select_less(none, finite, finite, scale);
  }

  void store(F scale, F zero) const {
    alignas(64) float scales[16], zeros[16];
    V::store(scales, job_.channel_scales == nullptr ? scale : multiplier(scale));
    V::store(zeros, zero);
    alignas(64) uint16_t halves[16];
    if (job_.scale_type == GroupType::kFp16) V::store_half(halves, scale);
    if (job_.scale_type == GroupType::kBf16) V::store_bf16(halves, scale);
    for (int64_t i = 0; i < lanes(); ++i) {
      const int64_t at = index(i);
      if (job_.zeros != nullptr) job_.zeros[at] = static_cast<uint8_t>(zeros[i]);
      if (job_.scale_type == GroupType::kFp32)
        static_cast<float*>(job_.scales)[at] = scales[i];
      else if (job_.scale_type == GroupType::kUint8)
        static_cast<uint8_t*>(job_.scales)[at] = static_cast<uint8_t>(scales[i]);
      else
        static_cast<uint16_t*>(job_.scales)[at] = halves[i];
    }
  }

  const ScaleSearch& job_;
  float* rows_;
  int64_t first_, group_, length_;
  F largest_;
  F channels_{};
};

// `scratch` holds job.scratch() floats at a multiple of 64 bytes.
template <class V>
void search_scales(const ScaleSearch& job, int64_t panel, int64_t group, float* scratch) {
  GroupRows<V>(job, panel, group, scratch).search();
}

}  // namespace qkernels::cpu
