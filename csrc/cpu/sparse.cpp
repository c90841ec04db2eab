#include "cpu/sparse.h"

#include <algorithm>

#include "cpu/faults.h"
#include "cpu/scratch.h"
#include "cpu/vector_portable.h"

namespace qkernels::cpu {

namespace {

// Rows of x whose sums are made together.
constexpr int64_t kTogether = 16;
// Rows of x that are turned into columns at once: with 4096 columns, half of an L2 cache.
constexpr int64_t kRowsAtOnce = 4 * kTogether;
constexpr int64_t kRowsOfTask = 64;
// Starting threads costs about as much as so many products.
constexpr int64_t kProductsWorthThreads = 1 << 14;

float number(const void* p, FloatType type, int64_t index) {
  switch (type) {
    case FloatType::kFp16: return half_to_float(static_cast<const uint16_t*>(p)[index]);
    case FloatType::kBf16: return bf16_to_float(static_cast<const uint16_t*>(p)[index]);
    default: return static_cast<const float*>(p)[index];
  }
}

void add_to(void* p, FloatType type, int64_t index, float sum) {
  const float value = number(p, type, index) + sum;
  switch (type) {
    case FloatType::kFp16: static_cast<uint16_t*>(p)[index] = float_to_half(value); break;
    case FloatType::kBf16: static_cast<uint16_t*>(p)[index] = float_to_bf16(value); break;
    default: static_cast<float*>(p)[index] = value;
  }
}

// Rows [first, first + count) of x as columns of kTogether numbers.
void turn(const SparseProduct& job, int64_t first, int64_t count, float* out) {
  for (int64_t r = 0; r < kTogether; ++r) {
    const int64_t row = (first + r) * job.x_stride;
    for (int64_t c = 0; c < job.k; ++c) {
      out[c * kTogether + r] = r < count ? number(job.x, job.x_type, row + c) : 0.0f;
    }
  }
}

// A row of y at a time, where there are too few for sums together.
template <class Column>
void add_alone(const SparseProduct& job, int64_t row, const float* x, int64_t m) {
  const auto* columns = static_cast<const Column*>(job.columns);
  float sum = 0;
  for (int64_t e = row == 0 ? 0 : job.ends[row - 1]; e < job.ends[row]; ++e) {
    sum += number(job.values, job.value_type, e) * x[columns[e]];
  }
  add_to(job.y, job.y_type, m * job.n + row, sum);
}

template <class Column>
void add_together(const SparseProduct& job, int64_t row, const float* x, int64_t first,
                  int64_t count) {
  const auto* columns = static_cast<const Column*>(job.columns);
  float sums[kTogether] = {};
  for (int64_t e = row == 0 ? 0 : job.ends[row - 1]; e < job.ends[row]; ++e) {
    const float value = number(job.values, job.value_type, e);
    const float* from = x + columns[e] * kTogether;
    for (int64_t r = 0; r < kTogether; ++r) sums[r] += value * from[r];
  }
  if (QK_FAULT(last_row_of_sparse_missing)) --count;
  for (int64_t r = 0; r < count; ++r) add_to(job.y, job.y_type, (first + r) * job.n + row, sums[r]);
}

template <class Column>
void add(const SparseProduct& job, const Pool& pool) {
  const int64_t entries = job.n == 0 ? 0 : job.ends[job.n - 1];
  const Pool own{entries * job.m < kProductsWorthThreads ? 1 : pool.threads, pool.run};
  Scratch memory;
  const bool alone = job.m < kTogether / 4;
  const int64_t rows = alone ? 1 : kRowsAtOnce;
  auto* x = static_cast<float*>(memory.reserve(static_cast<size_t>(rows * job.k) * sizeof(float)));
  for (int64_t first = 0; first < job.m; first += rows) {
    const int64_t count = std::min(rows, job.m - first), blocks = ceil_div(count, kTogether);
    if (alone) {
      for (int64_t c = 0; c < job.k; ++c) {
        x[c] = number(job.x, job.x_type, first * job.x_stride + c);
      }
    } else {
      parallel_for(own, blocks, [&](int64_t block) {
        const int64_t skipped = block * kTogether;
        turn(job, first + skipped, std::min(kTogether, count - skipped), x + skipped * job.k);
      });
    }
    parallel_for(own, ceil_div(job.n, kRowsOfTask), [&](int64_t task) {
      const int64_t end = std::min(job.n, (task + 1) * kRowsOfTask);
      for (int64_t row = task * kRowsOfTask; row < end; ++row) {
        if (alone) {
          add_alone<Column>(job, row, x, first);
          continue;
        }
        for (int64_t skipped = 0; skipped < count; skipped += kTogether) {
          add_together<Column>(job, row, x + skipped * job.k, first + skipped,
                               std::min(kTogether, count - skipped));
        }
      }
    });
  }
}

}  // namespace

void add_sparse_product(const SparseProduct& job, const Pool& pool) {
  if (job.short_columns)
    add<int16_t>(job, pool);
  else
    add<int32_t>(job, pool);
}

}  // namespace qkernels::cpu
