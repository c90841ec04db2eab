// Sixteen lanes in a register of AVX-512. Only for source files after QK_TARGET.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qkernels::cpu {

struct Avx512 {
  using F = __m512;
  using I = __m512i;

  static constexpr int kMostPanels = 2;
  static constexpr int kPanelsOfOneRow = 4;  // float_rows.h
  static constexpr int kSplit = 2;
  // Whether fma rounds once.
  static constexpr bool kFused = true;
  static constexpr bool kFastLookup = true;
  static constexpr int32_t kByteOffset = 0;
  static constexpr int kBurstSums = 12;

  static QK_INLINE F broadcast(float x) { return _mm512_set1_ps(x); }
  static QK_INLINE I broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static QK_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static QK_INLINE I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static QK_INLINE I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static QK_INLINE __m256i load_sixteen(const uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static QK_INLINE F load_half(const uint16_t* p) { return _mm512_cvtph_ps(load_sixteen(p)); }
  static QK_INLINE F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_sixteen(p)), 16));
  }
  static QK_INLINE I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static QK_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static QK_INLINE void store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static QK_INLINE void store_half(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // bf16 in the low halves of the lanes.
  static QK_INLINE I round_to_bf16(F x) {
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                 _mm512_set1_epi32(0x7fc0));
  }
  static QK_INLINE void store_bf16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(round_to_bf16(x)));
  }
  static QK_INLINE void store_bytes(int8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }

  static QK_INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
  static QK_INLINE F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static QK_INLINE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static QK_INLINE F div(F x, F y) { return _mm512_div_ps(x, y); }
  static QK_INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static QK_INLINE F fnma(F x, F y, F z) { return _mm512_fnmadd_ps(x, y, z); }
  static QK_INLINE F min(F x, F y) { return _mm512_min_ps(x, y); }
  static QK_INLINE F max(F x, F y) { return _mm512_max_ps(x, y); }
  // x < y ? yes : no
  static QK_INLINE F select_less(F x, F y, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), yes);
  }
  // Whole numbers: the nearest, half to even, and the next below.
  static QK_INLINE F nearest(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static QK_INLINE F floor(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static QK_INLINE F zero_nan(F x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x);
  }
  static QK_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static QK_INLINE I round(F x) { return _mm512_cvtps_epi32(x); }
  static QK_INLINE I bits(F x) { return _mm512_castps_si512(x); }
  static QK_INLINE F from_bits(I x) { return _mm512_castsi512_ps(x); }

  static QK_INLINE I add(I x, I y) { return _mm512_add_epi32(x, y); }
  static QK_INLINE I sub(I x, I y) { return _mm512_sub_epi32(x, y); }
  static QK_INLINE I mul(I x, I y) { return _mm512_mullo_epi32(x, y); }
  static QK_INLINE I max(I x, I y) { return _mm512_max_epi32(x, y); }
  static QK_INLINE I and_(I x, I y) { return _mm512_and_si512(x, y); }
  static QK_INLINE I or_(I x, I y) { return _mm512_or_si512(x, y); }
  static QK_INLINE I xor_(I x, I y) { return _mm512_xor_si512(x, y); }
  template <int kBy>
  static QK_INLINE I left(I x) {
    return _mm512_slli_epi32(x, kBy);
  }
  template <int kBy>
  static QK_INLINE I right(I x) {
    return _mm512_srli_epi32(x, kBy);
  }
  template <int kBy>
  static QK_INLINE I right_signed(I x) {
    return _mm512_srai_epi32(x, kBy);
  }

  // The lowest byte of a lane in all four.
  static QK_INLINE I spread_byte(I x) {
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8,
                                                                       8, 8, 12, 12, 12, 12)));
  }
  // Whether no lane is zero.
  static QK_INLINE bool all(I x) { return _mm512_test_epi32_mask(x, x) == 0xffff; }
  // y in the lanes where x is not zero, and zero in the others.
  static QK_INLINE F where(I x, F y) {
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(x, x), y);
  }

  // Of eight numbers of 16 bits, the order that pairs of codes of up to 4 bits are decoded in: 0 2
  // 4 6 1 3 5 7. For shuffles of bytes.
  static QK_INLINE __m128i order_of_pairs() {
    return _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  }
  static QK_INLINE __m128i bytes_in_order() {
    return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }

  static QK_INLINE F low_half_to_float(I x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }

  using Table = __m512;
  static QK_INLINE Table load_table(const float* p) { return _mm512_loadu_ps(p); }
  static QK_INLINE F lookup(Table table, I index) { return _mm512_permutexvar_ps(index, table); }

  template <bool kSmall>
  static QK_INLINE I dot(I sum, I u, I s) {
    return _mm512_dpbusd_epi32(sum, u, s);
  }

  static QK_INLINE float sum_lanes(F x) { return _mm512_reduce_add_ps(x); }
  static QK_INLINE int32_t sum_lanes(I x) { return _mm512_reduce_add_epi32(x); }
  static QK_INLINE int32_t max_lanes(I x) { return _mm512_reduce_max_epi32(x); }
};

}  // namespace qkernels::cpu
