// A weight in the layout of integer products, run by int8_mma; and that kernel as an operator of
// its own, which tests call with a schedule.

#include "cuda/int8/int8.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "bindings/cuda/device.h"
#include "bindings/cuda/fragment.h"
#include "bindings/cuda/rows.h"
#include "bindings/cuda/schedule_choice.h"
#include "bindings/preparation.h"
#include "bindings/route.h"
#include "cuda/int8/outliers.h"
#include "cuda/weights/fragment.cuh"

namespace qkernels::bindings {

namespace {

constexpr int64_t kXMultiple = 16;  // bytes that rows of int8 x are whole numbers of
constexpr double kLargestInt8 = 127;

int64_t padded_x(int64_t columns) { return ceil_div(columns, kXMultiple) * kXMultiple; }

// What a weight is, but for its tensors. `filled`: columns of a group that are not padding.
struct Int8Shape {
  int64_t n, k, group_size, filled;
  int bits;
};

// Throws ValueError for what the kernel does not take.
Int8Shape int8_shape(int64_t n, int64_t k, int64_t group_size, int64_t filled, int64_t bits) {
  check_size(n, k);
  require(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  require(group_size >= k || (group_size > 0 && group_size % 32 == 0),
          "group_size must be a multiple of 32, or k or more, got ", group_size);
  require(filled > 0 && filled <= group_size, "a group of ", group_size,
          " columns has 1 to all of them filled, got ", filled);
  const int64_t size = std::min(group_size, k);
  return {n, k, size, std::min(filled, size), static_cast<int>(bits)};
}

Int8Weight int8_weight(const Int8Shape& shape, const at::Tensor& words, const at::Tensor& scales,
                       const at::Tensor* zeros, const at::Tensor* channel_scales,
                       bool x_has_zeros) {
  const at::Device device = words.device();
  check_words(words, shape.n, shape.k, shape.bits);
  const int64_t groups = ceil_div(shape.k, shape.group_size), rows = padded_rows(shape.n);
  require(shape.bits == 4 || (zeros == nullptr && channel_scales == nullptr),
          "zeros and two levels of scales are for 4 bits");
  Int8Weight weight{};
  check("scales", scales, device, {groups, rows});
  if (channel_scales != nullptr) {
    check("channel_scales", *channel_scales, device, {shape.n}, at::kFloat);
    require(scales.scalar_type() == at::kByte,
            "scales must be uint8 where there are channel_scales, got ", scales.scalar_type());
    weight.channel_scales = channel_scales->const_data_ptr<float>();
  } else {
    weight.scale_type = float_type("scales", scales);
  }
  if (zeros != nullptr) {
    check("zeros", *zeros, device, {groups, rows}, at::kByte);
    weight.zeros = zeros->const_data_ptr<uint8_t>();
  }
  weight.words = words.const_data_ptr();
  weight.scales = scales.const_data_ptr();
  weight.n = shape.n;
  weight.k = shape.k;
  weight.group_size = shape.group_size;
  weight.filled = shape.filled;
  weight.bits = shape.bits;
  const char* reason = why_not_exact(weight, x_has_zeros);
  require(reason == nullptr, reason, ", got K of ", shape.k, " in groups of ", shape.group_size);
  return weight;
}

// x quantized: int8 [m, stride], whose columns behind a weight's are zeros.
struct Int8Rows {
  at::Tensor codes;
  int64_t m, stride;
  at::Tensor scales;  // fp32 [m]
  Optional zeros;     // int32 [m]
  Optional addend;    // fp32 [m, n], what columns with outliers add to y
};

// Fills y, of `type` or, where there is a reader, of int8.
void multiply(const Int8Rows& rows, const Int8Weight& weight, const Optional& bias,
              const ScheduleChoice& choice, at::ScalarType type, const at::Tensor& y,
              const Int8Reader* reader) {
  const at::Device device = rows.codes.device();
  Int8Arguments arguments{};
  arguments.weight = weight;
  arguments.bias_type = FloatType::kFloat;
  if (bias) {
    check("bias", *bias, device, {weight.n});
    arguments.bias_type = float_type("bias", *bias);
    arguments.bias = bias->const_data_ptr();
  }
  require(type == at::kHalf || type == at::kBFloat16 || type == at::kFloat,
          "y must be fp16, bf16 or fp32, got ", type);
  arguments.y_type = type == at::kHalf       ? FloatType::kHalf
                     : type == at::kBFloat16 ? FloatType::kBfloat16
                                             : FloatType::kFloat;
  if (rows.m == 0) return;
  const DeviceScope scope(rows.codes);
  WeightOnlyProblem problem = int8_problem(weight, rows.m);
  const WeightOnlyConfig config = choice.of(problem, scope.facts());
  const char* reason = why_not(problem, config);
  TORCH_CHECK_VALUE(reason == nullptr, reason, ": ", to_string(config));
  problem.m = rows.m;
  at::Tensor partials;
  if (const int64_t bytes = partial_bytes(problem, config); bytes > 0) {
    partials = at::empty({bytes / 4}, rows.codes.options().dtype(at::kInt));
    arguments.partials = partials.mutable_data_ptr();
    arguments.counters = scope.counters(counter_bytes(problem, config) / 4);
  }
  arguments.x = rows.codes.const_data_ptr<int8_t>();
  arguments.x_stride = rows.stride;
  arguments.x_scales = rows.scales.const_data_ptr<float>();
  if (rows.zeros) arguments.x_zeros = rows.zeros->const_data_ptr<int32_t>();
  if (rows.addend) arguments.addend = rows.addend->const_data_ptr<float>();
  arguments.y = y.mutable_data_ptr();
  arguments.reader = reader;
  arguments.m = rows.m;
  succeed(int8_mma(arguments, config, scope.stream()));
}

// Of row_scales as the kernel wants them: the scale, until it puts NaN there.
Int8Reader reader_of(const at::Tensor& scale, const Optional& zero, bool relu,
                     const at::Tensor& row_scales, at::Device device, int64_t m) {
  check("the scale of y", scale, device, {}, at::kFloat);
  if (zero) check("the zero point of y", *zero, device, {}, at::kInt);
  require(row_scales.device() == device && row_scales.scalar_type() == at::kFloat &&
              row_scales.numel() == m && row_scales.is_contiguous(),
          "row_scales must be ", m, " numbers of fp32 side by side, got ", row_scales.sizes());
  row_scales.fill_(scale);
  return {scale.const_data_ptr<float>(), zero ? zero->const_data_ptr<int32_t>() : nullptr, relu,
          row_scales.mutable_data_ptr<float>()};
}

// fp32 [M, N]: the listed columns of x times those of the weight.
at::Tensor outlier_product(const at::Tensor& x, const Outliers& found, const Int8Weight& weight,
                           const DeviceScope& scope) {
  at::Tensor y = at::empty({x.size(0), weight.n}, x.options().dtype(at::kFloat));
  OutlierProduct product{};
  product.weight = weight;
  product.x = x.const_data_ptr();
  product.x_type = float_type("x", x);
  product.x_stride = x.stride(0);
  product.m = x.size(0);
  product.columns = found.columns.const_data_ptr<int32_t>();
  product.count = found.count.const_data_ptr<int32_t>();
  product.y = y.mutable_data_ptr<float>();
  succeed(multiply_outliers(product, scope.stream()));
  return y;
}

enum class XScale { kToken, kTensor, kStatic };

class Int8Route final : public Route {
 public:
  Int8Route(const Int8Shape& shape, const Preparation& preparation, bool two_levels, XScale scale,
            bool has_zeros, double largest, double outliers, int64_t schedule_m)
      : shape_(shape),
        floats_(preparation),
        integers_(preparation),
        whole_(preparation),
        two_levels_(two_levels),
        scale_(scale),
        has_zeros_(has_zeros),
        largest_(largest),
        outliers_(outliers),
        schedule_m_(schedule_m) {
    integers_.column_multiple = kXMultiple;
    integers_.row_bytes = kXMultiple;
    whole_.group = whole_.padded_group = whole_.k;
  }

  at::Tensor run(const Call& call) const override {
    const Buffers& buffers = call.buffers;
    const at::Tensor& words = *buffers.words;
    require(call.x.device() == words.device(), "x is on ", call.x.device(), ", the weight on ",
            words.device());
    require(call.x.size(-1) == floats_.k, "x must have shape [..., ", floats_.k, "], got ",
            call.x.sizes());
    require((buffers.channel_scales != nullptr) == two_levels_,
            "channel_scales go with two levels of scales");
    const Int8Weight weight = int8_weight(shape_, words, *buffers.scales, buffers.zeros,
                                          buffers.channel_scales, has_zeros_);
    const DeviceScope scope(words);
    const Int8Rows rows =
        call.row_scales == nullptr ? quantized(call, weight, scope) : given(call, *call.row_scales);
    const bool gives_int8 = call.reader != nullptr;
    at::Tensor y = empty_output(call.x, weight.n, gives_int8 ? at::kChar : call.y_type);
    Int8Reader reader{};
    if (gives_int8) {
      reader = reader_of(call.reader->scale, call.reader->zero, call.reader->relu,
                         call.reader->row_scales, words.device(), rows.m);
    }
    multiply(rows, weight, call.bias, {schedule_m_, std::nullopt, &last_}, call.y_type, y,
             gives_int8 ? &reader : nullptr);
    return y;
  }

  // A scale of all rows is not known of a part of them, zero points of rows have no place in a
  // call, and columns with outliers none among integers.
  bool takes_quantized() const override {
    if (outliers_ > 0 || largest_ < kLargestInt8) return false;
    return scale_ == XScale::kStatic || (scale_ == XScale::kToken && !has_zeros_);
  }

  bool gives_int8() const override { return true; }

 private:
  Int8Rows quantized(const Call& call, const Int8Weight& weight, const DeviceScope& scope) const {
    // Zeros of x become its zero point: groups of it are filled up behind that.
    const bool fills_codes = has_zeros_ && floats_.columns() != floats_.k;
    const Rows rows = prepare(call.x, call.buffers, fills_codes ? whole_ : floats_);
    const at::TensorOptions options = call.x.options();
    Int8Rows out;
    out.m = rows.m;
    out.stride = fills_codes ? rows.k : padded_x(rows.k);
    out.codes = at::empty({rows.m, out.stride}, options.dtype(at::kChar));
    out.scales = at::empty({rows.m}, options.dtype(at::kFloat));
    if (has_zeros_) out.zeros = at::empty({rows.m}, options.dtype(at::kInt));
    RowArguments arguments{};
    arguments.kind = RowKind::kPlain;
    arguments.code = has_zeros_ ? RowCode::kInt8WithZero : RowCode::kInt8;
    arguments.type = float_type("x", rows.tensor);
    arguments.largest = static_cast<float>(largest_);
    if (rows.m == 0) return out;
    std::optional<Outliers> outliers;
    if (outliers_ > 0) {
      outliers = find_outliers(rows.matrix(), outliers_, 0, scope);
      arguments.left_out = outliers->flags.const_data_ptr<uint8_t>();
    }
    at::Tensor found;
    if (scale_ == XScale::kTensor) {
      found = scale_of_tensor(rows.matrix(), arguments.code, largest_, scope);
      arguments.given_scale = found.const_data_ptr<float>();
    } else if (scale_ == XScale::kStatic) {
      arguments.given_scale = static_number(call.buffers.activation_scale, "activation_scale", call)
                                  .const_data_ptr<float>();
      if (has_zeros_) {
        arguments.given_zero = static_zero(call).const_data_ptr<int32_t>();
      }
    }
    arguments.x = rows.tensor.const_data_ptr();
    arguments.x_stride = rows.stride;
    arguments.m = rows.m;
    arguments.k = rows.k;
    arguments.codes = out.codes.mutable_data_ptr();
    arguments.codes_stride = out.stride;
    arguments.scales = out.scales.mutable_data_ptr<float>();
    if (out.zeros) arguments.zeros = out.zeros->mutable_data_ptr<int32_t>();
    arguments.shared_bytes = scope.facts().shared_bytes;
    succeed(quantize_rows(arguments, scope.stream()));
    if (outliers) out.addend = outlier_product(rows.matrix(), *outliers, weight, scope);
    if (fills_codes) {
      const Rows filled = prepare(out.codes, Buffers{}, integers_);
      out.codes = filled.tensor;
      out.stride = filled.stride;
    }
    return out;
  }

  Int8Rows given(const Call& call, const at::Tensor& row_scales) const {
    require(takes_quantized() && call.x.scalar_type() == at::kChar,
            "row_scales go with int8 x, of its own scale or a static one, got ",
            call.x.scalar_type());
    const Rows rows = prepare(call.x, call.buffers, integers_);
    Int8Rows out;
    out.codes = rows.tensor;
    out.m = rows.m;
    out.stride = rows.stride;
    require(row_scales.device() == call.x.device() && row_scales.numel() == rows.m &&
                row_scales.scalar_type() == at::kFloat,
            "row_scales must be ", rows.m, " numbers of fp32, got ", row_scales.scalar_type(), " ",
            row_scales.sizes());
    out.scales = row_scales.contiguous();
    if (has_zeros_) out.zeros = static_zero(call).expand({rows.m}).contiguous();
    return out;
  }

  static const at::Tensor& static_number(const at::Tensor* number, const char* name,
                                         const Call& call) {
    require(number != nullptr, "static activations need ", name);
    check(name, *number, call.x.device(), {});
    return *number;
  }

  static const at::Tensor& static_zero(const Call& call) {
    const at::Tensor& zero = static_number(call.buffers.activation_zero, "activation_zero", call);
    require(zero.scalar_type() == at::kInt, "activation_zero must be int32, got ",
            zero.scalar_type());
    return zero;
  }

  Int8Shape shape_;
  Preparation floats_, integers_, whole_;  // of x in floats, in int8 already, and without groups
  bool two_levels_;
  XScale scale_;
  bool has_zeros_;
  double largest_;   // number of symmetric integers
  double outliers_;  // the threshold above which columns of x are kept apart, or 0
  int64_t schedule_m_;
  mutable LastSchedule last_;
};

// A route as a number, which qkernels._C adopts. activation: int8 or, of -7..7, int4. granularity:
// token, tensor or static, and of these tokenasym and staticasym with zero points.
int64_t route_op(int64_t n, int64_t k, int64_t group, int64_t padded_group, int64_t bits,
                 bool two_levels, std::string_view activation, std::string_view granularity,
                 int64_t schedule_m, double outliers) {
  require(activation == "int8" || activation == "int4", "activation must be int8 or int4, got ",
          activation);
  const bool has_zeros = granularity == "tokenasym" || granularity == "staticasym";
  const bool of_token = granularity == "token" || granularity == "tokenasym";
  const bool is_static = granularity == "static" || granularity == "staticasym";
  require(of_token || is_static || granularity == "tensor",
          "granularity must be token, tensor, static, tokenasym or staticasym, got ", granularity);
  const double largest = activation == "int8" ? kLargestInt8 : 7;
  require(!has_zeros || largest == kLargestInt8, "zero points are for int8 activations");
  require(
      outliers == 0 || (outliers > 0 && granularity == "token" && schedule_m == 0),
      "outliers are above 0, and go with scales of tokens and a schedule for their number, got ",
      outliers, " with ", granularity);
  Preparation preparation;
  preparation.k = k;
  preparation.group = group;
  preparation.padded_group = padded_group;
  check(preparation);
  check_size(n, k);
  require(group >= k || padded_group <= kMostSize, "groups must be filled up to ", kMostSize,
          " columns at most, got ", padded_group);
  const Int8Shape shape = int8_shape(n, preparation.columns(), padded_group, group, bits);
  const XScale scale = of_token ? XScale::kToken : is_static ? XScale::kStatic : XScale::kTensor;
  auto route = std::make_shared<Int8Route>(shape, preparation, two_levels, scale, has_zeros,
                                           largest, outliers, schedule_m);
  return reinterpret_cast<int64_t>(new std::shared_ptr<Route>(std::move(route)));
}

// int8 x [M, k up to a multiple of 16], zero behind k, with a scale and perhaps a zero point for
// each row. A schedule as given_schedule() takes it; `filled` columns of each group, or all where
// it is 0, are not padding. With a scale of y, what its reader makes of y as rounded to dtype, and
// row_scales for it. addend fp32 [M, n] is added to y before it is rounded.
at::Tensor int8_mma_op(const at::Tensor& x, const at::Tensor& x_scale, const Optional& x_zero,
                       const at::Tensor& words, const at::Tensor& scales, const Optional& zeros,
                       const Optional& channel_scales, const Optional& bias, int64_t n, int64_t k,
                       int64_t group_size, int64_t bits, at::ScalarType dtype, int64_t schedule_m,
                       int64_t tokens, int64_t blocks, int64_t stages, int64_t unit, bool each_tile,
                       int64_t filled, const Optional& y_scale, const Optional& y_zero, bool relu,
                       const Optional& row_scales, const Optional& addend) {
  const Int8Shape shape = int8_shape(n, k, group_size, filled == 0 ? group_size : filled, bits);
  const Int8Weight weight = int8_weight(shape, words, scales, pointer(zeros),
                                        pointer(channel_scales), x_zero.has_value());
  const at::Device device = words.device();
  require(x.device() == device, "x is on ", x.device(), ", the weight on ", device);
  require(x.scalar_type() == at::kChar, "x must be int8, got ", x.scalar_type());
  require(x.dim() == 2 && x.size(1) == padded_x(k), "x must have shape [M, ", padded_x(k),
          "], got ", x.sizes());
  const int64_t m = x.size(0);
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kXMultiple == 0;
  require(aligned && x.stride(1) == 1 && (x.stride(0) % kXMultiple == 0 || m < 2),
          "x must be contiguous along K, with rows aligned to 16 bytes, got strides ", x.strides(),
          aligned ? "" : " at an unaligned address");
  check("x_scale", x_scale, device, {m}, at::kFloat);
  if (x_zero) check("x_zero", *x_zero, device, {m}, at::kInt);
  if (addend) check("addend", *addend, device, {m, n}, at::kFloat);
  require(y_scale.has_value() == row_scales.has_value() && (y_scale || !(y_zero || relu)),
          "row_scales, a zero point of y and relu go with a scale of y");
  const ScheduleChoice choice =
      given_schedule(schedule_m, tokens, blocks, stages, unit, each_tile, least_unit(shape.bits));
  Int8Reader reader{};
  if (y_scale) reader = reader_of(*y_scale, y_zero, relu, *row_scales, device, m);
  at::Tensor y = empty_output(x, n, y_scale ? at::kChar : dtype);
  multiply({x, m, x.stride(0), x_scale, x_zero, addend}, weight, bias, choice, dtype, y,
           y_scale ? &reader : nullptr);
  return y;
}

// Of x [M, k] and the columns that find_outliers lists: fp32 [M, n].
at::Tensor multiply_outliers_op(const at::Tensor& x, const at::Tensor& columns,
                                const at::Tensor& count, const at::Tensor& words,
                                const at::Tensor& scales, const Optional& zeros,
                                const Optional& channel_scales, int64_t n, int64_t k,
                                int64_t group_size, int64_t bits) {
  const Int8Weight weight = int8_weight(int8_shape(n, k, group_size, group_size, bits), words,
                                        scales, pointer(zeros), pointer(channel_scales), false);
  const at::Device device = words.device();
  require(x.device() == device, "x is on ", x.device(), ", the weight on ", device);
  require(x.dim() == 2 && x.size(1) == k && (x.stride(1) == 1 || k == 1), "x must have shape [M, ",
          k, "] and adjacent columns, got ", x.sizes(), " with strides ", x.strides());
  check("columns", columns, device, {k}, at::kInt);
  check("count", count, device, {1}, at::kInt);
  return outlier_product(x, {at::Tensor(), columns, count}, weight, DeviceScope(words));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(QKERNELS_LIBRARY, m) {
  m.def(
      "int8_route(int n, int k, int group, int padded_group, int bits, bool two_levels, "
      "str activation, str granularity, int schedule_m, float outliers=0.0) -> int",
      &route_op);
  m.def(
      "int8_mma(Tensor x, Tensor x_scale, Tensor? x_zero, Tensor words, Tensor scales, "
      "Tensor? zeros, Tensor? channel_scales, Tensor? bias, int n, int k, int group_size, int "
      "bits, "
      "ScalarType dtype, int schedule_m=0, int tokens=0, int blocks=1, int stages=4, int unit=0, "
      "bool each_tile=False, int filled=0, Tensor? y_scale=None, Tensor? y_zero=None, "
      "bool relu=False, Tensor(a!)? row_scales=None, Tensor? addend=None) -> Tensor");
  m.def(
      "multiply_outliers(Tensor x, Tensor columns, Tensor count, Tensor words, Tensor scales, "
      "Tensor? zeros, Tensor? channel_scales, int n, int k, int group_size, int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(QKERNELS_LIBRARY, QKERNELS_DISPATCH_KEY, m) {
  m.impl("int8_mma", &int8_mma_op);
  m.impl("multiply_outliers", &multiply_outliers_op);
}

}  // namespace qkernels::bindings
