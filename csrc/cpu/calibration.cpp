#include "cpu/calibration.h"

#include <algorithm>
#include <cstring>

#include "cpu/faults.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace qkernels::cpu {

namespace {

// Starting threads costs about as much as searching the scales of so many weights, or rounding
// them.
constexpr int64_t kWeightsWorthThreads = 1 << 12;
// Rows that are packed at once: two panels of them stay in the L2 cache.
constexpr int64_t kStepsAtOnce = 1024;

// Of each thread at work.
thread_local Scratch task_scratch;

Pool pool_for(const Pool& pool, int64_t work) {
  return {work < kWeightsWorthThreads ? 1 : pool.threads, pool.run};
}

float* floats(int64_t count) {
  return static_cast<float*>(task_scratch.reserve(static_cast<size_t>(count) * sizeof(float)));
}

// A step of `columns` numbers of type fp32, or of pairs of bf16 of two rows, into panels. `next` is
// null where there is no second row.
void pack_step(const void* row, const void* next, FloatType type, int64_t columns, int64_t steps,
               uint32_t* out) {
  for (int64_t first = 0; first < columns; first += kProductPanel) {
    uint32_t* to = out + first * steps;
    const int64_t count = std::min(kProductPanel, columns - first);
    if (type == FloatType::kFp32) {
      std::memcpy(to, static_cast<const float*>(row) + first,
                  static_cast<size_t>(count) * sizeof(float));
    } else {
      const auto* low = static_cast<const uint16_t*>(row) + first;
      const auto* high = next == nullptr ? nullptr : static_cast<const uint16_t*>(next) + first;
      for (int64_t c = 0; c < count; ++c) {
        to[c] = low[c] | (high == nullptr ? 0 : uint32_t{high[c]} << 16);
      }
    }
    std::fill(to + count, to + kProductPanel, 0u);
  }
}

struct Packed {
  const void* x;
  int64_t columns;
  uint32_t* panels;  // [panels][steps][kProductPanel]
};

void pack(const Packed& packed, FloatType type, int64_t first, int64_t rows, int64_t steps,
          const Pool& pool) {
  const int64_t rows_a_step = type == FloatType::kFp32 ? 1 : 2;
  const int64_t row_bytes = packed.columns * size_of(type);
  constexpr int64_t kStepsOfTask = 16;
  parallel_for(pool, ceil_div(steps, kStepsOfTask), [&](int64_t task) {
    const int64_t end = std::min(steps, (task + 1) * kStepsOfTask);
    for (int64_t step = task * kStepsOfTask; step < end; ++step) {
      const int64_t row = first + step * rows_a_step;
      const char* from = static_cast<const char*>(packed.x) + row * row_bytes;
      const bool is_pair = rows_a_step == 2 && row + 1 < rows;
      pack_step(from, is_pair ? from + row_bytes : nullptr, type, packed.columns, steps,
                packed.panels + step * kProductPanel);
    }
  });
}

ProductKernel product_kernel(FloatType type, Isa isa) {
  const Kernels& table = kernels(isa);
  switch (type) {
    case FloatType::kFp32: return table.fp32_product;
    case FloatType::kBf16: return table.bf16_product;
    default: return nullptr;
  }
}

}  // namespace

void search_scales(const ScaleSearch& job, Isa isa, const Pool& pool) {
  const Kernels& table = kernels(isa);
  const int64_t groups = job.groups();
  parallel_for(pool_for(pool, job.n * job.k), ceil_div(job.n, kLanes) * groups, [&](int64_t task) {
    table.search_scales(job, task / groups, task % groups, floats(job.scratch()));
  });
}

void round_columns(const ColumnRounding& job, Isa isa, const Pool& pool) {
  const Kernels& table = kernels(isa);
  parallel_for(pool_for(pool, job.n * job.columns), ceil_div(job.n, kLanes),
               [&](int64_t task) { table.round_columns(job, task, floats(kLanes * job.columns)); });
}

bool multiplies_transposed(FloatType type, Isa isa) { return product_kernel(type, isa) != nullptr; }

void multiply_transposed(const TransposedProduct& job, Isa isa, const Pool& pool) {
  const ProductKernel multiply = product_kernel(job.type, isa);
  const bool symmetric = job.x == job.y;
  const int64_t down = ceil_div(job.x_columns, kProductPanel);
  const int64_t across = ceil_div(job.y_columns, kProductPanel);
  const int64_t rows_a_step = job.type == FloatType::kFp32 ? 1 : 2;
  const int64_t most = std::min(kStepsAtOnce, ceil_div(job.rows, rows_a_step));
  Scratch memory;
  const int64_t panel = most * kProductPanel, panels = down + (symmetric ? 0 : across);
  auto* words = static_cast<uint32_t*>(
      memory.reserve(static_cast<size_t>(panel * panels) * sizeof(uint32_t)));
  const Packed x{job.x, job.x_columns, words};
  const Packed y{job.y, job.y_columns, symmetric ? words : words + panel * down};
  std::fill(job.out, job.out + job.x_columns * job.y_columns, 0.0f);
  for (int64_t first = 0; first < job.rows; first += kStepsAtOnce * rows_a_step) {
    const int64_t steps = std::min(kStepsAtOnce, ceil_div(job.rows - first, rows_a_step));
    pack(x, job.type, first, job.rows, steps, pool);
    if (!symmetric) pack(y, job.type, first, job.rows, steps, pool);
    parallel_for(pool, down * across, [&](int64_t task) {
      const int64_t i = task / across, j = task % across;
      if (symmetric && j < i) return;
      alignas(64) float sums[kProductPanel * kProductPanel] = {};
      const int64_t height = std::min(kProductPanel, job.x_columns - i * kProductPanel);
      multiply(x.panels + i * steps * kProductPanel, y.panels + j * steps * kProductPanel, steps,
               height, sums);
      const int64_t width = std::min(kProductPanel, job.y_columns - j * kProductPanel);
      for (int64_t r = 0; r < height; ++r) {
        float* to = job.out + (i * kProductPanel + r) * job.y_columns + j * kProductPanel;
        if (QK_FAULT(rows_packed_before_forgotten)) std::fill(to, to + width, 0.0f);
        for (int64_t c = 0; c < width; ++c) to[c] += sums[r * kProductPanel + c];
      }
    });
  }
  if (!symmetric || QK_FAULT(product_not_mirrored)) return;
  parallel_for(pool, down, [&](int64_t task) {
    const int64_t end = std::min(job.x_columns, (task + 1) * kProductPanel);
    for (int64_t first = 0; first < end; first += kProductPanel) {
      for (int64_t r = task * kProductPanel; r < end; ++r) {
        const int64_t stop = std::min(r, first + kProductPanel);
        for (int64_t c = first; c < stop; ++c) {
          job.out[r * job.x_columns + c] = job.out[c * job.x_columns + r];
        }
      }
    }
  });
}

}  // namespace qkernels::cpu
