// The operators that quantize rows of activations, alone or behind a normalization or a gate.

#include "bindings/cuda/rows.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "bindings/cuda/fragment.h"
#include "cuda/activations/outliers.h"
#include "integers.h"

namespace qkernels::bindings {

namespace {

// That share a byte of flags.
constexpr int64_t kPieceColumns = 8;

// Blocks a multiprocessor that look for the scale of a tensor: as many as may run there at a time.
constexpr int kScaleBlocks = 4;

}  // namespace

at::Tensor scale_of_tensor(const at::Tensor& x, RowCode code, double largest,
                           const DeviceScope& scope) {
  TensorScaleArguments arguments{};
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.m = x.size(0);
  arguments.k = x.size(1);
  arguments.type = float_type("x", x);
  arguments.largest = code == RowCode::kFp8E4M3 ? 448.0f : static_cast<float>(largest);
  const int64_t most = int64_t{kScaleBlocks} * scope.facts().multiprocessors;
  arguments.blocks = static_cast<int>(std::clamp<int64_t>(arguments.m, 1, most));
  at::Tensor scale = at::empty({}, x.options().dtype(at::kFloat));
  const at::Tensor tops = at::empty({arguments.blocks}, x.options().dtype(at::kInt));
  arguments.scale = scale.mutable_data_ptr<float>();
  arguments.tops = reinterpret_cast<uint32_t*>(tops.mutable_data_ptr<int32_t>());
  arguments.counter = scope.counters(1);
  succeed(tensor_scale(arguments, scope.stream()));
  return scale;
}

Outliers find_outliers(const at::Tensor& x, double threshold, int64_t parts,
                       const DeviceScope& scope) {
  const int64_t m = x.size(0), k = x.size(1), bytes = ceil_div(k, kPieceColumns);
  OutlierArguments arguments{};
  arguments.type = float_type("x", x);
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.m = m;
  arguments.k = k;
  const auto wide = static_cast<float>(threshold);
  arguments.threshold = arguments.type == FloatType::kHalf ? static_cast<float>(at::Half(wide))
                        : arguments.type == FloatType::kBfloat16
                            ? static_cast<float>(at::BFloat16(wide))
                            : wide;
  const int64_t most = int64_t{kScaleBlocks} * scope.facts().multiprocessors;
  const int64_t useful = std::max<int64_t>(ceil_div(m, kOutlierRows), 1);
  const int64_t wanted = parts > 0 ? parts : most / ceil_div(k, kOutlierTileColumns);
  arguments.parts =
      static_cast<int>(std::clamp<int64_t>(wanted, 1, std::min<int64_t>(useful, 65535)));
  const auto make = [&](int64_t size, at::ScalarType type) {
    return at::empty({size}, x.options().dtype(type));
  };
  const at::Tensor flags = make(bytes, at::kByte), columns = make(k, at::kInt);
  const at::Tensor count = make(1, at::kInt), partial = make(arguments.parts * bytes, at::kByte);
  arguments.flags = flags.mutable_data_ptr<uint8_t>();
  arguments.columns = columns.mutable_data_ptr<int32_t>();
  arguments.count = count.mutable_data_ptr<int32_t>();
  arguments.partial = partial.mutable_data_ptr<uint8_t>();
  arguments.counter = scope.counters(1);
  succeed(qkernels::find_outliers(arguments, scope.stream()));
  return {flags, columns, count};
}

namespace {

void check_rows(const char* name, const at::Tensor& x) {
  require(x.dim() == 2, name, " must have 2 dimensions, got shape ", x.sizes());
  require(x.size(0) <= kMostRows && x.size(1) <= kMostRowColumns, name, " must have up to ",
          kMostRows, " rows and ", kMostRowColumns, " columns, got shape ", x.sizes(),
          ": cut it into parts");
  require(x.stride(1) == 1 || x.size(1) <= 1 || x.size(0) == 0, name,
          " must have adjacent columns, got strides ", x.strides());
}

void check_like(const char* name, const at::Tensor& other, const at::Tensor& x) {
  check_rows(name, other);
  require(other.device() == x.device() && other.scalar_type() == x.scalar_type() &&
              other.sizes() == x.sizes(),
          name, " must be like x, ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ", got ",
          other.scalar_type(), " ", other.sizes(), " on ", other.device());
}

RowKind row_kind(std::string_view name) {
  if (name == "plain") return RowKind::kPlain;
  if (name == "rms_norm") return RowKind::kRmsNorm;
  if (name == "silu_mul") return RowKind::kSiluMul;
  if (name == "layer_norm") return RowKind::kLayerNorm;
  if (name == "gelu_mul") return RowKind::kGeluMul;
  if (name == "gelu_tanh_mul") return RowKind::kGeluTanhMul;
  TORCH_CHECK_VALUE(false,
                    "kind must be plain, rms_norm, silu_mul, layer_norm, gelu_mul or "
                    "gelu_tanh_mul, got ",
                    name);
}

RowCode row_code(at::ScalarType dtype, bool has_zeros) {
  if (dtype == at::kChar) return has_zeros ? RowCode::kInt8WithZero : RowCode::kInt8;
  require(dtype == at::kFloat8_e4m3fn && !has_zeros,
          "rows are quantized to int8, or without zero points to float8_e4m3fn, got ", dtype);
  return RowCode::kFp8E4M3;
}

// Codes, scales, zero points, x + residual, and the rows in x's type.
using Quantized = std::tuple<at::Tensor, at::Tensor, Optional, Optional, Optional>;

// scale_of: "token", "asymmetric", "static" with a scale and perhaps a zero point, or "tensor", of
// plain rows, whose scale is fp32 [] and not one of each row. shared_bytes: what a block may take
// of its multiprocessor, or -1 for all it can have. padded: zeros fill rows of codes up to a
// multiple of 16 columns. left_out: the flags of find_outliers, of columns of plain rows that are
// taken as zeros. largest: number of symmetric int8.
Quantized quantize_rows_op(const at::Tensor& x, std::string_view kind, const Optional& other,
                           const Optional& gain, const Optional& bias, double epsilon,
                           std::string_view scale_of, const Optional& scale, at::ScalarType dtype,
                           bool rounds, int64_t shared_bytes, const Optional& zero, bool padded,
                           const Optional& left_out, double largest) {
  check_rows("x", x);
  const int64_t m = x.size(0), k = x.size(1);
  const bool of_tensor = scale_of == "tensor", is_static = scale_of == "static";
  require(of_tensor || is_static || scale_of == "token" || scale_of == "asymmetric",
          "scale_of must be token, asymmetric, static or tensor, got ", scale_of);
  RowArguments arguments{};
  arguments.kind = row_kind(kind);
  require(!zero || is_static, "a zero point goes with a static scale alone");
  const bool has_zeros = scale_of == "asymmetric" || zero.has_value();
  arguments.code = row_code(dtype, has_zeros);
  require(arguments.kind == RowKind::kPlain || arguments.code != RowCode::kFp8E4M3,
          "float8_e4m3fn is for plain rows, got ", kind);
  require(arguments.kind == RowKind::kPlain || !of_tensor,
          "the scale of a tensor is for plain rows, got ", kind);
  require(scale.has_value() == is_static, "a scale goes with static scales alone");
  if (scale) check("scale", *scale, x.device(), {}, at::kFloat);
  if (zero) check("zero", *zero, x.device(), {}, at::kInt);
  require(largest > 0 && largest <= 127, "largest must be above 0, and 127 at most, got ", largest);
  arguments.largest = static_cast<float>(largest);
  if (left_out) {
    require(arguments.kind == RowKind::kPlain && arguments.code == RowCode::kInt8,
            "columns are left out of plain rows to int8 without zero points alone");
    check("left_out", *left_out, x.device(), {ceil_div(k, kPieceColumns)}, at::kByte);
    arguments.left_out = left_out->const_data_ptr<uint8_t>();
  }
  arguments.type = float_type("x", x);
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.m = m;
  arguments.k = k;
  arguments.epsilon = static_cast<float>(epsilon);
  const DeviceScope scope(x);
  Optional zeros, total, rounded;
  require(is_gate(arguments.kind) ? other.has_value() : !other || is_norm(arguments.kind), kind,
          other ? " takes no other rows" : " needs the rows that the gate multiplies");
  if (other) {
    check_like(is_gate(arguments.kind) ? "up" : "residual", *other, x);
    arguments.other = other->const_data_ptr();
    arguments.other_stride = other->stride(0);
  }
  if (is_norm(arguments.kind) && other) {
    total = at::empty({m, k}, x.options());
    arguments.total = total->mutable_data_ptr();
  }
  require(!gain || is_norm(arguments.kind), "a gain goes with rms_norm and layer_norm alone");
  if (gain) {
    check("gain", *gain, x.device(), {k});
    arguments.gain = gain->const_data_ptr();
    arguments.gain_type = float_type("gain", *gain);
  }
  require(!bias || arguments.kind == RowKind::kLayerNorm, "a bias goes with layer_norm alone");
  if (bias) {
    check("bias", *bias, x.device(), {k});
    arguments.bias = bias->const_data_ptr();
    arguments.bias_type = float_type("bias", *bias);
  }
  require(!rounds || arguments.kind != RowKind::kPlain, "plain rows are not rounded");
  if (rounds) {
    rounded = at::empty({m, k}, x.options());
    arguments.rounded = rounded->mutable_data_ptr();
  }
  arguments.codes_stride = padded ? ceil_div(k, 16) * 16 : k;
  const at::Tensor codes = at::empty({m, arguments.codes_stride}, x.options().dtype(dtype));
  at::Tensor scales = at::empty({m}, x.options().dtype(at::kFloat));
  if (has_zeros) {
    zeros = at::empty({m}, x.options().dtype(at::kInt));
    arguments.zeros = zeros->mutable_data_ptr<int32_t>();
  }
  arguments.codes = codes.mutable_data_ptr();
  arguments.scales = scales.mutable_data_ptr<float>();
  if (scale) arguments.given_scale = scale->const_data_ptr<float>();
  if (zero) arguments.given_zero = zero->const_data_ptr<int32_t>();
  at::Tensor found;
  if (of_tensor) {
    found = scale_of_tensor(x, arguments.code, largest, scope);
    arguments.given_scale = found.const_data_ptr<float>();
  }
  const int64_t most = scope.facts().shared_bytes;
  arguments.shared_bytes = static_cast<int>(shared_bytes < 0 ? most : std::min(shared_bytes, most));
  succeed(quantize_rows(arguments, scope.stream()));
  return {codes, of_tensor ? found : scales, zeros, total, rounded};
}

// Flags, columns and their number. parts: of the rows, each of another block, or 0 for as many as
// the device wants.
std::tuple<at::Tensor, at::Tensor, at::Tensor> find_outliers_op(const at::Tensor& x,
                                                                double threshold, int64_t parts) {
  check_rows("x", x);
  require(x.size(1) > 0, "x must have columns, got shape ", x.sizes());
  require(threshold > 0, "threshold must be above 0, got ", threshold);
  const Outliers found = find_outliers(x, threshold, parts, DeviceScope(x));
  return {found.flags, found.columns, found.count};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(QKERNELS_LIBRARY, m) {
  m.def(
      "quantize_rows(Tensor x, str kind, Tensor? other, Tensor? gain, Tensor? bias, "
      "float epsilon, str scale_of, Tensor? scale, ScalarType dtype, bool rounds=False, "
      "int shared_bytes=-1, Tensor? zero=None, bool padded=False, Tensor? left_out=None, "
      "float largest=127.0) -> (Tensor, Tensor, Tensor?, Tensor?, Tensor?)");
  m.def("find_outliers(Tensor x, float threshold, int parts=0) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(QKERNELS_LIBRARY, QKERNELS_DISPATCH_KEY, m) {
  m.impl("quantize_rows", &quantize_rows_op);
  m.impl("find_outliers", &find_outliers_op);
}

}  // namespace qkernels::bindings
