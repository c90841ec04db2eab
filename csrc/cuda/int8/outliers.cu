// Columns of the weight that are listed on the device: lanes take every 32nd of the list
// (sparse/lanes.cuh).

#include "cuda/int8/outliers.h"
#include "cuda/sparse/lanes.cuh"
#include "cuda/weights/fragment_int8.cuh"
#include "cuda/weights/groups.cuh"

namespace qkernels {

namespace {

struct OutlierParameters : LaneParameters {
  Int8Weight weight;
  const int32_t *columns, *count;
  float* y;
  int64_t padded_k, padded_n;
  int group_size;
};

template <class X>
class OutlierBlock : public LaneBlock<X, OutlierParameters, OutlierBlock<X>> {
  using Base = LaneBlock<X, OutlierParameters, OutlierBlock<X>>;
  friend Base;
  using Base::lane_, Base::p_;

 public:
  using Base::Base;

 private:
  QK_DEVICE void add_row(int64_t n) {
    const auto count = ptx::load_global<int32_t>(p_.count);
#pragma unroll 1
    for (int i = lane_; i < count; i += 32) {
      const auto column = ptx::load_global<int32_t>(p_.columns + i);
      this->add(weight(n, column), column);
    }
  }

  // As it dequantizes: a code less its zero point, times its scale.
  QK_DEVICE float weight(int64_t n, int column) const {
    // Rows of a tile lie in the order 0, 8, 1, 9, ..., 7, 15.
    const int64_t row = n % kTileRows;
    const int64_t at = column / p_.group_size * p_.padded_n + n - row + row % 8 * 2 + row / 8;
    const int value = p_.weight.bits == 8 ? static_cast<int8_t>(byte<8>(n, column))
                                          : static_cast<int>(byte<4>(n, column)) - zero(at);
    return ptx::mul(static_cast<float>(value), scale(n, at));
  }

  // A code in the lowest bits; of 8, less 128.
  template <int kBits>
  QK_DEVICE uint8_t byte(int64_t n, int64_t column) const {
    const FragmentPlace place = fragment_int8_place<kBits>(n, column, p_.padded_k);
    const auto* bytes = static_cast<const unsigned char*>(p_.weight.words);
    const auto found = ptx::load_global<uint8_t>(bytes + place.word * 4 + place.bit / 8);
    return kBits == 8 ? found : found >> place.bit % 8 & 0xf;
  }

  QK_DEVICE int zero(int64_t at) const {
    return p_.weight.zeros == nullptr ? 8 : ptx::load_global<uint8_t>(p_.weight.zeros + at);
  }

  QK_DEVICE float scale(int64_t n, int64_t at) const {
    if (p_.weight.channel_scales == nullptr)
      return load_float(p_.weight.scales, p_.weight.scale_type, at);
    const auto* multipliers = static_cast<const uint8_t*>(p_.weight.scales);
    return ptx::mul(static_cast<float>(ptx::load_global<uint8_t>(multipliers + at)),
                    ptx::load_global<float>(p_.weight.channel_scales + n));
  }

  QK_DEVICE void write(int64_t m, int64_t n, float sum) const {
    ptx::store_global<float>(p_.y + m * p_.n + n, sum);
  }
};

template <class X>
QK_KERNEL void QK_LAUNCH_BOUNDS(kLaneThreads, 3)
    multiply_outliers_kernel(const QK_GRID_CONSTANT OutlierParameters parameters) {
  OutlierBlock<X>(parameters, ptx::shared_memory()).run();
}

template <class X>
const char* start(const OutlierParameters& p, unsigned blocks, Stream stream) {
  return launch(multiply_outliers_kernel<X>, dim3{blocks, 1, 1}, kLaneThreads, kLaneSharedBytes,
                stream, p);
}

}  // namespace

const char* multiply_outliers(const OutlierProduct& product, Stream stream) {
  const Int8Weight& weight = product.weight;
  if (product.m == 0 || weight.n == 0) return nullptr;
  OutlierParameters p{};
  const unsigned blocks = p.set(product.x, product.x_stride, product.m, weight.n);
  if (blocks == 0) return kTooManyLaneBlocks;
  p.weight = weight;
  p.columns = product.columns;
  p.count = product.count;
  p.y = product.y;
  p.padded_k = padded_columns(weight.k, weight.bits);
  p.padded_n = padded_rows(weight.n);
  p.group_size = static_cast<int>(weight.group_size < weight.k ? weight.group_size : weight.k);
  switch (product.x_type) {
    case FloatType::kHalf: return start<Half>(p, blocks, stream);
    case FloatType::kBfloat16: return start<Bfloat16>(p, blocks, stream);
    case FloatType::kFloat: return start<Single>(p, blocks, stream);
  }
  return "no such type of x";
}

}  // namespace qkernels
