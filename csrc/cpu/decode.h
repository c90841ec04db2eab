// Codes to numbers: for each code type, a struct that takes a column out of a step's words.
// `value(words, c)` is the number of column c of the step less `offset`, in each of 16 rows.

#pragma once

#include "cpu/faults.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

// Where column c of a step of eight lies in its lane.
constexpr int nibble_shift(int column) { return column < 4 ? 8 * column : 8 * (column - 4) + 4; }

template <class V, int kColumn>
QK_INLINE typename V::I nibble_first(typename V::I words) {
  if constexpr (nibble_shift(kColumn) == 0)
    return words;
  else
    return V::template right<nibble_shift(kColumn)>(words);
}

// Integers of up to 4 bits less 8: smaller sums are more exact.
template <class V>
struct Int4 {
  static constexpr int kColumns = 8;
  float offset = 8;

  explicit Int4(const Weight&) {}

  template <int kColumn>
  QK_INLINE typename V::F value(typename V::I words) const {
    // With its top bit flipped, a code read as a signed number of 4 bits is code - 8.
    auto code = V::xor_(words, V::broadcast(int32_t(0x88888888)));
    constexpr int kUp = 28 - nibble_shift(kColumn);
    if constexpr (kUp > 0) code = V::template left<kUp>(code);
    return V::to_float(V::template right_signed<28>(code));
  }
};

// One of 16 numbers; also integers of 2 and 3 bits, and where lookups are fast those of 4.
template <class V>
struct Table4 {
  static constexpr int kColumns = 8;
  float offset = 0;
  typename V::Table table;

  explicit Table4(const Weight& weight) {
    if (weight.code == Code::kTable4) {
      table = V::load_table(weight.table);
      return;
    }
    offset = weight.implied_zero;
    if (QK_FAULT(middle_off_by_one)) offset += 1;
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i) - offset;
    table = V::load_table(values);
  }

  template <int kColumn>
  QK_INLINE typename V::F value(typename V::I words) const {
    return V::lookup(table, nibble_first<V, kColumn>(words));
  }
};

template <class V>
struct Int8 {
  static constexpr int kColumns = 4;
  float offset = 128;

  explicit Int8(const Weight&) {}

  template <int kColumn>
  QK_INLINE typename V::F value(typename V::I words) const {
    // With its top bit flipped, a code read as a signed byte is code - 128.
    auto code = V::xor_(words, V::broadcast(int32_t(0x80808080)));
    if constexpr (kColumn < 3) code = V::template left<24 - 8 * kColumn>(code);
    return V::to_float(V::template right_signed<24>(code));
  }
};

// E4M3: moved into the fields of fp16, whose exponent is biased by 8 more.
template <class V>
struct Fp8E4M3 {
  static constexpr int kColumns = 4;
  float offset = 0;

  explicit Fp8E4M3(const Weight&) {}

  template <int kColumn>
  QK_INLINE typename V::F value(typename V::I words) const {
    auto byte = words;
    if constexpr (kColumn > 0) byte = V::template right<8 * kColumn>(words);
    const auto sign = V::template left<8>(V::and_(byte, V::broadcast(int32_t{0x80})));
    const auto rest = V::template left<7>(V::and_(byte, V::broadcast(int32_t{0x7f})));
    return V::mul(V::low_half_to_float(V::or_(sign, rest)), V::broadcast(256.0f));
  }
};

// E5M2 is the upper byte of fp16.
template <class V>
struct Fp8E5M2 {
  static constexpr int kColumns = 4;
  float offset = 0;

  explicit Fp8E5M2(const Weight&) {}

  template <int kColumn>
  QK_INLINE typename V::F value(typename V::I words) const {
    auto shifted = words;
    if constexpr (kColumn == 0) shifted = V::template left<8>(words);
    if constexpr (kColumn > 1) shifted = V::template right<8 * kColumn - 8>(words);
    return V::low_half_to_float(V::and_(shifted, V::broadcast(int32_t{0xff00})));
  }
};

// `visit(decoder)` for the decoder of a weight.
template <class V, class Visit>
void visit_decoder(const Weight& weight, const Visit& visit) {
  switch (weight.code) {
    case Code::kInt4:
      if (V::kFastLookup || weight.implied_zero != 8) return visit(Table4<V>(weight));
      return visit(Int4<V>(weight));
    case Code::kTable4: return visit(Table4<V>(weight));
    case Code::kInt8: return visit(Int8<V>(weight));
    case Code::kFp8E4M3: return visit(Fp8E4M3<V>(weight));
    default: return visit(Fp8E5M2<V>(weight));
  }
}

}  // namespace qkernels::cpu
