// A weight in the fragment layout, run by the CUDA kernels; and those kernels as operators of their
// own, which tests call with a schedule.

#include "bindings/route.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <limits>
#include <memory>

#include "bindings/cuda/device.h"
#include "bindings/cuda/fragment.h"
#include "bindings/cuda/schedule_choice.h"
#include "bindings/preparation.h"
#include "cuda/weights/fragment.cuh"
#include "cuda/weights/pack.h"

namespace qkernels::bindings {

namespace {

void check_x(const at::Tensor& x, const at::Tensor& words, bool is_float = false) {
  require(x.device() == words.device(), "x is on ", x.device(), ", the weight on ", words.device());
  if (is_float) {
    require(x.scalar_type() == at::kFloat, "x must be fp32, got ", x.scalar_type());
  } else {
    require(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
            "x must be fp16 or bf16, got ", x.scalar_type());
  }
}

// Whether the weight's codes less their zero points are bf16 numbers, so that x of fp32 in three of
// them meets the weight itself.
bool multiplies_floats(const FragmentWeight& weight) {
  return weight.code != WeightCode::kTable4 &&
         (weight.zero_type == ZeroType::kNone || weight.zero_type == ZeroType::kInteger);
}

// Where rows go to experts: int32 [E], the row behind the last one of each.
using Ends = const at::Tensor*;

// Writes y [m, n] for rows of fp16 or bf16, padded to whole 16 bytes; y is of their type, or fp32
// for rows of bf16 where multiplies_floats() says so. With `ends`, `weight` is the
// first of the experts.
void multiply(const Rows& rows, const FragmentWeight& weight, const Optional& bias,
              const ScheduleChoice& choice, const at::Tensor& y, Ends ends = nullptr) {
  WeightOnlyArguments arguments{};
  arguments.weight = weight;
  arguments.bias_type = FloatType::kFloat;
  if (bias) {
    check("bias", *bias, rows.tensor.device(), {weight.n});
    arguments.bias_type = float_type("bias", *bias);
    arguments.bias = bias->const_data_ptr();
  }
  if (rows.m == 0) return;
  const DeviceScope scope(rows.tensor);
  WeightOnlyProblem problem{};
  problem.m = rows.m;
  problem.n = weight.n;
  problem.k = weight.k;
  problem.group_size = weight.group_size;
  problem.bits = code_bits(weight.code);
  problem.scale_bytes = size_of(weight.scale_type);
  problem.zero_bytes = size_of(weight.zero_type);
  problem.y_is_float = y.scalar_type() == at::kFloat;
  problem.experts = ends == nullptr ? 0 : ends->size(0);
  const WeightOnlyConfig config = choice.of(problem, scope.facts());
  const char* reason = why_not(problem, config);
  TORCH_CHECK_VALUE(reason == nullptr, reason, ": ", to_string(config));
  problem.m = rows.m;
  at::Tensor partials;
  if (const int64_t bytes = partial_bytes(problem, config); bytes > 0) {
    partials = at::empty({bytes / 4}, rows.tensor.options().dtype(at::kFloat));
    arguments.partials = partials.mutable_data_ptr<float>();
    arguments.counters = scope.counters(counter_bytes(problem, config) / 4);
  }
  at::Tensor plan;
  if (ends != nullptr) {
    plan = at::empty({plan_bytes(problem, config)}, rows.tensor.options().dtype(at::kByte));
    arguments.plan = plan.mutable_data_ptr();
    arguments.experts = problem.experts;
    arguments.ends = ends->const_data_ptr<int32_t>();
  }
  arguments.x = rows.tensor.const_data_ptr();
  arguments.x_stride = rows.stride;
  arguments.x_type = float_type("x", rows.tensor);
  arguments.y_type = float_type("y", y);
  arguments.y = y.mutable_data_ptr();
  arguments.m = rows.m;
  succeed(weight_only_mma(arguments, config, scope.stream()));
}

// The first of a stack of weights, each [E, ...], whose others lie behind it.
FragmentWeight first_expert(const FragmentShape& shape, const at::Tensor& ends,
                            const at::Tensor& words, const at::Tensor& scales,
                            const at::Tensor* zeros, const at::Tensor* table) {
  check("ends", ends, words.device(), {ends.size(0)}, at::kInt);
  const auto first = [&](const char* name, const at::Tensor& stack) {
    require(stack.dim() > 0 && stack.size(0) == ends.size(0) && stack.is_contiguous(), name,
            " must be contiguous, and of ", ends.size(0), " experts, got ", stack.sizes());
    return stack.select(0, 0);
  };
  const Optional first_zeros = zeros == nullptr ? std::nullopt : Optional(first("zeros", *zeros));
  return fragment_weight(shape, first("words", words), first("scales", scales),
                         pointer(first_zeros), table);
}

at::Tensor dequantized(const FragmentWeight& weight, const at::Tensor& words, at::ScalarType type) {
  require(type == at::kHalf || type == at::kBFloat16, "dtype must be fp16 or bf16, got ", type);
  const DeviceScope scope(words);
  at::Tensor out = at::empty({weight.n, weight.k}, words.options().dtype(type));
  succeed(dequantize(weight, out.mutable_data_ptr(), float_type("out", out), scope.stream()));
  return out;
}

class FragmentRoute : public Route {
 public:
  FragmentRoute(const FragmentShape& shape, Optional table, const Preparation& preparation,
                bool is_float = false)
      : shape_(shape), table_(std::move(table)), preparation_(preparation), is_float_(is_float) {}

  at::Tensor run(const Call& call) const final {
    const Buffers& buffers = call.buffers;
    const Rows rows = prepared(call.x, buffers);
    const FragmentWeight weight =
        fragment_weight(shape_, *buffers.words, *buffers.scales, buffers.zeros, pointer(table_));
    return run(call, rows, weight);
  }

 protected:
  Rows prepared(const at::Tensor& x, const Buffers& buffers) const {
    check_x(x, *buffers.words, is_float_);
    require(x.size(-1) == preparation_.k, "x must have shape [..., ", preparation_.k, "], got ",
            x.sizes());
    return prepare(x, buffers, preparation_);
  }

  // The first of the experts in stacks.
  FragmentWeight first_of(const Buffers& stacks, const at::Tensor& ends) const {
    return first_expert(shape_, ends, *stacks.words, *stacks.scales, stacks.zeros, pointer(table_));
  }

 private:
  virtual at::Tensor run(const Call& call, const Rows& rows,
                         const FragmentWeight& weight) const = 0;

  FragmentShape shape_;
  Optional table_;
  Preparation preparation_;
  bool is_float_;  // x is of fp32
};

// Codes are dequantized on their way to the tensor cores.
class FusedRoute final : public FragmentRoute {
 public:
  FusedRoute(const FragmentShape& shape, Optional table, const Preparation& preparation,
             int64_t schedule_m)
      : FragmentRoute(shape, std::move(table), preparation), schedule_m_(schedule_m) {}

  // An order of columns or a factor of each expert's own would have to meet its rows alone.
  bool takes_groups(const Buffers& stacks) const override {
    return stacks.perm == nullptr && stacks.input_factor == nullptr;
  }

  at::Tensor run_grouped(const GroupedCall& call) const override {
    const Rows rows = prepared(call.x, call.buffers);
    const FragmentWeight first = first_of(call.buffers, call.ends);
    at::Tensor y = empty_output(call.x, first.n, call.x.scalar_type());
    multiply(rows, first, std::nullopt, {schedule_m_, std::nullopt}, y, &call.ends);
    return y;
  }

 private:
  at::Tensor run(const Call& call, const Rows& rows, const FragmentWeight& weight) const override {
    at::Tensor y = empty_output(call.x, weight.n, call.x.scalar_type());
    multiply(rows, weight, call.bias, {schedule_m_, std::nullopt, &last_}, y);
    return y;
  }

  int64_t schedule_m_;
  mutable LastSchedule last_;
};

// The weight [n, k] in fp32, of integers with real zero points: what torch makes of it.
at::Tensor dense_floats(const FragmentWeight& weight, const Buffers& buffers) {
  const DeviceScope scope(*buffers.words);
  const int64_t n = weight.n, k = weight.k;
  at::Tensor codes = at::empty({n, k}, buffers.words->options().dtype(at::kByte));
  succeed(unpack_fragment(weight.words, codes.mutable_data_ptr<uint8_t>(), k, 0, n,
                          code_bits(weight.code), scope.stream()));
  // Of every column, from the rows of a tile in the order 0, 8, 1, 9, ...
  const at::Tensor groups =
      at::arange(k, codes.options().dtype(at::kLong)).div_(weight.group_size, "floor");
  const auto spread = [&](const at::Tensor& stored) {
    const at::Tensor rows = stored.to(at::kFloat).unflatten(1, {-1, 8, 2}).transpose(2, 3);
    return rows.flatten(1).narrow(1, 0, n).t().index_select(1, groups);
  };
  return (codes.to(at::kFloat) - spread(*buffers.zeros)) * spread(*buffers.scales);
}

// x of fp32 in three bf16 numbers, as three rows each.
class FloatRoute final : public FragmentRoute {
 public:
  FloatRoute(const FragmentShape& shape, const Preparation& preparation, int64_t schedule_m)
      : FragmentRoute(shape, std::nullopt, preparation, true), schedule_m_(schedule_m) {}

 private:
  at::Tensor run(const Call& call, const Rows& rows, const FragmentWeight& weight) const override {
    const Optional bias = call.bias ? Optional(call.bias->to(at::kFloat)) : std::nullopt;
    at::Tensor y;
    if (multiplies_floats(weight)) {
      const at::Tensor parts =
          at::empty({3 * rows.m, rows.k}, rows.tensor.options().dtype(at::kBFloat16));
      {
        const DeviceScope scope(parts);
        succeed(split_floats(rows.tensor.const_data_ptr<float>(), rows.stride, rows.m, rows.k,
                             parts.mutable_data_ptr(), scope.stream()));
      }
      const at::Tensor sums = at::empty({rows.m, 3, weight.n}, rows.tensor.options());
      multiply({parts, 3 * rows.m, rows.k, rows.k, std::nullopt}, weight, std::nullopt,
               {3 * schedule_m_, std::nullopt, &last_}, sums);
      y = sums.sum(1);
      if (bias) y += *bias;
    } else {
      const at::Tensor x = rows.matrix().narrow(1, 0, weight.k);
      y = at::linear(x, dense_floats(weight, call.buffers), bias);
    }
    return call.x.dim() == 2 ? y : y.view(output_shape(call.x, weight.n));
  }

  int64_t schedule_m_;
  mutable LastSchedule last_;
};

// The weight is dequantized to memory, and cuBLAS multiplies it.
class DenseRoute final : public FragmentRoute {
 public:
  using FragmentRoute::FragmentRoute;

 private:
  at::Tensor run(const Call& call, const Rows& rows, const FragmentWeight& weight) const override {
    const at::ScalarType type = call.x.scalar_type();
    const at::Tensor w = dequantized(weight, *call.buffers.words, type);
    const Optional bias = call.bias ? Optional(call.bias->to(type)) : std::nullopt;
    const at::Tensor y = at::linear(rows.matrix(), w, bias);
    return call.x.dim() == 2 ? y : y.view(output_shape(call.x, weight.n));
  }
};

// A route as a number, which qkernels._C adopts: that is another library where this one is the
// emulator's.
int64_t route_op(int64_t n, int64_t k, int64_t group, int64_t padded_group, std::string_view code,
                 const Optional& table, std::string_view kind, int64_t schedule_m) {
  require(kind == "fused" || kind == "dense" || kind == "float",
          "kind must be fused, dense or float, got ", kind);
  require(kind != "float" || !table, "fp32 x takes no table");
  Preparation preparation;
  preparation.k = k;
  preparation.group = group;
  preparation.padded_group = padded_group;
  if (kind != "dense") {
    preparation.column_multiple = 8;
    preparation.row_bytes = 16;
  }
  check(preparation);
  check_size(n, k);
  require(group >= k || padded_group <= kMostSize, "groups must be filled up to ", kMostSize,
          " columns at most, got ", padded_group);
  const FragmentShape shape = fragment_shape(n, preparation.columns(), padded_group, code);
  std::shared_ptr<Route> route;
  if (kind == "dense") {
    route = std::make_shared<DenseRoute>(shape, table, preparation);
  } else if (kind == "float") {
    route = std::make_shared<FloatRoute>(shape, preparation, schedule_m);
  } else {
    route = std::make_shared<FusedRoute>(shape, table, preparation, schedule_m);
  }
  return reinterpret_cast<int64_t>(new std::shared_ptr<Route>(std::move(route)));
}

// tokens, blocks, stages, unit and each_tile as given_schedule() takes them. With `ends`, there is
// a weight for each of its numbers.
at::Tensor weight_only_mma_op(const at::Tensor& x, const at::Tensor& words,
                              const at::Tensor& scales, const Optional& zeros,
                              const Optional& table, const Optional& bias, int64_t n, int64_t k,
                              int64_t group_size, std::string_view code, int64_t schedule_m,
                              int64_t tokens, int64_t blocks, int64_t stages, int64_t unit,
                              bool each_tile, const Optional& ends) {
  const FragmentShape shape = fragment_shape(n, k, group_size, code);
  const FragmentWeight weight =
      ends ? first_expert(shape, *ends, words, scales, pointer(zeros), pointer(table))
           : fragment_weight(shape, words, scales, pointer(zeros), pointer(table));
  check_x(x, words);
  const int64_t k_read = (k + 7) / 8 * 8;  // whole 16 bytes; beyond k, x is zero
  require(x.dim() == 2 && x.size(1) == k_read, "x must have shape [M, ", k_read, "], got ",
          x.sizes());
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  require(aligned && x.stride(1) == 1 && (x.stride(0) % 8 == 0 || x.size(0) < 2),
          "x must be contiguous along K, with rows aligned to 16 bytes, got strides ", x.strides(),
          aligned ? "" : " at an unaligned address");
  const ScheduleChoice choice = given_schedule(schedule_m, tokens, blocks, stages, unit, each_tile,
                                               least_unit(code_bits(weight.code)));
  at::Tensor y = empty_output(x, n, x.scalar_type());
  multiply({x, x.size(0), k_read, x.stride(0), std::nullopt}, weight, bias, choice, y,
           pointer(ends));
  return y;
}

at::Tensor dequantize_op(const at::Tensor& words, const at::Tensor& scales, const Optional& zeros,
                         const Optional& table, int64_t n, int64_t k, int64_t group_size,
                         std::string_view code, at::ScalarType dtype) {
  const FragmentWeight weight = fragment_weight(fragment_shape(n, k, group_size, code), words,
                                                scales, pointer(zeros), pointer(table));
  return dequantized(weight, words, dtype);
}

}  // namespace

TORCH_LIBRARY(QKERNELS_LIBRARY, m) {
  m.def(
      "weight_only_route(int n, int k, int group, int padded_group, str code, Tensor? table, "
      "str kind, int schedule_m) -> int",
      &route_op);
  m.def(
      "weight_only_mma(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? table, "
      "Tensor? bias, int n, int k, int group_size, str code, int schedule_m=0, int tokens=0, "
      "int blocks=1, int stages=4, int unit=0, bool each_tile=False, Tensor? ends=None) -> Tensor");
  m.def(
      "dequantize(Tensor words, Tensor scales, Tensor? zeros, Tensor? table, int n, int k, "
      "int group_size, str code, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(QKERNELS_LIBRARY, QKERNELS_DISPATCH_KEY, m) {
  m.impl("weight_only_mma", &weight_only_mma_op);
  m.impl("dequantize", &dequantize_op);
}

}  // namespace qkernels::bindings
