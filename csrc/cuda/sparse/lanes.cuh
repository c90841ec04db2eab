// Products of few numbers of each row of a weight with 8 rows of x: what the kernels for them
// share.
//
// A block is 32 rows of the weight by 8 rows of x. A warp takes a row of the weight at a time, its
// lanes the numbers of that, each of which meets all 8 rows of x; the lanes' sums are added up, and
// pass through shared memory, so that what is made is written along its rows.

#pragma once

#include <type_traits>

#include "cuda/activations/pieces.cuh"
#include "integers.h"

namespace qkernels {

// int8, beside Half, Bfloat16 and Single.
struct SignedByte {};

constexpr int kLaneTokens = 8, kLaneRows = 32, kLaneWarps = 8;
constexpr int kLaneThreads = 32 * kLaneWarps, kWarpRows = kLaneRows / kLaneWarps;
static_assert(kLaneWarps == kLaneTokens, "at the end a warp has a row of x");
// A row more than there are, so that the sums of a row of the weight lie in different banks.
constexpr int kTokenBytes = (kLaneRows + 1) * 4;
constexpr int kLaneSharedBytes = kLaneTokens * kTokenBytes;

struct LaneParameters {
  const unsigned char* x;  // [m][k], rows x_stride numbers apart
  int64_t x_stride, m, n;
  const int32_t* row_zeros;  // [m] of int8 x, or null
  unsigned row_tiles;

  // Blocks of a launch, or 0 where it cannot count them.
  unsigned set(const void* of, int64_t stride, int64_t rows, int64_t weight_rows) {
    x = static_cast<const unsigned char*>(of);
    x_stride = stride;
    m = rows;
    n = weight_rows;
    constexpr int64_t kMostBlocks = 0x7fffffff;
    const int64_t tiles = ceil_div(n, kLaneRows), token_tiles = ceil_div(m, kLaneTokens);
    if (tiles > kMostBlocks / token_tiles) return 0;
    row_tiles = static_cast<unsigned>(tiles);
    return static_cast<unsigned>(tiles * token_tiles);
  }
};

constexpr const char* kTooManyLaneBlocks =
    "x has more rows than a launch can count: pass fewer at a time";

// `Product::add_row(n)` calls `add(value, column)` for each number that the lane has of row n;
// `Product::write(m, n, sum)` is what becomes of a sum.
template <class X, class Parameters, class Product>
class LaneBlock {
 public:
  QK_DEVICE LaneBlock(const Parameters& parameters, ptx::Shared shared)
      : p_(parameters),
        lane_(static_cast<int>(threadIdx.x) % 32),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        row_(static_cast<int64_t>(blockIdx.x % parameters.row_tiles) * kLaneRows),
        token_(static_cast<int64_t>(blockIdx.x / parameters.row_tiles) * kLaneTokens) {}

  QK_DEVICE void run() {
    load_zeros();
#pragma unroll 1
    for (int i = 0; i < kWarpRows; ++i) {
      const int own = warp_ * kWarpRows + i;
      if (!ptx::within(row_ + own, p_.n)) break;
#pragma unroll
      for (float& sum : sums_) sum = 0.0f;
      static_cast<Product*>(this)->add_row(row_ + own);
      reduce_lanes();
      if (lane_ % 4 == 0) ptx::store_shared<float>(sum_at(lane_ / 4, own), sums_[0]);
    }
    ptx::sync_threads();
    const int64_t m = token_ + warp_, n = row_ + lane_;
    if (!ptx::within(m, p_.m) || !ptx::within(n, p_.n)) return;
    const float sum = ptx::as_float(ptx::load_shared<uint32_t>(sum_at(warp_, lane_)));
    static_cast<Product*>(this)->write(m, n, sum);
  }

 protected:
  static constexpr bool kIsInt8 = std::is_same_v<X, SignedByte>;

  // `value` of the weight meets the column of all rows of x.
  QK_DEVICE void add(float value, int64_t column) {
#pragma unroll
    for (int t = 0; t < kLaneTokens; ++t) {
      if (ptx::within(token_ + t, p_.m)) sums_[t] = ptx::fma(value, number(t, column), sums_[t]);
    }
  }

  const Parameters& p_;
  const int lane_;

 private:
  QK_DEVICE ptx::Shared sum_at(int token, int row) const {
    return shared_ + (token * kTokenBytes + row * 4);
  }

  QK_DEVICE void load_zeros() {
    if constexpr (kIsInt8) {
#pragma unroll
      for (int t = 0; t < kLaneTokens; ++t) {
        zeros_[t] = 0;
        if (p_.row_zeros != nullptr && ptx::within(token_ + t, p_.m)) {
          zeros_[t] = ptx::load_global<int32_t>(p_.row_zeros + token_ + t);
        }
      }
    }
  }

  QK_DEVICE float number(int t, int64_t column) const {
    const int64_t at = (token_ + t) * p_.x_stride + column;
    if constexpr (kIsInt8) {
      const auto code = static_cast<int8_t>(ptx::load_global<uint8_t>(p_.x + at));
      return static_cast<float>(code - zeros_[t]);
    } else if constexpr (kNumberBytes<X> == 4) {
      return ptx::as_float(ptx::load_global<uint32_t>(p_.x + at * 4));
    } else {
      return ptx::to_float<X>(ptx::load_global<uint16_t>(p_.x + at * 2));
    }
  }

  // Sums over the lanes: that of row t of x to lanes 4 t to 4 t + 3, as their first. Each half of
  // the lanes gives the other one the rows that it does not go on with.
  QK_DEVICE void reduce_lanes() {
#pragma unroll
    for (int half = kLaneTokens / 2; half > 0; half /= 2) {
      const bool upper = (lane_ & (half * 4)) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float kept = upper ? sums_[i + half] : sums_[i];
        const float given = upper ? sums_[i] : sums_[i + half];
        sums_[i] = ptx::add(kept, from_lane(given, half * 4));
      }
    }
    sums_[0] = ptx::add(sums_[0], from_lane(sums_[0], 2));
    sums_[0] = ptx::add(sums_[0], from_lane(sums_[0], 1));
  }

  static QK_DEVICE float from_lane(float value, int mask) {
    return ptx::as_float(ptx::shuffle_xor(ptx::as_bits(value), mask));
  }

  const ptx::Shared shared_;
  const int warp_;
  const int64_t row_, token_;  // the block's first
  float sums_[kLaneTokens];
  int zeros_[kIsInt8 ? kLaneTokens : 1];
};

}  // namespace qkernels
