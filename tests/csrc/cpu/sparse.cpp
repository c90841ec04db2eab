// Sparse numbers added to products.

#include "cpu/sparse.h"

#include <cmath>
#include <cstdio>
#include <memory>

#include "cases.h"
#include "truth.h"

namespace cases {

using namespace qkernels::cpu;

namespace {

struct Size {
  int64_t m, n, k;
};

class Sparse {
 public:
  Sparse(const Size& size, FloatType type, FloatType values, bool short_columns, Random& random)
      : size_(size), type_(type), value_type_(values), short_columns_(short_columns) {
    for (int64_t row = 0; row < size.n; ++row) {
      // Some rows have none.
      for (int64_t count = random.below(4) == 0 ? 0 : random.below(9); count > 0; --count) {
        columns_.push_back(static_cast<int32_t>(random.below(size.k)));
      }
      ends_.push_back(static_cast<int32_t>(columns_.size()));
    }
    shorts_.assign(columns_.begin(), columns_.end());
    values_ = random.numbers(entries(), values, -2, 2);
    x_ = random.numbers(size.m * stride(), type, -3, 3);
    y_ = random.numbers(size.m * size.n, type, -3, 3);
  }

  std::string name() const {
    char text[120];
    std::snprintf(text, sizeof text, "sparse m %d n %d k %d %s values %s columns of %d",
                  static_cast<int>(size_.m), static_cast<int>(size_.n), static_cast<int>(size_.k),
                  name_of(type_), name_of(value_type_), short_columns_ ? 16 : 32);
    return text;
  }

  Bytes run(const Pool& pool) const {
    Bytes y = y_;
    SparseProduct job{};
    job.m = size_.m;
    job.n = size_.n;
    job.k = size_.k;
    job.x = x_.data();
    job.x_type = job.y_type = type_;
    job.x_stride = stride();
    job.ends = ends_.data();
    job.columns = short_columns_ ? static_cast<const void*>(shorts_.data()) : columns_.data();
    job.short_columns = short_columns_;
    job.values = values_.data();
    job.value_type = value_type_;
    job.y = y.data();
    job.y_type = type_;
    add_sparse_product(job, pool);
    return y;
  }

  std::string complaint(const Bytes& y) const {
    for (int64_t m = 0; m < size_.m; ++m) {
      for (int64_t n = 0; n < size_.n; ++n) {
        const int64_t at = m * size_.n + n;
        double sum = 0, size = 0;
        for (int64_t e = n == 0 ? 0 : ends_[static_cast<size_t>(n - 1)];
             e < ends_[static_cast<size_t>(n)]; ++e) {
          const int64_t column = columns_[static_cast<size_t>(e)];
          const double product = truth::number_at(values_.data(), value_type_, e) *
                                 truth::number_at(x_.data(), type_, m * stride() + column);
          sum += product;
          size += std::fabs(product);
        }
        const double wanted = truth::number_at(y_.data(), type_, at) + sum;
        const double found = truth::number_at(y.data(), type_, at);
        const double step = type_ == FloatType::kFp32   ? 1e-6
                            : type_ == FloatType::kFp16 ? 0x1p-11
                                                        : 0x1p-8;
        if (!(std::fabs(found - wanted) <= step * std::fabs(wanted) + 1e-6 * (size + 1))) {
          return "another sum at " + std::to_string(m) + ", " + std::to_string(n);
        }
      }
    }
    return "";
  }

 private:
  int64_t entries() const { return static_cast<int64_t>(columns_.size()); }
  int64_t stride() const { return size_.k + 3; }

  Size size_;
  FloatType type_, value_type_;
  bool short_columns_;
  std::vector<int32_t> ends_, columns_;
  std::vector<int16_t> shorts_;
  Bytes values_, x_, y_;
};

}  // namespace

void make_sparse(const Options& options, Random& random, const Take& take) {
  constexpr Size kSizes[] = {{0, 5, 7},    {1, 130, 40},  {3, 1, 9},     {4, 70, 33},
                             {17, 65, 20}, {70, 200, 64}, {200, 130, 50}};
  for (const Size& size : kSizes) {
    for (FloatType type : kFloatTypes) {
      const FloatType values = random.below(2) ? FloatType::kFp16 : FloatType::kBf16;
      const bool short_columns = random.below(2) == 0;
      take([&]() -> Case {
        const auto sparse =
            std::make_shared<const Sparse>(size, type, values, short_columns, random);
        return {sparse->name(),
                {{options.isas.front(), false, false}},
                [sparse](const Schedule&, const Pool& pool) { return sparse->run(pool); },
                [sparse](const Bytes& y, const Schedule&) { return sparse->complaint(y); }};
      });
    }
  }
}

}  // namespace cases
