// Rows of x to int8 on the CPU, alone or behind a normalization or a gate.

#include <ATen/ops/empty.h>

#include <string>
#include <tuple>

#include "bindings/cpu/cpu.h"
#include "cpu/linear.h"

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

// Rows [m][k] that follow each other at any distance, their elements side by side.
void check_rows(const char* name, const at::Tensor& x, int64_t k) {
  require(x.device().is_cpu(), name, " must be on the CPU, got ", x.device());
  require(x.dim() == 2 && x.size(1) == k, name, " must have shape [M, ", k, "], got ", x.sizes());
  require(x.stride(1) == 1 || x.numel() == 0 || k == 1, name,
          " must have adjacent columns, got strides ", x.strides());
}

// kind: "plain"; "rms_norm" with residual and gain; "silu_mul" with up.
std::tuple<at::Tensor, at::Tensor, Optional, Optional> quantize(
    const at::Tensor& x, const std::string& kind, const Optional& other, const Optional& gain,
    double epsilon, const std::string& scale_of, const Optional& given_scale,
    const std::string& isa) {
  require(x.dim() == 2, "x must have 2 dimensions, got shape ", x.sizes());
  const int64_t m = x.size(0), k = x.size(1);
  check_rows("x", x, k);
  cpu::RowSource source{};
  source.x = x.const_data_ptr();
  source.type = float_type("x", x.scalar_type());
  source.k = k;
  source.x_stride = m > 1 ? x.stride(0) : k;
  source.epsilon = static_cast<float>(epsilon);
  Optional sum, zeros;
  if (other) require(other->scalar_type() == x.scalar_type(), "both inputs must have one type");
  if (kind == "rms_norm") {
    source.kind = cpu::RowSource::Kind::kRmsNorm;
    if (other) {
      check("residual", *other, at::kCPU, x.sizes());
      sum = at::empty({m, k}, x.scalar_type());
      source.residual = other->const_data_ptr();
      source.sum = sum->mutable_data_ptr();
    }
    if (gain) {
      check("gain", *gain, at::kCPU, {k});
      source.gain = gain->const_data_ptr();
      source.gain_type = float_type("gain", gain->scalar_type());
    }
  } else if (kind == "silu_mul") {
    source.kind = cpu::RowSource::Kind::kSiluMul;
    require(other.has_value() && other->sizes() == x.sizes(), "up must have the shape of gate");
    check_rows("up", *other, k);
    source.up = other->const_data_ptr();
    source.up_stride = m > 1 ? other->stride(0) : k;
  } else {
    require(kind == "plain", "kind must be plain, rms_norm or silu_mul, got ", kind);
  }
  const float* given = nullptr;
  cpu::ScaleOf scale = cpu::ScaleOf::kRow;
  if (scale_of == "tensor") scale = cpu::ScaleOf::kTensor;
  if (scale_of == "static") {
    require(given_scale.has_value(), "a static scale must be given");
    check("scale", *given_scale, at::kCPU, {}, at::kFloat);
    given = given_scale->const_data_ptr<float>();
    scale = cpu::ScaleOf::kGiven;
  }
  const cpu::Isa level = isa_here(isa);
  at::Tensor quantized = at::empty({m, k}, at::kChar), scales = at::empty({m}, at::kFloat);
  if (scale_of == "asymmetric") zeros = at::empty({m}, at::kInt);
  {
    const py::gil_scoped_release released;
    cpu::quantize_rows(source, m, scale, given, quantized.mutable_data_ptr<int8_t>(),
                       scales.mutable_data_ptr<float>(),
                       zeros ? zeros->mutable_data_ptr<int32_t>() : nullptr, level, torch_pool());
  }
  return {quantized, scales, zeros, sum};
}

}  // namespace

void register_cpu_rows(py::module_& m) {
  m.def("quantize_rows_cpu", &quantize, "-> int8 [M, K], scales [M], zero points or None, sum");
}

}  // namespace qkernels::bindings
