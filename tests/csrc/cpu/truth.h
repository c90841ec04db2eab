// What the kernels of csrc/cpu must give, from the formulas alone: sums in double, one element
// after the other. It shares no code with what it judges.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/linear.h"
#include "numbers.h"

namespace truth {

using qkernels::cpu::FloatArguments;
using qkernels::cpu::Int8Arguments;
using qkernels::cpu::RowSource;
using qkernels::cpu::ScaleOf;
using qkernels::cpu::Schedule;

// y [m][n] before it is rounded to its type: any number within `slack`, or this one where that is
// 0.
struct Product {
  std::vector<double> y, slack;
};

// Of floats. `codes` [n][k] are those in the words of the weight. `exact_sums` says that no sum of
// this call needs rounding.
Product float_product(const FloatArguments& call, const uint8_t* codes, const Schedule& schedule,
                      bool exact_sums);
// Of int8, where each rounding is prescribed.
Product int8_product(const Int8Arguments& call, const uint8_t* codes);

// What is wrong with `y` [m][n], or nothing.
std::string complaint(const Product& product, const void* y, FloatType type, int64_t n);

// Who reads y, of a type, as int8 numbers of `least` to 127.
struct Reader {
  float scale;
  int32_t zero, least;
  bool relu;
};

// What is wrong with these numbers [m][n], and with what is said of each row, or nothing.
std::string complaint(const Product& product, const Reader& reader, const int8_t* numbers,
                      const float* row_scales, FloatType type, int64_t n);

// The rows of a source as int8, with a scale each, and where they are asymmetric a zero point.
struct Rows {
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> zeros;  // or none
};

Rows quantized_rows(const RowSource& source, int64_t m, ScaleOf scale_of, const float* given,
                    bool asymmetric);

// What is wrong with rows that were quantized, or nothing. Bit for bit where they are quantized as
// they come, as each step is rounded, or as they stand in `source.y`; where they are normalized or
// gated in fp32, within roundings of that.
std::string complaint(const RowSource& source, int64_t m, ScaleOf scale_of, const float* given,
                      const Rows& got);
// The same of x + residual.
std::string complaint_about_sum(const RowSource& source, int64_t m, const void* sum);
// Of the rows in `source.y`: bit for bit where each step is rounded; of norms and gates, the
// nearest number or one beside it.
std::string complaint_about_rounded(const RowSource& source, int64_t m);

}  // namespace truth
