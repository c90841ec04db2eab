#include "cpu/outliers.h"

#include <algorithm>

#include "cpu/faults.h"
#include "cpu/vector_portable.h"

namespace qkernels::cpu {

namespace {

constexpr int64_t kColumnsOfTask = 512;
constexpr int64_t kPanelsOfTask = 8;
constexpr int64_t kOutputsOfTask = 256;
// Sums that stay in registers.
constexpr int64_t kSums = 16;
// Starting threads costs about as much as looking at so many numbers.
constexpr int64_t kNumbersWorthThreads = 1 << 16;

// Magnitudes are ordered as their bits are, with NaN above infinity.
template <class Bits>
void flag(const OutlierSearch& search, int64_t first, int64_t end, uint8_t* flags) {
  constexpr auto kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  const auto threshold = static_cast<Bits>(search.threshold);
  const int64_t rows = QK_FAULT(last_row_of_search_missing) ? search.m - 1 : search.m;
  for (int64_t row = 0; row < rows; ++row) {
    const Bits* x = static_cast<const Bits*>(search.x) + row * search.x_stride;
    for (int64_t c = first; c < end; ++c) {
      flags[c] |= static_cast<uint8_t>(static_cast<Bits>(x[c] & kMagnitude) >= threshold);
    }
  }
}

float group_number(const void* numbers, GroupType type, int64_t index) {
  switch (type) {
    case GroupType::kFp16: return half_to_float(static_cast<const uint16_t*>(numbers)[index]);
    case GroupType::kBf16: return bf16_to_float(static_cast<const uint16_t*>(numbers)[index]);
    case GroupType::kFp32: return static_cast<const float*>(numbers)[index];
    default: return static_cast<const uint8_t*>(numbers)[index];
  }
}

// Rows of a panel in a column.
void take_panel(const Weight& weight, int64_t panel, int64_t column, float* out) {
  const int64_t g = column / weight.filled, place = g * weight.group + column % weight.filled;
  const bool nibble = is_nibble(weight.code);
  const int64_t step = place % weight.step_columns();
  const int shift = static_cast<int>(8 * (step % 4) + 4 * (step / 4));
  const uint32_t mask = nibble ? 0xf : 0xff;
  const uint32_t* words = weight.words + panel * weight.panel_words() + weight.words_before(place);
  const int64_t groups = (panel * weight.groups() + g) * kLanes;
  const int64_t rows = std::min(kLanes, weight.n - panel * kLanes);
  for (int64_t lane = 0; lane < rows; ++lane) {
    const float zero = weight.has_zeros()
                           ? group_number(weight.zeros, weight.zero_type, groups + lane)
                           : weight.implied_zero;
    float scale = group_number(weight.scales, weight.scale_type, groups + lane);
    if (weight.channel_scales != nullptr && !QK_FAULT(channel_scale_of_outlier_missing)) {
      scale *= weight.channel_scales[panel * kLanes + lane];
    }
    out[lane] = (static_cast<float>(words[lane] >> shift & mask) - zero) * scale;
  }
}

// y [count] += x [columns] times weight [columns][n], of which `count` numbers, kSums at most.
void add_sums(const float* x, const float* weight, int64_t columns, int64_t n, int64_t count,
              float* y) {
  float sums[kSums] = {};
  if (QK_FAULT(last_outlier_missing)) --columns;
  for (int64_t c = 0; c < columns; ++c, weight += n) {
    if (count == kSums) {
      for (int64_t i = 0; i < kSums; ++i) sums[i] += x[c] * weight[i];
    } else {
      for (int64_t i = 0; i < count; ++i) sums[i] += x[c] * weight[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) y[i] += sums[i];
}

}  // namespace

std::vector<int64_t> find_outliers(const OutlierSearch& search, const Pool& pool) {
  std::vector<uint8_t> flags(static_cast<size_t>(search.k));
  const Pool own{search.m * search.k < kNumbersWorthThreads ? 1 : pool.threads, pool.run};
  parallel_for(own, ceil_div(search.k, kColumnsOfTask), [&](int64_t task) {
    const int64_t first = task * kColumnsOfTask, end = std::min(search.k, first + kColumnsOfTask);
    if (search.type == FloatType::kFp32)
      flag<uint32_t>(search, first, end, flags.data());
    else
      flag<uint16_t>(search, first, end, flags.data());
  });
  std::vector<int64_t> columns;
  for (int64_t c = 0; c < search.k; ++c) {
    if (flags[static_cast<size_t>(c)] != 0) columns.push_back(c);
  }
  return columns;
}

void take_columns(const Weight& weight, const int64_t* columns, int64_t count, float* out,
                  const Pool& pool) {
  const Pool own{weight.n * count < kNumbersWorthThreads ? 1 : pool.threads, pool.run};
  parallel_for(own, ceil_div(weight.panels(), kPanelsOfTask), [&](int64_t task) {
    const int64_t end = std::min(weight.panels(), (task + 1) * kPanelsOfTask);
    for (int64_t panel = task * kPanelsOfTask; panel < end; ++panel) {
      for (int64_t i = 0; i < count; ++i) {
        take_panel(weight, panel, columns[i], out + i * weight.n + panel * kLanes);
      }
    }
  });
}

void add_columns(const float* x, const float* weight, int64_t m, int64_t n, int64_t count, float* y,
                 const Pool& pool) {
  const Pool own{m * n * count < kNumbersWorthThreads ? 1 : pool.threads, pool.run};
  parallel_for(own, ceil_div(n, kOutputsOfTask), [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kOutputsOfTask);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t at = task * kOutputsOfTask; at < end; at += kSums) {
        add_sums(x + row * count, weight + at, count, n, std::min(kSums, end - at),
                 y + row * n + at);
      }
    }
  });
}

}  // namespace qkernels::cpu
