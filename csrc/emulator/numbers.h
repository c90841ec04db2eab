// fp16 and bf16 by their bits, as a GPU computes with them: one rounding to nearest even,
// subnormals kept, every NaN that comes out is 0x7fff.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qkernels::emulator {

template <class To, class From>
To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr int kDoubleMantissa = 52;
constexpr int kDoubleBias = 1023;

// The 16-bit number nearest to x; kMantissa is 10 for fp16, 7 for bf16.
template <int kMantissa>
uint16_t round_to_16(double x) {
  constexpr int kBias = (1 << (14 - kMantissa)) - 1;
  constexpr uint32_t kInfinity = static_cast<uint32_t>(2 * kBias + 1) << kMantissa;
  const uint64_t bits = bits_to<uint64_t>(x);
  const uint32_t sign = static_cast<uint32_t>(bits >> 63) << 15;
  const int exponent = static_cast<int>(bits >> kDoubleMantissa & 0x7ff);
  if (exponent == 0x7ff) {
    return static_cast<uint16_t>(x != x ? 0x7fff : sign | kInfinity);
  }
  const int place = exponent - kDoubleBias + kBias;
  if (place > 2 * kBias) return static_cast<uint16_t>(sign | kInfinity);
  // Bits to round away: more of them where the result is subnormal.
  const int dropped = kDoubleMantissa - kMantissa + (place < 1 ? 1 - place : 0);
  if (exponent == 0 || dropped > kDoubleMantissa + 1) return static_cast<uint16_t>(sign);
  const uint64_t mantissa =
      (bits & ((uint64_t{1} << kDoubleMantissa) - 1)) | uint64_t{1} << kDoubleMantissa;
  const uint64_t kept = mantissa >> dropped;
  const uint64_t rest = mantissa & ((uint64_t{1} << dropped) - 1);
  const uint64_t half = uint64_t{1} << (dropped - 1);
  const uint64_t up = rest > half || (rest == half && (kept & 1) != 0) ? 1 : 0;
  // `kept` has the leading one, which adds one to the exponent below; so a carry out of the
  // mantissa gives the next exponent, and at last infinity.
  const uint64_t below = place < 1 ? 0 : static_cast<uint64_t>(place - 1) << kMantissa;
  return static_cast<uint16_t>(sign | (below + kept + up));
}

// a + b rounded to odd, so that rounding it again to few bits gives what rounding a + b would.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  if (!std::isfinite(sum) || error == 0) return sum;
  uint64_t bits = bits_to<uint64_t>(sum);
  if ((bits & 1) != 0) return sum;
  // The neighbour of `sum` on the side of the error is odd.
  bits += (error > 0) == (sum > 0) ? 1 : -1;
  return bits_to<double>(bits);
}

inline float bfloat16_to_float(uint16_t bits) {
  return bits_to<float>(static_cast<uint32_t>(bits) << 16);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // As fp32 the exponent is 112 too small; multiplying also makes normal numbers of subnormal ones.
  return bits_to<float>(sign | bits_to<uint32_t>(bits_to<float>(magnitude << 13) * 0x1p112f));
}

}  // namespace qkernels::emulator
