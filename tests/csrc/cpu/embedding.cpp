// Rows of a weight by their numbers, over the orders, formats and sizes that the bindings let
// through. What must come out follows from codes and numbers as they are before they are laid out,
// each step rounded to fp32: to the bit.

#include "cpu/embedding.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cases.h"
#include "cpu/vnni.h"

namespace cases {

using namespace qkernels::cpu;

namespace {

constexpr const char* kGroupNames[] = {"none", "fp16", "bf16", "fp32", "uint8", "nested", "blocks"};
constexpr int64_t kWholeK = 1 << 20;
// Columns that the groups of panels are multiples of.
constexpr int64_t kGroupMultiple = 16;

struct Form {
  RowOrder order;
  int bits;
  int64_t group;
  GroupType scales;  // kUint8: with a scale for each row, the second level
  GroupType zeros = GroupType::kNone;
  GroupType offsets = GroupType::kNone;
  bool one_scale = false;
};

struct Size {
  int64_t n, k, count;
};

// A number for each group of each row, or one for all: `stored` in that order, `placed` in that of
// the codes.
struct Numbers {
  GroupType type = GroupType::kNone;
  Bytes stored, placed;

  bool are_bytes() const { return type >= GroupType::kUint8; }
  int64_t size() const { return are_bytes() ? 1 : size_of(float_type()); }
  FloatType float_type() const {
    return kFloatTypes[static_cast<int>(type) - static_cast<int>(GroupType::kFp16)];
  }
  double at(int64_t index) const {
    if (are_bytes()) return stored[static_cast<size_t>(index)];
    return truth::number_at(stored.data(), float_type(), index);
  }
  GroupNumbers as_given() const { return {or_null(placed), type}; }
};

double rounded(double value) { return truth::nearest(value, truth::kFp32); }

class LookUp {
 public:
  LookUp(const Form& form, const Size& size, FloatType type, Random& random)
      : form_(form), size_(size), type_(type) {
    form_.group = std::min(form.group, size.k);
    groups_ = qkernels::ceil_div(size.k, form_.group);
    const int64_t multiple = is_panels() && groups_ > 1 ? kGroupMultiple : 1;
    padded_group_ = qkernels::ceil_div(form_.group, multiple) * multiple;
    columns_ = (groups_ - 1) * (padded_group_ - form_.group) + size.k;
    fill_codes(random);
    fill_groups(random);
    fill_rows(random);
  }

  std::string name() const {
    const auto number = [](int64_t value) { return static_cast<int>(value); };
    char text[200];
    std::snprintf(text, sizeof text,
                  "embedding %s bits %d group %d scales %s%s zeros %s offsets %s n %d k %d rows %d "
                  "of %s",
                  is_panels() ? "panels" : "dense", form_.bits, number(form_.group),
                  kGroupNames[static_cast<int>(form_.scales)], form_.one_scale ? " one" : "",
                  kGroupNames[static_cast<int>(form_.zeros)],
                  kGroupNames[static_cast<int>(form_.offsets)], number(size_.n), number(size_.k),
                  number(size_.count), name_of(type_));
    return text;
  }

  // The rows, and a byte for what is told of wrong row numbers.
  Bytes run(const Pool& pool) const {
    Bytes out = unwritten(size_.count * size_.k, size_of(type_));
    look_up(table(), rows_.data(), size_.count, out.data(), type_, pool);
    out.push_back(tells_of_wrong_rows());
    return out;
  }

  std::string complaint(const Bytes& out) const {
    if (out.back() != 1) return "rows out of range are not told from others";
    const auto size = static_cast<size_t>(size_of(type_));
    uint8_t want[4];
    for (int64_t i = 0; i < size_.count; ++i) {
      for (int64_t c = 0; c < size_.k; ++c) {
        const int64_t at = i * size_.k + c;
        truth::store_at(want, type_, 0, element(rows_[static_cast<size_t>(i)], c));
        if (std::memcmp(want, out.data() + static_cast<size_t>(at) * size, size) == 0) continue;
        char text[100];
        std::snprintf(text, sizeof text, "%.9g instead of %.9g at row %d, column %d",
                      truth::number_at(out.data(), type_, at), truth::number_at(want, type_, 0),
                      static_cast<int>(i), static_cast<int>(c));
        return text;
      }
    }
    return "";
  }

 private:
  bool is_panels() const { return form_.order == RowOrder::kPanels; }
  // Where a number of a group is before it is laid out.
  int64_t place(int64_t row, int64_t g) const { return form_.one_scale ? 0 : row * groups_ + g; }

  void fill_codes(Random& random) {
    codes_ = random.bytes(size_.n * size_.k, 0, 1 << form_.bits);
    values_ = random.floats(form_.bits == 8 ? 256 : 16, -8, 8);
    // Half between two numbers of bf16 and of fp16, where the scale is one.
    for (size_t i = 0; i < values_.size(); i += 4) values_[i] = 257 + static_cast<float>(i);
    for (size_t i = 2; i < values_.size(); i += 4) values_[i] = 2049 + 2 * static_cast<float>(i);
    if (is_panels())
      pack_panels(random);
    else
      pack_bits();
  }

  // Each row a stream of bits, from the lowest of its first word on.
  void pack_bits() {
    const int64_t stride = qkernels::ceil_div(size_.k * form_.bits, 32);
    words_.assign(static_cast<size_t>(size_.n * stride), 0);
    for (int64_t i = 0; i < size_.n * size_.k; ++i) {
      for (int bit = 0; bit < form_.bits; ++bit) {
        const int64_t at = i % size_.k * form_.bits + bit;
        const uint32_t one = codes_[static_cast<size_t>(i)] >> bit & 1;
        words_[static_cast<size_t>(i / size_.k * stride + at / 32)] |= one << at % 32;
      }
    }
  }

  // What pads a group is any code, which must not be looked up.
  void pack_panels(Random& random) {
    Bytes padded = random.bytes(size_.n * columns_, 0, 1 << form_.bits);
    for (int64_t i = 0; i < size_.n * size_.k; ++i) {
      const int64_t row = i / size_.k, c = i % size_.k;
      const int64_t column = c / form_.group * padded_group_ + c % form_.group;
      padded[static_cast<size_t>(row * columns_ + column)] = codes_[static_cast<size_t>(i)];
    }
    const bool nibbles = form_.bits <= 4;
    const int64_t panels = qkernels::ceil_div(size_.n, kLanes);
    const int64_t words = panels * kLanes * padded_columns(columns_) / (nibbles ? 8 : 4);
    words_.assign(static_cast<size_t>(words), 0);
    pack_vnni(padded.data(), words_.data(), size_.n, columns_, nibbles, pool_of(1));
  }

  Numbers numbers(GroupType type, float low, float high, Random& random) const {
    Numbers out;
    out.type = type;
    const int64_t count = form_.one_scale ? 1 : size_.n * groups_;
    if (out.are_bytes())
      out.stored = random.bytes(count, 0, 256);
    else
      out.stored = random.numbers(count, out.float_type(), low, high);
    out.placed = is_panels() ? in_panels(out) : out.stored;
    return out;
  }

  // Rows that fill the last panel up have numbers that are none.
  Bytes in_panels(const Numbers& numbers) const {
    const int64_t size = numbers.size(), panels = qkernels::ceil_div(size_.n, kLanes);
    Bytes out = unwritten(panels * groups_ * kLanes, size);
    for (int64_t row = 0; row < size_.n; ++row) {
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t to = (row / kLanes * groups_ + g) * kLanes + row % kLanes;
        const auto from = numbers.stored.begin() + place(row, g) * size;
        std::copy(from, from + size, out.begin() + to * size);
      }
    }
    return out;
  }

  void fill_groups(Random& random) {
    const bool is_one = form_.one_scale;
    scales_ = numbers(form_.scales, is_one ? 1 : -0.02f, is_one ? 1 : 0.02f, random);
    if (form_.zeros != GroupType::kNone) zeros_ = numbers(form_.zeros, -9, 9, random);
    if (form_.offsets != GroupType::kNone) offsets_ = numbers(form_.offsets, -1, 1, random);
    if (form_.scales == GroupType::kUint8) channel_scales_ = random.floats(size_.n, -0.1f, 0.1f);
    if (form_.scales != GroupType::kNested) return;
    nested_table_ = random.floats(256, -1, 1);
    nested_absmax_ = random.floats(qkernels::ceil_div(size_.n * groups_, 256), 0.001f, 0.01f);
    nested_offset_ = 0.02f;
  }

  // The first row, the last one twice, and others.
  void fill_rows(Random& random) {
    const int64_t some[] = {size_.n - 1, 0, size_.n - 1};
    for (int64_t i = 0; i < size_.count; ++i) {
      rows_.push_back(i < 3 ? some[i] : random.below(size_.n));
    }
  }

  EmbeddingTable table() const {
    EmbeddingTable out{};
    out.order = form_.order;
    out.words = words_.data();
    out.bits = form_.bits;
    out.n = size_.n;
    out.k = size_.k;
    out.columns = columns_;
    out.group = form_.group;
    out.padded_group = padded_group_;
    out.groups = groups_;
    out.one_scale = form_.one_scale;
    out.values = values_.data();
    out.scales = scales_.as_given();
    out.zeros = zeros_.as_given();
    out.offsets = offsets_.as_given();
    out.channel_scales = or_null(channel_scales_);
    out.nested_table = or_null(nested_table_);
    out.nested_absmax = or_null(nested_absmax_);
    out.nested_offset = nested_offset_;
    return out;
  }

  uint8_t tells_of_wrong_rows() const {
    const int64_t n = size_.n;
    if (out_of_range(rows_.data(), size_.count, n) != nullptr) return 0;
    for (int64_t wrong : {int64_t{-1}, n, int64_t{1} << 40}) {
      const int64_t rows[] = {n - 1, wrong, 0, wrong};
      if (out_of_range(rows, 4, n) != rows + 1) return 0;
    }
    return 1;
  }

  double element(int64_t row, int64_t column) const {
    const int64_t g = column / form_.group, index = place(row, g);
    const uint8_t code = codes_[static_cast<size_t>(row * size_.k + column)];
    double value = values_[code];
    if (form_.zeros != GroupType::kNone) value = rounded(value - zeros_.at(index));
    value = rounded(value * scale(row, index));
    return form_.offsets == GroupType::kNone ? value : rounded(value + offsets_.at(index));
  }

  double scale(int64_t row, int64_t index) const {
    const double stored = scales_.at(index);
    if (form_.scales == GroupType::kNested) {
      const double largest = nested_absmax_[static_cast<size_t>(index / 256)];
      return rounded(rounded(nested_table_[static_cast<size_t>(stored)] * largest) +
                     nested_offset_);
    }
    if (form_.scales != GroupType::kUint8) return stored;
    return rounded(stored * channel_scales_[static_cast<size_t>(row)]);
  }

  Form form_;
  Size size_;
  FloatType type_;
  int64_t groups_, padded_group_, columns_;
  Bytes codes_;  // [n][k]
  std::vector<uint32_t> words_;
  Numbers scales_, zeros_, offsets_;
  std::vector<float> values_, channel_scales_, nested_table_, nested_absmax_;
  float nested_offset_ = 0;
  std::vector<int64_t> rows_;
};

// Fewer rows and columns than a panel, a word and a group; whole ones; and neither.
constexpr int64_t kShapes[][2] = {{1, 1}, {5, 7}, {16, 64}, {49, 135}, {37, 200}};
constexpr int64_t kCounts[] = {1, 3, 20};

}  // namespace

void make_embeddings(const Options& options, Random& random, const Take& take) {
  const std::vector<Schedule> schedules{{options.isas.front(), false, false}};
  const auto add = [&](const Form& form, const Size& size, FloatType type) {
    take([&]() -> Case {
      const auto rows = std::make_shared<const LookUp>(form, size, type, random);
      return {rows->name(), schedules,
              [rows](const Schedule&, const Pool& pool) { return rows->run(pool); },
              [rows](const Bytes& out, const Schedule&) { return rows->complaint(out); }};
    });
  };
  const auto floats = {GroupType::kFp16, GroupType::kBf16, GroupType::kFp32};
  const auto zero_types = {GroupType::kNone, GroupType::kUint8, GroupType::kFp16, GroupType::kBf16,
                           GroupType::kFp32};
  for (RowOrder order : {RowOrder::kDense, RowOrder::kPanels}) {
    for (int bits : {1, 2, 3, 4, 8}) {
      // In some shape, of some rows and type.
      const auto add_somewhere = [&](const Form& form) {
        const auto& shape = kShapes[random.below(5)];
        add(form, {shape[0], shape[1], kCounts[random.below(3)]}, kFloatTypes[random.below(3)]);
      };
      for (int64_t group : {int64_t{16}, int64_t{24}, int64_t{64}, kWholeK}) {
        for (GroupType zeros : zero_types) {
          for (GroupType scales : floats) add_somewhere({order, bits, group, scales, zeros});
          add_somewhere({order, bits, group, GroupType::kUint8, zeros});
          add_somewhere({order, bits, group, GroupType::kNested, zeros});
        }
        for (GroupType offsets : floats) {
          add_somewhere({order, bits, group, offsets, GroupType::kUint8, offsets});
          add_somewhere({order, bits, group, offsets, GroupType::kNone, offsets});
        }
      }
      for (FloatType type : kFloatTypes) {
        const GroupType half = GroupType::kFp16, byte = GroupType::kUint8, none = GroupType::kNone;
        for (GroupType zeros : {none, byte})
          add({order, bits, kWholeK, GroupType::kFp32, zeros, none, true}, {33, 135, 20}, type);
        // No rows; groups of which the last is short, in rows that begin within a block of 256
        // scales; enough rows for several threads.
        add({order, bits, 64, half, byte}, {33, 135, 0}, type);
        add({order, bits, 24, GroupType::kNested, byte}, {49, 205, 20}, type);
        add({order, bits, 24, half, half}, {49, 205, 200}, type);
      }
    }
  }
}

}  // namespace cases
