// A weight in the vnni layout, run by the CPU kernels.

#include "bindings/route.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/cpu/cpu.h"
#include "bindings/preparation.h"
#include "cpu/linear.h"
#include "cpu/outliers.h"

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

cpu::Code code_of(std::string_view name) {
  if (name == "int4") return cpu::Code::kInt4;
  if (name == "table4") return cpu::Code::kTable4;
  if (name == "int8") return cpu::Code::kInt8;
  if (name == "fp8e4m3") return cpu::Code::kFp8E4M3;
  if (name == "fp8e5m2") return cpu::Code::kFp8E5M2;
  TORCH_CHECK_VALUE(false, "code must be int4, table4, int8, fp8e4m3 or fp8e5m2, got ", name);
}

cpu::ScaleOf scale_of(std::string_view granularity) {
  if (granularity == "token") return cpu::ScaleOf::kRow;
  if (granularity == "tensor") return cpu::ScaleOf::kTensor;
  if (granularity == "static") return cpu::ScaleOf::kGiven;
  TORCH_CHECK_VALUE(false, "granularity must be token, tensor or static, got ", granularity);
}

Float8 float8_of(cpu::ScaleOf scale) {
  if (scale == cpu::ScaleOf::kRow) return Float8::kPerToken;
  return scale == cpu::ScaleOf::kTensor ? Float8::kPerTensor : Float8::kStatic;
}

class CpuRoute final : public Route {
 public:
  CpuRoute(int64_t n, int64_t k, int64_t group, int64_t padded_group, const std::string& code,
           double implied_zero, const Optional& table, const Optional& nested_table,
           const std::string& isa, bool tiles, bool rounds_weights, bool pairs,
           const std::string& activation, const std::string& granularity)
      : table_(table), nested_table_(nested_table) {
    preparation_.k = k;
    preparation_.group = group;
    preparation_.padded_group = padded_group;
    check(preparation_);
    require(n > 0, "n must be above 0, got ", n);
    weight_.n = n;
    weight_.k = preparation_.columns();
    weight_.group = std::min(padded_group, weight_.k);
    weight_.filled = std::min(group, k);
    require(padded_group >= weight_.k || padded_group % 16 == 0,
            "padded_group must be a multiple of 16, or all columns, got ", padded_group);
    weight_.code = code_of(code);
    weight_.implied_zero = static_cast<float>(implied_zero);
    weight_.prepare();
    require(table.has_value() == (weight_.code == cpu::Code::kTable4),
            "a table goes with table4 codes alone, got ", code);
    if (table) {
      check("table", *table, at::kCPU, {16}, at::kFloat);
      weight_.table = table->const_data_ptr<float>();
    }
    if (nested_table) {
      check("nested_table", *nested_table, at::kCPU, {256}, at::kFloat);
      weight_.nested_table = nested_table->const_data_ptr<float>();
    }
    schedule_ = {isa_here(isa), tiles, rounds_weights, pairs};
    require(tiles || !rounds_weights || cpu::rounds_on_vectors(schedule_.isa),
            "only tiles and products of pairs of bf16 round weights, which ", isa, " has none of");
    require(
        !pairs || (!tiles && !rounds_weights && cpu::is_nibble(weight_.code) &&
                   cpu::has_pairs(schedule_.isa)),
        "pairs are for codes of up to 4 bits, without tiles and rounded weights, on avx512 with "
        "bf16, got ",
        code, " on ", isa);
    require(activation == "none" || activation == "int8" || activation == "fp8",
            "activation must be none, int8 or fp8, got ", activation);
    scale_of_ = scale_of(granularity);
    integers_ = activation == "int8";
    require(!tiles || (integers_ ? cpu::has_int8_tiles(schedule_.isa)
                                 : cpu::has_float_tiles(schedule_.isa)),
            "tiles need amx, or for int8 products avx512 or neon_i8mm, got ", isa);
    if (activation == "fp8") preparation_.float8 = float8_of(scale_of_);
    require(!integers_ || weight_.code == cpu::Code::kInt4 || weight_.code == cpu::Code::kInt8,
            "int8 products take int4 and int8 codes alone, got ", code);
  }

  at::Tensor run(const Call& call) const override {
    require(call.x.device().is_cpu(), "x must be on the CPU, got ", call.x.device());
    require(call.x.size(-1) == preparation_.k, "x must have shape [..., ", preparation_.k,
            "], got ", call.x.sizes());
    try {
      return integers_ ? integers(call) : floats(call);
    } catch (const std::bad_alloc&) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "no memory for the work of ", torch_pool().threads,
                       " threads on x of shape ", call.x.sizes());
    }
  }

  bool takes_quantized() const override { return integers_ && scale_of_ != cpu::ScaleOf::kTensor; }

  bool gives_int8() const override { return true; }

  bool fills_y() const override { return true; }

  // Columns of the weight, counted without those that pad groups: fp32 [C, N], as it dequantizes.
  at::Tensor columns(const Buffers& buffers, const std::vector<int64_t>& wanted) const {
    require(integers_, "columns are taken of weights of int8 products");
    const auto count = static_cast<int64_t>(wanted.size());
    at::Tensor out = at::empty({count, weight_.n}, at::kFloat);
    cpu::take_columns(weight(buffers), wanted.data(), count, out.mutable_data_ptr<float>(),
                      torch_pool());
    return out;
  }

 private:
  // y for x of fp16, bf16 or fp32.
  at::Tensor floats(const Call& call) const {
    const Rows rows = prepare(call.x, call.buffers, preparation_);
    cpu::FloatArguments arguments{};
    arguments.weight = weight(call.buffers);
    at::Tensor ranges;  // alive while the kernel reads them
    if (call.buffers.block_ranges != nullptr) ranges = take_blocks(call.buffers, arguments.weight);
    require(call.buffers.channel_scales == nullptr, "two-level scales are for int8 products");
    const bool whole = !schedule_.tiles || schedule_.rounds_weights || weight_.groups() == 1;
    require(whole || cpu::fits_float_tiles(weight_.group),
            "tiles need groups of a multiple of 32, got ", weight_.group);
    arguments.m = rows.m;
    arguments.k = rows.k;
    arguments.x = rows.tensor.const_data_ptr();
    arguments.x_type = float_type("x", rows.tensor.scalar_type());
    arguments.x_stride = rows.stride;
    const bool is_bf16 = arguments.x_type == cpu::FloatType::kBf16 && call.y_type == at::kBFloat16;
    require(!(schedule_.rounds_weights || schedule_.pairs) || is_bf16,
            "rounded weights and pairs go with x and y of bf16, got ", rows.tensor.scalar_type(),
            " and ", call.y_type);
    at::Tensor y = empty_output(call);
    arguments.out = output(y, call);
    if (rows.scales) arguments.out.row_scales = rows.scales->const_data_ptr<float>();
    cpu::linear_float(arguments, schedule_, torch_pool());
    return y;
  }

  // y for such x, quantized to int8 on the way; or for int8 x with its row scales.
  at::Tensor integers(const Call& call) const {
    const Rows rows = prepare(call.x, call.buffers, preparation_);
    cpu::Int8Arguments arguments{};
    arguments.weight = weight(call.buffers);
    const at::Tensor* zeros = call.buffers.zeros;
    require(zeros == nullptr || zeros->scalar_type() == at::kByte,
            "zeros must be uint8 for int8 products");
    require(call.buffers.channel_scales == nullptr || weight_.code == cpu::Code::kInt4,
            "two-level scales are for codes of up to 4 bits");
    const bool whole = arguments.weight.sums_are_integers();
    require(!schedule_.tiles || whole || cpu::fits_int8_tiles(schedule_.isa, weight_.group),
            "tiles need one scale a row, or two levels of them, or groups that these take, got ",
            weight_.group);
    arguments.m = rows.m;
    arguments.k = rows.k;
    at::Tensor y = empty_output(call);
    arguments.out = output(y, call);
    const at::ScalarType type = rows.tensor.scalar_type();
    require((call.row_scales != nullptr) == (type == at::kChar),
            "row_scales go with int8 x alone, got x of ", type);
    at::Tensor scales;  // alive while the kernel reads them
    if (call.row_scales != nullptr) {
      require(call.row_scales->numel() == rows.m && call.row_scales->scalar_type() == at::kFloat,
              "row_scales must be ", rows.m, " numbers of fp32, got ",
              call.row_scales->scalar_type(), " ", call.row_scales->sizes());
      scales = call.row_scales->contiguous();
      arguments.out.row_scales = scales.const_data_ptr<float>();
      arguments.quantized = rows.tensor.const_data_ptr<int8_t>();
      arguments.quantized_stride = rows.stride;
    } else {
      arguments.source.x = rows.tensor.const_data_ptr();
      arguments.source.type = float_type("x", type);
      arguments.source.k = rows.k;
      arguments.source.x_stride = rows.stride;
      arguments.scale_of = scale_of_;
      if (scale_of_ == cpu::ScaleOf::kGiven) {
        const at::Tensor* scale = call.buffers.activation_scale;
        require(scale != nullptr, "static activations need activation_scale");
        check("activation_scale", *scale, at::kCPU, {}, at::kFloat);
        arguments.given_scale = scale->const_data_ptr<float>();
      }
    }
    cpu::linear_int8(arguments, schedule_, torch_pool());
    return y;
  }

  cpu::Weight weight(const Buffers& buffers) const {
    cpu::Weight weight = weight_;
    const int64_t panels = weight.panels(), groups = weight.groups();
    check("words", *buffers.words, at::kCPU,
          {panels, weight.columns() / weight.step_columns(), cpu::kLanes}, at::kInt);
    check("scales", *buffers.scales, at::kCPU, {panels, groups, cpu::kLanes});
    weight.words = reinterpret_cast<const uint32_t*>(buffers.words->const_data_ptr<int32_t>());
    weight.scales = buffers.scales->const_data_ptr();
    weight.scale_type = group_type("scales", buffers.scales->scalar_type());
    if (buffers.zeros != nullptr) {
      check("zeros", *buffers.zeros, at::kCPU, {panels, groups, cpu::kLanes});
      weight.zeros = buffers.zeros->const_data_ptr();
      weight.zero_type = group_type("zeros", buffers.zeros->scalar_type());
    }
    if (buffers.offsets != nullptr) {
      require(!integers_ && !schedule_.tiles && buffers.zeros != nullptr,
              "offsets go with zeros, and with products of floats without tiles");
      check("offsets", *buffers.offsets, at::kCPU, {panels, groups, cpu::kLanes});
      weight.offsets = buffers.offsets->const_data_ptr();
      weight.offset_type = group_type("offsets", buffers.offsets->scalar_type());
      require(weight.offset_type != cpu::GroupType::kUint8, "offsets must be floats");
    }
    if (buffers.channel_scales != nullptr) {
      check("channel_scales", *buffers.channel_scales, at::kCPU, {weight.n}, at::kFloat);
      weight.channel_scales = buffers.channel_scales->const_data_ptr<float>();
    }
    if (buffers.nested_absmax != nullptr) {
      require(buffers.nested_offset != nullptr && nested_table_.has_value(),
              "nested scales need all parts");
      check("nested_absmax", *buffers.nested_absmax, at::kCPU, {ceil_div(weight.n * groups, 256)},
            at::kFloat);
      check("nested_offset", *buffers.nested_offset, at::kCPU, {}, at::kFloat);
      weight.scale_type = cpu::GroupType::kNested;
      weight.nested_absmax = buffers.nested_absmax->const_data_ptr<float>();
      weight.nested_offset = *buffers.nested_offset->const_data_ptr<float>();
    }
    const bool integer_scales = weight.scale_type == cpu::GroupType::kUint8;
    const bool blocks = buffers.block_ranges != nullptr;
    require(integer_scales == (buffers.channel_scales != nullptr || blocks),
            "uint8 scales need channel_scales, block_ranges or nested ones");
    require(!blocks || (!integers_ && buffers.zeros == nullptr && buffers.offsets == nullptr &&
                        buffers.channel_scales == nullptr),
            "block_ranges go without zeros, offsets and channel_scales, for products of floats");
    return weight;
  }

  // Gives `weight` scales and zero points of 4 bits; they are read from the result.
  static at::Tensor take_blocks(const Buffers& buffers, cpu::Weight& weight) {
    check("block_ranges", *buffers.block_ranges, at::kCPU, {weight.panels(), weight.groups(), 4});
    require(at::isFloatingType(buffers.block_ranges->scalar_type()), "block_ranges must be floats");
    at::Tensor ranges = buffers.block_ranges->to(at::kFloat);
    weight.scale_type = weight.zero_type = cpu::GroupType::kBlocks;
    weight.block_ranges = ranges.const_data_ptr<float>();
    return ranges;
  }

  // y, or its int8 numbers.
  at::Tensor empty_output(const Call& call) const {
    if (call.y != nullptr) return *call.y;
    const at::ScalarType type = call.reader == nullptr ? call.y_type : at::kChar;
    return bindings::empty_output(call.x, weight_.n, type);
  }

  cpu::Output output(const at::Tensor& y, const Call& call) const {
    cpu::Output out{};
    out.y_type = float_type("y", call.y_type);
    if (call.reader == nullptr) {
      out.y = y.mutable_data_ptr();
    } else {
      out.int8.values = y.mutable_data_ptr<int8_t>();
      out.int8.row_scales = call.reader->row_scales.mutable_data_ptr<float>();
      out.int8.scale = *call.reader->scale.const_data_ptr<float>();
      const Optional& zero = call.reader->zero;
      out.int8.zero = zero ? *zero->const_data_ptr<int32_t>() : 0;
      out.int8.relu = call.reader->relu;
      out.int8.limit(zero ? -128 : -127);
    }
    if (call.bias) {
      check("bias", *call.bias, at::kCPU, {weight_.n});
      out.bias = call.bias->const_data_ptr();
      out.bias_type = float_type("bias", call.bias->scalar_type());
    }
    return out;
  }

  Preparation preparation_;
  cpu::Weight weight_{};
  cpu::Schedule schedule_{};
  cpu::ScaleOf scale_of_ = cpu::ScaleOf::kRow;
  bool integers_ = false;
  Optional table_, nested_table_;  // keep alive what weight_ points to
};

// Columns of x that hold a magnitude of a threshold or more are multiplied as they are with those
// of the weight, in fp32, and the others as integers: LLM.int8(). y is rounded once.
class OutlierRoute final : public Route {
 public:
  // Of the others: for rows of x from so many on, to so many, or -1 without an end.
  using Part = std::tuple<int64_t, int64_t, std::shared_ptr<CpuRoute>>;

  // largest: number of integers, 127 or, with 4 bits, 7. each_row: columns are found in each row
  // alone.
  OutlierRoute(int64_t k, double threshold, double largest, bool each_row, std::vector<Part> parts)
      : threshold_(static_cast<float>(threshold)),
        largest_(largest),
        each_row_(each_row),
        parts_(std::move(parts)) {
    require(threshold > 0, "threshold must be above 0, got ", threshold);
    require(!parts_.empty(), "the other columns need a kernel");
    order_.k = order_.group = order_.padded_group = k;
    check(order_);
  }

  at::Tensor run(const Call& call) const override {
    require(call.row_scales == nullptr, "x is quantized, and columns of it are kept in 16 bits");
    require(call.x.size(-1) == order_.k, "x must have shape [..., ", order_.k, "], got ",
            call.x.sizes());
    const at::Tensor x = prepare(call.x, call.buffers, order_).matrix();
    Buffers buffers = call.buffers;  // what is done to x is done
    buffers.perm = buffers.input_factor = nullptr;
    at::Tensor y;
    if (each_row_ && x.size(0) > 1) {
      std::vector<at::Tensor> rows;
      for (int64_t m = 0; m < x.size(0); ++m) {
        rows.push_back(multiply(x.narrow(0, m, 1), buffers, call));
      }
      y = at::cat(rows);
    } else {
      y = multiply(x, buffers, call);
    }
    return call.x.dim() == 2 ? y : y.view(output_shape(call.x, y.size(1)));
  }

 private:
  // y [M, N] for x [M, K].
  at::Tensor multiply(const at::Tensor& x, const Buffers& buffers, const Call& call) const {
    const std::vector<int64_t> found = outliers(x);
    if (found.empty()) return integers(x, buffers, call, call.y_type);
    const at::Tensor columns = at::tensor(found, at::kLong);
    at::Tensor y = integers(x.index_fill(1, columns, 0), buffers, call, at::kFloat);
    const at::Tensor weight = part(x.size(0)).columns(buffers, found);
    const at::Tensor kept = x.index_select(1, columns).to(at::kFloat);
    cpu::add_columns(kept.const_data_ptr<float>(), weight.const_data_ptr<float>(), y.size(0),
                     y.size(1), kept.size(1), y.mutable_data_ptr<float>(), torch_pool());
    return y.to(call.y_type);
  }

  std::vector<int64_t> outliers(const at::Tensor& x) const {
    cpu::OutlierSearch search{};
    search.x = x.const_data_ptr();
    search.type = float_type("x", x.scalar_type());
    search.m = x.size(0);
    search.k = x.size(1);
    search.x_stride = x.stride(0);
    // Rounded to x's type, as torch compares.
    search.threshold = x.scalar_type() == at::kHalf       ? at::Half(threshold_).x
                       : x.scalar_type() == at::kBFloat16 ? at::BFloat16(threshold_).x
                                                          : c10::bit_cast<uint32_t>(threshold_);
    return cpu::find_outliers(search, torch_pool());
  }

  at::Tensor integers(const at::Tensor& x, const Buffers& buffers, const Call& call,
                      at::ScalarType type) const {
    const CpuRoute& route = part(x.size(0));
    constexpr double kLargest = 127;
    if (largest_ == kLargest) return route.run({x, nullptr, buffers, call.list, call.bias, type});
    // As `reference.quantize_rows` does it; nothing here is NaN or infinity.
    const at::Tensor top = x.to(at::kFloat).abs().amax(-1);
    const at::Tensor scales = at::where(top == 0, at::ones_like(top), top / largest_);
    const at::Tensor codes =
        (x.to(at::kFloat) / scales.unsqueeze(1)).round_().clamp_(-largest_, largest_).to(at::kChar);
    return route.run({codes, &scales, buffers, call.list, call.bias, type});
  }

  const CpuRoute& part(int64_t m) const {
    for (const auto& [least, most, route] : parts_) {
      if (m >= least && (most < 0 || m <= most)) return *route;
    }
    return *std::get<2>(parts_.back());
  }

  float threshold_;
  double largest_;
  bool each_row_;
  std::vector<Part> parts_;
  Preparation order_;
};

}  // namespace

cpu::GroupType group_type(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kHalf: return cpu::GroupType::kFp16;
    case at::kBFloat16: return cpu::GroupType::kBf16;
    case at::kFloat: return cpu::GroupType::kFp32;
    case at::kByte: return cpu::GroupType::kUint8;
    default: TORCH_CHECK_VALUE(false, name, " must be uint8, fp16, bf16 or fp32, got ", type);
  }
}

void register_cpu_routes(py::module_& m) {
  py::class_<CpuRoute, Route, std::shared_ptr<CpuRoute>>(
      m, "CpuRoute", "A weight in the vnni layout, less its tensors.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, const std::string&, double, const Optional&,
                    const Optional&, const std::string&, bool, bool, bool, const std::string&,
                    const std::string&>(),
           py::kw_only(), py::arg("n"), py::arg("k"), py::arg("group"), py::arg("padded_group"),
           py::arg("code"), py::arg("implied_zero"), py::arg("table"), py::arg("nested_table"),
           py::arg("isa"), py::arg("tiles"), py::arg("rounds_weights"), py::arg("pairs"),
           py::arg("activation"), py::arg("granularity"));
  py::class_<OutlierRoute, Route, std::shared_ptr<OutlierRoute>>(
      m, "CpuOutlierRoute", "Columns of x with outliers beside routes for the others.")
      .def(py::init<int64_t, double, double, bool, std::vector<OutlierRoute::Part>>(),
           py::kw_only(), py::arg("k"), py::arg("threshold"), py::arg("largest"),
           py::arg("each_row"), py::arg("parts"));
}

}  // namespace qkernels::bindings
