// Pieces of rows: eight numbers, of fp16, bf16 or fp32, which a thread reads and writes together.

#pragma once

#include "cuda/ptx.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

// fp32, beside Half and Bfloat16.
struct Single {};

template <class T>
constexpr int kNumberBytes = 2;
template <>
constexpr int kNumberBytes<Single> = 4;

constexpr int kPieceNumbers = 8;

// Rows [m][k] at any distance; `aligned` where each begins at 16 bytes.
struct RowsIn {
  const unsigned char* first;
  int64_t stride;  // in bytes
  bool aligned;
};

struct Piece {
  float values[kPieceNumbers];

  template <class T>
  QK_DEVICE void widen(uint4 words) {
    static_assert(kNumberBytes<T> == 2);
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = ptx::to_float<T>(static_cast<uint16_t>(all[i] & 0xffff));
      values[2 * i + 1] = ptx::to_float<T>(static_cast<uint16_t>(all[i] >> 16));
    }
  }

  QK_DEVICE void set_half(int half, uint4 words) {
    values[4 * half] = ptx::as_float(words.x);
    values[4 * half + 1] = ptx::as_float(words.y);
    values[4 * half + 2] = ptx::as_float(words.z);
    values[4 * half + 3] = ptx::as_float(words.w);
  }

  QK_DEVICE uint4 half(int half) const {
    return {ptx::as_bits(values[4 * half]), ptx::as_bits(values[4 * half + 1]),
            ptx::as_bits(values[4 * half + 2]), ptx::as_bits(values[4 * half + 3])};
  }

  // Numbers `column` and on of a row of k, with zeros behind it.
  template <class T>
  QK_DEVICE void load(const unsigned char* row, bool aligned, int64_t column, int64_t k) {
    const unsigned char* from = row + column * kNumberBytes<T>;
    if (aligned && ptx::within(column + kPieceNumbers - 1, k)) {
      const uint4 words = ptx::load_global<uint4>(from);
      if constexpr (kNumberBytes<T> == 2) {
        widen<T>(words);
      } else {
        set_half(0, words);
        set_half(1, ptx::load_global<uint4>(from + 16));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPieceNumbers; ++i) {
      values[i] = 0.0f;
      if (!ptx::within(column + i, k)) continue;
      if constexpr (kNumberBytes<T> == 2) {
        values[i] = ptx::to_float<T>(ptx::load_global<uint16_t>(from + 2 * i));
      } else {
        values[i] = ptx::as_float(ptx::load_global<uint32_t>(from + 4 * i));
      }
    }
  }

  // Rounds to a type of 16 bits, and returns the words.
  template <class T>
  QK_DEVICE uint4 round() {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = ptx::pack2<T>(values[2 * i], values[2 * i + 1]);
    const uint4 all = {words[0], words[1], words[2], words[3]};
    widen<T>(all);
    return all;
  }

  // Numbers `column` and on of a row [k], which begins at 16 bytes if k is `whole` pieces.
  template <class T>
  QK_DEVICE void store_rounded(unsigned char* row, bool whole, int64_t column, int64_t k) {
    unsigned char* to = row + column * kNumberBytes<T>;
    if constexpr (kNumberBytes<T> == 2) {
      const uint4 words = round<T>();
      if (whole) {
        ptx::store_global<uint4>(to, words);
        return;
      }
      const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < kPieceNumbers; ++i) {
        if (!ptx::within(column + i, k)) continue;
        ptx::store_global<uint16_t>(to + 2 * i, static_cast<uint16_t>(all[i / 2] >> (i % 2 * 16)));
      }
    } else {
      if (whole) {
        ptx::store_global<uint4>(to, half(0));
        ptx::store_global<uint4>(to + 16, half(1));
        return;
      }
#pragma unroll
      for (int i = 0; i < kPieceNumbers; ++i) {
        if (ptx::within(column + i, k)) ptx::store_global<float>(to + 4 * i, values[i]);
      }
    }
  }
};

// Aligned if the first row and the distance to the next are.
inline RowsIn rows_in(const void* first, int64_t stride, int64_t m, FloatType type) {
  const int64_t bytes = stride * size_of(type);
  const bool aligned = reinterpret_cast<uintptr_t>(first) % 16 == 0 && (m == 1 || bytes % 16 == 0);
  return {static_cast<const unsigned char*>(first), bytes, aligned};
}

// --- What the threads of a block find together

constexpr int kMostRowThreads = 512;
constexpr int kMostRowWarps = kMostRowThreads / 32;
constexpr int kReductionBytes = kMostRowWarps * 4;  // of each word

// Combines words over the block, in the same order at every call. `slots` is kReductionBytes of
// shared memory for each word, which nothing else in the kernel uses.
template <int kWords, class Combine>
QK_DEVICE void reduce(uint32_t (&words)[kWords], ptx::Shared slots, Combine combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = combine(words[i], ptx::shuffle_xor(words[i], mask));
    }
  }
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (warps == 1) return;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      ptx::store_shared<uint32_t>(slots + i * kReductionBytes + warp * 4, words[i]);
    }
  }
  ptx::sync_threads();
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = ptx::load_shared<uint32_t>(slots + i * kReductionBytes);
#pragma unroll 1
    for (int other = 1; other < warps; ++other) {
      words[i] =
          combine(words[i], ptx::load_shared<uint32_t>(slots + i * kReductionBytes + other * 4));
    }
  }
}

struct Largest {
  QK_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

struct Sum {
  QK_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const {
    return ptx::as_bits(ptx::add(ptx::as_float(a), ptx::as_float(b)));
  }
};

// --- Numbers

constexpr uint32_t kInfinityBits = 0x7f800000;
// 1.5 * 2^23: a sum with it has no bit for a fraction, and the integer in its low ones.
constexpr float kRounder = 12582912.0f;
constexpr uint32_t kRounderBits = 0x4b400000;

// The bits of |x|, which are ordered as the numbers are, with NaN above infinity.
QK_DEVICE uint32_t magnitude_bits(float x) { return ptx::as_bits(x) & 0x7fffffff; }

// x rounded half to even, of magnitude below 2^22.
QK_DEVICE int to_integer(float x) {
  return static_cast<int>(ptx::as_bits(ptx::add(x, kRounder)) - kRounderBits);
}

// The largest magnitude over the largest number of a type: the scale of what has it.
QK_DEVICE float scale_of(uint32_t top, float largest) {
  return top == 0 ? 1.0f : ptx::divide(ptx::as_float(top), largest);
}

// e^x within two units in the last place, 0 below -104 and infinity above 89, as in
// cpu/quantize_rows.h: 2^n * 2^f with the Taylor series of e^(f log 2) on |f| <= 1/2; log 2 in two
// parts keeps the rest exact. NaN gives any number.
QK_DEVICE float exponential(float x) {
  const float clamped = ptx::max(ptx::min(x, 89.0f), -104.0f);
  const float shifted = ptx::add(ptx::mul(clamped, 1.44269504f), kRounder);
  const int n = static_cast<int>(ptx::as_bits(shifted) - kRounderBits);
  const float whole = ptx::add(shifted, -kRounder);
  float rest = ptx::fma(-whole, 0.693145751953125f, clamped);
  rest = ptx::fma(-whole, 1.42860677e-6f, rest);
  float sum = 1.0f / 5040;
  constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < 7; ++i) sum = ptx::fma(sum, rest, kFactors[i]);
  // In two steps: 2^n itself may lie outside of the range of floats.
  const int half = n >> 1;
  const float first = ptx::as_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = ptx::as_float(static_cast<uint32_t>(n - half + 127) << 23);
  return ptx::mul(ptx::mul(sum, first), second);
}

// x / (1 + e^-x)
QK_DEVICE float silu(float x) { return ptx::divide(x, ptx::add(1.0f, exponential(-x))); }

// x Phi(x). With z = |x| / sqrt(2) and t = 1 / (1 + z / 2), erfc(z) = t e^(p(t) - z^2), where p was
// fitted to it on 0 <= z <= 10. Down to e^-88 within 2^-15 of the result, above e^-8 within 2^-19.
QK_DEVICE float gelu(float x) {
  const float z = ptx::mul(ptx::as_float(magnitude_bits(x)), 0.70710678f);
  const float t = ptx::divide(1.0f, ptx::fma(z, 0.5f, 1.0f));
  float sum = 0.14805983f;
  constexpr float kFactors[] = {-0.69787419f, 1.19684815f, -0.74962485f, -0.03616848f, -0.02213898f,
                                0.04254839f,  0.38498244f, 0.99882513f,  -1.26545739f};
#pragma unroll
  for (int i = 0; i < 9; ++i) sum = ptx::fma(sum, t, kFactors[i]);
  const float half = ptx::mul(x, 0.5f);
  const float erfc = ptx::mul(t, exponential(ptx::fma(-half, x, sum)));
  return x > 0 ? ptx::mul(x, ptx::fma(-0.5f, erfc, 1.0f)) : ptx::mul(half, erfc);
}

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u)).
QK_DEVICE float gelu_tanh(float x) {
  const float cube = ptx::mul(ptx::mul(x, x), x);
  const float twice = ptx::mul(ptx::fma(cube, 0.044715f, x), 1.59576912f);
  return ptx::divide(x, ptx::add(1.0f, exponential(-twice)));
}

// x / scale, rounded as a division. Where that is sure to be right, by the product with the
// reciprocal and what it misses (Markstein 1990), in three operations.
class Quotient {
 public:
  // `bounded`: x is finite, and x / scale small.
  QK_DEVICE void start(float scale, bool bounded) {
    scale_ = scale;
    const bool fast = scale > 0x1p-60f && scale < 0x1p60f;
    bounded_ = bounded && fast;
    fast_ = fast;
    reciprocal_ = ptx::divide(1.0f, scale);
    limit_ = ptx::mul(scale, 512.0f);
  }

  QK_DEVICE bool bounded() const { return bounded_; }

  // Beyond 512 it is some number beyond 448 of its sign.
  QK_DEVICE float operator()(float x) const {
    if (bounded_) return near(x);
    if (!fast_) return ptx::divide(x, scale_);
    return x == x ? near(ptx::max(ptx::min(x, limit_), -limit_)) : x;
  }

 private:
  QK_DEVICE float near(float x) const {
    const float product = ptx::mul(x, reciprocal_);
    return ptx::fma(ptx::fma(-product, scale_, x), reciprocal_, product);
  }

  float scale_, reciprocal_, limit_;
  bool bounded_, fast_;
};

// fp8 E4M3 of |x|, half to even, saturated at 448.
QK_DEVICE uint32_t to_fp8_e4m3(float x) {
  const uint32_t bits = magnitude_bits(x);
  const float magnitude = ptx::min(ptx::as_float(bits), 448.0f);
  const uint32_t word = ptx::as_bits(magnitude);
  // From 2^-6 on the mantissa is cut to 3 bits; below, a sum whose last place is 2^-9 rounds.
  const uint32_t normal = ((word + 0x7ffff + (word >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t subnormal = ptx::as_bits(ptx::add(magnitude, 16384.0f)) & 0xff;
  if (bits > kInfinityBits) return 0x7f;
  return magnitude < 0x1p-6f ? subnormal : normal;
}

}  // namespace qkernels
