// Rows of activations: read, normalized or gated in fp32, rounded where that is asked for, and
// quantized to int8.

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

// x / (1 + e^-x)
template <class V>
QK_INLINE typename V::F silu(typename V::F x) {
  const auto minus = V::sub(V::broadcast(0.0f), x);
  return V::div(x, V::add(V::broadcast(1.0f), exponential<V>(minus)));
}

// x Phi(x). With z = |x| / sqrt(2) and t = 1 / (1 + z / 2), erfc(z) = t e^(p(t) - z^2), where p was
// fitted to it on 0 <= z <= 10. z^2 comes in two parts, the first of which is exact, and what their
// sum with p rounds off is a factor: so the result is within 2^-20 of itself.
template <class V>
QK_INLINE typename V::F gelu(typename V::F x) {
  const auto one = V::broadcast(1.0f), half = V::broadcast(0.5f), end = V::broadcast(15.0f);
  // Beyond, erfc is 0 or 2.
  const auto near = V::max(V::broadcast(-15.0f), V::min(end, x));
  const auto size = V::from_bits(V::and_(V::bits(near), V::broadcast(int32_t{0x7fffffff})));
  const auto z = V::mul(size, V::broadcast(0.70710678f));
  const auto t = V::div(one, V::fma(z, half, one));
  auto sum = V::broadcast(0.14805983f);
  constexpr float kFactors[] = {-0.69787419f, 1.19684815f, -0.74962485f, -0.03616848f, -0.02213898f,
                                0.04254839f,  0.38498244f, 0.99882513f,  -1.26545739f};
  for (float factor : kFactors) sum = V::fma(sum, t, V::broadcast(factor));
  const auto short_x = V::from_bits(V::and_(V::bits(near), V::broadcast(int32_t{~0xfff})));
  const auto square = V::mul(V::mul(short_x, short_x), half);
  const auto rest = V::mul(V::mul(V::sub(near, short_x), V::add(near, short_x)), half);
  const auto added = V::sub(sum, rest), power = V::sub(added, square);
  const auto missing = V::sub(added, V::add(power, square));
  const auto whole = exponential<V>(power);
  const auto erfc = V::mul(t, V::fma(whole, missing, whole));
  const auto above = V::mul(x, V::fnma(half, erfc, one));
  return V::select_less(V::broadcast(0.0f), x, above, V::mul(V::mul(x, half), erfc));
}

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u)).
template <class V>
QK_INLINE typename V::F gelu_tanh(typename V::F x) {
  const auto cube = V::mul(V::mul(x, x), x);
  const auto minus_twice =
      V::mul(V::fma(cube, V::broadcast(0.044715f), x), V::broadcast(-1.59576912f));
  return V::div(x, V::add(V::broadcast(1.0f), exponential<V>(minus_twice)));
}

template <class V>
QK_INLINE typename V::F gated(RowSource::Kind kind, typename V::F x) {
  switch (kind) {
    case RowSource::Kind::kGeluMul: return gelu<V>(x);
    case RowSource::Kind::kGeluTanhMul: return gelu_tanh<V>(x);
    default: return silu<V>(x);
  }
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

// Takes the mean of a row of k numbers off them.
template <class V>
void center_row(float* values, int64_t k) {
  auto sums = V::broadcast(0.0f);
  for (int64_t at = 0; at < k; at += kLanes) sums = V::add(sums, V::load(values + at));
  const auto mean = V::broadcast(V::sum_lanes(sums) / static_cast<float>(k));
  for (int64_t at = 0; at < k; at += kLanes) {
    V::store(values + at, V::sub(V::load(values + at), mean));
  }
}

template <class V>
void normalize_row(const RowSource& source, int64_t row, float* values) {
  const int64_t k = source.k;
  if (source.kind == RowSource::Kind::kLayerNorm) center_row<V>(values, k);
  auto squares = V::broadcast(0.0f);
  for (int64_t at = 0; at < k; at += kLanes) {
    // What lies behind the row is 0, or was until its mean was taken off.
    const int64_t count = QK_FAULT(squares_beyond_the_row) ? kLanes : k - at;
    const auto value = load_first<V>(values, FloatType::kFp32, at, count);
    squares = V::fma(value, value, squares);
  }
  const float mean = V::sum_lanes(squares) / static_cast<float>(k);
  const auto factor =
      V::broadcast(1.0f / std::sqrt(mean + (QK_FAULT(epsilon_missing) ? 0.0f : source.epsilon)));
  for (int64_t at = 0; at < k; at += kLanes) {
    auto value = V::mul(V::load(values + at), factor);
    if (source.gain != nullptr) {
      value = V::mul(value, load_first<V>(source.gain, source.gain_type, at, k - at));
    }
    if (source.bias != nullptr && !QK_FAULT(bias_of_norm_missing)) {
      value = V::add(value, load_first<V>(source.bias, source.bias_type, at, k - at));
    }
    if (source.y != nullptr) {
      value = store_rounded<V>(source.y, source.type, row * k + at, k - at, value);
    }
    V::store(values + at, value);
  }
}

template <class V>
void load_row(const RowSource& source, int64_t row, float* values) {
  if (source.kind == RowSource::Kind::kScaled || source.kind == RowSource::Kind::kProduct) {
    return load_rounded_row<V>(source, row, values);
  }
  const int64_t k = source.k, first = row * source.x_stride;
  const FloatType type = source.type;
  for (int64_t at = 0; at < k; at += kLanes) {
    const int64_t count = k - at, to = row * k + at;
    auto value = load_first<V>(source.x, type, first + at, count);
    if (source.is_gate()) {
      const auto up = load_first<V>(source.up, type, row * source.up_stride + at, count);
      value = V::mul(gated<V>(source.kind, value), up);
      if (source.y != nullptr && !QK_FAULT(gated_rows_not_rounded)) {
        value = store_rounded<V>(source.y, type, to, count, value);
      }
    } else if (source.residual != nullptr) {
      value = V::add(value, load_first<V>(source.residual, type, to, count));
      value = store_rounded<V>(source.sum, type, to, count, value);
    }
    V::store(values + at, value);
  }
  if (source.is_norm()) normalize_row<V>(source, row, values);
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
