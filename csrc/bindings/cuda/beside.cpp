// The operator that adds what a weight has in 16 bits beside its codes.

#include "cuda/sparse/beside.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings/cuda/device.h"
#include "bindings/cuda/fragment.h"

namespace qkernels::bindings {

namespace {

BesideX x_type(const at::Tensor& x) {
  if (x.scalar_type() == at::kChar) return BesideX::kInt8;
  switch (float_type("x", x)) {
    case FloatType::kHalf: return BesideX::kHalf;
    case FloatType::kBfloat16: return BesideX::kBfloat16;
    default: return BesideX::kFloat;
  }
}

FloatType value_type(const char* name, const at::Tensor& values) {
  require(values.scalar_type() == at::kHalf || values.scalar_type() == at::kBFloat16, name,
          " must be fp16 or bf16, got ", values.scalar_type());
  return float_type(name, values);
}

// y [M, N] of fp16, bf16 or fp32, and to it what x [M, K] is times the rest of the weight: in fp32,
// rounded to dtype. row_scales fp32 [M], and row_zeros int32 [M] where there are some, go with int8
// x alone.
at::Tensor add_beside_op(const at::Tensor& y, const at::Tensor& x, const Optional& columns,
                         const Optional& column_values, const Optional& ends,
                         const Optional& entry_columns, const Optional& entry_values,
                         const Optional& row_scales, const Optional& row_zeros,
                         at::ScalarType dtype) {
  require(y.dim() == 2 && x.dim() == 2 && x.size(0) == y.size(0),
          "x and y must be [M, K] and [M, N] with the same M, got ", x.sizes(), " and ", y.sizes());
  const int64_t m = y.size(0), n = y.size(1);
  const at::Device device = y.device();
  check("y", y, device, {m, n});
  require(x.device() == device, "x is on ", x.device(), ", y on ", device);
  require(x.stride(1) == 1 || x.size(1) <= 1 || m == 0,
          "x must have adjacent columns, got strides ", x.strides());
  BesideArguments arguments{};
  arguments.m = m;
  arguments.n = n;
  arguments.x = x.const_data_ptr();
  arguments.x_type = x_type(x);
  arguments.x_stride = x.stride(0);
  require(
      row_scales.has_value() == (arguments.x_type == BesideX::kInt8) && (row_scales || !row_zeros),
      "row_scales go with int8 x, and row_zeros with them, got x of ", x.scalar_type());
  if (row_scales) {
    check("row_scales", *row_scales, device, {m}, at::kFloat);
    arguments.row_scales = row_scales->const_data_ptr<float>();
  }
  if (row_zeros) {
    check("row_zeros", *row_zeros, device, {m}, at::kInt);
    arguments.row_zeros = row_zeros->const_data_ptr<int32_t>();
  }
  require(columns.has_value() == column_values.has_value(), "columns go with column_values");
  if (columns) {
    check("columns", *columns, device, {columns->numel()}, at::kLong);
    check("column_values", *column_values, device, {n, columns->numel()});
    arguments.columns = columns->const_data_ptr<int64_t>();
    arguments.column_count = columns->numel();
    arguments.column_values = column_values->const_data_ptr();
    arguments.column_type = value_type("column_values", *column_values);
  }
  require(
      ends.has_value() == entry_columns.has_value() && ends.has_value() == entry_values.has_value(),
      "ends go with entry_columns and entry_values");
  if (ends) {
    const int64_t entries = entry_columns->numel();
    check("ends", *ends, device, {n}, at::kInt);
    check("entry_columns", *entry_columns, device, {entries});
    check("entry_values", *entry_values, device, {entries});
    const at::ScalarType type = entry_columns->scalar_type();
    require(type == at::kShort || type == at::kInt, "entry_columns must be int16 or int32, got ",
            type);
    arguments.ends = ends->const_data_ptr<int32_t>();
    arguments.entry_columns = entry_columns->const_data_ptr();
    arguments.short_columns = type == at::kShort;
    arguments.entry_values = entry_values->const_data_ptr();
    arguments.entry_type = value_type("entry_values", *entry_values);
  }
  const DeviceScope scope(y);
  at::Tensor out = at::empty({m, n}, y.options().dtype(dtype));
  arguments.from = y.const_data_ptr();
  arguments.from_type = float_type("y", y);
  arguments.to = out.mutable_data_ptr();
  arguments.to_type = float_type("dtype", out);
  succeed(add_beside(arguments, scope.stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(QKERNELS_LIBRARY, m) {
  m.def(
      "add_beside(Tensor y, Tensor x, Tensor? columns, Tensor? column_values, Tensor? ends, "
      "Tensor? entry_columns, Tensor? entry_values, Tensor? row_scales, Tensor? row_zeros, "
      "ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(QKERNELS_LIBRARY, QKERNELS_DISPATCH_KEY, m) {
  m.impl("add_beside", &add_beside_op);
}

}  // namespace qkernels::bindings
