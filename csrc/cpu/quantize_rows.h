// Rows of activations: read, normalized or gated in fp32, and quantized to int8.

#pragma once

#include <cmath>

#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"

namespace qkernels::cpu {

// e^x within two units in the last place, 0 below -104 and infinity above 89. 2^n * 2^f with the
// Taylor series of e^(f log 2) on |f| <= 1/2; log 2 in two parts keeps the rest exact.
template <class V>
QK_INLINE typename V::F exponential(typename V::F x) {
  const auto top = V::broadcast(89.0f), bottom = V::broadcast(-104.0f);
  // Operands in this order: where x is NaN, so is the result.
  const auto clamped = V::max(bottom, V::min(top, x));
  const auto n = V::round(V::mul(clamped, V::broadcast(1.44269504f)));
  const auto whole = V::to_float(n);
  auto rest = V::fnma(whole, V::broadcast(0.693145751953125f), clamped);
  rest = V::fnma(whole, V::broadcast(1.42860677e-6f), rest);
  auto sum = V::broadcast(1.0f / 5040);
  constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float factor : kFactors) sum = V::fma(sum, rest, V::broadcast(factor));
  // In two steps: 2^n itself may lie outside of the range of floats.
  const auto half = V::template right_signed<1>(n);
  const auto bias = V::broadcast(int32_t{127});
  const auto first = V::from_bits(V::template left<23>(V::add(half, bias)));
  const auto second = V::from_bits(V::template left<23>(V::add(V::sub(n, half), bias)));
  return V::mul(V::mul(sum, first), second);
}

// 16 numbers, or `count`, rounded to a type as they are stored.
template <class V>
QK_INLINE typename V::F store_rounded(void* out, FloatType type, int64_t at, int64_t count,
                                      typename V::F value) {
  store_first<V>(out, type, at, count, value);
  return load_first<V>(out, type, at, count);
}

// Rows of kScaled and kProduct.
template <class V>
void load_rounded_row(const RowSource& source, int64_t row, float* values) {
  const int64_t k = source.k;
  const FloatType type = source.type;
  const bool scaled = source.kind == RowSource::Kind::kScaled;
  const auto one = V::broadcast(1.0f);
  const auto factor =
      V::broadcast(scaled ? source.factors[QK_FAULT(factor_of_first_row) ? 0 : row] : 1.0f);
  for (int64_t at = 0; at < k; at += kLanes) {
    const int64_t count = k - at, to = row * k + at;
    auto value = load_first<V>(source.x, type, row * source.x_stride + at, count);
    if (!scaled) {
      value = V::mul(value, load_first<V>(source.up, type, row * source.up_stride + at, count));
    } else {
      value = V::mul(value, factor);
      if (source.rounds_first && !QK_FAULT(norm_not_rounded_before_gain)) {
        value = store_rounded<V>(source.y, type, to, count, value);
      }
      auto gain = load_first<V>(source.gain, source.gain_type, at, count);
      if (source.adds_one && !QK_FAULT(gain_without_one)) gain = V::add(gain, one);
      value = V::mul(value, gain);
    }
    const auto rounded = store_rounded<V>(source.y, type, to, count, value);
    V::store(values + at, QK_FAULT(codes_of_unrounded_rows) ? value : rounded);
  }
}

template <class V>
void load_row(const RowSource& source, int64_t row, float* values) {
  if (source.kind == RowSource::Kind::kScaled || source.kind == RowSource::Kind::kProduct) {
    return load_rounded_row<V>(source, row, values);
  }
  const int64_t k = source.k, first = row * source.x_stride;
  const FloatType type = source.type;
  auto squares = V::broadcast(0.0f);
  for (int64_t at = 0; at < k; at += kLanes) {
    auto value = load_first<V>(source.x, type, first + at, k - at);
    if (source.kind == RowSource::Kind::kSiluMul) {
      const auto up = load_first<V>(source.up, type, row * source.up_stride + at, k - at);
      const auto minus = V::sub(V::broadcast(0.0f), value);
      const auto below = V::add(V::broadcast(1.0f), exponential<V>(minus));
      value = V::mul(V::div(value, below), up);
    } else if (source.kind == RowSource::Kind::kRmsNorm) {
      if (source.residual != nullptr) {
        value = V::add(value, load_first<V>(source.residual, type, row * k + at, k - at));
        store_first<V>(source.sum, type, row * k + at, k - at, value);
        value = load_first<V>(source.sum, type, row * k + at, k - at);  // as rounded
      }
      squares = V::fma(value, value, squares);
    }
    V::store(values + at, value);
  }
  if (source.kind != RowSource::Kind::kRmsNorm) return;
  const float mean = V::sum_lanes(squares) / static_cast<float>(k);
  const auto factor =
      V::broadcast(1.0f / std::sqrt(mean + (QK_FAULT(epsilon_missing) ? 0.0f : source.epsilon)));
  for (int64_t at = 0; at < k; at += kLanes) {
    auto value = V::mul(V::load(values + at), factor);
    if (source.gain != nullptr) {
      value = V::mul(value, load_first<V>(source.gain, source.gain_type, at, k - at));
    }
    V::store(values + at, value);
  }
}

template <class V>
int32_t largest_bits(const float* values, int64_t k) {
  if (QK_FAULT(end_of_row_not_measured)) k = k / kLanes * kLanes;
  const auto magnitude = V::broadcast(int32_t{0x7fffffff});
  auto largest = V::broadcast(int32_t{0});
  for (int64_t at = 0; at < k; at += kLanes) {
    const auto value = load_first<V>(values, FloatType::kFp32, at, k - at);
    largest = V::max(largest, V::and_(V::bits(value), magnitude));
  }
  return V::max_lanes(largest);
}

inline float float_of_bits(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

template <class V>
float quantize_row(const float* values, int64_t k, const float* given_scale, int8_t* out) {
  const int32_t bits = largest_bits<V>(values, k);
  const float top = float_of_bits(bits);
  float scale = top == 0 ? 1.0f : top / 127.0f;
  if (given_scale != nullptr && !QK_FAULT(given_scale_ignored)) scale = *given_scale;
  const Quotient<V> quotient(scale);
  if (given_scale == nullptr && bits < kInfinityBits) {
    // Nothing is beyond the range, and there is no NaN.
    for (int64_t at = 0; at < k; at += kLanes) {
      const auto value = quotient(load_first<V>(values, FloatType::kFp32, at, k - at));
      store_first_bytes<V>(out, at, k - at, V::round(value));
    }
    return scale;
  }
  const auto high = V::broadcast(127.0f),
             low = V::broadcast(QK_FAULT(saturates_at_minus_128) ? -128.0f : -127.0f);
  // Beyond the range anyhow, so that infinity is not divided.
  const auto most = V::broadcast(scale * 128.0f), least = V::broadcast(scale * -128.0f);
  for (int64_t at = 0; at < k; at += kLanes) {
    auto value = V::zero_nan(load_first<V>(values, FloatType::kFp32, at, k - at));
    value = quotient(V::max(V::min(value, most), least));
    value = V::max(V::min(V::zero_nan(value), high), low);
    if (QK_FAULT(ties_go_up)) value = V::add(value, V::broadcast(0x1p-17f));
    store_first_bytes<V>(out, at, k - at, V::round(value));
  }
  // A given scale knows nothing of this row, so NaN and infinity are told here.
  if (QK_FAULT(nan_not_told)) return scale;
  if (given_scale != nullptr && bits >= kInfinityBits) return float_of_bits(0x7fc00000);
  return scale;
}

template <class V>
float quantize_row_asymmetric(const float* values, int64_t k, int8_t* out, int32_t* zero) {
  auto smallest = V::broadcast(0.0f), largest = V::broadcast(0.0f);
  for (int64_t at = 0; at < k; at += kLanes) {
    const auto value = load_first<V>(values, FloatType::kFp32, at, k - at);
    smallest = V::min(smallest, value);
    largest = V::max(largest, value);
  }
  alignas(64) float lanes[2][16];
  V::store(lanes[0], smallest);
  V::store(lanes[1], largest);
  float low = 0, high = 0;
  for (int i = 0; i < kLanes; ++i) {
    low = lanes[0][i] < low ? lanes[0][i] : low;
    high = lanes[1][i] > high ? lanes[1][i] : high;
  }
  float scale = high == low ? 1.0f : (high - low) / 255.0f;
  const bool finite = largest_bits<V>(values, k) < kInfinityBits;
  if (!finite) {
    *zero = 0;
    scale = float_of_bits(0x7fc00000);
  } else {
    const float shifted = -128.0f - std::nearbyint(low / scale);
    *zero = static_cast<int32_t>(shifted < -128 ? -128 : shifted > 127 ? 127 : shifted);
  }
  const auto divisor = V::broadcast(scale), offset = V::broadcast(static_cast<float>(*zero));
  const auto top = V::broadcast(127.0f), bottom = V::broadcast(-128.0f);
  for (int64_t at = 0; at < k; at += kLanes) {
    const auto value = V::div(load_first<V>(values, FloatType::kFp32, at, k - at), divisor);
    // Rounded before the zero point is added: half to even of the value itself.
    const auto limited =
        V::max(V::min(V::zero_nan(value), V::broadcast(512.0f)), V::broadcast(-512.0f));
    auto moved = V::add(V::to_float(V::round(limited)), offset);
    if (QK_FAULT(rounded_after_zero)) moved = V::add(limited, offset);
    store_first_bytes<V>(out, at, k - at, V::round(V::max(V::min(moved, top), bottom)));
  }
  return scale;
}

}  // namespace qkernels::cpu
