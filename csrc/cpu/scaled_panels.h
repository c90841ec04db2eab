// Many rows of x times scaled weights rounded to bf16, in products of pairs of bf16: what tiles of
// whole_tiles.h do, on vectors.
//
// Three panels and a chunk of columns are decoded into the L1 cache and multiplied with the same
// chunk of all rows, 48 at a time, which comes from the L2 cache. A sum goes through the same
// additions whatever the number of rows is. Only for source files after QK_TARGET.

#pragma once

#include <immintrin.h>

#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"
#include "cpu/scaled_weights.h"

namespace qkernels::cpu {
namespace {

constexpr int64_t kScaledChunk = 256;  // columns
constexpr int64_t kDecodedWords = kScaledChunk / 2 * kProductPanel;
constexpr int64_t kPanelSums = kProductPanel * kProductPanel;
static_assert(kScaledPanels * kLanes == kProductPanel);

inline int64_t scaled_scratch(int64_t m) {
  return (kDecodedWords + ceil_div(m, kProductPanel) * kPanelSums) * 4;
}

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

template <class Decoder>
void run_scaled_panels(const ScaledJob& job, const Decoder& decoder, ProductKernel multiply,
                       int64_t begin, int64_t end, void* scratch) {
  using V = Avx512;
  const Weight& weight = job.weight;
  const ScaledWeights<Decoder> weights(weight, decoder);
  auto* decoded = static_cast<uint32_t*>(scratch);
  auto* sums = reinterpret_cast<float*>(decoded + kDecodedWords);
  const int64_t columns = weight.columns(), row_panels = ceil_div(job.m, kProductPanel);
  // Where a task has fewer than three, what lies beside them is multiplied too, and not used.
  __builtin_memset(decoded, 0, static_cast<size_t>(kDecodedWords) * 4);
  for (int64_t panel = begin; panel < end; panel += kScaledPanels) {
    const int64_t panels = end - panel < kScaledPanels ? end - panel : kScaledPanels;
    __builtin_memset(sums, 0, static_cast<size_t>(row_panels * kPanelSums) * 4);
    for (int64_t first = 0; first < columns; first += kScaledChunk) {
      const int64_t last = columns - first < kScaledChunk ? columns : first + kScaledChunk;
      for (int64_t p = 0; p < panels; ++p) {
        auto* to = reinterpret_cast<char*>(decoded + p * kLanes);
        weights.template decode<kScaledPanels>(panel + p, first, last, to);
      }
      const uint32_t* x = job.x + first / 2 * kProductPanel;
      for (int64_t r = 0; r < row_panels; ++r, x += columns / 2 * kProductPanel) {
        const int64_t rows = job.m - r * kProductPanel;
        multiply(x, decoded, (last - first) / 2, rows < kProductPanel ? rows : kProductPanel,
                 sums + r * kPanelSums);
      }
      if (QK_FAULT(scaled_chunk_missing)) break;
    }
    for (int64_t row = 0; row < job.m; ++row) {
      for (int64_t p = 0; p < panels; ++p) {
        const float* sum = sums + row * kProductPanel + p * kLanes;
        write_output<V>(job.out, weight, row, panel + p, V::load(sum), false);
      }
    }
  }
}

}  // namespace
}  // namespace qkernels::cpu
