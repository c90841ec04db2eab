#include "bindings/cuda/fragment.h"

#include <algorithm>

#include "cuda/weights/fragment.cuh"

namespace qkernels::bindings {

namespace {

ZeroType zero_type(const at::Tensor& zeros) {
  switch (zeros.scalar_type()) {
    case at::kByte: return ZeroType::kInteger;
    case at::kHalf: return ZeroType::kHalf;
    case at::kBFloat16: return ZeroType::kBfloat16;
    case at::kFloat: return ZeroType::kFloat;
    default:
      TORCH_CHECK_VALUE(false, "zeros must be uint8, fp16, bf16 or fp32, got ",
                        zeros.scalar_type());
  }
}

WeightCode weight_code(std::string_view name) {
  if (name == "int2") return WeightCode::kInt2;
  if (name == "int3") return WeightCode::kInt3;
  if (name == "int4") return WeightCode::kInt4;
  if (name == "int8") return WeightCode::kInt8;
  if (name == "table4") return WeightCode::kTable4;
  if (name == "fp4") return WeightCode::kFp4E2M1;
  if (name == "fp8e4m3") return WeightCode::kFp8E4M3;
  if (name == "fp8e5m2") return WeightCode::kFp8E5M2;
  TORCH_CHECK_VALUE(
      false, "code must be int2, int3, int4, int8, table4, fp4, fp8e4m3 or fp8e5m2, got ", name);
}

}  // namespace

FloatType float_type(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf: return FloatType::kHalf;
    case at::kBFloat16: return FloatType::kBfloat16;
    case at::kFloat: return FloatType::kFloat;
    default:
      TORCH_CHECK_VALUE(false, name, " must be fp16, bf16 or fp32, got ", tensor.scalar_type());
  }
}

void check_size(int64_t n, int64_t k) {
  require(n > 0 && k > 0, "n and k must be above 0, got ", n, " and ", k);
  require(n <= kMostSize && k <= kMostSize && n * k <= kMostNumbers, "n and k must be ", kMostSize,
          " at most, and their product ", kMostNumbers, ", got ", n, " and ", k,
          ": cut the weight into parts");
}

void check_words(const at::Tensor& words, int64_t n, int64_t k, int bits) {
  check_size(n, k);
  require(words.scalar_type() == at::kInt, "words must be int32, got ", words.scalar_type());
  const int64_t row_step = words_rows(bits);
  check("words", words, words.device(),
        {padded_rows(n) / row_step, padded_columns(k, bits) * row_step * bits / 8 / kUnitBytes,
         kLanes, 4});
}

FragmentShape fragment_shape(int64_t n, int64_t k, int64_t group_size, std::string_view code) {
  check_size(n, k);
  require(group_size >= k || (group_size >= 16 && group_size % 16 == 0),
          "group_size must be a multiple of 16, or k or more, got ", group_size);
  return {n, k, std::min(group_size, k), weight_code(code)};
}

FragmentWeight fragment_weight(const FragmentShape& shape, const at::Tensor& words,
                               const at::Tensor& scales, const at::Tensor* zeros,
                               const at::Tensor* table) {
  const at::Device device = words.device();
  check_words(words, shape.n, shape.k, code_bits(shape.code));
  const int64_t groups = ceil_div(shape.k, shape.group_size), rows = padded_rows(shape.n);
  check("scales", scales, device, {groups, rows});
  FragmentWeight weight{};
  weight.zero_type = ZeroType::kNone;
  if (zeros != nullptr) {
    check("zeros", *zeros, device, {groups, rows});
    const bool has_zeros = shape.code == WeightCode::kInt2 || shape.code == WeightCode::kInt3 ||
                           shape.code == WeightCode::kInt4 || shape.code == WeightCode::kInt8;
    require(has_zeros, "only int2, int3, int4 and int8 codes take zeros");
    weight.zeros = zeros->const_data_ptr();
    weight.zero_type = zero_type(*zeros);
  }
  require((table != nullptr) == (shape.code == WeightCode::kTable4),
          "a table goes with table4 codes alone");
  if (table != nullptr) {
    check("table", *table, device, {16}, at::kFloat);
    weight.table = table->const_data_ptr<float>();
  }
  weight.words = words.const_data_ptr();
  weight.scales = scales.const_data_ptr();
  weight.scale_type = float_type("scales", scales);
  weight.n = shape.n;
  weight.k = shape.k;
  weight.group_size = shape.group_size;
  weight.code = shape.code;
  return weight;
}

}  // namespace qkernels::bindings
