// Sixteen lanes in plain C++. The other vector_*.h have the same interface.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/faults.h"

namespace qkernels::cpu {

// IEEE half and bfloat16 to float and back, rounding half to even.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {
    value = static_cast<float>(magnitude) * 0x1p-24f;
    if (QK_FAULT(subnormals_flushed)) value = 0;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (QK_FAULT(portable_bf16_ties_go_up)) ++bits;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // from 65520 on
  if (bits < 0x38800000) {                       // below 2^-14
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return sign | static_cast<uint16_t>(std::lrintf(magnitude * 0x1p24f));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - (112u << 23)) >> 13);
}

struct Portable {
  struct F {
    float lane[16];
  };
  struct I {
    int32_t lane[16];
  };

  // How many panels of W a block of several rows' sums in registers has, at most.
  static constexpr int kMostPanels = 1;
  static constexpr int kPanelsOfOneRow = 1;  // float_rows.h
  // Sums that take turns over the columns, for more additions in flight.
  static constexpr int kSplit = 1;
  // Whether fma rounds once.
  static constexpr bool kFused = false;
  static constexpr bool kFastLookup = false;
  // What `dot` takes bytes of 8 bits less: 128 where it multiplies signed ones alone.
  static constexpr int32_t kByteOffset = 0;
  // Sums of bursts.h: enough to hide how long an operation takes.
  static constexpr int kBurstSums = 12;

  template <class Value>
  static F make_f(const Value& value) {
    F out;
    for (int i = 0; i < 16; ++i) out.lane[i] = value(i);
    return out;
  }
  template <class Value>
  static I make_i(const Value& value) {
    I out;
    for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<int32_t>(value(i));
    return out;
  }

  static F broadcast(float a) {
    return make_f([&](int) { return a; });
  }
  static I broadcast(int32_t a) {
    return make_i([&](int) { return a; });
  }
  static F load(const float* p) {
    return make_f([&](int i) { return p[i]; });
  }
  static I load(const int32_t* p) {
    return make_i([&](int i) { return p[i]; });
  }
  static I load(const uint32_t* p) {
    return make_i([&](int i) { return p[i]; });
  }
  static F load_half(const uint16_t* p) {
    return make_f([&](int i) { return half_to_float(p[i]); });
  }
  static F load_bf16(const uint16_t* p) {
    return make_f([&](int i) { return bf16_to_float(p[i]); });
  }
  static I load_bytes(const uint8_t* p) {
    return make_i([&](int i) { return p[i]; });
  }
  static void store(float* p, F a) { std::memcpy(p, a.lane, sizeof a); }
  static void store(int32_t* p, I a) { std::memcpy(p, a.lane, sizeof a); }
  static void store_half(uint16_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.lane[i]);
  }
  static void store_bf16(uint16_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a.lane[i]);
  }
  static void store_bytes(int8_t* p, I a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.lane[i]);
  }

  static F add(F a, F b) {
    return make_f([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F sub(F a, F b) {
    return make_f([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F mul(F a, F b) {
    return make_f([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F div(F a, F b) {
    return make_f([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  // a * b + c. Not rounded in between only where the machine does so at no cost.
  static F fma(F a, F b, F c) {
    return make_f([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // c - a * b
  static F fnma(F a, F b, F c) {
    return make_f([&](int i) { return c.lane[i] - a.lane[i] * b.lane[i]; });
  }
  static F min(F a, F b) {
    return make_f([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F max(F a, F b) {
    return make_f([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  // a < b ? yes : no
  static F select_less(F a, F b, F yes, F no) {
    return make_f([&](int i) { return a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]; });
  }
  // Whole numbers: the nearest, half to even, and the next below.
  static F nearest(F a) {
    // From 2^22 on the sum might not be exact, and from 2^23 on there are no others.
    return make_f([&](int i) {
      const float whole = (a.lane[i] + 0x1.8p23f) - 0x1.8p23f;
      return std::fabs(a.lane[i]) < 0x1p22f ? whole : std::rint(a.lane[i]);
    });
  }
  static F floor(F a) {
    return make_f([&](int i) { return std::floor(a.lane[i]); });
  }
  // a, and 0 where it is NaN
  static F zero_nan(F a) {
    return make_f([&](int i) { return a.lane[i] == a.lane[i] ? a.lane[i] : 0.0f; });
  }
  static F to_float(I a) {
    return make_f([&](int i) { return static_cast<float>(a.lane[i]); });
  }
  // Half to even; within the range of int32.
  static I round(F a) {
    return make_i([&](int i) { return std::lrintf(a.lane[i]); });
  }
  static I bits(F a) {
    I out;
    std::memcpy(&out, &a, sizeof a);
    return out;
  }
  static F from_bits(I a) {
    F out;
    std::memcpy(&out, &a, sizeof a);
    return out;
  }

  // Integers wrap.
  static I add(I a, I b) {
    return make_i([&](int i) { return uint32_t(a.lane[i]) + uint32_t(b.lane[i]); });
  }
  static I sub(I a, I b) {
    return make_i([&](int i) { return uint32_t(a.lane[i]) - uint32_t(b.lane[i]); });
  }
  static I mul(I a, I b) {
    return make_i([&](int i) { return uint32_t(a.lane[i]) * uint32_t(b.lane[i]); });
  }
  static I max(I a, I b) {
    return make_i([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static I and_(I a, I b) {
    return make_i([&](int i) { return a.lane[i] & b.lane[i]; });
  }
  static I or_(I a, I b) {
    return make_i([&](int i) { return a.lane[i] | b.lane[i]; });
  }
  static I xor_(I a, I b) {
    return make_i([&](int i) { return a.lane[i] ^ b.lane[i]; });
  }
  template <int kBy>
  static I left(I a) {
    return make_i([&](int i) { return uint32_t(a.lane[i]) << kBy; });
  }
  template <int kBy>
  static I right(I a) {
    return make_i([&](int i) { return uint32_t(a.lane[i]) >> kBy; });
  }
  template <int kBy>
  static I right_signed(I a) {
    return make_i([&](int i) { return a.lane[i] >> kBy; });
  }

  // The lowest byte of a lane in all four.
  static I spread_byte(I a) {
    return make_i([&](int i) { return (uint32_t(a.lane[i]) & 0xff) * 0x01010101u; });
  }
  // Whether no lane is zero.
  static bool all(I a) {
    bool all = true;
    for (int i = 0; i < 16; ++i) all = all && a.lane[i] != 0;
    return all;
  }
  // b in the lanes where a is not zero, and zero in the others.
  static F where(I a, F b) {
    return make_f([&](int i) { return a.lane[i] != 0 ? b.lane[i] : 0.0f; });
  }

  // fp16 numbers in the low halves of the lanes.
  static F low_half_to_float(I a) {
    return make_f([&](int i) { return half_to_float(static_cast<uint16_t>(a.lane[i])); });
  }

  struct Table {
    float value[16];
  };
  static Table load_table(const float* p) {
    Table table;
    std::memcpy(table.value, p, sizeof table);
    return table;
  }
  // By the four low bits of each lane.
  static F lookup(const Table& table, I index) {
    return make_f([&](int i) { return table.value[index.lane[i] & 15]; });
  }

  // sum + the products of the four bytes of each lane, unsigned times signed, wrapping.
  // With kSmall, unsigned bytes are below 64.
  template <bool kSmall>
  static I dot(I sum, I unsigned_bytes, I signed_bytes) {
    return make_i([&](int i) {
      const auto a = static_cast<uint32_t>(unsigned_bytes.lane[i]);
      const auto b = static_cast<uint32_t>(signed_bytes.lane[i]);
      auto total = static_cast<uint32_t>(sum.lane[i]);
      for (int byte = 0; byte < 32; byte += 8) {
        const int32_t left = static_cast<int32_t>(a >> byte & 0xff);
        const int32_t right = static_cast<int8_t>(b >> byte & 0xff);
        total += static_cast<uint32_t>(left * right);
      }
      return total;
    });
  }

  static float sum_lanes(F a) {
    for (int half = 8; half; half /= 2) {
      for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
    }
    return a.lane[0];
  }
  static int32_t sum_lanes(I a) {
    uint32_t total = 0;
    for (int i = 0; i < 16; ++i) total += static_cast<uint32_t>(a.lane[i]);
    return static_cast<int32_t>(total);
  }
  static int32_t max_lanes(I a) {
    int32_t largest = a.lane[0];
    for (int i = 1; i < 16; ++i) largest = a.lane[i] > largest ? a.lane[i] : largest;
    return largest;
  }
};

}  // namespace qkernels::cpu
