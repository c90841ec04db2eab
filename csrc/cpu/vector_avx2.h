// Sixteen lanes in two registers of AVX2. Only for source files after QK_TARGET.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qkernels::cpu {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };

  static constexpr int kMostPanels = 1;
  static constexpr int kPanelsOfOneRow = 2;  // float_rows.h
  static constexpr int kSplit = 1;
  // Whether fma rounds once.
  static constexpr bool kFused = true;
  static constexpr bool kFastLookup = false;
  static constexpr int32_t kByteOffset = 0;
  static constexpr int kBurstSums = 6;

  static QK_INLINE F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static QK_INLINE I broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static QK_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static QK_INLINE I load(const int32_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
  }
  static QK_INLINE I load(const uint32_t* p) { return load(reinterpret_cast<const int32_t*>(p)); }
  static QK_INLINE __m128i load_eight(const uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static QK_INLINE F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(load_eight(p)), _mm256_cvtph_ps(load_eight(p + 8))};
  }
  static QK_INLINE __m256 widen_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static QK_INLINE F load_bf16(const uint16_t* p) {
    return {widen_bf16(load_eight(p)), widen_bf16(load_eight(p + 8))};
  }
  static QK_INLINE I load_bytes(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
  }
  static QK_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static QK_INLINE void store(int32_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, x.b);
  }
  static QK_INLINE void store_half(uint16_t* p, F x) {
    constexpr int kEven = _MM_FROUND_TO_NEAREST_INT;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, kEven));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(x.b, kEven));
  }
  static QK_INLINE __m256i round_to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  }
  static QK_INLINE void store_bf16(uint16_t* p, F x) {
    const __m256i both = _mm256_packus_epi32(round_to_bf16(x.a), round_to_bf16(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
  }
  static QK_INLINE void store_bytes(int8_t* p, I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
  }

  static QK_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static QK_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static QK_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static QK_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static QK_INLINE F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static QK_INLINE F fnma(F x, F y, F z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
  }
  static QK_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static QK_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  // x < y ? yes : no
  static QK_INLINE F select_less(F x, F y, F yes, F no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
  }
  // Whole numbers: the nearest, half to even, and the next below.
  static QK_INLINE F nearest(F x) {
    constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kEven), _mm256_round_ps(x.b, kEven)};
  }
  static QK_INLINE F floor(F x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
  static QK_INLINE __m256 zero_nan(__m256 x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
  }
  static QK_INLINE F zero_nan(F x) { return {zero_nan(x.a), zero_nan(x.b)}; }
  static QK_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static QK_INLINE I round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
  static QK_INLINE I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static QK_INLINE F from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

  static QK_INLINE I add(I x, I y) {
    return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
  }
  static QK_INLINE I sub(I x, I y) {
    return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
  }
  static QK_INLINE I mul(I x, I y) {
    return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
  }
  static QK_INLINE I max(I x, I y) {
    return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
  }
  static QK_INLINE I and_(I x, I y) {
    return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
  }
  static QK_INLINE I or_(I x, I y) {
    return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
  }
  static QK_INLINE I xor_(I x, I y) {
    return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
  }
  template <int kBy>
  static QK_INLINE I left(I x) {
    return {_mm256_slli_epi32(x.a, kBy), _mm256_slli_epi32(x.b, kBy)};
  }
  template <int kBy>
  static QK_INLINE I right(I x) {
    return {_mm256_srli_epi32(x.a, kBy), _mm256_srli_epi32(x.b, kBy)};
  }
  template <int kBy>
  static QK_INLINE I right_signed(I x) {
    return {_mm256_srai_epi32(x.a, kBy), _mm256_srai_epi32(x.b, kBy)};
  }

  // The lowest byte of a lane in all four.
  static QK_INLINE I spread_byte(I x) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    return {_mm256_shuffle_epi8(x.a, order), _mm256_shuffle_epi8(x.b, order)};
  }
  static QK_INLINE __m256i is_zero(__m256i x) {
    return _mm256_cmpeq_epi32(x, _mm256_setzero_si256());
  }
  // Whether no lane is zero.
  static QK_INLINE bool all(I x) {
    const __m256i zeros = _mm256_or_si256(is_zero(x.a), is_zero(x.b));
    return _mm256_testz_si256(zeros, zeros) != 0;
  }
  // y in the lanes where x is not zero, and zero in the others.
  static QK_INLINE F where(I x, F y) {
    return {_mm256_andnot_ps(_mm256_castsi256_ps(is_zero(x.a)), y.a),
            _mm256_andnot_ps(_mm256_castsi256_ps(is_zero(x.b)), y.b)};
  }

  static QK_INLINE F low_half_to_float(I x) {
    const __m256i mask = _mm256_set1_epi32(0xffff);
    const __m256i both = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)), 0xd8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(both)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1))};
  }

  struct Table {
    __m256 low, high;
  };
  static QK_INLINE Table load_table(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  static QK_INLINE __m256 lookup(const Table& table, __m256i index) {
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  static QK_INLINE F lookup(const Table& table, I index) {
    return {lookup(table, index.a), lookup(table, index.b)};
  }

  template <bool kSmall>
  static QK_INLINE __m256i dot(__m256i sum, __m256i u, __m256i s) {
    if constexpr (kSmall) {
      // Two products of 63 and 128 at most fit 16 bits.
      const __m256i pairs = _mm256_maddubs_epi16(u, s);
      return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {
      const __m256i even_u = _mm256_and_si256(u, _mm256_set1_epi16(0xff));
      const __m256i odd_u = _mm256_srli_epi16(u, 8);
      const __m256i even_s = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8);
      const __m256i odd_s = _mm256_srai_epi16(s, 8);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even_u, even_s));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(odd_u, odd_s));
    }
  }
  template <bool kSmall>
  static QK_INLINE I dot(I sum, I u, I s) {
    return {dot<kSmall>(sum.a, u.a, s.a), dot<kSmall>(sum.b, u.b, s.b)};
  }

  static QK_INLINE float sum_lanes(F x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static QK_INLINE int32_t sum_lanes(I x) {
    const __m256i eight = _mm256_add_epi32(x.a, x.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  static QK_INLINE int32_t max_lanes(I x) {
    const __m256i eight = _mm256_max_epi32(x.a, x.b);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
};

}  // namespace qkernels::cpu
