#include "bindings/preparation.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>
#include <limits>

#include "integers.h"

namespace qkernels::bindings {

namespace {

constexpr double kLargestFloat8 = 448;

struct Quantized {
  at::Tensor values, scales;  // bf16 [M, K], fp32 [M]
};

at::Tensor scale_for(const at::Tensor& largest) {
  return at::where(largest == 0, at::ones_like(largest), largest / kLargestFloat8);
}

at::Tensor round_to_float8(const at::Tensor& scaled) {
  const at::Tensor clamped = scaled.clamp(-kLargestFloat8, kLargestFloat8);
  return clamped.to(at::kFloat8_e4m3fn).to(at::kBFloat16);
}

// The same operations as `reference.quantize_activations`, and so the same bits.
Quantized quantize(const at::Tensor& rows, const Buffers& buffers, Float8 float8) {
  const at::Tensor values = rows.to(at::kFloat);
  if (float8 == Float8::kPerToken) {
    const at::Tensor scale = scale_for(values.abs().amax(-1));
    return {round_to_float8(values / scale.unsqueeze(1)), scale};
  }
  if (float8 == Float8::kPerTensor) {
    const at::Tensor largest =
        rows.numel() > 0 ? rows.abs().amax().to(at::kFloat) : at::zeros({}, values.options());
    const at::Tensor scale = scale_for(largest);
    return {round_to_float8(values / scale), scale.expand({rows.size(0)}).contiguous()};
  }
  require(buffers.activation_scale != nullptr, "static activations need activation_scale");
  const at::Tensor& scale = *buffers.activation_scale;
  // A static scale knows nothing of a row: NaN and infinity, which saturate, are told here.
  const at::Tensor finite = rows.isfinite().all(-1);
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  return {round_to_float8(values / scale),
          at::where(finite, scale, at::full_like(scale, kNan)).contiguous()};
}

int64_t padded(int64_t size, int64_t multiple) { return ceil_div(size, multiple) * multiple; }

// `rows` [M, K] with zeros where groups are filled up, and behind the last.
at::Tensor pad(const at::Tensor& rows, const Preparation& wanted) {
  const int64_t m = rows.size(0), columns = padded(wanted.columns(), wanted.column_multiple);
  const int64_t whole = (wanted.k - 1) / wanted.group;
  const int64_t from = whole * wanted.group, to = whole * wanted.padded_group;
  at::Tensor out = at::zeros({m, columns}, rows.options());
  if (whole > 0) {
    out.narrow(1, 0, to)
        .view({m, whole, wanted.padded_group})
        .narrow(2, 0, wanted.group)
        .copy_(rows.narrow(1, 0, from).unflatten(1, {whole, wanted.group}));
  }
  out.narrow(1, to, wanted.k - from).copy_(rows.narrow(1, from, wanted.k - from));
  return out;
}

// How far apart the rows of x [..., k] are, or nothing where they do not lie in memory as rows.
std::optional<int64_t> stride_of_rows(const at::Tensor& x, int64_t k) {
  if (x.is_contiguous()) return k;
  if (x.dim() == 2 && (x.stride(1) == 1 || k <= 1)) return x.stride(0);
  return std::nullopt;
}

}  // namespace

void check(const Preparation& p) {
  require(p.k > 0, "k must be above 0, got ", p.k);
  require(p.group > 0 && p.padded_group >= p.group, "a group of ", p.group,
          " columns cannot be filled up to ", p.padded_group);
  require(p.padded_group == p.group || p.group < p.k, "one group of all columns is not filled up");
}

at::Tensor Rows::matrix() const {
  return tensor.dim() == 2 ? tensor : tensor.view({m, tensor.size(-1)});
}

Rows prepare(const at::Tensor& x, const Buffers& buffers, const Preparation& wanted) {
  const int64_t k = x.size(-1), m = k > 0 ? x.numel() / k : 0;
  const int64_t columns = padded(wanted.columns(), wanted.column_multiple);
  Rows rows{x, m, columns, columns, std::nullopt};
  const bool as_it_is = buffers.input_factor == nullptr && buffers.perm == nullptr &&
                        wanted.float8 == Float8::kNone && columns == wanted.k;
  if (!as_it_is || !stride_of_rows(x, k)) rows.tensor = x.reshape({m, k});
  if (buffers.input_factor != nullptr) {
    rows.tensor = (rows.tensor.to(at::kFloat) * *buffers.input_factor).to(x.scalar_type());
  }
  if (buffers.perm != nullptr) rows.tensor = rows.tensor.index_select(1, *buffers.perm);
  if (wanted.float8 != Float8::kNone) {
    Quantized quantized = quantize(rows.tensor, buffers, wanted.float8);
    rows.tensor = std::move(quantized.values);
    rows.scales = std::move(quantized.scales);
  }
  if (columns != wanted.k) rows.tensor = pad(rows.tensor, wanted);
  if (const auto stride = stride_of_rows(rows.tensor, columns)) {
    rows.stride = *stride;
  } else {
    rows.tensor = rows.tensor.contiguous();
  }
  const auto address = reinterpret_cast<uintptr_t>(rows.tensor.const_data_ptr());
  const auto aligned = [&](uintptr_t bytes) {
    return bytes % static_cast<uintptr_t>(wanted.row_bytes) == 0;
  };
  const auto row_bytes = static_cast<uintptr_t>(rows.stride * rows.tensor.element_size());
  if (!aligned(address) || (m > 1 && !aligned(row_bytes))) {
    rows.tensor = rows.tensor.clone(at::MemoryFormat::Contiguous);
    rows.stride = columns;
  }
  return rows;
}

c10::SmallVector<int64_t, 5> output_shape(const at::Tensor& x, int64_t n) {
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  return shape;
}

at::Tensor empty_output(const at::Tensor& x, int64_t n, at::ScalarType type) {
  return at::empty(output_shape(x, n), x.options().dtype(type));
}

}  // namespace qkernels::bindings
