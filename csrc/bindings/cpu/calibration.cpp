// The hot loops of calibration on the CPU: scales, columns, x^T y.

#include "cpu/calibration.h"

#include <ATen/ops/empty.h>

#include <string>
#include <tuple>

#include "bindings/cpu/cpu.h"

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

constexpr int64_t kMostBits = 8;

void check_range(const char* name, const int64_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    require(values[i] >= 0 && values[i] < end, name, "[", i, "] is ", values[i],
            ", which is not in [0, ", end, ")");
  }
}

std::tuple<at::Tensor, Optional> search(const at::Tensor& weight, const at::Tensor& scales,
                                        const Optional& zeros, const Optional& channel_scales,
                                        const Optional& diagonal, const Optional& gram,
                                        int64_t length, int64_t bits, double implied_zero,
                                        double least_scale, double most_multiplier,
                                        const std::string& isa) {
  require(weight.dim() == 2 && weight.numel() > 0, "weight must be [N, K], got ", weight.sizes());
  const int64_t n = weight.size(0), k = weight.size(1);
  require(weight.device().is_cpu(), "weight must be on the CPU, got ", weight.device());
  require(k == 1 || weight.stride(1) == 1, "weight must have adjacent columns, got strides ",
          weight.strides());
  require(length > 0, "length must be above 0, got ", length);
  require(bits >= 1 && bits <= kMostBits, "bits must be from 1 to ", kMostBits, ", got ", bits);
  cpu::ScaleSearch job{};
  job.weight = weight.const_data_ptr();
  job.type = float_type("weight", weight.scalar_type());
  job.n = n;
  job.k = k;
  job.stride = n > 1 ? weight.stride(0) : k;
  job.length = length;
  job.bits = static_cast<int>(bits);
  job.implied_zero = static_cast<float>(implied_zero);
  job.least_scale = static_cast<float>(least_scale);
  check("scales", scales, at::kCPU, {n, job.groups()});
  job.scale_type = group_type("scales", scales.scalar_type());
  require((job.scale_type == cpu::GroupType::kUint8) == channel_scales.has_value(),
          "integer scales go with channel_scales, got ", scales.scalar_type());
  if (channel_scales) {
    check("channel_scales", *channel_scales, at::kCPU, {n}, at::kFloat);
    job.channel_scales = channel_scales->const_data_ptr<float>();
    require(most_multiplier >= 1 && most_multiplier < 256,
            "most_multiplier must be in [1, 256), got ", most_multiplier);
    job.most_multiplier = static_cast<float>(most_multiplier);
  }
  if (diagonal) {
    check("diagonal", *diagonal, at::kCPU, {k}, at::kFloat);
    job.diagonal = diagonal->const_data_ptr<float>();
  }
  if (gram) {
    require(gram->device().is_cpu() && gram->scalar_type() == at::kFloat && gram->dim() == 2 &&
                gram->size(0) == k && gram->size(1) == k && (k == 1 || gram->stride(1) == 1),
            "gram must be fp32 [", k, ", ", k, "] with adjacent columns on the CPU, got ",
            gram->scalar_type(), " ", gram->sizes());
    job.gram = gram->const_data_ptr<float>();
    job.gram_stride = gram->stride(0);
  }
  const at::Tensor found = scales.clone();
  job.scales = found.mutable_data_ptr();
  Optional moved;
  if (zeros) {
    check("zeros", *zeros, at::kCPU, {n, job.groups()}, at::kByte);
    moved = zeros->clone();
    job.zeros = moved->mutable_data_ptr<uint8_t>();
  }
  const cpu::Isa level = isa_here(isa);
  const py::gil_scoped_release released;
  cpu::search_scales(job, level, torch_pool());
  return {found, moved};
}

std::tuple<at::Tensor, Optional> round_columns(const at::Tensor& left, const at::Tensor& factors,
                                               const Optional& values, const at::Tensor& places,
                                               const at::Tensor& groups, const at::Tensor& scales,
                                               const Optional& zeros, double implied_zero,
                                               const at::Tensor& low, const at::Tensor& high,
                                               at::Tensor codes, const Optional& kept,
                                               const std::string& isa) {
  require(left.dim() == 2, "left must be [columns, N], got ", left.sizes());
  cpu::ColumnRounding job{};
  job.columns = left.size(0);
  job.n = left.size(1);
  check("left", left, at::kCPU, left.sizes(), at::kFloat);
  job.left = left.const_data_ptr<float>();
  require(factors.device().is_cpu() && factors.scalar_type() == at::kFloat && factors.dim() == 2 &&
              factors.size(0) == job.columns && factors.size(1) == job.columns &&
              (job.columns <= 1 || factors.stride(1) == 1),
          "factors must be fp32 [", job.columns, ", ", job.columns,
          "] with adjacent columns on the CPU, got ", factors.scalar_type(), " ", factors.sizes());
  job.factors = factors.const_data_ptr<float>();
  job.stride = factors.stride(0);
  if (values) {
    check("values", *values, at::kCPU, left.sizes(), at::kFloat);
    job.values = values->const_data_ptr<float>();
  }
  require(scales.dim() == 2 && codes.dim() == 2, "scales and codes must be matrices, got ",
          scales.sizes(), " and ", codes.sizes());
  check("scales", scales, at::kCPU, {scales.size(0), job.n}, at::kFloat);
  check("low", low, at::kCPU, scales.sizes(), at::kFloat);
  check("high", high, at::kCPU, scales.sizes(), at::kFloat);
  if (zeros) {
    check("zeros", *zeros, at::kCPU, scales.sizes(), at::kFloat);
    job.zeros = zeros->const_data_ptr<float>();
  }
  check("codes", codes, at::kCPU, {codes.size(0), job.n}, at::kByte);
  check("places", places, at::kCPU, {job.columns}, at::kLong);
  check("groups", groups, at::kCPU, {job.columns}, at::kLong);
  job.places = places.const_data_ptr<int64_t>();
  job.groups = groups.const_data_ptr<int64_t>();
  check_range("places", job.places, job.columns, codes.size(0));
  check_range("groups", job.groups, job.columns, scales.size(0));
  job.scales = scales.const_data_ptr<float>();
  job.implied_zero = static_cast<float>(implied_zero);
  job.low = low.const_data_ptr<float>();
  job.high = high.const_data_ptr<float>();
  job.codes = codes.mutable_data_ptr<uint8_t>();
  at::Tensor moved = at::empty(left.sizes(), at::kFloat);
  job.moved = moved.mutable_data_ptr<float>();
  Optional beyond;
  if (kept) {
    check("kept", *kept, at::kCPU, left.sizes(), at::kFloat);
    job.kept = kept->const_data_ptr<float>();
    beyond = at::empty(left.sizes(), at::kFloat);
    job.beyond = beyond->mutable_data_ptr<float>();
  }
  const cpu::Isa level = isa_here(isa);
  const py::gil_scoped_release released;
  cpu::round_columns(job, level, torch_pool());
  return {moved, beyond};
}

bool multiplies_transposed(at::ScalarType type, const std::string& isa) {
  return cpu::multiplies_transposed(float_type("x", type), isa_here(isa));
}

at::Tensor transposed_product(const at::Tensor& x, const at::Tensor& y, const std::string& isa) {
  require(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0),
          "x and y must be [T, K] with the same T, got ", x.sizes(), " and ", y.sizes());
  check("x", x, at::kCPU, x.sizes());
  check("y", y, at::kCPU, y.sizes(), x.scalar_type());
  const cpu::Isa level = isa_here(isa);
  cpu::TransposedProduct job{};
  job.type = float_type("x", x.scalar_type());
  require(cpu::multiplies_transposed(job.type, level), isa, " has no products of ",
          x.scalar_type());
  job.rows = x.size(0);
  job.x_columns = x.size(1);
  job.y_columns = y.size(1);
  job.x = x.const_data_ptr();
  job.y = y.const_data_ptr();
  at::Tensor out = at::empty({job.x_columns, job.y_columns}, at::kFloat);
  job.out = out.mutable_data_ptr<float>();
  const py::gil_scoped_release released;
  cpu::multiply_transposed(job, level, torch_pool());
  return out;
}

}  // namespace

void register_cpu_calibration(py::module_& m) {
  m.def("search_scales_cpu", &search, "-> scales and zero points of the least cost");
  m.def("round_columns_cpu", &round_columns,
        "writes codes -> moved fp32 [columns, N], and what kept ones are beyond their codes");
  m.def("multiplies_transposed_cpu", &multiplies_transposed, "whether x^T y has kernels");
  m.def("transposed_product_cpu", &transposed_product, "x [T, K], y [T, L] -> x^T y fp32 [K, L]");
}

}  // namespace qkernels::bindings
