// Columns of x with outliers, found, met by those of the weight, and added to a product.

#include "cpu/outliers.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cases.h"
#include "cpu/vnni.h"
#include "truth.h"

namespace cases {

using namespace qkernels::cpu;

namespace {

constexpr double kThreshold = 6;

struct Form {
  Code code;
  int64_t group, padding;  // columns of a group, and how many of them are padding
  GroupType scales;        // kUint8: with a scale for each row, the second level
  GroupType zeros;
};

struct Size {
  int64_t m, n, k;  // k without the columns that pad groups
};

class Outliers {
 public:
  Outliers(const Form& form, const Size& size, FloatType type, Random& random)
      : size_(size), type_(type) {
    weight_.n = size.n;
    const int64_t filled = form.group - form.padding;
    weight_.filled = std::min(filled, size.k);
    weight_.group = filled < size.k ? form.group : size.k;
    weight_.k = (size.k - 1) / weight_.filled * (weight_.group - weight_.filled) + size.k;
    weight_.code = form.code;
    const int64_t codes = is_nibble(form.code) ? 16 : 256;
    weight_.implied_zero = static_cast<float>(codes / 2);
    weight_.prepare();
    codes_ = random.bytes(size.n * weight_.k, 0, codes);
    words_.assign(static_cast<size_t>(weight_.panels() * weight_.panel_words()), 0);
    pack_vnni(codes_.data(), words_.data(), size.n, weight_.k, is_nibble(form.code), pool_of(1));
    weight_.words = words_.data();
    fill_groups(form, codes, random);
    fill_rows(random);
  }

  std::string name() const {
    const auto number = [](int64_t value) { return static_cast<int>(value); };
    char text[160];
    std::snprintf(text, sizeof text, "outliers m %d n %d k %d %s bits %d group %d of %d%s%s",
                  number(size_.m), number(size_.n), number(size_.k), name_of(type_),
                  is_nibble(weight_.code) ? 4 : 8, number(weight_.filled), number(weight_.group),
                  weight_.channel_scales == nullptr ? "" : " two levels",
                  weight_.has_zeros() ? " zeros" : "");
    return text;
  }

  // Which columns, as bytes, their weights, and y.
  Bytes run(const Pool& pool) const {
    OutlierSearch search{};
    search.x = x_.data();
    search.type = type_;
    search.m = size_.m;
    search.k = size_.k;
    search.x_stride = stride();
    uint8_t bits[4] = {};
    truth::store_at(bits, type_, 0, kThreshold);
    std::memcpy(&search.threshold, bits, static_cast<size_t>(size_of(type_)));
    const std::vector<int64_t> found = find_outliers(search, pool);
    const auto count = static_cast<int64_t>(found.size());
    std::vector<float> weight(static_cast<size_t>(count * size_.n)), kept, y = y_;
    take_columns(weight_, found.data(), count, weight.data(), pool);
    for (int64_t row = 0; row < size_.m; ++row) {
      for (int64_t column : found) kept.push_back(static_cast<float>(number(row, column)));
    }
    add_columns(kept.data(), weight.data(), size_.m, size_.n, count, y.data(), pool);
    Bytes out(static_cast<size_t>(size_.k), 0);
    for (int64_t column : found) out[static_cast<size_t>(column)] += 1;
    append(out, weight);
    append(out, y);
    return out;
  }

  std::string complaint(const Bytes& got) const {
    Bytes want(static_cast<size_t>(size_.k), 0);
    std::vector<int64_t> columns;
    for (int64_t c = 0; c < size_.k; ++c) {
      for (int64_t row = 0; row < size_.m; ++row) {
        if (!(std::fabs(number(row, c)) < kThreshold)) want[static_cast<size_t>(c)] = 1;
      }
      if (want[static_cast<size_t>(c)] == 1) columns.push_back(c);
    }
    if (!std::equal(want.begin(), want.end(), got.begin())) return "other columns are found";
    const size_t count = columns.size() * static_cast<size_t>(size_.n);
    std::vector<float> weight(count), y(y_.size());
    copy(weight, got.data() + want.size());
    copy(y, got.data() + want.size() + count * sizeof(float));
    for (size_t i = 0; i < columns.size(); ++i) {
      for (int64_t n = 0; n < size_.n; ++n) {
        const double found = weight[i * static_cast<size_t>(size_.n) + static_cast<size_t>(n)];
        if (found != element(n, columns[i])) return "another weight in row " + std::to_string(n);
      }
    }
    for (int64_t m = 0; m < size_.m; ++m) {
      for (int64_t n = 0; n < size_.n; ++n) {
        const auto at = static_cast<size_t>(m * size_.n + n);
        double sum = y_[at], size = std::fabs(y_[at]);
        for (int64_t c : columns) {
          const double product = number(m, c) * element(n, c);
          sum += product;
          size += std::fabs(product);
        }
        const bool finite = std::isfinite(sum);
        const double difference = std::fabs(y[at] - sum);
        if (finite != std::isfinite(y[at]) || (finite && !(difference <= 1e-6 * (size + 1)))) {
          return "another sum at " + std::to_string(m) + ", " + std::to_string(n);
        }
      }
    }
    return "";
  }

 private:
  int64_t stride() const { return size_.k + 3; }
  double number(int64_t row, int64_t column) const {
    return truth::number_at(x_.data(), type_, row * stride() + column);
  }

  static void append(Bytes& out, const std::vector<float>& numbers) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(numbers.data());
    out.insert(out.end(), bytes, bytes + numbers.size() * sizeof(float));
  }
  static void copy(std::vector<float>& numbers, const uint8_t* from) {
    if (!numbers.empty()) std::memcpy(numbers.data(), from, numbers.size() * sizeof(float));
  }

  void fill_groups(const Form& form, int64_t codes, Random& random) {
    const int64_t count = weight_.panels() * weight_.groups() * kLanes;
    weight_.scale_type = form.scales;
    weight_.zero_type = form.zeros;
    if (form.scales == GroupType::kUint8) {
      scales_ = random.bytes(count, 1, 8);
      channel_scales_ = random.floats(size_.n, 0.001f, 0.01f);
    } else {
      scales_ = random.numbers(count, float_type(form.scales), 0.001f, 0.02f);
    }
    if (form.zeros != GroupType::kNone) zeros_ = random.bytes(count, 0, codes);
    weight_.scales = scales_.data();
    weight_.zeros = or_null(zeros_);
    weight_.channel_scales = or_null(channel_scales_);
  }

  // Most rows have no outlier. The threshold itself is one, the number below it is none, and NaN
  // and infinity are some.
  void fill_rows(Random& random) {
    x_ = random.numbers(size_.m * stride(), type_, -3, 3);
    y_ = random.floats(size_.m * size_.n, -3, 3);
    const auto put = [&](int64_t row, int64_t column, double value) {
      truth::store_at(x_.data(), type_, row * stride() + column, value);
    };
    for (int64_t row = 0; row < size_.m; ++row) {
      put(row, random.below(size_.k), 5.96875);
      put(row, size_.k, 100);  // between two rows
    }
    if (size_.m == 0) return;
    put(size_.m - 1, size_.k - 1, -kThreshold);
    put(0, random.below(size_.k), 30);
    if (size_.m > 3) {
      put(1, random.below(size_.k), INFINITY);
      put(2, random.below(size_.k), NAN);
    }
  }

  static FloatType float_type(GroupType type) {
    return kFloatTypes[static_cast<int>(type) - static_cast<int>(GroupType::kFp16)];
  }

  // Of a row of the weight, each step rounded to fp32.
  double element(int64_t row, int64_t column) const {
    const auto rounded = [](double value) { return truth::nearest(value, truth::kFp32); };
    const int64_t g = column / weight_.filled, place = g * weight_.group + column % weight_.filled;
    const auto at =
        static_cast<size_t>((row / kLanes * weight_.groups() + g) * kLanes + row % kLanes);
    const double zero = zeros_.empty() ? weight_.implied_zero : zeros_[at];
    double scale = weight_.scale_type == GroupType::kUint8
                       ? scales_[at]
                       : truth::number_at(scales_.data(), float_type(weight_.scale_type),
                                          static_cast<int64_t>(at));
    if (!channel_scales_.empty()) {
      scale = rounded(scale * channel_scales_[static_cast<size_t>(row)]);
    }
    return rounded((codes_[static_cast<size_t>(row * weight_.k + place)] - zero) * scale);
  }

  Size size_;
  FloatType type_;
  Weight weight_{};
  Bytes codes_, scales_, zeros_, x_;
  std::vector<uint32_t> words_;
  std::vector<float> channel_scales_, y_;
};

}  // namespace

void make_outliers(const Options& options, const Take& take) {
  constexpr int64_t kWholeK = 1 << 20;
  constexpr Form kForms[] = {
      {Code::kInt8, kWholeK, 0, GroupType::kFp16, GroupType::kNone},
      {Code::kInt4, 64, 0, GroupType::kUint8, GroupType::kUint8},
      {Code::kInt4, 32, 5, GroupType::kBf16, GroupType::kUint8},
      {Code::kInt8, 48, 3, GroupType::kFp32, GroupType::kNone},
  };
  // Few numbers and, by threads, many; several tasks of columns and of panels.
  constexpr Size kSizes[] = {{0, 16, 40}, {1, 33, 70}, {5, 300, 135}, {70, 170, 1100}};
  Random own(171);
  for (const Form& form : kForms) {
    for (const Size& size : kSizes) {
      const FloatType type = kFloatTypes[own.below(3)];
      take([&]() -> Case {
        const auto one = std::make_shared<const Outliers>(form, size, type, own);
        return {one->name(),
                {{options.isas.front(), false, false}},
                [one](const Schedule&, const Pool& pool) { return one->run(pool); },
                [one](const Bytes& got, const Schedule&) { return one->complaint(got); }};
      });
    }
  }
}

}  // namespace cases
