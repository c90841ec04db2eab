// Columns and single numbers beside codes: lanes take every 32nd of a row's (lanes.cuh).

#include "cuda/sparse/beside.h"
#include "cuda/sparse/lanes.cuh"

namespace qkernels {

namespace {

struct BesideParameters : LaneParameters {
  const unsigned char *column_values, *entry_columns, *entry_values, *from;
  unsigned char* to;
  const float* row_scales;
  const int32_t* ends;
  const int64_t* columns;
  int64_t column_count;
  FloatType column_type, entry_type, from_type, to_type;
  bool short_columns;
};

QK_DEVICE float wide(uint16_t bits, FloatType type) {
  return type == FloatType::kHalf ? ptx::to_float<Half>(bits) : ptx::to_float<Bfloat16>(bits);
}

template <class X>
class BesideBlock : public LaneBlock<X, BesideParameters, BesideBlock<X>> {
  using Base = LaneBlock<X, BesideParameters, BesideBlock<X>>;
  friend Base;
  using Base::lane_, Base::p_;

 public:
  using Base::Base;

 private:
  QK_DEVICE void add_row(int64_t row) {
#pragma unroll 1
    for (int64_t i = lane_; i < p_.column_count; i += 32) {
      const unsigned char* value = p_.column_values + (row * p_.column_count + i) * 2;
      this->add(wide(ptx::load_global<uint16_t>(value), p_.column_type),
                ptx::load_global<int64_t>(p_.columns + i));
    }
    if (p_.ends != nullptr) add_entries(row);
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
      this->add(wide(ptx::load_global<uint16_t>(p_.entry_values + i * 2), p_.entry_type), column);
    }
  }

  QK_DEVICE void write(int64_t m, int64_t n, float sum) const {
    if constexpr (Base::kIsInt8) {
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
};

template <class X>
QK_KERNEL void QK_LAUNCH_BOUNDS(kLaneThreads, 4)
    add_beside_kernel(const QK_GRID_CONSTANT BesideParameters parameters) {
  BesideBlock<X>(parameters, ptx::shared_memory()).run();
}

template <class X>
const char* start(const BesideParameters& p, unsigned blocks, Stream stream) {
  return launch(add_beside_kernel<X>, dim3{blocks, 1, 1}, kLaneThreads, kLaneSharedBytes, stream,
                p);
}

}  // namespace

const char* add_beside(const BesideArguments& arguments, Stream stream) {
  if (arguments.m == 0 || arguments.n == 0) return nullptr;
  BesideParameters p{};
  const unsigned blocks = p.set(arguments.x, arguments.x_stride, arguments.m, arguments.n);
  if (blocks == 0) return kTooManyLaneBlocks;
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
  switch (arguments.x_type) {
    case BesideX::kHalf: return start<Half>(p, blocks, stream);
    case BesideX::kBfloat16: return start<Bfloat16>(p, blocks, stream);
    case BesideX::kFloat: return start<Single>(p, blocks, stream);
    case BesideX::kInt8: return start<SignedByte>(p, blocks, stream);
  }
  return "no such type of x";
}

}  // namespace qkernels
