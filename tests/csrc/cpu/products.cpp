// Products, over the formats and sizes that the bindings let through.

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

constexpr Code kCodes[] = {Code::kInt4, Code::kTable4, Code::kInt8, Code::kFp8E4M3, Code::kFp8E5M2};
constexpr const char* kCodeNames[] = {"int4", "table4", "int8", "fp8e4m3", "fp8e5m2"};
constexpr const char* kGroupNames[] = {"none", "fp16", "bf16", "fp32", "uint8", "nested", "blocks"};
// Odd, whole panels, fewer and more panels than a task has; K with and without columns that pad it.
constexpr int64_t kShapes[][2] = {{16, 72}, {49, 135}, {80, 200}, {77, 320}, {33, 520}};
constexpr int64_t kRows[] = {0, 1, 3, 17, 41, 70};
constexpr int64_t kWholeK = 1 << 20;
constexpr int64_t kGroups[] = {16, 32, 64, 112, kWholeK};
// From so many products on, plain C++ is too slow under a sanitizer, and then vectors are.
constexpr int64_t kMostPortableProducts = 1 << 18, kMostVectorProducts = 4 << 20;
// Of columns beyond K in a row of x.
constexpr int64_t kGap = 5;

// Where rows of int8 have their scales from.
enum class Rows { kFloats, kRow, kTensor, kGiven, kQuantized };
constexpr const char* kRowsNames[] = {"floats", "row", "tensor", "given", "quantized"};

// What the numbers of a product are.
enum class Numbers {
  kRandom,
  kIntegers,  // of floats: every sum is exact, and many results lie between two numbers of y's type
  kOneHot,    // of floats: a row of x picks a column of the weight, whose codes are all there are
  kZeroGroups,  // of floats: groups of codes that are all, or all but the last, their zero point
};
constexpr const char* kNumbersNames[] = {"", " of integers", " of every code", " of zero groups"};
// Of the columns of a group, those that pad it where groups are padded.
constexpr int64_t kPadding = 5;

// What is written of y.
enum class Written { kNumbers, kInt8, kInt8WithZero, kReluInt8, kReluInt8WithZero };
constexpr const char* kWrittenNames[] = {"", " as int8", " as int8 with zero", " relu as int8",
                                         " relu as int8 with zero"};

struct Format {
  Code code;
  int64_t group;
  GroupType scales;  // kUint8: with a scale for each row of W, the second level
  GroupType zeros;
  Rows rows;
  GroupType offsets = GroupType::kNone;  // with zeros, of floats
};

struct Size {
  int64_t n, k, m;

  int64_t products() const { return n * k * m; }
};

// A product and all its buffers.
class Product {
 public:
  Product(const Format& format, const Size& size, FloatType x_type, FloatType y_type,
          Numbers numbers, Written written, int64_t missing, Random& random)
      : rows_(format.rows),
        numbers_(numbers),
        written_(written),
        m_(size.m),
        missing_(missing),
        x_type_(x_type),
        y_type_(y_type) {
    weight_.n = size.n;
    weight_.k = size.k;
    weight_.group = std::min(format.group, size.k);
    weight_.filled = weight_.group;
    if (numbers == Numbers::kZeroGroups && weight_.group < size.k) weight_.filled -= kPadding;
    weight_.code = format.code;
    const bool two_levels = format.scales == GroupType::kUint8;
    int64_t codes = is_nibble(weight_.code) ? 16 : 256;
    // Codes of 3 bits are decoded by a table of their own.
    const bool may_be_short = weight_.code == Code::kInt4 && !two_levels;
    if (may_be_short && is_random() && random.below(3) == 0) codes = 8;
    const bool integers = weight_.code == Code::kInt4 || weight_.code == Code::kInt8;
    weight_.implied_zero = integers ? static_cast<float>(codes / 2) : 0.0f;
    weight_.prepare();
    fill_codes(codes, random);
    fill_groups(format, codes, random);
    if (numbers == Numbers::kZeroGroups) fill_zero_groups(codes, random);
    pack();
    fill_rows(random);
    if (is_int8()) fill_output(random);
  }

  std::string name() const {
    const auto number = [](int64_t value) { return static_cast<int>(value); };
    char text[200];
    std::snprintf(text, sizeof text,
                  "%s group %d scales %s zeros %s offsets %s n %d k %d m %d rows %s x %s y %s%s%s",
                  kCodeNames[static_cast<int>(weight_.code)], number(weight_.group),
                  kGroupNames[static_cast<int>(weight_.scale_type)],
                  kGroupNames[static_cast<int>(weight_.zero_type)],
                  kGroupNames[static_cast<int>(weight_.offset_type)], number(weight_.n),
                  number(weight_.k), number(m_), kRowsNames[static_cast<int>(rows_)],
                  name_of(x_type_), name_of(y_type_), kNumbersNames[static_cast<int>(numbers_)],
                  kWrittenNames[static_cast<int>(written_)]);
    return text;
  }

  // What the bindings let through, of `isas`.
  std::vector<Schedule> schedules(const std::vector<Isa>& isas) const {
    std::vector<Schedule> out;
    for (Isa isa : isas) {
      const int64_t most = isa == Isa::kPortable ? kMostPortableProducts : kMostVectorProducts;
      if (m_ * weight_.n * weight_.k <= most) out.push_back({isa, false, false});
      const bool bf16 = x_type_ == FloatType::kBf16 && y_type_ == FloatType::kBf16;
      const bool rounds = rows_ == Rows::kFloats && bf16;
      const bool pairs = rounds && is_nibble(weight_.code) && has_pairs(isa);
      if (isa != Isa::kAmx && pairs) out.push_back({isa, false, false, true});
      if (weight_.has_offsets()) continue;
      if (isa != Isa::kAmx && rounds && rounds_on_vectors(isa)) out.push_back({isa, false, true});
      if (rows_ == Rows::kFloats) {
        if (!has_float_tiles(isa)) continue;
        const bool whole = weight_.groups() == 1 || fits_float_tiles(weight_.group);
        if (whole) out.push_back({isa, true, false});
        if (rounds) out.push_back({isa, true, true});
      } else if (!has_int8_tiles(isa)) {
        continue;
      } else if (weight_.sums_are_integers() || fits_int8_tiles(isa, weight_.group)) {
        out.push_back({isa, true, false});
      }
    }
    return out;
  }

  Bytes run(const Schedule& schedule, const Pool& pool) const {
    Bytes y = unwritten(m_ * weight_.n - missing_, is_int8() ? 1 : size_of(y_type_));
    std::vector<float> scales(static_cast<size_t>(is_int8() ? m_ : 0));
    if (rows_ == Rows::kFloats) {
      linear_float(float_arguments(output(y.data(), scales.data())), schedule, pool);
    } else if (rows_ != Rows::kQuantized || m_ > 0) {
      // Without rows there is no pointer, by which rows that are quantized are told from others.
      linear_int8(int8_arguments(output(y.data(), scales.data())), schedule, pool);
    }
    const auto* told = reinterpret_cast<const uint8_t*>(scales.data());
    y.insert(y.end(), told, told + scales.size() * 4);
    return y;
  }

  std::string complaint(const Bytes& y, const Schedule& schedule) const {
    const bool exact_sums = numbers_ == Numbers::kIntegers;
    const truth::Product product =
        rows_ == Rows::kFloats
            ? truth::float_product(float_arguments(output(nullptr, nullptr)), codes_.data(),
                                   schedule, exact_sums)
            : truth::int8_product(int8_arguments(output(nullptr, nullptr)), codes_.data());
    if (is_int8()) {
      const auto at = static_cast<size_t>(m_ * weight_.n);
      std::vector<float> scales(static_cast<size_t>(m_));
      if (m_ > 0) std::memcpy(scales.data(), y.data() + at, scales.size() * 4);
      const truth::Reader reader{out_scale_, out_zero_, out_least_, is_relu()};
      const auto* got = reinterpret_cast<const int8_t*>(y.data());
      return truth::complaint(product, reader, got, scales.data(), y_type_, weight_.n);
    }
    return truth::complaint(product, y.data(), y_type_, weight_.n);
  }

 private:
  bool is_random() const { return numbers_ == Numbers::kRandom; }
  bool is_int8() const { return written_ != Written::kNumbers; }
  bool is_relu() const {
    return written_ == Written::kReluInt8 || written_ == Written::kReluInt8WithZero;
  }
  int64_t stride() const { return m_ > 1 ? weight_.k + kGap : weight_.k; }

  static FloatType float_type(GroupType type) {
    return kFloatTypes[static_cast<int>(type) - static_cast<int>(GroupType::kFp16)];
  }

  void fill_codes(int64_t codes, Random& random) {
    codes_ = random.bytes(weight_.n * weight_.k, 0, codes);
    for (size_t i = 0; i < codes_.size(); ++i) {
      uint8_t& code = codes_[i];
      if (numbers_ == Numbers::kOneHot)
        code = static_cast<uint8_t>(static_cast<int64_t>(i) % codes);
      // No code stands for NaN or infinity.
      if (weight_.code == Code::kFp8E4M3 && (code & 0x7f) == 0x7f) code = 0x7e;
      if (weight_.code == Code::kFp8E5M2 && (code & 0x7f) >= 0x7c) code = 0x3c;
    }
  }

  void pack() {
    words_.assign(static_cast<size_t>(weight_.panels() * weight_.panel_words()), 0);
    pack_vnni(codes_.data(), words_.data(), weight_.n, weight_.k, is_nibble(weight_.code),
              pool_of(1));
    weight_.words = words_.data();
  }

  void fill_groups(const Format& format, int64_t codes, Random& random) {
    const int64_t count = weight_.panels() * weight_.groups() * kLanes;
    weight_.scale_type = format.scales;
    weight_.zero_type = format.zeros;
    if (format.scales == GroupType::kUint8) {
      // multiplier * (code - zero) fits a signed byte, as the format has it.
      scales_ = random.bytes(count, 1, 8);
      channel_scales_ = random.floats(weight_.n, 0.001f, 0.01f);
    } else if (format.scales == GroupType::kNested) {
      scales_ = random.bytes(count, 0, 256);
      nested_table_ = random.floats(256, -1, 1);
      nested_absmax_ =
          random.floats(qkernels::ceil_div(weight_.n * weight_.groups(), 256), 0.001f, 0.01f);
      weight_.nested_offset = 0.02f;
    } else if (format.scales == GroupType::kBlocks) {
      scales_ = random.bytes(count, 0, 256);
      for (int64_t i = 0; i < weight_.panels() * weight_.groups(); ++i) {
        for (float most : {0.002f, 0.02f, 0.5f, 1.5f}) {
          block_ranges_.push_back(random.between(0.1f * most, most));
        }
      }
    } else {
      const bool is_one = numbers_ == Numbers::kIntegers;
      scales_ =
          random.numbers(count, float_type(format.scales), is_one ? 1 : 0.001f, is_one ? 1 : 0.02f);
    }
    if (format.zeros == GroupType::kUint8) zeros_ = random.bytes(count, 0, codes);
    if (format.zeros == GroupType::kFp16) zeros_ = random.numbers(count, FloatType::kFp16, 0, 15);
    if (format.offsets != GroupType::kNone) {
      weight_.offset_type = format.offsets;
      offsets_ = random.numbers(count, float_type(format.offsets), -0.2f, 0.2f);
    }
    weight_.offsets = or_null(offsets_);
    if (weight_.code == Code::kTable4) table_ = random.floats(16, -1, 1);
    weight_.scales = scales_.data();
    weight_.zeros = or_null(zeros_);
    weight_.channel_scales = or_null(channel_scales_);
    weight_.table = or_null(table_);
    weight_.nested_table = or_null(nested_table_);
    weight_.nested_absmax = or_null(nested_absmax_);
    weight_.block_ranges = or_null(block_ranges_);
  }

  // Codes of a group are its zero point: all, all but the last, or all but some others. A third of
  // real zero points are beyond or between codes. Padding has a code that is none.
  void fill_zero_groups(int64_t codes, Random& random) {
    const bool real = weight_.zero_type == GroupType::kFp16;
    for (int64_t row = 0; row < weight_.n; ++row) {
      for (int64_t g = 0; g < weight_.groups(); ++g) {
        const int64_t first = g * weight_.group, count = weight_.codes_of_group(g);
        const int64_t place = (row / kLanes * weight_.groups() + g) * kLanes + row % kLanes;
        const auto zero = static_cast<uint8_t>(random.below(codes));
        uint8_t* at = codes_.data() + row * weight_.k + first;
        const int64_t end = std::min(first + weight_.group, weight_.k) - first;
        if (random.below(4) > 0) std::memset(at, zero, static_cast<size_t>(count));
        if (random.below(4) == 0) at[count - 1] = static_cast<uint8_t>(random.below(codes));
        std::memset(at + count, zero ^ 1, static_cast<size_t>(end - count));
        if (!real) {
          zeros_[static_cast<size_t>(place)] = zero;
          continue;
        }
        constexpr double kNoCodes[] = {0.25, 16, 256};
        const double beyond = random.below(3) > 0 ? 0 : kNoCodes[random.below(3)];
        truth::store_at(zeros_.data(), FloatType::kFp16, place, zero + beyond);
      }
    }
  }

  void fill_rows(Random& random) {
    const int64_t elements = m_ == 0 ? 0 : (m_ - 1) * stride() + weight_.k;
    if (rows_ == Rows::kQuantized)
      x_ = random.bytes(elements, 0, 256);
    else
      x_ = random.numbers(elements, x_type_, -3, 3);
    bias_type_ = kFloatTypes[random.below(3)];
    if (numbers_ == Numbers::kZeroGroups) {
      // Padding has no x, and the others enough for roundings to tell.
      for (int64_t i = 0; i < elements; ++i) {
        const int64_t g = i % stride() / weight_.group, column = i % stride() % weight_.group;
        const bool pads = g < weight_.groups() && column >= weight_.codes_of_group(g);
        if (pads) truth::store_at(x_.data(), x_type_, i, 0.0);
      }
      return;
    }
    if (!is_random()) {
      for (int64_t i = 0; i < elements; ++i) {
        const int64_t integer = random.below(201) - 100, picked = i / stride();
        const bool one_hot = numbers_ == Numbers::kOneHot;
        const int64_t value = one_hot ? i % stride() == picked : integer;
        truth::store_at(x_.data(), x_type_, i, static_cast<double>(value));
      }
      return;
    }
    const bool may_be_scaled = rows_ == Rows::kFloats && random.below(3) == 0;
    if (rows_ == Rows::kQuantized || may_be_scaled) row_scales_ = random.floats(m_, 0.01f, 0.1f);
    if (random.below(2) == 0) bias_ = random.numbers(weight_.n, bias_type_, -1, 1);
  }

  // Some numbers saturate; a row of NaN and one of infinity, where x or the bias may have such.
  void fill_output(Random& random) {
    const float kScales[] = {0.01f, 0.3f, 4.0f};
    out_scale_ = kScales[random.below(3)];
    const bool has_zero =
        written_ == Written::kInt8WithZero || written_ == Written::kReluInt8WithZero;
    constexpr int32_t kZeros[] = {-128, -5, 100};
    out_zero_ = has_zero ? kZeros[random.below(3)] : 0;
    out_least_ = has_zero ? -128 : -127;
    if (row_scales_.size() > 2) {
      row_scales_[0] = NAN;
      row_scales_[1] = INFINITY;
    }
    // relu(-inf) is a number.
    if (!bias_.empty() && is_relu()) truth::store_at(bias_.data(), bias_type_, 0, -INFINITY);
  }

  Output output(void* y, float* scales) const {
    Output out{y, y_type_, or_null(row_scales_), or_null(bias_), bias_type_};
    if (!is_int8()) return out;
    out.y = nullptr;
    out.int8.values = static_cast<int8_t*>(y);
    out.int8.row_scales = scales;
    out.int8.scale = out_scale_;
    out.int8.zero = out_zero_;
    out.int8.relu = is_relu();
    out.int8.limit(out_least_);
    return out;
  }

  FloatArguments float_arguments(const Output& out) const {
    return {weight_, m_, weight_.k, x_.data(), x_type_, stride(), out};
  }

  Int8Arguments int8_arguments(const Output& out) const {
    Int8Arguments arguments{};
    arguments.weight = weight_;
    arguments.m = m_;
    arguments.k = weight_.k;
    arguments.out = out;
    if (rows_ == Rows::kQuantized) {
      arguments.quantized = reinterpret_cast<const int8_t*>(x_.data());
      arguments.quantized_stride = stride();
      return arguments;
    }
    arguments.source.x = x_.data();
    arguments.source.type = x_type_;
    arguments.source.k = weight_.k;
    arguments.source.x_stride = stride();
    if (rows_ == Rows::kTensor) arguments.scale_of = ScaleOf::kTensor;
    if (rows_ == Rows::kGiven) arguments.scale_of = ScaleOf::kGiven;
    if (rows_ == Rows::kGiven) arguments.given_scale = &given_;
    return arguments;
  }

  Rows rows_;
  Numbers numbers_;
  Written written_;
  int64_t m_, missing_;
  FloatType x_type_, y_type_, bias_type_;
  Weight weight_{};
  Bytes codes_;  // [n][k]
  std::vector<uint32_t> words_;
  Bytes scales_, zeros_, offsets_, x_, bias_;
  std::vector<float> channel_scales_, table_, nested_table_, nested_absmax_, block_ranges_,
      row_scales_;
  float given_ = 0.02f;  // too small for some elements of x
  float out_scale_ = 0;
  int32_t out_zero_ = 0, out_least_ = 0;
};

class Products {
 public:
  Products(const Options& options, Random& random, const Take& take)
      : options_(options), random_(random), take_(take) {}

  void add(const Format& format, const Size& size, FloatType x, FloatType y,
           Numbers numbers = Numbers::kRandom, Written written = Written::kNumbers) {
    if (size.products() > options_.most_products) return;
    take_([&]() -> Case {
      const auto product = std::make_shared<const Product>(format, size, x, y, numbers, written,
                                                           options_.missing, random_);
      return {product->name(), product->schedules(options_.isas),
              [product](const Schedule& schedule, const Pool& pool) {
                return product->run(schedule, pool);
              },
              [product](const Bytes& result, const Schedule& schedule) {
                return product->complaint(result, schedule);
              }};
    });
  }

  // Sizes from which on work is split: K in parts; many tasks of panels; rows in several blocks;
  // tiles whose x outgrows the cache.
  void add_sizes() {
    constexpr Size kSizes[] = {{33, 2100, 3}, {145, 72, 17},   {16, 960, 70},
                               {16, 72, 530}, {49, 1100, 512}, {33, 4200, 300}};
    for (const Size& size : kSizes) add_size(size);
  }

  // So few rows and columns that faults are looked for in it: K in chunks of many rows.
  void add_long_rows() { add_size({16, 4200, 12}); }

  void add_size(const Size& size) {
    const GroupType half = GroupType::kFp16, none = GroupType::kNone, byte = GroupType::kUint8;
    for (int64_t group : {int64_t{64}, kWholeK}) {
      const auto of = [&](FloatType x, const Format& format) { add(format, size, x, x); };
      of(FloatType::kBf16, {Code::kInt4, group, half, byte, Rows::kFloats});
      of(FloatType::kBf16, {Code::kFp8E4M3, group, half, none, Rows::kFloats});
      of(FloatType::kFp32, {Code::kTable4, group, GroupType::kNested, none, Rows::kFloats});
      of(FloatType::kFp16, {Code::kInt8, group, half, byte, Rows::kTensor});
      of(FloatType::kFp32, {Code::kInt4, group, half, none, Rows::kRow});
      of(FloatType::kBf16, {Code::kInt4, group, byte, byte, Rows::kQuantized});
    }
  }

  void add_special_numbers() {
    for (FloatType type : kFloatTypes) {
      for (Code code : kCodes) {
        const Format format{code, kWholeK, GroupType::kFp32, GroupType::kNone, Rows::kFloats};
        add(format, {33, 72, 16}, type, FloatType::kFp32, Numbers::kOneHot);
      }
      for (Code code : {Code::kInt4, Code::kInt8}) {
        for (GroupType zeros : {GroupType::kUint8, GroupType::kFp16}) {
          for (int64_t group : {int64_t{32}, int64_t{112}, kWholeK}) {
            for (int64_t m : {1, 6, 17}) {
              const Format format{code, group, GroupType::kFp32, zeros, Rows::kFloats};
              add(format, {33, 135, m}, type, type, Numbers::kZeroGroups);
              // A last group of so few codes that a step has padding.
              add(format, {33, 226, m}, type, type, Numbers::kZeroGroups);
            }
          }
        }
        for (GroupType zeros : {GroupType::kNone, GroupType::kUint8}) {
          const Format format{code, 64, GroupType::kFp16, zeros, Rows::kFloats};
          add(format, {33, 320, 17}, type, type, Numbers::kIntegers);
        }
      }
    }
  }

  // Each format, with what else there is drawn at random: once in bf16, for the sake of weights
  // that are rounded, and once in another type.
  void add_format(const Format& format) {
    for (bool bf16 : {true, false}) {
      const auto& shape = kShapes[random_.below(5)];
      const FloatType x = bf16               ? FloatType::kBf16
                          : random_.below(2) ? FloatType::kFp16
                                             : FloatType::kFp32;
      const FloatType y = random_.below(3) > 0 || bf16 ? x : kFloatTypes[random_.below(3)];
      add(format, {shape[0], shape[1], kRows[random_.below(6)]}, x, y);
    }
  }

  void add_blocks() {
    for (int64_t group : kGroups) {
      for (int i = 0; i < 2; ++i) {
        add_format({Code::kInt4, group, GroupType::kBlocks, GroupType::kBlocks, Rows::kFloats});
      }
    }
  }

  // Each way in which y becomes int8, behind each kernel; the first sizes are split, in parts of K
  // and in blocks of rows.
  void add_outputs() {
    constexpr Size kSizes[] = {{16, 2100, 3}, {17, 72, 70}, {49, 135, 5}, {33, 320, 17}};
    constexpr Written kWritten[] = {Written::kInt8, Written::kInt8WithZero, Written::kReluInt8,
                                    Written::kReluInt8WithZero};
    const GroupType half = GroupType::kFp16, none = GroupType::kNone, byte = GroupType::kUint8;
    for (const Size& size : kSizes) {
      for (Written written : kWritten) {
        for (FloatType type : kFloatTypes) {
          const auto of = [&](const Format& format) {
            add(format, size, type, type, Numbers::kRandom, written);
          };
          of({Code::kInt4, 64, half, byte, Rows::kFloats});
          of({Code::kTable4, kWholeK, GroupType::kFp32, none, Rows::kFloats});
          of({Code::kInt8, kWholeK, half, none, Rows::kGiven});
          of({Code::kInt4, 64, byte, byte, Rows::kQuantized});
          of({Code::kInt4, 64, half, none, Rows::kQuantized});
        }
      }
    }
  }

  void add_formats() {
    const auto scales = {GroupType::kFp16, GroupType::kBf16, GroupType::kFp32};
    for (int64_t group : kGroups) {
      for (Code code : kCodes) {
        for (GroupType zeros : {GroupType::kNone, GroupType::kUint8, GroupType::kFp16}) {
          for (GroupType type : scales) add_format({code, group, type, zeros, Rows::kFloats});
          add_format({code, group, GroupType::kNested, zeros, Rows::kFloats});
        }
      }
      for (Code code : {Code::kInt4, Code::kInt8}) {
        for (GroupType type : scales)
          add_format({code, group, type, GroupType::kUint8, Rows::kFloats, type});
        add_format(
            {code, group, GroupType::kFp32, GroupType::kFp16, Rows::kFloats, GroupType::kFp32});
      }
      for (Rows rows : {Rows::kRow, Rows::kTensor, Rows::kGiven, Rows::kQuantized}) {
        for (GroupType zeros : {GroupType::kNone, GroupType::kUint8}) {
          for (GroupType type : scales) {
            add_format({Code::kInt4, group, type, zeros, rows});
            add_format({Code::kInt8, group, type, zeros, rows});
          }
          // Two levels are of codes of 4 bits alone: see scheme.py.
          add_format({Code::kInt4, group, GroupType::kUint8, zeros, rows});
        }
      }
    }
  }

 private:
  const Options& options_;
  Random& random_;
  const Take& take_;
};

}  // namespace

void make_products(const Options& options, Random& random, const Take& take) {
  Products products(options, random, take);
  products.add_special_numbers();
  products.add_sizes();
  products.add_formats();
  // Drawn apart, so that what is drawn after it stays as it is.
  Random own(4200);
  Products(options, own, take).add_long_rows();
}

void make_outputs(const Options& options, Random& random, const Take& take) {
  Products(options, random, take).add_outputs();
}

void make_blocks(const Options& options, Random& random, const Take& take) {
  Products(options, random, take).add_blocks();
}

}  // namespace cases
