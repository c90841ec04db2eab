#include "truth.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace truth {

using qkernels::cpu::Code;
using qkernels::cpu::GroupType;
using qkernels::cpu::kLanes;
using qkernels::cpu::Output;
using qkernels::cpu::Weight;

namespace {

// How far a sum in fp32 may be off, in parts of the sum of all magnitudes: some roundings of 2^-24.
constexpr double kSumSlack = 0x1p-20;

template <class... Parts>
std::string text(const char* format, Parts... parts) {
  char out[200];
  std::snprintf(out, sizeof out, format, parts...);
  return out;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

int bf16_terms(FloatType type) {
  return type == FloatType::kBf16 ? 1 : type == FloatType::kFp16 ? 2 : 3;
}

// `value` as the sum of bf16 numbers, each the nearest to what the others leave.
double in_bf16_terms(double value, int terms) {
  double sum = 0;
  for (int i = 0; i < terms; ++i) sum += nearest(value - sum, kBf16);
  return sum;
}

double group_number(const void* array, GroupType type, int64_t index) {
  switch (type) {
    case GroupType::kFp16: return number_at(array, FloatType::kFp16, index);
    case GroupType::kBf16: return number_at(array, FloatType::kBf16, index);
    case GroupType::kFp32: return number_at(array, FloatType::kFp32, index);
    default: return static_cast<const uint8_t*>(array)[index];
  }
}

// Where a row's scale and zero point of a group lie.
int64_t place(const Weight& weight, int64_t row, int64_t g) {
  return (row / kLanes * weight.groups() + g) * kLanes + row % kLanes;
}

float in_block(const Weight& weight, int64_t row, int64_t g, int code, int first) {
  const float* range = weight.block_ranges + (row / kLanes * weight.groups() + g) * 4 + first;
  const float product = static_cast<float>(code) * range[0];
  return product + range[1];
}

float scale_at(const Weight& weight, int64_t row, int64_t g) {
  const int64_t at = place(weight, row, g);
  if (weight.scale_type == GroupType::kBlocks) {
    return in_block(weight, row, g, static_cast<const uint8_t*>(weight.scales)[at] % 16, 0);
  }
  if (weight.scale_type != GroupType::kNested) {
    return static_cast<float>(group_number(weight.scales, weight.scale_type, at));
  }
  const uint8_t code = static_cast<const uint8_t*>(weight.scales)[at];
  const int64_t block = (row * weight.groups() + g) / 256;
  return weight.nested_table[code] * weight.nested_absmax[block] + weight.nested_offset;
}

double zero_at(const Weight& weight, int64_t row, int64_t g) {
  if (weight.zero_type == GroupType::kNone) return weight.implied_zero;
  if (weight.zero_type == GroupType::kBlocks) {
    const uint8_t both = static_cast<const uint8_t*>(weight.scales)[place(weight, row, g)];
    return in_block(weight, row, g, both / 16, 2);
  }
  return group_number(weight.zeros, weight.zero_type, place(weight, row, g));
}

double offset_at(const Weight& weight, int64_t row, int64_t g) {
  if (!weight.has_offsets()) return 0;
  return group_number(weight.offsets, weight.offset_type, place(weight, row, g));
}

double code_number(const Weight& weight, uint8_t code) {
  switch (weight.code) {
    case Code::kTable4: return weight.table[code];
    case Code::kFp8E4M3: return number_of(code, kE4M3);
    case Code::kFp8E5M2: return number_of(code, kE5M2);
    default: return code;
  }
}

double bias_at(const Output& out, int64_t n) {
  return out.bias == nullptr ? 0 : number_at(out.bias, out.bias_type, n);
}

// Whether stored zero points leave nothing of a group of integers.
bool is_zero_group(const Weight& weight, const uint8_t* row_codes, int64_t row, int64_t g,
                   int64_t k) {
  const bool integers = weight.code == Code::kInt4 || weight.code == Code::kInt8;
  if (!integers || !weight.has_zeros() || weight.has_offsets()) return false;
  const int64_t first = g * weight.group, last = first + weight.codes_of_group(g);
  const double zero = zero_at(weight, row, g);
  return std::all_of(row_codes + first, row_codes + std::min(last, k),
                     [&](uint8_t code) { return code == zero; });
}

// A row of the weight, and the magnitudes that a kernel may add up in place of its numbers: it may
// take zero points off the sums alone, but for groups of which they leave nothing.
struct WeightRow {
  std::vector<double> numbers, magnitudes;

  WeightRow(const Weight& weight, const uint8_t* codes, int64_t row, int64_t k,
            const Schedule& schedule, int table_terms) {
    for (int64_t c = 0; c < k; ++c) {
      const int64_t g = c / weight.group;
      const float scale = scale_at(weight, row, g);
      const double zero = zero_at(weight, row, g);
      double code = code_number(weight, codes[row * k + c]);
      if (table_terms > 0) code = in_bf16_terms(code, table_terms);
      const double size = is_zero_group(weight, codes + row * k, row, g, k) ? 0 : 1;
      const double offset = offset_at(weight, row, g);
      if (schedule.rounds_weights) {
        numbers.push_back(nearest(static_cast<float>(code - zero) * scale, kBf16));
        magnitudes.push_back(std::fabs(numbers.back()));
      } else {
        numbers.push_back((code - zero) * scale + offset);
        // Both are taken less the middle of the codes.
        const double middle = weight.implied_zero;
        const double apart = std::fabs(code - middle) + std::fabs(zero - middle);
        magnitudes.push_back(apart * std::fabs(scale) * size + std::fabs(offset));
      }
    }
  }
};

}  // namespace

Product float_product(const FloatArguments& call, const uint8_t* codes, const Schedule& schedule,
                      bool exact_sums) {
  const Weight& weight = call.weight;
  const int64_t n = weight.n, k = call.k, m = call.m;
  // Tiles and pairs hold the numbers of a table in bf16.
  const bool exact = (schedule.tiles && !schedule.rounds_weights) || schedule.pairs;
  const bool splits = exact && weight.code == Code::kTable4;
  const int y_terms = bf16_terms(call.out.y_type), table_terms = splits ? y_terms : 0;
  double slack = kSumSlack;
  // Two terms each, without the product of the smaller ones.
  if (splits && std::max(bf16_terms(call.x_type), y_terms) == 2) slack += 0x1p-17;
  std::vector<double> x;
  for (int64_t i = 0; i < m * k; ++i) {
    x.push_back(number_at(call.x, call.x_type, i / k * call.x_stride + i % k));
  }
  Product product;
  product.y.resize(static_cast<size_t>(m * n));
  product.slack.resize(product.y.size());
  for (int64_t row = 0; row < n; ++row) {
    const WeightRow w(weight, codes, row, k, schedule, table_terms);
    for (int64_t i = 0; i < m; ++i) {
      const double* factors = x.data() + i * k;
      double sum = 0, magnitude = 0;
      for (size_t c = 0; c < w.numbers.size(); ++c) {
        sum += w.numbers[c] * factors[c];
        magnitude += w.magnitudes[c] * std::fabs(factors[c]);
      }
      const double row_scale = call.out.row_scales == nullptr ? 1 : call.out.row_scales[i];
      const double y = row_scale * sum + bias_at(call.out, row);
      const auto at = static_cast<size_t>(i * n + row);
      product.y[at] = y;
      if (exact_sums) continue;
      product.slack[at] = row_scale * magnitude * slack + std::fabs(y) * kSumSlack;
    }
  }
  return product;
}

Product int8_product(const Int8Arguments& call, const uint8_t* codes) {
  const Weight& weight = call.weight;
  const int64_t n = weight.n, k = call.k, m = call.m;
  Rows rows;
  if (call.quantized == nullptr) {
    rows = quantized_rows(call.source, m, call.scale_of, call.given_scale, false);
  } else {
    for (int64_t i = 0; i < m; ++i) {
      const int8_t* row = call.quantized + i * call.quantized_stride;
      rows.values.insert(rows.values.end(), row, row + k);
      rows.scales.push_back(call.out.row_scales[i]);
    }
  }
  Product product;
  for (int64_t i = 0; i < m; ++i) {
    const int8_t* x = rows.values.data() + i * k;
    const float row_scale = rows.scales[static_cast<size_t>(i)];
    for (int64_t row = 0; row < n; ++row) {
      int64_t total = 0;
      float floats = 0;
      for (int64_t g = 0; g < weight.groups(); ++g) {
        const auto zero = static_cast<int64_t>(zero_at(weight, row, g));
        int64_t sum = 0;
        for (int64_t c = g * weight.group; c < std::min(k, (g + 1) * weight.group); ++c) {
          sum += (codes[row * k + c] - zero) * x[c];
        }
        const float scale = scale_at(weight, row, g);
        total += weight.channel_scales == nullptr ? sum : static_cast<int64_t>(scale) * sum;
        floats += scale * static_cast<float>(sum);
      }
      float y = row_scale * floats;
      if (weight.sums_are_integers()) {
        const bool two_levels = weight.channel_scales != nullptr;
        const float scale = two_levels ? weight.channel_scales[row] : scale_at(weight, row, 0);
        y = row_scale * scale * static_cast<float>(total);
      }
      if (call.out.bias != nullptr) y += static_cast<float>(bias_at(call.out, row));
      product.y.push_back(y);
      product.slack.push_back(0);
    }
  }
  return product;
}

std::string complaint(const Product& product, const void* y, FloatType type, int64_t n) {
  const Layout& layout = layout_of(type);
  for (size_t i = 0; i < product.y.size(); ++i) {
    const double want = product.y[i], slack = product.slack[i];
    const double got = number_at(y, type, static_cast<int64_t>(i));
    const bool fits = slack == 0 ? same(got, nearest(want, layout))
                                 : std::fabs(got - want) <= slack + spacing(want, layout) / 2;
    const int row = static_cast<int>(i) / static_cast<int>(n);
    const int column = static_cast<int>(i) % static_cast<int>(n);
    if (!fits) return text("y[%d][%d] is %.9g and not %.9g", row, column, got, want);
  }
  return "";
}

namespace {

// y, rounded to its type, as a reader's number.
int8_t code_of_output(double y, const Reader& to, const Layout& layout) {
  const auto value = static_cast<float>(nearest(y, layout));
  const float rounded = std::nearbyint((to.relu && value < 0 ? 0 : value) / to.scale);
  const float code = (std::isnan(rounded) ? 0 : rounded) + static_cast<float>(to.zero);
  return static_cast<int8_t>(std::clamp(code, static_cast<float>(to.least), 127.0f));
}

}  // namespace

std::string complaint(const Product& product, const Reader& reader, const int8_t* numbers,
                      const float* row_scales, FloatType type, int64_t n) {
  const Layout& layout = layout_of(type);
  const auto columns = static_cast<size_t>(n);
  for (size_t row = 0; row < product.y.size() / columns; ++row) {
    bool finite = true;
    for (size_t i = row * columns; i < (row + 1) * columns; ++i) {
      const double want = product.y[i], slack = product.slack[i], near = nearest(want, layout);
      finite = finite && (std::isfinite(near) || (reader.relu && near < 0));
      // Codes grow with y.
      const double off = slack == 0 || !std::isfinite(want) ? 0 : slack + spacing(want, layout) / 2;
      const int low = code_of_output(want - off, reader, layout);
      const int high = code_of_output(want + off, reader, layout);
      const int code = numbers[i];
      if (code >= low && code <= high) continue;
      const int r = static_cast<int>(row), c = static_cast<int>(i % columns);
      return text("number %d of row %d is %d and not %d to %d", c, r, code, low, high);
    }
    const double want = finite ? reader.scale : NAN;
    if (!same(row_scales[row], want)) {
      return text("scale %d is %.9g and not %.9g", static_cast<int>(row), row_scales[row], want);
    }
  }
  return "";
}

// --- Rows of int8

namespace {

// The sum of x and the residual, in their type.
double sum_at(const RowSource& source, int64_t row, int64_t c) {
  const double x = number_at(source.x, source.type, row * source.x_stride + c);
  const double residual = number_at(source.residual, source.type, row * source.k + c);
  return nearest(static_cast<float>(x + residual), layout_of(source.type));
}

bool rounds_each_step(const RowSource& source) {
  return source.kind == RowSource::Kind::kScaled || source.kind == RowSource::Kind::kProduct;
}

// x * factor * gain, or x * up, in the type of x. Products of two numbers are exact in double.
double rounded_at(const RowSource& source, int64_t row, int64_t c) {
  const Layout& layout = layout_of(source.type);
  const double x = number_at(source.x, source.type, row * source.x_stride + c);
  if (source.kind == RowSource::Kind::kProduct) {
    const double up = number_at(source.up, source.type, row * source.up_stride + c);
    return nearest(static_cast<float>(x * up), layout);
  }
  float scaled = static_cast<float>(x * source.factors[row]);
  if (source.rounds_first) scaled = static_cast<float>(nearest(scaled, layout));
  const auto gain = static_cast<float>(number_at(source.gain, source.gain_type, c));
  const double factor = source.adds_one ? static_cast<float>(1.0 + gain) : gain;
  return nearest(static_cast<float>(scaled * factor), layout);
}

double gate_of(RowSource::Kind kind, double x) {
  switch (kind) {
    case RowSource::Kind::kGeluMul: return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case RowSource::Kind::kGeluTanhMul:
      return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default: return x / (1 + std::exp(-x));
  }
}

// A row's values in real numbers.
std::vector<double> values_of(const RowSource& source, int64_t row) {
  std::vector<double> values;
  if (rounds_each_step(source)) {
    for (int64_t c = 0; c < source.k; ++c) values.push_back(rounded_at(source, row, c));
    return values;
  }
  double sum = 0;
  for (int64_t c = 0; c < source.k; ++c) {
    double value = number_at(source.x, source.type, row * source.x_stride + c);
    if (source.residual != nullptr) value = sum_at(source, row, c);
    if (source.is_gate()) {
      const double up = number_at(source.up, source.type, row * source.up_stride + c);
      value = gate_of(source.kind, value) * up;
    }
    sum += value;
    values.push_back(value);
  }
  if (!source.is_norm()) return values;
  const auto k = static_cast<double>(source.k);
  const double mean = source.kind == RowSource::Kind::kLayerNorm ? sum / k : 0;
  double squares = 0;
  for (double& value : values) {
    value -= mean;
    squares += value * value;
  }
  const double root = std::sqrt(squares / k + source.epsilon);
  for (int64_t c = 0; c < source.k; ++c) {
    const double gain = source.gain == nullptr ? 1 : number_at(source.gain, source.gain_type, c);
    const double bias = source.bias == nullptr ? 0 : number_at(source.bias, source.bias_type, c);
    double& value = values[static_cast<size_t>(c)];
    value = value * (gain / root) + bias;
  }
  return values;
}

// A row's values as they are quantized.
std::vector<double> quantized_values_of(const RowSource& source, int64_t row) {
  if (source.y == nullptr) return values_of(source, row);
  std::vector<double> values;
  for (int64_t c = 0; c < source.k; ++c) {
    values.push_back(number_at(source.y, source.type, row * source.k + c));
  }
  return values;
}

// Of several values; NaN where one is.
double largest_magnitude(const std::vector<double>& values) {
  double top = 0;
  for (double value : values) {
    if (std::isnan(value)) return NAN;
    top = std::max(top, std::fabs(value));
  }
  return top;
}

// How a row becomes codes: what it is divided by, and what is said of it.
struct RowScale {
  float divisor, told;
  int32_t zero = 0;
  float least = -127, most = 127;
};

float step_of(double range, float steps) {
  return range == 0 ? 1.0f : static_cast<float>(range) / steps;
}

RowScale symmetric_scale(const std::vector<double>& values, ScaleOf scale_of, float shared) {
  const double top = largest_magnitude(values);
  const float own = step_of(top, 127);
  if (scale_of == ScaleOf::kRow) return {own, own};
  // A given scale does not know of this row; that of the whole tensor does.
  const bool is_unknown = scale_of == ScaleOf::kGiven && !std::isfinite(top);
  return {shared, is_unknown ? NAN : shared};
}

RowScale asymmetric_scale(const std::vector<double>& values) {
  if (!std::isfinite(largest_magnitude(values))) return {NAN, NAN, 0, -128, 127};
  float low = 0, high = 0;
  for (double value : values) {
    low = std::min(low, static_cast<float>(value));
    high = std::max(high, static_cast<float>(value));
  }
  const float scale = step_of(high - low, 255);
  const float zero = std::clamp(-128 - std::nearbyint(low / scale), -128.0f, 127.0f);
  return {scale, scale, static_cast<int32_t>(zero), -128, 127};
}

int8_t code_of(double value, const RowScale& scale) {
  const float rounded = std::nearbyint(static_cast<float>(value) / scale.divisor);
  const float code = (std::isnan(rounded) ? 0 : rounded) + static_cast<float>(scale.zero);
  return static_cast<int8_t>(std::clamp(code, scale.least, scale.most));
}

std::vector<RowScale> scales_of(const std::vector<std::vector<double>>& rows, ScaleOf scale_of,
                                const float* given, bool asymmetric) {
  float shared = given == nullptr ? 0 : *given;
  if (scale_of == ScaleOf::kTensor) {
    std::vector<double> tops;
    for (const auto& row : rows) tops.push_back(largest_magnitude(row));
    shared = step_of(largest_magnitude(tops), 127);
  }
  std::vector<RowScale> scales;
  for (const auto& row : rows) {
    scales.push_back(asymmetric ? asymmetric_scale(row) : symmetric_scale(row, scale_of, shared));
  }
  return scales;
}

std::vector<std::vector<double>> all_values(const RowSource& source, int64_t m) {
  std::vector<std::vector<double>> rows;
  for (int64_t row = 0; row < m; ++row) rows.push_back(quantized_values_of(source, row));
  return rows;
}

}  // namespace

Rows quantized_rows(const RowSource& source, int64_t m, ScaleOf scale_of, const float* given,
                    bool asymmetric) {
  const auto rows = all_values(source, m);
  const auto scales = scales_of(rows, scale_of, given, asymmetric);
  Rows out;
  for (size_t row = 0; row < rows.size(); ++row) {
    out.scales.push_back(scales[row].told);
    if (asymmetric) out.zeros.push_back(scales[row].zero);
    for (double value : rows[row]) out.values.push_back(code_of(value, scales[row]));
  }
  return out;
}

std::string complaint(const RowSource& source, int64_t m, ScaleOf scale_of, const float* given,
                      const Rows& got) {
  // Of numbers that fp32 may round otherwise than double: relative, and in codes.
  constexpr double kSlack = 1e-5, kCodeSlack = 256 * kSlack;
  const bool exact = source.kind == RowSource::Kind::kPlain || source.y != nullptr;
  const auto rows = all_values(source, m);
  const auto scales = scales_of(rows, scale_of, given, !got.zeros.empty());
  for (size_t row = 0; row < rows.size(); ++row) {
    RowScale scale = scales[row];
    const int at = static_cast<int>(row);
    const double distance = std::fabs(got.scales[row] / scale.told - 1);
    const bool is_near = same(got.scales[row], scale.told) || (!exact && distance <= kSlack);
    if (!is_near) {
      return text("scale %d is %.9g and not %.9g", at, got.scales[row], scale.told);
    }
    if (!got.zeros.empty()) {
      const int32_t zero = got.zeros[row];
      if (std::abs(zero - scale.zero) > !exact) {
        return text("zero point %d is %d and not %d", at, zero, scale.zero);
      }
      scale.zero = zero;
    }
    for (size_t c = 0; c < rows[row].size(); ++c) {
      const int code = got.values[row * rows[row].size() + c];
      const int want = code_of(rows[row][c], scale);
      const double real = rows[row][c] / scale.divisor + scale.zero;
      const double limited = std::clamp<double>(real, scale.least, scale.most);
      // Without a scale, codes say nothing.
      const bool fits = code == want || (!exact && !(std::fabs(limited - code) > 0.5 + kCodeSlack));
      if (!fits) {
        return text("row %d, column %d is %d and not %d", at, static_cast<int>(c), code, want);
      }
    }
  }
  return "";
}

std::string complaint_about_sum(const RowSource& source, int64_t m, const void* sum) {
  for (int64_t i = 0; i < m * source.k; ++i) {
    const double got = number_at(sum, source.type, i);
    const double want = sum_at(source, i / source.k, i % source.k);
    if (!same(got, want)) {
      return text("element %d of the sum is %.9g and not %.9g", static_cast<int>(i), got, want);
    }
  }
  return "";
}

std::string complaint_about_rounded(const RowSource& source, int64_t m) {
  // What fp32 may round otherwise than double, in parts of the largest number of a row: a norm's
  // sums, and differences from their mean.
  constexpr double kSlack = 0x1p-20;
  const Layout& layout = layout_of(source.type);
  for (int64_t row = 0; row < m; ++row) {
    const std::vector<double> values = values_of(source, row);
    double top = 0;
    for (double value : values) {
      if (std::isfinite(value)) top = std::max(top, std::fabs(value));
    }
    const double slack = rounds_each_step(source) ? 0 : top * kSlack;
    for (int64_t c = 0; c < source.k; ++c) {
      const double got = number_at(source.y, source.type, row * source.k + c);
      const double value = values[static_cast<size_t>(c)];
      const double least = nearest(value - slack, layout), most = nearest(value + slack, layout);
      const bool fits = same(got, least) || (got >= least && got <= most);
      if (!fits) {
        return text("row %d, column %d of y is %.9g and not %.9g", static_cast<int>(row),
                    static_cast<int>(c), got, nearest(value, layout));
      }
    }
  }
  return "";
}

}  // namespace truth
