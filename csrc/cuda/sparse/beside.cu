// A block is 32 rows of the weight by 8 rows of x. A warp takes a row of the weight at a time, its
// lanes the numbers that this has beside its codes, each of which meets all 8 rows of x; the lanes'
// sums are added up, and pass through shared memory, so that y is read and written along its rows.

#include <type_traits>

#include "cuda/activations/pieces.cuh"
#include "cuda/sparse/beside.h"
#include "integers.h"

namespace qkernels {

namespace {

constexpr int kTokens = 8, kRows = 32, kWarps = 8, kWarpRows = kRows / kWarps;
constexpr int kThreads = 32 * kWarps;
// A row more than there are, so that the sums of a row of the weight lie in different banks.
constexpr int kTokenBytes = (kRows + 1) * 4;

// int8, beside Half, Bfloat16 and Single.
struct Int8 {};

struct BesideParameters {
  const unsigned char *x, *column_values, *entry_columns, *entry_values, *from;
  unsigned char* to;
  const float* row_scales;
  const int32_t *row_zeros, *ends;
  const int64_t* columns;
  int64_t x_stride, column_count, m, n;
  FloatType column_type, entry_type, from_type, to_type;
  bool short_columns;
  unsigned row_tiles;
};

QK_DEVICE float wide(uint16_t bits, FloatType type) {
  return type == FloatType::kHalf ? ptx::to_float<Half>(bits) : ptx::to_float<Bfloat16>(bits);
}

template <class X>
class BesideBlock {
 public:
  QK_DEVICE BesideBlock(const BesideParameters& parameters, ptx::Shared shared)
      : p_(parameters),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        row_(static_cast<int64_t>(blockIdx.x % parameters.row_tiles) * kRows),
        token_(static_cast<int64_t>(blockIdx.x / parameters.row_tiles) * kTokens) {}

  QK_DEVICE void run() {
    start_rows();
#pragma unroll 1
    for (int i = 0; i < kWarpRows; ++i) {
      const int own = warp_ * kWarpRows + i;
      if (!ptx::within(row_ + own, p_.n)) break;
#pragma unroll
      for (float& sum : sums_) sum = 0.0f;
      add_columns(row_ + own);
      if (p_.ends != nullptr) add_entries(row_ + own);
      reduce_lanes();
      if (lane_ % 4 == 0) ptx::store_shared<float>(sum_at(lane_ / 4, own), sums_[0]);
    }
    ptx::sync_threads();
    store();
  }

 private:
  QK_DEVICE ptx::Shared sum_at(int token, int row) const {
    return shared_ + (token * kTokenBytes + row * 4);
  }

  QK_DEVICE void start_rows() {
    if constexpr (kIsInt8) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
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

  // `value` of the weight meets the column of all rows of x.
  QK_DEVICE void add(float value, int64_t column) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (ptx::within(token_ + t, p_.m)) sums_[t] = ptx::fma(value, number(t, column), sums_[t]);
    }
  }

  QK_DEVICE void add_columns(int64_t row) {
#pragma unroll 1
    for (int64_t i = lane_; i < p_.column_count; i += 32) {
      const unsigned char* value = p_.column_values + (row * p_.column_count + i) * 2;
      add(wide(ptx::load_global<uint16_t>(value), p_.column_type),
          ptx::load_global<int64_t>(p_.columns + i));
    }
  }

  QK_DEVICE void add_entries(int64_t row) {
    int64_t i = lane_;
    if (row != 0) i += ptx::load_global<int32_t>(p_.ends + row - 1);
    const int64_t end = ptx::load_global<int32_t>(p_.ends + row);
#pragma unroll 1
    for (; i < end; i += 32) {
      const int64_t column = p_.short_columns
                                 ? ptx::load_global<uint16_t>(p_.entry_columns + i * 2)
                                 : ptx::load_global<uint32_t>(p_.entry_columns + i * 4);
      add(wide(ptx::load_global<uint16_t>(p_.entry_values + i * 2), p_.entry_type), column);
    }
  }

  // Sums over the lanes: that of row t of x to lanes 4 t to 4 t + 3, as their first. Each half of
  // the lanes gives the other one the rows that it does not go on with.
  QK_DEVICE void reduce_lanes() {
#pragma unroll
    for (int half = kTokens / 2; half > 0; half /= 2) {
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

  // A warp has a row of x, and a lane a row of the weight.
  QK_DEVICE void store() const {
    const int64_t m = token_ + warp_, n = row_ + lane_;
    if (!ptx::within(m, p_.m) || !ptx::within(n, p_.n)) return;
    float sum = ptx::as_float(ptx::load_shared<uint32_t>(sum_at(warp_, lane_)));
    if constexpr (kIsInt8) {
      sum = ptx::mul(sum, ptx::as_float(ptx::load_global<uint32_t>(p_.row_scales + m)));
    }
    const int64_t at = m * p_.n + n;
    // Past the cache of what is never written: it may be what is stored below.
    if (p_.from_type == FloatType::kFloat) {
      sum = ptx::add(sum, ptx::as_float(ptx::load_global_written<uint32_t>(p_.from + at * 4)));
    } else {
      sum = ptx::add(sum, wide(ptx::load_global_written<uint16_t>(p_.from + at * 2), p_.from_type));
    }
    if (p_.to_type == FloatType::kFloat) {
      ptx::store_global<float>(p_.to + at * 4, sum);
    } else {
      const uint32_t rounded = p_.to_type == FloatType::kHalf ? ptx::pack2<Half>(sum, 0.0f)
                                                              : ptx::pack2<Bfloat16>(sum, 0.0f);
      ptx::store_global<uint16_t>(p_.to + at * 2, static_cast<uint16_t>(rounded & 0xffff));
    }
  }

  static constexpr bool kIsInt8 = std::is_same_v<X, Int8>;

  const BesideParameters& p_;
  const ptx::Shared shared_;
  const int warp_, lane_;
  const int64_t row_, token_;  // the block's first
  float sums_[kTokens];
  int zeros_[kIsInt8 ? kTokens : 1];
};

template <class X>
QK_KERNEL void QK_LAUNCH_BOUNDS(kThreads, 4)
    add_beside_kernel(const QK_GRID_CONSTANT BesideParameters parameters) {
  BesideBlock<X>(parameters, ptx::shared_memory()).run();
}

template <class X>
const char* start(const BesideParameters& p, unsigned blocks, Stream stream) {
  return launch(add_beside_kernel<X>, dim3{blocks, 1, 1}, kThreads, kTokens * kTokenBytes, stream,
                p);
}

}  // namespace

const char* add_beside(const BesideArguments& arguments, Stream stream) {
  if (arguments.m == 0 || arguments.n == 0) return nullptr;
  BesideParameters p{};
  p.x = static_cast<const unsigned char*>(arguments.x);
  p.x_stride = arguments.x_stride;
  p.row_scales = arguments.row_scales;
  p.row_zeros = arguments.row_zeros;
  p.columns = arguments.columns;
  p.column_values = static_cast<const unsigned char*>(arguments.column_values);
  p.column_type = arguments.column_type;
  p.column_count = arguments.column_count;
  p.ends = arguments.ends;
  p.entry_columns = static_cast<const unsigned char*>(arguments.entry_columns);
  p.short_columns = arguments.short_columns;
  p.entry_values = static_cast<const unsigned char*>(arguments.entry_values);
  p.entry_type = arguments.entry_type;
  p.from = static_cast<const unsigned char*>(arguments.from);
  p.from_type = arguments.from_type;
  p.to = static_cast<unsigned char*>(arguments.to);
  p.to_type = arguments.to_type;
  p.m = arguments.m;
  p.n = arguments.n;
  const int64_t row_tiles = ceil_div(p.n, kRows);
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (row_tiles > kMostBlocks / ceil_div(p.m, kTokens)) {
    return "x has more rows than a launch can count: pass fewer at a time";
  }
  p.row_tiles = static_cast<unsigned>(row_tiles);
  const auto blocks = static_cast<unsigned>(row_tiles * ceil_div(p.m, kTokens));
  switch (arguments.x_type) {
    case BesideX::kHalf: return start<Half>(p, blocks, stream);
    case BesideX::kBfloat16: return start<Bfloat16>(p, blocks, stream);
    case BesideX::kFloat: return start<Single>(p, blocks, stream);
    case BesideX::kInt8: return start<Int8>(p, blocks, stream);
  }
  return "no such type of x";
}

}  // namespace qkernels
