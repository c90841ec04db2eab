// Scales and zero points of the two rows that a lane holds of a tile, for one group.

#pragma once

#include <cmath>

#include "cuda/weights/decode.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

// Two numbers side by side in shared (or, with kGlobal, global) memory, as fp32. Address: of
// either.
struct TwoFloats {
  float low, high;
};

template <class V, bool kGlobal, class Address>
QK_DEVICE V load_pair(Address address) {
  if constexpr (kGlobal) {
    return ptx::load_global<V>(address);
  } else {
    return ptx::load_shared<V>(address);
  }
}

template <bool kGlobal, class Address>
QK_DEVICE TwoFloats load_floats(Address address, FloatType type) {
  if (type == FloatType::kFloat) {
    const uint2 bits = load_pair<uint2, kGlobal>(address);
    return {ptx::as_float(bits.x), ptx::as_float(bits.y)};
  }
  const uint32_t bits = load_pair<uint32_t, kGlobal>(address);
  const uint16_t low = bits & 0xffff, high = bits >> 16;
  if (type == FloatType::kHalf) return {ptx::to_float<Half>(low), ptx::to_float<Half>(high)};
  return {ptx::to_float<Bfloat16>(low), ptx::to_float<Bfloat16>(high)};
}

// Element `index` of an array in global memory.
QK_DEVICE float load_float(const void* array, FloatType type, int64_t index) {
  if (type == FloatType::kFloat) {
    return ptx::load_global<float>(static_cast<const float*>(array) + index);
  }
  const uint16_t bits = ptx::load_global<uint16_t>(static_cast<const uint16_t*>(array) + index);
  return type == FloatType::kHalf ? ptx::to_float<Half>(bits) : ptx::to_float<Bfloat16>(bits);
}

// The rows' scales, each in both halves of a word.
template <class T, bool kGlobal, class Address>
QK_DEVICE void load_scales(Address address, FloatType type, uint32_t (&scales)[2]) {
  constexpr FloatType kSame = kIsHalf<T> ? FloatType::kHalf : FloatType::kBfloat16;
  uint32_t bits;
  if (type == kSame) {
    bits = load_pair<uint32_t, kGlobal>(address);
  } else {
    const TwoFloats values = load_floats<kGlobal>(address, type);
    bits = ptx::pack2<T>(values.low, values.high);
  }
  scales[0] = ptx::prmt(bits, bits, 0x1010);
  scales[1] = ptx::prmt(bits, bits, 0x3232);
}

template <bool kGlobal, bool kRealZeros, class Address>
QK_DEVICE TwoFloats load_zeros(Address address, ZeroType type) {
  if constexpr (kRealZeros) {
    return load_floats<kGlobal>(address, type == ZeroType::kHalf       ? FloatType::kHalf
                                         : type == ZeroType::kBfloat16 ? FloatType::kBfloat16
                                                                       : FloatType::kFloat);
  } else {
    const uint16_t bits = load_pair<uint16_t, kGlobal>(address);
    return {static_cast<float>(bits & 0xff), static_cast<float>(bits >> 8)};
  }
}

// The zero points of one group: codes less these. The integer part of a zero point goes into the
// exact offset, so that only what is left of a real one rounds. kScaled: the numbers come as
// Decoder::decode_scaled gives them, which real zero points do not fit.
template <class T, template <class> class Decoder, bool kRealZeros, bool kScaled>
struct GroupZeros {
  Offsets offsets;
  uint32_t fractions[2];

  static QK_DEVICE Offsets offsets_of(float low, float high) {
    if constexpr (kScaled) {
      return Decoder<T>::scaled_offsets(low, high);
    } else {
      return Decoder<T>::offsets(low, high);
    }
  }

  // Before the first group.
  QK_DEVICE void start() {
    if constexpr (Decoder<T>::kHasOffsets) {
      offsets = offsets_of(Decoder<T>::kImpliedZero, Decoder<T>::kImpliedZero);
    }
  }

  // `zeros_at` points to the numbers of the lane's two rows.
  template <bool kGlobal, class Address>
  QK_DEVICE void load_zeros(const FragmentWeight& weight, Address zeros_at) {
    if constexpr (Decoder<T>::kHasOffsets) {
      if (weight.zero_type == ZeroType::kNone) return;
      const TwoFloats zeros = qkernels::load_zeros<kGlobal, kRealZeros>(zeros_at, weight.zero_type);
      if constexpr (kRealZeros) {
        // Within these, offsets are exact in both types.
        const float low = rintf(fminf(fmaxf(zeros.low, -64.0f), 128.0f));
        const float high = rintf(fminf(fmaxf(zeros.high, -64.0f), 128.0f));
        offsets = offsets_of(low, high);
        fractions[0] = ptx::pack2<T>(zeros.low - low, zeros.low - low);
        fractions[1] = ptx::pack2<T>(zeros.high - high, zeros.high - high);
      } else {
        offsets = offsets_of(zeros.low, zeros.high);
      }
    }
  }

  // The pairs of one step, from its Decoder::kWords words, before they are scaled.
  QK_DEVICE void numbers(const Decoder<T>& decoder, const uint32_t* words,
                         uint32_t (&pairs)[4]) const {
    if constexpr (kScaled) {
      decoder.decode_scaled(words, offsets, pairs);
    } else {
      decoder.decode(words, offsets, pairs);
    }
    if constexpr (kRealZeros) {
#pragma unroll
      for (int p = 0; p < 4; ++p) pairs[p] = ptx::sub2<T>(pairs[p], fractions[p % 2]);
    }
  }
};

// Weights that are scaled before they are multiplied: the A operand is (code - zero) * scale.
template <class T, template <class> class Decoder, bool kRealZeros>
struct WeightGroup : GroupZeros<T, Decoder, kRealZeros, false> {
  uint32_t scales[2];

  template <bool kGlobal, class Address>
  QK_DEVICE void load(const FragmentWeight& weight, Address scales_at, Address zeros_at) {
    load_scales<T, kGlobal>(scales_at, weight.scale_type, scales);
    this->template load_zeros<kGlobal>(weight, zeros_at);
  }

  QK_DEVICE void weights(const Decoder<T>& decoder, const uint32_t* words,
                         uint32_t (&pairs)[4]) const {
    this->numbers(decoder, words, pairs);
#pragma unroll
    for (int p = 0; p < 4; ++p) pairs[p] = ptx::mul2<T>(pairs[p], scales[p % 2]);
  }
};

// Weights that are multiplied as code - zero, whose sums are scaled, in fp32.
template <class T, template <class> class Decoder, bool kRealZeros>
struct SumGroup : GroupZeros<T, Decoder, kRealZeros, Decoder<T>::kScales && !kRealZeros> {
  static constexpr bool kScaled = Decoder<T>::kScales && !kRealZeros;
  float scales[2];

  QK_DEVICE void start() {
    scales[0] = scales[1] = 0;
    GroupZeros<T, Decoder, kRealZeros, kScaled>::start();
  }

  template <bool kGlobal, class Address>
  QK_DEVICE void load(const FragmentWeight& weight, Address scales_at, Address zeros_at) {
    const TwoFloats both = load_floats<kGlobal>(scales_at, weight.scale_type);
    scales[0] = both.low;
    scales[1] = both.high;
    this->template load_zeros<kGlobal>(weight, zeros_at);
  }

  QK_DEVICE void weights(const Decoder<T>& decoder, const uint32_t* words,
                         uint32_t (&pairs)[4]) const {
    this->numbers(decoder, words, pairs);
  }

  // A sum of row g (`high` false) or g + 8, whose groups are scaled, without what decode_scaled
  // left.
  static QK_DEVICE float rescaled(float sum, bool high) {
    if constexpr (kScaled)
      return sum * (1 / (high ? Decoder<T>::kHighFactor : Decoder<T>::kLowFactor));
    return sum;
  }
};

}  // namespace qkernels
