// Scales and zero points of the two rows that a lane holds of a tile, for one group.

#pragma once

#include <cmath>

#include "cuda/weights/decode.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

// Two numbers side by side in shared (or, with kGlobal, global) memory, as fp32.
struct TwoFloats {
  float low, high;
};

template <class V, bool kGlobal>
QK_DEVICE V load_pair(const void* address) {
  if constexpr (kGlobal) {
    return ptx::load_global<V>(address);
  } else {
    return ptx::load_shared<V>(address);
  }
}

template <bool kGlobal>
QK_DEVICE TwoFloats load_floats(const void* address, FloatType type) {
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
template <class T, bool kGlobal>
QK_DEVICE void load_scales(const void* address, FloatType type, uint32_t (&scales)[2]) {
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

template <bool kGlobal, bool kRealZeros>
QK_DEVICE TwoFloats load_zeros(const void* address, ZeroType type) {
  if constexpr (kRealZeros) {
    return load_floats<kGlobal>(address, type == ZeroType::kHalf       ? FloatType::kHalf
                                         : type == ZeroType::kBfloat16 ? FloatType::kBfloat16
                                                                       : FloatType::kFloat);
  } else {
    const uint16_t bits = load_pair<uint16_t, kGlobal>(address);
    return {static_cast<float>(bits & 0xff), static_cast<float>(bits >> 8)};
  }
}

// What turns the codes of one group into weights: (code - offset - fraction) * scale. The integer
// part of a zero point goes into the exact offset, so that only what is left of a real one rounds.
template <class T, template <class> class Decoder, bool kRealZeros>
struct Group {
  Offsets offsets;
  uint32_t scales[2];
  uint32_t fractions[2];

  // Before the first group.
  QK_DEVICE void start() {
    if constexpr (Decoder<T>::kHasOffsets) {
      offsets = Decoder<T>::offsets(Decoder<T>::kImpliedZero, Decoder<T>::kImpliedZero);
    }
  }

  // `scales_at` and `zeros_at` point to the numbers of the lane's two rows.
  template <bool kGlobal>
  QK_DEVICE void load(const FragmentWeight& weight, const void* scales_at, const void* zeros_at) {
    load_scales<T, kGlobal>(scales_at, weight.scale_type, scales);
    if constexpr (Decoder<T>::kHasOffsets) {
      if (weight.zero_type == ZeroType::kNone) return;
      const TwoFloats zeros = load_zeros<kGlobal, kRealZeros>(zeros_at, weight.zero_type);
      if constexpr (kRealZeros) {
        // Within these, offsets are exact in both types.
        const float low = rintf(fminf(fmaxf(zeros.low, -64.0f), 128.0f));
        const float high = rintf(fminf(fmaxf(zeros.high, -64.0f), 128.0f));
        offsets = Decoder<T>::offsets(low, high);
        fractions[0] = ptx::pack2<T>(zeros.low - low, zeros.low - low);
        fractions[1] = ptx::pack2<T>(zeros.high - high, zeros.high - high);
      } else {
        offsets = Decoder<T>::offsets(zeros.low, zeros.high);
      }
    }
  }

  // The A operand of one step from its Decoder::kWords words.
  QK_DEVICE void weights(const Decoder<T>& decoder, const uint32_t* words,
                         uint32_t (&pairs)[4]) const {
    decoder.decode(words, offsets, pairs);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if constexpr (kRealZeros) pairs[p] = ptx::sub2<T>(pairs[p], fractions[p % 2]);
      pairs[p] = ptx::mul2<T>(pairs[p], scales[p % 2]);
    }
  }
};

}  // namespace qkernels
