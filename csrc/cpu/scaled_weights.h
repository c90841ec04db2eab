// Weights decoded, scaled and rounded to bf16, in pairs of columns as products of bf16 take them:
// word r of a pair has row r's even column in its low half. V rounds pairs: V::round_pairs(even,
// odd). Only for source files after QK_TARGET.

#pragma once

#include "cpu/decode.h"
#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/weight.h"

namespace qkernels::cpu {
namespace {

template <class V, class Decoder>
class ScaledWeights {
  using F = typename V::F;
  using I = typename V::I;

 public:
  ScaledWeights(const Weight& weight, const Decoder& decoder)
      : weight_(weight), decoder_(decoder) {}

  // Columns [first, last) of a panel: a pair is 64 bytes, of `kPanels` panels that lie beside each
  // other.
  template <int kPanels>
  __attribute__((noinline)) void decode(int64_t panel, int64_t first, int64_t last,
                                        char* out) const {
    const uint32_t* from =
        weight_.words + panel * weight_.panel_words() + first / Decoder::kColumns * kLanes;
    const bool zeros = weight_.has_zeros();
    const bool fuses = has_scales_of_16_bits() && weight_.zero_type == GroupType::kUint8;
    while (first < last) {
      const int64_t g = weight_.groups() == 1 ? 0 : first / weight_.group;
      const int64_t end = weight_.group_end(g) < last ? weight_.group_end(g) : last;
      const F scale = group_scales<V>(weight_, panel, g);
      const F zero = group_zeros<V>(weight_, panel, g, decoder_.offset);
      // One operation where it loses nothing: integers times scales of 16 bits are exact.
      if (!zeros)
        decode_group<Zeros::kNone, kPanels>(from, first, end, scale, zero, out);
      else if (fuses)
        decode_group<Zeros::kFused, kPanels>(from, first, end, scale, minus_product(zero, scale),
                                             out);
      else
        decode_group<Zeros::kReal, kPanels>(from, first, end, scale, zero, out);
      from += (end - first) / Decoder::kColumns * kLanes;
      out += (end - first) / 2 * kPanels * kPairBytes;
      first = end;
    }
  }

 private:
  enum class Zeros { kNone, kFused, kReal };

  static constexpr int64_t kPairBytes = 64;

  bool has_scales_of_16_bits() const {
    return weight_.scale_type == GroupType::kFp16 || weight_.scale_type == GroupType::kBf16;
  }

  static QK_INLINE F minus_product(F x, F y) { return V::mul(V::sub(V::broadcast(0.0f), x), y); }

  template <Zeros kZeros, int kColumn>
  QK_INLINE F weight_of(I words, F scale, F zero) const {
    const F value = decoder_.template value<kColumn>(words);
    if constexpr (kZeros == Zeros::kNone) return V::mul(value, scale);
    if constexpr (kZeros == Zeros::kFused) return V::fma(value, scale, zero);
    return V::mul(V::sub(value, zero), scale);
  }

  template <Zeros kZeros, int kColumn>
  QK_INLINE void store_pair(I words, F scale, F zero, char* out) const {
    const I pair = V::round_pairs(weight_of<kZeros, kColumn>(words, scale, zero),
                                  weight_of<kZeros, kColumn + 1>(words, scale, zero));
    V::store(reinterpret_cast<int32_t*>(out), pair);
  }

  template <Zeros kZeros, int kPanels>
  QK_INLINE void decode_group(const uint32_t* from, int64_t first, int64_t last, F scale, F zero,
                              char* out) const {
    constexpr int64_t kNext = kPanels * kPairBytes;
    if (QK_FAULT(scaled_zeros_missing)) zero = V::broadcast(0.0f);
    for (int64_t k = first; k < last; k += Decoder::kColumns, from += kLanes) {
      const I words = V::load(from);
      store_pair<kZeros, 0>(words, scale, zero, out);
      store_pair<kZeros, 2>(words, scale, zero, out + kNext);
      if constexpr (Decoder::kColumns == 8) {
        store_pair<kZeros, 4>(words, scale, zero, out + 2 * kNext);
        store_pair<kZeros, 6>(words, scale, zero, out + 3 * kNext);
      }
      out += Decoder::kColumns / 2 * kNext;
    }
  }

  const Weight& weight_;
  const Decoder& decoder_;
};

}  // namespace
}  // namespace qkernels::cpu
