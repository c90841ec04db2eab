// Many rows of x times scaled weights rounded to bf16, in products of pairs of bf16: what tiles of
// whole_tiles.h do, on vectors.
//
// Three panels and a chunk of columns are decoded into the L1 cache and multiplied with the same
// chunk of all rows, 48 at a time, which comes from the L2 cache. A sum goes through the same
// additions whatever the number of rows is. Only for source files after QK_TARGET.

#pragma once

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

// V rounds pairs: see scaled_weights.h.
template <class V, class Decoder>
void run_scaled_panels(const ScaledJob& job, const Decoder& decoder, ProductKernel multiply,
                       int64_t begin, int64_t end, void* scratch) {
  const Weight& weight = job.weight;
  const ScaledWeights<V, Decoder> weights(weight, decoder);
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
