#include "numbers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace truth {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

double number_of(uint32_t bits, const Layout& layout) {
  const int top = (1 << layout.exponent) - 1, ones = (1 << layout.mantissa) - 1;
  const int mantissa = static_cast<int>(bits) & ones;
  const int exponent = static_cast<int>(bits >> layout.mantissa) & top;
  const double sign = bits >> (layout.exponent + layout.mantissa) & 1 ? -1 : 1;
  if (exponent == top && layout.has_infinity) return mantissa == 0 ? sign * kInfinity : NAN;
  if (exponent == top && mantissa == ones) return NAN;
  const int whole = exponent == 0 ? mantissa : mantissa + ones + 1;
  return sign * std::ldexp(whole, std::max(exponent, 1) - layout.bias() - layout.mantissa);
}

double spacing(double value, const Layout& layout) {
  int exponent;
  std::frexp(value, &exponent);
  return std::ldexp(1, std::max(exponent - 1, 1 - layout.bias()) - layout.mantissa);
}

double nearest(double value, const Layout& layout) {
  if (!std::isfinite(value) || value == 0) return value;
  const double step = spacing(value, layout), rounded = std::nearbyint(value / step) * step;
  const bool is_beyond = std::fabs(rounded) >= std::ldexp(1, layout.bias() + 1);
  return is_beyond ? std::copysign(kInfinity, value) : rounded;
}

double number_at(const void* array, FloatType type, int64_t index) {
  const int64_t size = qkernels::cpu::size_of(type);
  uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(array) + index * size, static_cast<size_t>(size));
  return number_of(bits, layout_of(type));
}

void store_at(void* array, FloatType type, int64_t index, double value) {
  const int64_t size = qkernels::cpu::size_of(type);
  // fp32 has all numbers of the types; bf16 is its upper half, and fp16 has another exponent.
  const auto wide = static_cast<float>(nearest(value, layout_of(type)));
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  if (type == FloatType::kBf16) bits >>= 16;
  if (type == FloatType::kFp16) {
    const uint32_t sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x7f800000)
      bits = sign | 0x7c00 | (magnitude > 0x7f800000) << 9;
    else if (magnitude < 0x38800000)  // below the normal numbers: in units of 2^-24
      bits = sign | static_cast<uint32_t>(std::ldexp(std::fabs(wide), 24));
    else
      bits = sign | (magnitude - (112u << 23)) >> 13;
  }
  std::memcpy(static_cast<char*>(array) + index * size, &bits, static_cast<size_t>(size));
}

}  // namespace truth
