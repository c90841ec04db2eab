// AVX-512 that rounds to bf16 in pairs. Only for source files after QK_TARGET.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vector_avx512.h"

namespace qkernels::cpu {

struct Avx512Bf16 : Avx512 {
  // bf16 of `even` in the low halves of lanes, and of `odd` in the high ones.
  static QK_INLINE I round_pairs(F even, F odd) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(odd, even));
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
  }

  using Avx512::fma;
  // sum + the products of a pair.
  static QK_INLINE F fma(I pairs, I others, F sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs),
                            reinterpret_cast<__m512bh>(others));
  }

  // 16 numbers as bf16; twice, since a lookup takes five bits.
  using PairTable = I;
  static QK_INLINE PairTable pair_table(F numbers) {
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(round_to_bf16(numbers)));
  }
  static QK_INLINE I lookup_pairs(PairTable table, I indices) {
    return _mm512_permutexvar_epi16(indices, table);
  }
};

}  // namespace qkernels::cpu
