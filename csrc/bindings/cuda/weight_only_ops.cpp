// The operators of the weight-only CUDA kernels: checks tensors, takes device and stream, calls.
//
// Compiled twice: for a GPU, as torch.ops.qkernels_cuda, and with the emulator, as
// torch.ops.qkernels_emulated, whose tensors are on the CPU.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "bindings/cuda/device.h"
#include "cuda/weight_only/weight_only.h"
#include "cuda/weights/fragment.cuh"
#include "cuda/weights/pack.h"

#if defined(QKERNELS_EMULATOR)
#define QKERNELS_LIBRARY qkernels_emulated
#define QKERNELS_DISPATCH_KEY CPU
#else
#define QKERNELS_LIBRARY qkernels_cuda
#define QKERNELS_DISPATCH_KEY CUDA
#endif

namespace qkernels::bindings {
namespace {

FloatType float_type(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf: return FloatType::kHalf;
    case at::kBFloat16: return FloatType::kBfloat16;
    case at::kFloat: return FloatType::kFloat;
    default:
      TORCH_CHECK_VALUE(false, name, " must be fp16, bf16 or fp32, got ", tensor.scalar_type());
  }
}

ZeroType zero_type(const std::optional<at::Tensor>& zeros) {
  if (!zeros) return ZeroType::kNone;
  switch (zeros->scalar_type()) {
    case at::kByte: return ZeroType::kInteger;
    case at::kHalf: return ZeroType::kHalf;
    case at::kBFloat16: return ZeroType::kBfloat16;
    case at::kFloat: return ZeroType::kFloat;
    default:
      TORCH_CHECK_VALUE(false, "zeros must be uint8, fp16, bf16 or fp32, got ",
                        zeros->scalar_type());
  }
}

WeightCode weight_code(std::string_view name) {
  if (name == "int4") return WeightCode::kInt4;
  if (name == "int8") return WeightCode::kInt8;
  if (name == "table4") return WeightCode::kTable4;
  if (name == "fp4") return WeightCode::kFp4E2M1;
  if (name == "fp8e4m3") return WeightCode::kFp8E4M3;
  if (name == "fp8e5m2") return WeightCode::kFp8E5M2;
  TORCH_CHECK_VALUE(false, "code must be int4, int8, table4, fp4, fp8e4m3 or fp8e5m2, got ", name);
}

void check(const char* name, const at::Tensor& tensor, const at::Tensor& words,
           at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.device() == words.device(), name, " is on ", tensor.device(),
                    ", the weight on ", words.device());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ",
                    tensor.strides());
}

void check_words(const at::Tensor& words, int64_t n, int64_t k, int bits) {
  TORCH_CHECK_VALUE(words.scalar_type() == at::kInt, "words must be int32, got ",
                    words.scalar_type());
  check("words", words, words,
        {padded_rows(n) / kTileRows, padded_columns(k) * kTileRows * bits / 8 / kUnitBytes, kLanes,
         4});
}

FragmentWeight fragment_weight(const at::Tensor& words, const at::Tensor& scales,
                               const std::optional<at::Tensor>& zeros,
                               const std::optional<at::Tensor>& table, int64_t n, int64_t k,
                               int64_t group_size, std::string_view code) {
  FragmentWeight weight;
  weight.code = weight_code(code);
  TORCH_CHECK_VALUE(n > 0 && k > 0, "n and k must be above 0, got ", n, " and ", k);
  TORCH_CHECK_VALUE(group_size >= k || (group_size >= 16 && group_size % 16 == 0),
                    "group_size must be a multiple of 16, or k or more, got ", group_size);
  check_words(words, n, k, code_bits(weight.code));
  const int64_t groups = ceil_div(k, group_size);
  check("scales", scales, words, {groups, padded_rows(n)});
  if (zeros) check("zeros", *zeros, words, {groups, padded_rows(n)});
  const bool has_zeros = weight.code == WeightCode::kInt4 || weight.code == WeightCode::kInt8;
  TORCH_CHECK_VALUE(!zeros || has_zeros, "only int4 and int8 codes take zeros, got ", code);
  TORCH_CHECK_VALUE(table.has_value() == (weight.code == WeightCode::kTable4),
                    "a table goes with table4 codes alone, got ", code);
  if (table) {
    check("table", *table, words, {16});
    TORCH_CHECK_VALUE(table->scalar_type() == at::kFloat, "table must be fp32, got ",
                      table->scalar_type());
  }
  weight.words = words.const_data_ptr();
  weight.scales = scales.const_data_ptr();
  weight.zeros = zeros ? zeros->const_data_ptr() : nullptr;
  weight.table = table ? table->const_data_ptr<float>() : nullptr;
  weight.n = n;
  weight.k = k;
  weight.group_size = group_size < k ? group_size : k;
  weight.scale_type = float_type("scales", scales);
  weight.zero_type = zero_type(zeros);
  return weight;
}

void succeed(const char* problem) { TORCH_CHECK(problem == nullptr, problem); }

// schedule_m: the rows that the schedule is chosen for; a fixed number of them makes a row's result
// independent of how many there are. tokens, split_k and stages: a schedule, where tokens is not 0.
at::Tensor weight_only_mma_op(const at::Tensor& x, const at::Tensor& words,
                              const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                              const std::optional<at::Tensor>& table,
                              const std::optional<at::Tensor>& bias, int64_t n, int64_t k,
                              int64_t group_size, std::string_view code, int64_t schedule_m,
                              int64_t tokens, int64_t split_k, int64_t stages) {
  WeightOnlyArguments arguments;
  arguments.weight = fragment_weight(words, scales, zeros, table, n, k, group_size, code);
  TORCH_CHECK_VALUE(x.device() == words.device(), "x is on ", x.device(), ", the weight on ",
                    words.device());
  const int64_t k_read = ceil_div(k, 8) * 8;  // whole 16 bytes; beyond k, x is zero
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == k_read, "x must have shape [M, ", k_read,
                    "], got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
                    "x must be fp16 or bf16, got ", x.scalar_type());
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  TORCH_CHECK_VALUE(aligned && x.stride(1) == 1 && (x.stride(0) % 8 == 0 || x.size(0) < 2),
                    "x must be contiguous along K, with rows aligned to 16 bytes, got strides ",
                    x.strides(), aligned ? "" : " at an unaligned address");
  const int64_t m = x.size(0);
  if (bias) {
    check("bias", *bias, words, {n});
    arguments.bias_type = float_type("bias", *bias);
  } else {
    arguments.bias_type = FloatType::kFloat;
  }
  const DeviceScope scope(x);
  at::Tensor y = at::empty({m, n}, x.options());
  if (m == 0) return y;

  WeightOnlyProblem problem;
  problem.m = schedule_m > 0 ? schedule_m : m;
  problem.n = n;
  problem.k = k;
  problem.group_size = arguments.weight.group_size;
  problem.bits = code_bits(arguments.weight.code);
  problem.scale_bytes = static_cast<int>(scales.element_size());
  problem.zero_bytes = zeros ? static_cast<int>(zeros->element_size()) : 0;
  problem.multiprocessors = scope.facts().multiprocessors;
  problem.shared_bytes = scope.facts().shared_bytes;
  WeightOnlyConfig config;
  if (tokens > 0) {
    config.tokens = static_cast<int>(tokens);
    config.split_k = static_cast<int>(split_k);
    config.stages = static_cast<int>(stages);
  } else {
    config = choose_config(problem);
  }
  const char* reason = why_not(problem, config);
  TORCH_CHECK_VALUE(reason == nullptr, reason, ": ", to_string(config));
  problem.m = m;
  arguments.partials = nullptr;
  arguments.counters = nullptr;
  DeviceScope::Scratch scratch;
  if (config.split_k > 1) {
    scratch = scope.scratch(x, partial_bytes(problem, config), counter_bytes(problem, config));
    arguments.partials = scratch.partials.mutable_data_ptr<float>();
    arguments.counters = reinterpret_cast<uint32_t*>(scratch.counters.mutable_data_ptr<int32_t>());
  }
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.bias = bias ? bias->const_data_ptr() : nullptr;
  arguments.y = y.mutable_data_ptr();
  arguments.m = m;
  arguments.x_type = float_type("x", x);
  succeed(weight_only_mma(arguments, config, scope.stream()));
  return y;
}

at::Tensor dequantize_op(const at::Tensor& words, const at::Tensor& scales,
                         const std::optional<at::Tensor>& zeros,
                         const std::optional<at::Tensor>& table, int64_t n, int64_t k,
                         int64_t group_size, std::string_view code, at::ScalarType dtype) {
  const FragmentWeight weight =
      fragment_weight(words, scales, zeros, table, n, k, group_size, code);
  TORCH_CHECK_VALUE(dtype == at::kHalf || dtype == at::kBFloat16,
                    "dtype must be fp16 or bf16, got ", dtype);
  const DeviceScope scope(words);
  at::Tensor out = at::empty({n, k}, words.options().dtype(dtype));
  succeed(dequantize(weight, out.mutable_data_ptr(), float_type("out", out), scope.stream()));
  return out;
}

// Packs rows [first_row, first_row + rows) of an [n, k] weight into `words`, from `source` as
// `kind` says: "codes" (uint8 [rows, k]), "awq" or "gptq" (the int32 words of the whole weight).
void pack_op(const at::Tensor& source, const std::optional<at::Tensor>& perm, at::Tensor words,
             int64_t n, int64_t k, int64_t first_row, int64_t rows, int64_t bits,
             std::string_view kind) {
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  TORCH_CHECK_VALUE(first_row >= 0 && first_row % kRowMultiple == 0 && rows >= 0 &&
                        first_row + rows <= n &&
                        (first_row + rows == n || rows % kRowMultiple == 0),
                    "rows ", first_row, " to ", first_row + rows, " of ", n,
                    " do not begin and end at a multiple of ", kRowMultiple);
  check_words(words, n, k, static_cast<int>(bits));
  PackArguments arguments;
  if (kind == "codes") {
    arguments.kind = CodeSource::kCodes;
    check("codes", source, words, {rows, k});
    TORCH_CHECK_VALUE(source.scalar_type() == at::kByte, "codes must be uint8, got ",
                      source.scalar_type());
  } else {
    TORCH_CHECK_VALUE(kind == "awq" || kind == "gptq", "kind must be codes, awq or gptq, got ",
                      kind);
    TORCH_CHECK_VALUE(source.scalar_type() == at::kInt, kind, " words must be int32, got ",
                      source.scalar_type());
    if (kind == "awq") {
      arguments.kind = CodeSource::kAwq;
      TORCH_CHECK_VALUE(bits == 4 && n % 8 == 0,
                        "awq words hold 4 bits and N a multiple of 8, got ", bits,
                        " bits and N = ", n);
      check("awq words", source, words, {k, n / 8});
    } else {
      arguments.kind = CodeSource::kGptq;
      TORCH_CHECK_VALUE(k * bits % 32 == 0, "gptq words hold a whole number of K, got ", k);
      check("gptq words", source, words, {k * bits / 32, n});
    }
  }
  if (perm) {
    check("perm", *perm, words, {k});
    TORCH_CHECK_VALUE(perm->scalar_type() == at::kInt, "perm must be int32, got ",
                      perm->scalar_type());
  }
  const DeviceScope scope(words);
  arguments.source = source.const_data_ptr();
  arguments.perm = perm ? perm->const_data_ptr<int32_t>() : nullptr;
  arguments.words = words.mutable_data_ptr();
  arguments.n = n;
  arguments.k = k;
  arguments.first_row = first_row;
  arguments.rows = rows;
  arguments.bits = static_cast<int>(bits);
  succeed(pack_fragment(arguments, scope.stream()));
}

at::Tensor unpack_op(const at::Tensor& words, int64_t n, int64_t k, int64_t first_row, int64_t rows,
                     int64_t bits) {
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  TORCH_CHECK_VALUE(first_row >= 0 && rows >= 0 && first_row + rows <= n, "rows ", first_row,
                    " to ", first_row + rows, " are not in 0 to ", n);
  check_words(words, n, k, static_cast<int>(bits));
  const DeviceScope scope(words);
  at::Tensor codes = at::empty({rows, k}, words.options().dtype(at::kByte));
  succeed(unpack_fragment(words.const_data_ptr(), codes.mutable_data_ptr<uint8_t>(), k, first_row,
                          rows, static_cast<int>(bits), scope.stream()));
  return codes;
}

// The schedule that weight_only_mma takes for a problem: tokens, split_k, stages, and the bytes of
// shared memory of a block. zero_bytes is 0 without zero points.
std::tuple<int64_t, int64_t, int64_t, int64_t> choose_config_op(
    int64_t m, int64_t n, int64_t k, int64_t group_size, int64_t bits, int64_t scale_bytes,
    int64_t zero_bytes, int64_t multiprocessors, int64_t shared) {
  WeightOnlyProblem problem;
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.group_size = group_size;
  problem.bits = static_cast<int>(bits);
  problem.scale_bytes = static_cast<int>(scale_bytes);
  problem.zero_bytes = static_cast<int>(zero_bytes);
  problem.multiprocessors = static_cast<int>(multiprocessors);
  problem.shared_bytes = static_cast<int>(shared);
  const WeightOnlyConfig config = choose_config(problem);
  return {config.tokens, config.split_k, config.stages, shared_bytes(problem, config)};
}

}  // namespace

TORCH_LIBRARY(QKERNELS_LIBRARY, m) {
  m.def(
      "weight_only_mma(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? table, "
      "Tensor? bias, int n, int k, int group_size, str code, int schedule_m=0, int tokens=0, "
      "int split_k=1, int stages=4) -> Tensor");
  m.def(
      "dequantize(Tensor words, Tensor scales, Tensor? zeros, Tensor? table, int n, int k, "
      "int group_size, str code, ScalarType dtype) -> Tensor");
  m.def(
      "pack_fragment(Tensor source, Tensor? perm, Tensor(a!) words, int n, int k, int first_row, "
      "int rows, int bits, str kind) -> ()");
  m.def(
      "choose_config(int m, int n, int k, int group_size, int bits, int scale_bytes, "
      "int zero_bytes, int multiprocessors, int shared_bytes) -> (int, int, int, int)",
      &choose_config_op);
  m.def("unpack_fragment(Tensor words, int n, int k, int first_row, int rows, int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(QKERNELS_LIBRARY, QKERNELS_DISPATCH_KEY, m) {
  m.impl("weight_only_mma", &weight_only_mma_op);
  m.impl("dequantize", &dequantize_op);
  m.impl("pack_fragment", &pack_op);
  m.impl("unpack_fragment", &unpack_op);
}

}  // namespace qkernels::bindings
