// The hot loops of calibration. Scales must cost no more than all that must have been tried, in
// float64; columns and products are of numbers that fp32 rounds nowhere, and right to the bit.

#include "cpu/calibration.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cases.h"

namespace cases {

using namespace qkernels::cpu;

namespace {

// What fp32 may add to a cost, of the cost and of the squares of weights.
constexpr double kSlack = 0x1p-18, kNoise = 0x1p-36;
// From which on sums over groups are alike.
constexpr int64_t kManyGroups = 64;
// Between two rows of weights.
constexpr int64_t kGap = 3;

int number(int64_t value) { return static_cast<int>(value); }

template <class T>
void append(Bytes& out, const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  out.insert(out.end(), bytes, bytes + values.size() * sizeof(T));
}

struct SearchForm {
  FloatType type;
  GroupType scales;  // kUint8: with a scale for each row, the second level
  bool zeros, diagonal, block;
  int bits;
  int64_t n, k, length;
};

class Search {
 public:
  Search(const SearchForm& form, Random& random) : form_(form) {
    const int64_t groups = qkernels::ceil_div(form.k, form.length);
    weight_ = random.numbers((form.n - 1) * stride() + form.k, form.type, -1, 1);
    if (form.diagonal) diagonal_ = random.floats(form.k, 0, 4);
    if (form.block) fill_gram(random);
    for (int64_t i = 0; i < form.n * groups; ++i) {
      zeros_.push_back(static_cast<uint8_t>(form.zeros ? random.below(1 << form.bits) : 0));
    }
    // About what spreads the codes over the weights, more or less.
    const float full = 2.0f / static_cast<float>((1 << form.bits) - 1);
    if (is_multiple()) {
      channels_ = random.floats(form.n, full / 24, full / 17);
      scales_ = random.bytes(form.n * groups, 12, 17);
    } else {
      scales_ = random.numbers(form.n * groups, float_type(), full, 1.3f * full);
    }
  }

  std::string name() const {
    char text[150];
    std::snprintf(
        text, sizeof text,
        "search_scales %s scales %d zeros %d diagonal %d block %d bits %d n %d k %d of %d",
        name_of(form_.type), static_cast<int>(form_.scales), form_.zeros, form_.diagonal,
        form_.block, form_.bits, number(form_.n), number(form_.k), number(form_.length));
    return text;
  }

  // Scales and zero points.
  Bytes run(Isa isa, const Pool& pool) const {
    Bytes scales = scales_, zeros = zeros_;
    ScaleSearch job{};
    job.weight = weight_.data();
    job.type = form_.type;
    job.n = form_.n;
    job.k = form_.k;
    job.stride = stride();
    job.length = form_.length;
    job.diagonal = or_null(diagonal_);
    job.gram = or_null(gram_);
    job.gram_stride = form_.k + kGap;
    job.bits = form_.bits;
    job.implied_zero = implied_zero();
    job.scales = scales.data();
    job.scale_type = form_.scales;
    job.least_scale = 0x1p-24f;
    job.channel_scales = or_null(channels_);
    job.most_multiplier = static_cast<float>(most_multiplier());
    job.zeros = form_.zeros ? zeros.data() : nullptr;
    search_scales(job, isa, pool);
    scales.insert(scales.end(), zeros.begin(), zeros.end());
    return scales;
  }

  std::string complaint(const Bytes& out) const {
    const int64_t groups = qkernels::ceil_div(form_.k, form_.length);
    const uint8_t* zeros = out.data() + scales_.size();
    double total = 0, of_ranges = 0, fitted = 0;
    for (int64_t row = 0; row < form_.n; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = row * groups + g;
        const double zero = form_.zeros ? zeros[at] : implied_zero();
        const double found = cost(row, g, value(row, stored(out.data(), at)), zero);
        const Candidate best = best_range(row, g);
        total += found;
        of_ranges += best.cost;
        fitted += cost_when_fitted(row, g, best);
        if (found <= best.cost * (1 + kSlack) + noise(row, g)) continue;
        char text[120];
        std::snprintf(text, sizeof text, "group %d of row %d costs %.9g, and there is one of %.9g",
                      number(g), number(row), found, best.cost);
        return text;
      }
    }
    // One group may take another way to a scale that fits: of many, most is gained by all ways.
    const bool is_many = form_.n * groups >= kManyGroups;
    return is_many && total > fitted + (of_ranges - fitted) / 4 ? "scales are not fitted" : "";
  }

 private:
  bool is_multiple() const { return form_.scales == GroupType::kUint8; }
  int64_t stride() const { return form_.k + kGap; }
  float implied_zero() const { return static_cast<float>(1 << (form_.bits - 1)); }
  int largest() const { return (1 << form_.bits) - 1; }
  int most_multiplier() const { return form_.zeros ? 255 / largest() : 128 >> (form_.bits - 1); }
  FloatType float_type() const {
    return kFloatTypes[static_cast<int>(form_.scales) - static_cast<int>(GroupType::kFp16)];
  }
  double stored(const uint8_t* scales, int64_t at) const {
    return is_multiple() ? scales[at] : truth::number_at(scales, float_type(), at);
  }
  double value(int64_t row, double stored) const {
    if (!is_multiple()) return stored;
    return truth::nearest(stored * channels_[static_cast<size_t>(row)], truth::kFp32);
  }

  // Positive definite: x^T x of a few rows, and the unit matrix.
  void fill_gram(Random& random) {
    constexpr int64_t kRows = 3;
    const std::vector<float> x = random.floats(kRows * form_.k, -1, 1);
    for (int64_t i = 0; i < form_.k; ++i) {
      for (int64_t j = 0; j < form_.k + kGap; ++j) {
        float sum = i == j ? 1.0f : 0.0f;
        for (int64_t r = 0; r < kRows && j < form_.k; ++r) {
          sum += x[static_cast<size_t>(r * form_.k + i)] * x[static_cast<size_t>(r * form_.k + j)];
        }
        gram_.push_back(sum);
      }
    }
  }

  double gram_at(int64_t i, int64_t j) const {
    if (form_.block) return gram_[static_cast<size_t>(i * (form_.k + kGap) + j)];
    if (i != j) return 0;
    return form_.diagonal ? diagonal_[static_cast<size_t>(i)] : 1;
  }

  // sum_ij one(w_i) gram_ij other(w_j) over the weights of one group.
  template <class One, class Other>
  double product(int64_t row, int64_t g, const One& one, const Other& other) const {
    const int64_t first = g * form_.length, end = std::min(form_.k, first + form_.length);
    std::vector<double> others;
    const auto weight = [&](int64_t c) {
      return truth::number_at(weight_.data(), form_.type, row * stride() + c);
    };
    for (int64_t c = first; c < end; ++c) others.push_back(other(weight(c)));
    double total = 0;
    for (int64_t i = first; i < end; ++i) {
      double sum = 0;
      for (int64_t j = form_.block ? first : i; j < (form_.block ? end : i + 1); ++j) {
        sum += gram_at(i, j) * others[static_cast<size_t>(j - first)];
      }
      total += one(weight(i)) * sum;
    }
    return total;
  }

  double noise(int64_t row, int64_t g) const {
    const auto size = [](double w) { return std::fabs(w); };
    return kNoise * product(row, g, size, size);
  }

  // Less its zero point.
  double code(int64_t row, double w, double scale, double zero) const {
    double low = 0, high = largest();
    if (is_multiple()) {
      const double times = std::round(scale / channels_[static_cast<size_t>(row)]);
      low = std::max(low, zero - std::floor(128 / times));
      high = std::min(high, zero + std::floor(127 / times));
    }
    const double quotient = truth::nearest(w / scale, truth::kFp32);
    const double nearest = std::nearbyint(truth::nearest(quotient + zero, truth::kFp32));
    return std::max(low, std::min(high, nearest)) - zero;
  }

  double cost(int64_t row, int64_t g, double scale, double zero) const {
    const auto error = [&](double w) { return code(row, w, scale, zero) * scale - w; };
    return product(row, g, error, error);
  }

  double nearest_scale(int64_t row, double wanted) const {
    if (!is_multiple()) return truth::nearest(wanted, truth::layout_of(float_type()));
    const double times = std::nearbyint(wanted / channels_[static_cast<size_t>(row)]);
    return value(row, std::min<double>(most_multiplier(), std::max(1.0, times)));
  }

  struct Candidate {
    double scale, zero, cost;
  };

  Candidate best_range(int64_t row, int64_t g) const {
    const int64_t at = row * qkernels::ceil_div(form_.k, form_.length) + g;
    const double stored_first = stored(scales_.data(), at), first = value(row, stored_first);
    const double zero = form_.zeros ? zeros_[static_cast<size_t>(at)] : implied_zero();
    Candidate best{first, zero, cost(row, g, first, zero)};
    for (int step = 0; step < 19; ++step) {
      const double factor = 1 - step / 32.0, times = stored_first * factor;
      // Half between two multiples, it is rounding in fp32 that says which is nearer.
      if (is_multiple() && times - std::floor(times) == 0.5) continue;
      const double scale = nearest_scale(row, first * factor);
      for (int move = form_.zeros ? -2 : 0; move <= (form_.zeros ? 2 : 0); ++move) {
        const double moved = std::max(0.0, std::min<double>(largest(), zero + move));
        const double found = cost(row, g, scale, moved);
        if (found < best.cost) best = {scale, moved, found};
      }
    }
    return best;
  }

  double cost_when_fitted(int64_t row, int64_t g, Candidate best) const {
    for (int i = 0; i < 3; ++i) {
      const auto value_of = [&](double w) { return code(row, w, best.scale, best.zero); };
      const double top = product(row, g, [](double w) { return w; }, value_of);
      const double bottom = product(row, g, value_of, value_of);
      if (!(top > 0 && bottom > 0)) break;
      const double scale = nearest_scale(row, top / bottom);
      const double found = cost(row, g, scale, best.zero);
      if (found < best.cost) best = {scale, best.zero, found};
    }
    return best.cost;
  }

  SearchForm form_;
  Bytes weight_, scales_, zeros_;
  std::vector<float> diagonal_, gram_, channels_;
};

// Multiples of 1/16, factors of -1, 0 and 1, and scales and pivots that are powers of two.
class Rounding {
 public:
  Rounding(int64_t n, int64_t columns, int bits, bool zeros, bool values, Random& random,
           bool kept = false)
      : n_(n), columns_(columns), has_zeros_(zeros), has_values_(values) {
    const int64_t groups = columns / 4 + 1;
    const auto sixteenths = [&] {
      std::vector<float> out;
      for (int64_t i = 0; i < columns * n; ++i) {
        out.push_back(static_cast<float>(random.below(129) - 64) / 16);
      }
      return out;
    };
    left_ = sixteenths();
    if (values) values_ = sixteenths();
    for (int64_t i = 0; i < columns * (columns + 1); ++i) {
      const int64_t row = i / (columns + 1), column = i % (columns + 1);
      float factor = random.below(10) == 0 ? static_cast<float>(2 * random.below(2) - 1) : 0.0f;
      if (row == column) factor = 0.5f * static_cast<float>(1 << random.below(3));
      // What must not be read.
      if (row > column || column == columns) factor = NAN;
      factors_.push_back(factor);
    }
    for (int64_t i = 0; i < groups * n; ++i) {
      scales_.push_back(0.25f * static_cast<float>(1 << random.below(4)));
      zeros_.push_back(static_cast<float>(random.below(int64_t{1} << bits)));
      low_.push_back(static_cast<float>(random.below(2)));
      high_.push_back(static_cast<float>((1 << bits) - 1 - random.below(2)));
    }
    if (kept) {
      for (int64_t i = 0; i < columns * n; ++i) {
        kept_.push_back(random.below(4) == 0 ? 1.0f : 0.0f);
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      groups_.push_back(random.below(groups));
      places_.push_back((j * 7 + 3) % (columns + 2));
    }
    // Each place is another: the numbers of places have no divisor in common with 7.
    if ((columns + 2) % 7 == 0) {
      for (int64_t j = 0; j < columns; ++j) places_[static_cast<size_t>(j)] = columns - j;
    }
  }

  std::string name() const {
    char text[100];
    std::snprintf(text, sizeof text, "round_columns n %d columns %d zeros %d values %d kept %d",
                  number(n_), number(columns_), has_zeros_, has_values_, !kept_.empty());
    return text;
  }

  // What has moved, and the codes.
  Bytes run(Isa isa, const Pool& pool) const {
    std::vector<float> moved(left_.size(), NAN);
    Bytes codes = unwritten((columns_ + 2) * n_, 1);
    ColumnRounding job{};
    job.n = n_;
    job.columns = columns_;
    job.left = left_.data();
    job.factors = factors_.data();
    job.stride = columns_ + 1;
    job.values = or_null(values_);
    job.places = places_.data();
    job.groups = groups_.data();
    job.scales = scales_.data();
    job.zeros = has_zeros_ ? zeros_.data() : nullptr;
    job.implied_zero = kImplied;
    job.low = low_.data();
    job.high = high_.data();
    job.codes = codes.data();
    job.moved = moved.data();
    std::vector<float> beyond(kept_.size(), NAN);
    job.kept = or_null(kept_);
    job.beyond = beyond.data();
    round_columns(job, isa, pool);
    Bytes out;
    append(out, moved);
    append(out, beyond);
    out.insert(out.end(), codes.begin(), codes.end());
    return out;
  }

  std::string complaint(const Bytes& out) const {
    std::vector<float> moved(left_.size()), beyond(kept_.size());
    Bytes codes = unwritten((columns_ + 2) * n_, 1);
    for (int64_t row = 0; row < n_; ++row) {
      for (int64_t j = 0; j < columns_; ++j) round_one(row, j, moved, beyond, codes);
    }
    Bytes wanted;
    append(wanted, moved);
    append(wanted, beyond);
    wanted.insert(wanted.end(), codes.begin(), codes.end());
    return out == wanted ? "" : "other codes or steps";
  }

 private:
  static constexpr float kImplied = 2;

  void round_one(int64_t row, int64_t j, std::vector<float>& moved, std::vector<float>& beyond,
                 Bytes& codes) const {
    const auto at = [&](int64_t column) { return static_cast<size_t>(column * n_ + row); };
    const auto factor = [&](int64_t i) {
      return static_cast<double>(factors_[static_cast<size_t>(i * (columns_ + 1) + j)]);
    };
    double left = left_[at(j)];
    for (int64_t i = 0; i < j; ++i) left -= moved[at(i)] * factor(i);
    const size_t group = at(groups_[static_cast<size_t>(j)]);
    const double present = has_values_ ? values_[at(j)] : 0;
    const double wanted = has_values_ ? left / factor(j) + present : left;
    const double zero = has_zeros_ ? zeros_[group] : kImplied, scale = scales_[group];
    double code = std::nearbyint(wanted / scale + zero);
    code = std::max<double>(low_[group], std::min<double>(high_[group], code));
    double found = (code - zero) * scale;
    if (!kept_.empty() && kept_[at(j)] > 0) {
      beyond[at(j)] = static_cast<float>(wanted - found);
      found = wanted;
    }
    moved[at(j)] = static_cast<float>(has_values_ ? found - present : (wanted - found) / factor(j));
    codes[at(places_[static_cast<size_t>(j)])] = static_cast<uint8_t>(code);
  }

  int64_t n_, columns_;
  bool has_zeros_, has_values_;
  std::vector<float> left_, values_, factors_, scales_, zeros_, low_, high_, kept_;
  std::vector<int64_t> places_, groups_;
};

class Product {
 public:
  // Symmetric where `y_columns` is 0.
  Product(FloatType type, int64_t rows, int64_t x_columns, int64_t y_columns, Random& random)
      : type_(type), rows_(rows), x_columns_(x_columns), y_columns_(y_columns) {
    x_ = whole(rows * x_columns, random);
    y_ = whole(rows * y_columns, random);
  }

  std::string name() const {
    char text[100];
    std::snprintf(text, sizeof text, "multiply_transposed %s rows %d columns %d and %d",
                  name_of(type_), number(rows_), number(x_columns_), number(y_columns_));
    return text;
  }

  Bytes run(Isa isa, const Pool& pool) const {
    Bytes out = unwritten(x_columns_ * across(), 4);
    multiply_transposed(
        {rows_, x_columns_, across(), x_.data(), y(), type_, reinterpret_cast<float*>(out.data())},
        isa, pool);
    return out;
  }

  std::string complaint(const Bytes& out) const {
    std::vector<float> wanted(static_cast<size_t>(x_columns_ * across()));
    for (int64_t t = 0; t < rows_; ++t) {
      for (int64_t i = 0; i < x_columns_; ++i) {
        const double left = truth::number_at(x_.data(), type_, t * x_columns_ + i);
        for (int64_t j = 0; j < across(); ++j) {
          wanted[static_cast<size_t>(i * across() + j)] +=
              static_cast<float>(left * truth::number_at(y(), type_, t * across() + j));
        }
      }
    }
    Bytes bytes;
    append(bytes, wanted);
    return out == bytes ? "" : "another product";
  }

 private:
  Bytes whole(int64_t count, Random& random) const {
    Bytes out(static_cast<size_t>(count * size_of(type_)));
    for (int64_t i = 0; i < count; ++i) {
      truth::store_at(out.data(), type_, i, static_cast<double>(1 + random.below(9)));
    }
    return out;
  }
  int64_t across() const { return y_columns_ == 0 ? x_columns_ : y_columns_; }
  const uint8_t* y() const { return y_columns_ == 0 ? x_.data() : y_.data(); }

  FloatType type_;
  int64_t rows_, x_columns_, y_columns_;
  Bytes x_, y_;
};

// A case of work that `arguments` make, where `can` says that the instructions have it.
template <class Work, class Can, class... Arguments>
void add(const Options& options, const Can& can, const Take& take, Arguments&&... arguments) {
  take([&]() -> Case {
    std::vector<Schedule> schedules;
    for (Isa isa : options.isas) {
      if (can(isa)) schedules.push_back({isa, false, false});
    }
    const auto work = std::make_shared<const Work>(arguments...);
    return {work->name(), schedules,
            [work](const Schedule& schedule, const Pool& pool) {
              return work->run(schedule.isa, pool);
            },
            [work](const Bytes& out, const Schedule&) { return work->complaint(out); }};
  });
}

}  // namespace

void make_calibration(const Options& options, Random& random, const Take& take) {
  const auto everywhere = [](Isa) { return true; };
  constexpr int64_t kSizes[][3] = {{1, 1, 8}, {3, 50, 64}, {16, 48, 16}, {37, 130, 24}};
  for (const auto& [n, k, length] : kSizes) {
    for (GroupType scales :
         {GroupType::kFp16, GroupType::kBf16, GroupType::kFp32, GroupType::kUint8}) {
      for (bool zeros : {false, true}) {
        const FloatType type = kFloatTypes[random.below(3)];
        const bool diagonal = random.below(2) == 0;
        const int bits = scales == GroupType::kUint8 ? 4 : static_cast<int>(2 + random.below(3));
        const SearchForm form{type, scales, zeros, diagonal, !diagonal && random.below(2) == 0,
                              bits, n,      k,     length};
        add<Search>(options, everywhere, take, form, random);
      }
    }
  }
  // Enough for several threads.
  for (bool block : {false, true}) {
    const SearchForm large{FloatType::kBf16, GroupType::kFp16, true, !block, block, 4, 70, 128, 64};
    add<Search>(options, everywhere, take, large, random);
  }
  constexpr int64_t kBlocks[][2] = {{1, 1}, {5, 9}, {16, 8}, {37, 21}, {150, 30}};
  for (const auto& [n, columns] : kBlocks) {
    for (bool zeros : {false, true}) {
      for (bool values : {false, true}) {
        const int bits = static_cast<int>(zeros ? 8 : 3);
        add<Rounding>(options, everywhere, take, n, columns, bits, zeros, values, random);
      }
    }
  }
  constexpr int64_t kProducts[][3] = {{1, 1, 0},    {7, 50, 0},   {131, 97, 0}, {3, 48, 5},
                                      {9, 20, 100}, {2100, 3, 0}, {1100, 2, 50}};
  for (FloatType type : {FloatType::kFp32, FloatType::kBf16}) {
    const auto has_kernel = [type](Isa isa) { return multiplies_transposed(type, isa); };
    for (const auto& [rows, x_columns, y_columns] : kProducts) {
      add<Product>(options, has_kernel, take, type, rows, x_columns, y_columns, random);
    }
  }
}

void make_kept(const Options& options, Random& random, const Take& take) {
  const auto everywhere = [](Isa) { return true; };
  for (const auto& [n, columns] : {std::pair{5, 9}, {37, 21}, {150, 30}}) {
    for (bool values : {false, true}) {
      add<Rounding>(options, everywhere, take, n, columns, 3, values, values, random, true);
    }
  }
}

}  // namespace cases
