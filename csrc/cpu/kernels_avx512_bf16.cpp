#include <cmath>
#include <type_traits>

#include "cpu/calibration.h"
#include "cpu/faults.h"
#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the undefined vectors of its own headers for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

QK_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")

#include "cpu/vector_avx512_bf16.h"
//
#include "cpu/float_pairs.h"
#include "cpu/product_tiles.h"
#include "cpu/scaled_panels.h"

namespace qkernels::cpu {
namespace {

struct Bf16Step {
  static QK_INLINE __m512 add(__m512 sum, __m512 x, __m512 y) {
    return Avx512Bf16::fma(_mm512_castps_si512(x), _mm512_castps_si512(y), sum);
  }
};

// What row i has in place j comes to row j, in place i.
QK_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  QK_UNROLL for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // fours[i + c], i a multiple of 4: places c, c + 4, c + 8 and c + 12 of rows i to i + 3.
  QK_UNROLL for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  QK_UNROLL for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

void pack_pairs(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t k, int64_t columns,
                uint32_t* out) {
  for (int64_t c = 0; c < columns; c += 2 * kLanes, out += kLanes * kProductPanel) {
    const int64_t left = k - c;
    __mmask32 mask = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    if (QK_FAULT(last_column_of_pairs_missing) && left < 32) mask >>= 1;
    for (int64_t row = 0; row < kProductPanel; row += kLanes) {
      __m512i words[16];
      QK_UNROLL for (int i = 0; i < 16; ++i) {
        words[i] = row + i < rows ? _mm512_maskz_loadu_epi16(mask, x + (row + i) * x_stride + c)
                                  : _mm512_setzero_si512();
      }
      transpose(words);
      QK_UNROLL for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(out + i * kProductPanel + row, words[i]);
      }
    }
  }
}

void pair_row(const float* x, int64_t columns, int32_t* out) {
  const bool in_order = QK_FAULT(pairs_in_order);
  const __m128i order = in_order ? Avx512::bytes_in_order() : Avx512::order_of_pairs();
  for (int64_t c = 0; c < columns; c += kLanes) {
    const __m512i halves = _mm512_srli_epi32(_mm512_loadu_si512(x + c), 16);
    const __m256i words = _mm512_cvtepi32_epi16(halves);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c / 2),
                        _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order)));
  }
}

constexpr ProductKernel kProduct = multiply_panels<Avx512, Bf16Step, 8>;

void scaled_panels(const ScaledJob& job, int64_t begin, int64_t end, void* scratch) {
  visit_decoder<Avx512>(job.weight, [&](const auto& decoder) {
    run_scaled_panels<Avx512Bf16>(job, decoder, kProduct, begin, end, scratch);
  });
}

}  // namespace

void add_bf16_kernels(Kernels& table) {
  table.float_pairs = float_pairs<Avx512Bf16>;
  table.pair_row = pair_row;
  table.bf16_product = kProduct;
  table.scaled_panels = scaled_panels;
  table.scaled_scratch = scaled_scratch;
  table.pack_pairs = pack_pairs;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
