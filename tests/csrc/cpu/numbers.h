// Numbers of few bits by their definition, one at a time: what the conversions of csrc/cpu are held
// to.

#pragma once

#include <cstdint>

#include "cpu/weight.h"

namespace truth {

using qkernels::cpu::FloatType;

// A sign bit, an exponent with the usual bias, a mantissa.
struct Layout {
  int exponent, mantissa;
  bool has_infinity;  // else only a mantissa of ones is NaN

  int bias() const { return (1 << (exponent - 1)) - 1; }
};

constexpr Layout kFp16{5, 10, true}, kBf16{8, 7, true}, kFp32{8, 23, true};
constexpr Layout kE4M3{4, 3, false}, kE5M2{5, 2, true};

constexpr const Layout& layout_of(FloatType type) {
  return type == FloatType::kFp16 ? kFp16 : type == FloatType::kBf16 ? kBf16 : kFp32;
}

double number_of(uint32_t bits, const Layout& layout);
// The distance of the numbers around `value`.
double spacing(double value, const Layout& layout);
// The number that is nearest to `value`, half to even; infinity beyond the largest.
double nearest(double value, const Layout& layout);

// The element at `index` of an array of numbers.
double number_at(const void* array, FloatType type, int64_t index);
// Makes it the number nearest to `value`.
void store_at(void* array, FloatType type, int64_t index, double value);

}  // namespace truth
