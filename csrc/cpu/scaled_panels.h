// Many rows of x times scaled weights rounded to bf16, in products of pairs of bf16: what tiles of
// whole_tiles.h do, on vectors.
//
// Three panels and a chunk of columns are decoded into the L1 cache and multiplied with the same
// chunk of all rows, 48 at a time, which comes from the L2 cache. Four such blocks meet a chunk
// before the next one is read, since x as a whole may not lie in any cache. A sum goes through the
// same additions whatever the number of rows is. Only for source files after QK_TARGET.

#pragma once

#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/kernels.h"
#include "cpu/scaled_weights.h"

namespace qkernels::cpu {
namespace {

constexpr int64_t kBlocks = 4;
constexpr int64_t kDecodedWords = kScaledChunk / 2 * kProductPanel;
constexpr int64_t kPanelSums = kProductPanel * kProductPanel;
static_assert(kScaledPanels * kLanes == kProductPanel);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t scaled_scratch(int64_t m) {
  return (kDecodedWords + kBlocks * ceil_div(m, kProductPanel) * kPanelSums) * 4;
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
  const int64_t block_sums = row_panels * kPanelSums;
  for (int64_t group = begin; group < end; group += kBlocks * kScaledPanels) {
    const int64_t group_end = least(end, group + kBlocks * kScaledPanels);
    __builtin_memset(sums, 0, static_cast<size_t>(kBlocks * block_sums) * 4);
    for (int64_t first = 0; first < columns; first += kScaledChunk) {
      const int64_t last = least(columns, first + kScaledChunk), steps = (last - first) / 2;
      float* to = sums;
      for (int64_t panel = group; panel < group_end; panel += kScaledPanels, to += block_sums) {
        for (int64_t p = panel; p < least(group_end, panel + kScaledPanels); ++p) {
          auto* place = reinterpret_cast<char*>(decoded + (p - panel) * kLanes);
          weights.template decode<kScaledPanels>(p, first, last, place);
        }
        const uint32_t* x = job.x + first / 2 * kProductPanel * row_panels;
        for (int64_t r = 0; r < row_panels; ++r, x += steps * kProductPanel) {
          multiply(x, decoded, steps, least(kProductPanel, job.m - r * kProductPanel),
                   to + r * kPanelSums);
        }
      }
      if (QK_FAULT(scaled_chunk_missing)) break;
    }
    for (int64_t panel = group; panel < group_end; ++panel) {
      const int64_t block = (panel - group) / kScaledPanels, p = (panel - group) % kScaledPanels;
      const float* sum = sums + block * block_sums + p * kLanes;
      for (int64_t row = 0; row < job.m; ++row, sum += kProductPanel) {
        write_output<V>(job.out, weight, row, panel, V::load(sum), false);
      }
    }
  }
}

}  // namespace
}  // namespace qkernels::cpu
