// Rows of x to int8 on the CPU, alone or behind a normalization or a gate.

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

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

struct Kind {
  const char* name;
  cpu::RowSource::Kind kind;
};

constexpr Kind kKinds[] = {
    {"plain", cpu::RowSource::Kind::kPlain},
    {"rms_norm", cpu::RowSource::Kind::kRmsNorm},
    {"silu_mul", cpu::RowSource::Kind::kSiluMul},
    {"layer_norm", cpu::RowSource::Kind::kLayerNorm},
    {"gelu_mul", cpu::RowSource::Kind::kGeluMul},
    {"gelu_tanh_mul", cpu::RowSource::Kind::kGeluTanhMul},
};

cpu::RowSource::Kind row_kind(const std::string& name) {
  for (const Kind& each : kKinds) {
    if (name == each.name) return each.kind;
  }
  TORCH_CHECK_VALUE(false,
                    "kind must be plain, rms_norm, silu_mul, layer_norm, gelu_mul or "
                    "gelu_tanh_mul, got ",
                    name);
}

// A gain or a bias [k], or null.
const void* vector_of(const char* name, const Optional& vector, int64_t k, cpu::FloatType& type) {
  if (!vector) return nullptr;
  check(name, *vector, at::kCPU, {k});
  type = float_type(name, vector->scalar_type());
  return vector->const_data_ptr();
}

using Quantized = std::tuple<at::Tensor, at::Tensor, Optional, Optional, Optional>;

// other: the residual of a norm, or what a gate multiplies.
Quantized quantize(const at::Tensor& x, const std::string& kind, const Optional& other,
                   const Optional& gain, const Optional& bias, double epsilon,
                   const std::string& scale_of, const Optional& given_scale, bool rounds,
                   const std::string& isa) {
  require(x.dim() == 2, "x must have 2 dimensions, got shape ", x.sizes());
  const int64_t m = x.size(0), k = x.size(1);
  check_rows("x", x, k);
  cpu::RowSource source{};
  source.kind = row_kind(kind);
  source.x = x.const_data_ptr();
  source.type = float_type("x", x.scalar_type());
  source.k = k;
  source.x_stride = m > 1 ? x.stride(0) : k;
  source.epsilon = static_cast<float>(epsilon);
  Optional sum, zeros, rounded;
  if (other) require(other->scalar_type() == x.scalar_type(), "both inputs must have one type");
  if (source.is_gate()) {
    require(other.has_value() && other->sizes() == x.sizes(), "up must have the shape of gate");
    check_rows("up", *other, k);
    source.up = other->const_data_ptr();
    source.up_stride = m > 1 ? other->stride(0) : k;
  } else if (other) {
    require(source.is_norm(), kind, " takes no other rows");
    check("residual", *other, at::kCPU, x.sizes());
    sum = at::empty({m, k}, x.scalar_type());
    source.residual = other->const_data_ptr();
    source.sum = sum->mutable_data_ptr();
  }
  require(!gain || source.is_norm(), "a gain goes with rms_norm and layer_norm alone");
  source.gain = vector_of("gain", gain, k, source.gain_type);
  require(!bias || source.kind == cpu::RowSource::Kind::kLayerNorm,
          "a bias goes with layer_norm alone");
  source.bias = vector_of("bias", bias, k, source.bias_type);
  require(!rounds || source.kind != cpu::RowSource::Kind::kPlain, "plain rows are not rounded");
  if (rounds) {
    rounded = at::empty({m, k}, x.scalar_type());
    source.y = rounded->mutable_data_ptr();
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
  return {quantized, scales, zeros, sum, rounded};
}

using Rounded = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Whether values of x may be read beside torch's dispatcher: an ordinary tensor on the CPU of which
// no gradient is asked, outside of autocast, of transforms such as vmap, of tracing and of modes of
// Python.
bool is_plain(const at::Tensor& x) {
  constexpr c10::DispatchKeySet kUsual({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::AutocastCPU,
                                        c10::DispatchKey::ADInplaceOrView});
  constexpr c10::DispatchKeySet kIncluded(
      {c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  return kUsual.has_all(x.key_set()) && kIncluded.has_all(local.included_) &&
         !at::autocast::is_autocast_enabled(at::kCPU) && x.numel() > 0 && x.dim() > 0 &&
         !(x.requires_grad() && at::GradMode::is_enabled());
}

bool is_float(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat;
}

// How far apart the rows of x [..., K] are, or nothing where they do not lie at equal distances.
std::optional<int64_t> stride_of_rows(const at::Tensor& x) {
  const int64_t last = x.dim() - 1, k = x.size(last);
  if (x.stride(last) != 1 && k != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0;
  for (int64_t axis = last - 1; axis >= 0; --axis) {
    if (x.size(axis) == 1) continue;
    if (stride && x.stride(axis) != next) return std::nullopt;
    if (!stride) stride = x.stride(axis);
    next = x.stride(axis) * x.size(axis);
  }
  return stride.value_or(k);
}

// Rows of `source`, rounded and as int8 [..., K] with scales [..., 1].
Rounded quantize_rounded(cpu::RowSource& source, const at::Tensor& x, cpu::Isa isa) {
  const int64_t k = x.size(-1);
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  at::Tensor y = at::empty(shape, x.scalar_type()), quantized = at::empty(shape, at::kChar);
  shape.back() = 1;
  at::Tensor scales = at::empty(shape, at::kFloat);
  source.x = x.const_data_ptr();
  source.type = float_type("x", x.scalar_type());
  source.k = k;
  source.y = y.mutable_data_ptr();
  cpu::quantize_rows(source, x.numel() / k, cpu::ScaleOf::kRow, nullptr,
                     quantized.mutable_data_ptr<int8_t>(), scales.mutable_data_ptr<float>(),
                     nullptr, isa, torch_pool());
  return {y, quantized, scales};
}

// x / sqrt(mean(x^2) + epsilon) * gain as modules of torch compute it, with its int8 rows and their
// scales; nothing for x that only torch's own operators take. The factor of each row comes of those
// operators, whose sums have an order of their own.
std::optional<Rounded> norm(const at::Tensor& x, const at::Tensor& gain, double epsilon,
                            bool rounds_first, bool adds_one, const std::string& isa) {
  if (!is_plain(x) || !is_plain(gain) || !is_float(x.scalar_type()) || !x.is_contiguous() ||
      gain.scalar_type() != x.scalar_type() || gain.dim() != 1 || !gain.is_contiguous() ||
      gain.size(0) != x.size(-1)) {
    return std::nullopt;
  }
  const cpu::Isa level = isa_here(isa);
  const py::gil_scoped_release released;
  at::Tensor factors;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool is_wide = x.scalar_type() == at::kFloat;
    at::Tensor squares = is_wide ? x.pow(2) : x.to(at::kFloat).pow_(2);
    factors = squares.mean(-1, true).add_(epsilon).rsqrt_();
  }
  cpu::RowSource source{};
  source.kind = cpu::RowSource::Kind::kScaled;
  source.x_stride = x.size(-1);
  source.gain = gain.const_data_ptr();
  source.gain_type = float_type("gain", gain.scalar_type());
  source.factors = factors.const_data_ptr<float>();
  source.rounds_first = rounds_first;
  source.adds_one = adds_one;
  return quantize_rounded(source, x, level);
}

// The layer norm of x, rounded once, in the same way; its sums are not in torch's order.
std::optional<Rounded> layer_norm(const at::Tensor& x, const at::Tensor& gain, const Optional& bias,
                                  double epsilon, const std::string& isa) {
  if (!is_plain(x) || !is_float(x.scalar_type()) || !x.is_contiguous()) return std::nullopt;
  const int64_t k = x.size(-1);
  const auto fits = [&](const at::Tensor& vector) {
    return is_plain(vector) && is_float(vector.scalar_type()) && vector.dim() == 1 &&
           vector.size(0) == k && vector.is_contiguous();
  };
  if (!fits(gain) || (bias && !fits(*bias))) return std::nullopt;
  const cpu::Isa level = isa_here(isa);
  const py::gil_scoped_release released;
  cpu::RowSource source{};
  source.kind = cpu::RowSource::Kind::kLayerNorm;
  source.x_stride = k;
  source.gain = vector_of("gain", gain, k, source.gain_type);
  source.bias = vector_of("bias", bias, k, source.bias_type);
  source.epsilon = static_cast<float>(epsilon);
  return quantize_rounded(source, x, level);
}

// kind: "product" for gate * up as torch rounds it, or that of a gate, which is rounded once.
std::optional<Rounded> product(const at::Tensor& gate, const at::Tensor& up,
                               const std::string& kind, const std::string& isa) {
  if (!is_plain(gate) || !is_plain(up) || !is_float(gate.scalar_type()) ||
      up.scalar_type() != gate.scalar_type() || up.sizes() != gate.sizes()) {
    return std::nullopt;
  }
  const auto stride = stride_of_rows(gate), up_stride = stride_of_rows(up);
  if (!stride || !up_stride) return std::nullopt;
  const cpu::Isa level = isa_here(isa);
  const py::gil_scoped_release released;
  cpu::RowSource source{};
  source.kind = kind == "product" ? cpu::RowSource::Kind::kProduct : row_kind(kind);
  require(kind == "product" || source.is_gate(), kind, " multiplies nothing");
  source.x_stride = *stride;
  source.up = up.const_data_ptr();
  source.up_stride = *up_stride;
  return quantize_rounded(source, gate, level);
}

}  // namespace

void register_cpu_rows(py::module_& m) {
  m.def("quantize_rows_cpu", &quantize,
        "-> int8 [M, K], scales [M], then zero points, sum and rounded rows, or None");
  m.def("norm_rows_cpu", &norm, "-> y [..., K], its int8 rows, scales [..., 1]; or None");
  m.def("layer_norm_rows_cpu", &layer_norm,
        "-> y [..., K], its int8 rows, scales [..., 1]; or None");
  m.def("product_rows_cpu", &product, "-> y [..., K], its int8 rows, scales [..., 1]; or None");
}

}  // namespace qkernels::bindings
