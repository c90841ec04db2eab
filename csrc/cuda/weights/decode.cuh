// From codes in the fragment layout to the 16-bit pairs of an A operand.
//
// A decoder turns the kWords words of one step of 16 columns into four pairs: `pairs[p]` has the
// numbers of row g (p even) or g + 8 (p odd), see fragment.cuh. Integer codes come as code - zero,
// where `offsets` carries the zero points of the two rows, kImpliedZero where none are stored; all
// results are exact, but for numbers of a table that T does not have (kIsExact).
//
// Integers go through numbers whose low mantissa bits are the code: in fp16, 0x6400 | q is 1024 + q
// (q < 1024); in bf16, 0x4300 | q is 128 + q (q < 128). Subtracting 1024 + zero, or 128 + zero,
// leaves q - zero, with no conversion instruction. Source: Kim et al. 2022, "Who Says Elephants
// Can't Run"; Marlin (Frantar et al. 2024) for the interleaving.
//
// Where a sum is scaled and not its weights, a power of two may be left to that: `decode_scaled`
// gives the numbers times kLowFactor in row g and kHighFactor in row g + 8, in fewer instructions.
// In fp16 a code is a subnormal number as it lies, q * 2^-24, or 16 q * 2^-24 four bits higher.

#pragma once

#include "cuda/ptx.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

constexpr int kLop3AndOr = (0xf0 & 0xcc) | 0xaa;     // (a & b) | c
constexpr int kLop3NotAndOr = (0x0f & 0xcc) | 0xaa;  // (~a & b) | c

template <class T>
constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<Half> = true;

// The same 16 bits in both halves of a word.
QK_DEVICE uint32_t both(uint32_t bits) { return ptx::prmt(bits, bits, 0x1010); }

// What is subtracted from the raw pairs of row g (`low`) and of row g + 8 (`high`).
struct Offsets {
  uint32_t low, high;
};

// WeightCode::kInt4, 0.6 to 0.9 integer operations a weight.
template <class T>
struct Int4 {
  static constexpr int kBits = 4;
  static constexpr int kWords = 1;  // a step
  static constexpr bool kHasOffsets = true;
  static constexpr bool kIsExact = true;
  static constexpr bool kScales = kIsHalf<T>;  // whether there is a decode_scaled
  static constexpr float kLowFactor = 0x1p-24f, kHighFactor = 0x1p-20f;
  static constexpr float kImpliedZero = 8;

  QK_DEVICE void start(const float*) {}

  static QK_DEVICE Offsets offsets(float low, float high) {
    if constexpr (kIsHalf<T>) {
      // Row g + 8 has its codes in bits 4..7, as 16 q: see decode().
      return {ptx::pack2<T>(1024 + low, 1024 + low), ptx::pack2<T>(-64 - high, -64 - high)};
    } else {
      return {ptx::pack2<T>(128 + low, 128 + low), ptx::pack2<T>(128 + high, 128 + high)};
    }
  }

  QK_DEVICE void decode(const uint32_t* words, const Offsets& offsets, uint32_t (&pairs)[4]) const {
    const uint32_t word = words[0];
    if constexpr (kIsHalf<T>) {
      constexpr uint32_t kMagic = 0x64006400, kSixteenth = 0x2c002c00;
      const uint32_t shifted = word >> 8;
      const uint32_t raw0 = ptx::lop3<kLop3AndOr>(word, 0x000f000f, kMagic);
      const uint32_t raw1 = ptx::lop3<kLop3AndOr>(word, 0x00f000f0, kMagic);
      const uint32_t raw2 = ptx::lop3<kLop3AndOr>(shifted, 0x000f000f, kMagic);
      const uint32_t raw3 = ptx::lop3<kLop3AndOr>(shifted, 0x00f000f0, kMagic);
      pairs[0] = ptx::sub2<T>(raw0, offsets.low);
      pairs[1] = ptx::fma2<T>(raw1, kSixteenth, offsets.high);  // (1024 + 16 q) / 16 - 64 - zero
      pairs[2] = ptx::sub2<T>(raw2, offsets.low);
      pairs[3] = ptx::fma2<T>(raw3, kSixteenth, offsets.high);
    } else {
      constexpr uint32_t kMagic = 0x43004300;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const uint32_t raw = ptx::lop3<kLop3AndOr>(word >> (4 * p), 0x000f000f, kMagic);
        pairs[p] = ptx::sub2<T>(raw, p % 2 == 0 ? offsets.low : offsets.high);
      }
    }
  }

  static QK_DEVICE Offsets scaled_offsets(float low, float high) {
    const float small_low = low * kLowFactor, small_high = high * kHighFactor;
    return {ptx::pack2<T>(small_low, small_low), ptx::pack2<T>(small_high, small_high)};
  }

  QK_DEVICE void decode_scaled(const uint32_t* words, const Offsets& offsets,
                               uint32_t (&pairs)[4]) const {
    const uint32_t word = words[0], shifted = word >> 8;
    pairs[0] = ptx::sub2<T>(word & 0x000f000f, offsets.low);
    pairs[1] = ptx::sub2<T>(word & 0x00f000f0, offsets.high);
    pairs[2] = ptx::sub2<T>(shifted & 0x000f000f, offsets.low);
    pairs[3] = ptx::sub2<T>(shifted & 0x00f000f0, offsets.high);
  }
};

// Codes of 2 and 3 bits as span_words gives them: those of row g lie in bits 0 to 2 and, of the
// pair 8 columns on, 4 bits higher, but for the third bits, which lie one bit higher; those of row
// g + 8 lie another 2 bits higher.
template <class T, int kCodeBits>
struct LowInt {
  static constexpr int kBits = kCodeBits;
  static constexpr int kWords = 2;
  static constexpr bool kHasOffsets = true;
  static constexpr bool kIsExact = true;
  static constexpr bool kScales = kIsHalf<T>;
  static constexpr float kLowFactor = 0x1p-24f, kHighFactor = 0x1p-22f;
  static constexpr float kImpliedZero = 1 << (kBits - 1);

  QK_DEVICE void start(const float*) {}

  static QK_DEVICE Offsets offsets(float low, float high) {
    // Row g + 8 has 4 q.
    constexpr float kBase = kIsHalf<T> ? 1024 : 128;
    return {ptx::pack2<T>(kBase + low, kBase + low),
            ptx::pack2<T>(-kBase / 4 - high, -kBase / 4 - high)};
  }

  QK_DEVICE void decode(const uint32_t* words, const Offsets& offsets, uint32_t (&pairs)[4]) const {
    constexpr uint32_t kMagic = kIsHalf<T> ? 0x64006400 : 0x43004300;
    constexpr uint32_t kQuarter = kIsHalf<T> ? 0x34003400 : 0x3e803e80;
    uint32_t raw[4];
    take(words, kMagic, raw);
#pragma unroll
    for (int p = 0; p < 4; p += 2) {
      pairs[p] = ptx::sub2<T>(raw[p], offsets.low);
      pairs[p + 1] = ptx::fma2<T>(raw[p + 1], kQuarter, offsets.high);
    }
  }

  static QK_DEVICE Offsets scaled_offsets(float low, float high) {
    const float small_low = low * kLowFactor, small_high = high * kHighFactor;
    return {ptx::pack2<T>(small_low, small_low), ptx::pack2<T>(small_high, small_high)};
  }

  QK_DEVICE void decode_scaled(const uint32_t* words, const Offsets& offsets,
                               uint32_t (&pairs)[4]) const {
    uint32_t raw[4];
    take(words, 0, raw);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      pairs[p] = ptx::sub2<T>(raw[p], p % 2 == 0 ? offsets.low : offsets.high);
    }
  }

 private:
  static QK_DEVICE void take(const uint32_t* words, uint32_t magic, uint32_t (&raw)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t low = words[0] >> (4 * h), third = words[1] >> h;
      raw[2 * h] = ptx::lop3<kLop3AndOr>(low, 0x00030003, magic);
      raw[2 * h + 1] = ptx::lop3<kLop3AndOr>(low, 0x000c000c, magic);
      if constexpr (kBits == 3) {
        raw[2 * h] = ptx::lop3<kLop3AndOr>(third, 0x00040004, raw[2 * h]);
        raw[2 * h + 1] = ptx::lop3<kLop3AndOr>(third, 0x00100010, raw[2 * h + 1]);
      }
    }
  }
};

// WeightCode::kInt2 and kInt3
template <class T>
using Int2 = LowInt<T, 2>;
template <class T>
using Int3 = LowInt<T, 3>;

// WeightCode::kInt8
template <class T>
struct Int8 {
  static constexpr int kBits = 8;
  static constexpr int kWords = 2;
  static constexpr bool kHasOffsets = true;
  static constexpr bool kIsExact = true;
  static constexpr bool kScales = false;
  static constexpr float kImpliedZero = 128;

  QK_DEVICE void start(const float*) {}

  static QK_DEVICE Offsets offsets(float low, float high) {
    // bf16 has q - 128 first, which is symmetric about 0 and so fits its 8 bits.
    const float base = kIsHalf<T> ? 1024.0f : -128.0f;
    return {ptx::pack2<T>(base + low, base + low), ptx::pack2<T>(base + high, base + high)};
  }

  QK_DEVICE void decode(const uint32_t* words, const Offsets& offsets, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t word = words[p / 2];
      const uint32_t offset = p % 2 == 0 ? offsets.low : offsets.high;
      if constexpr (kIsHalf<T>) {
        const uint32_t raw = ptx::prmt(word, 0x64646464, p % 2 == 0 ? 0x4240 : 0x4341);
        pairs[p] = ptx::sub2<T>(raw, offset);
      } else {
        const uint32_t bytes = word >> (8 * (p % 2));
        // The low 7 bits as 128 + q7; the top bit as 128 or, where it is clear, 256.
        const uint32_t low = ptx::lop3<kLop3AndOr>(bytes, 0x007f007f, 0x43004300);
        const uint32_t top = ptx::lop3<kLop3NotAndOr>(bytes, 0x00800080, 0x43004300);
        pairs[p] = ptx::sub2<T>(ptx::sub2<T>(low, top), offset);
      }
    }
  }
};

// WeightCode::kTable4: any 16 numbers. Bytes 0..3 of low[0] are the low bytes of entries 0..3, and
// so on; `prmt` looks up four of eight bytes at a time, and a second one takes the half of the
// table that bit 3 of the code names. About 3 integer operations a weight.
template <class T>
struct Table4 {
  static constexpr int kBits = 4;
  static constexpr int kWords = 1;
  static constexpr bool kHasOffsets = false;
  static constexpr bool kIsExact = false;
  static constexpr bool kScales = false;

  uint32_t low_bytes[4], high_bytes[4];

  QK_DEVICE void start(const float* table) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a = ptx::pack2<T>(ptx::load_global<float>(table + 4 * i),
                                       ptx::load_global<float>(table + 4 * i + 1));
      const uint32_t b = ptx::pack2<T>(ptx::load_global<float>(table + 4 * i + 2),
                                       ptx::load_global<float>(table + 4 * i + 3));
      low_bytes[i] = ptx::prmt(a, b, 0x6420);
      high_bytes[i] = ptx::prmt(a, b, 0x7531);
    }
  }

  QK_DEVICE void decode(const uint32_t* words, const Offsets&, uint32_t (&pairs)[4]) const {
    uint32_t low[2], high[2];  // low and high bytes of nibbles 0..3 and 4..7
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t codes = words[0] >> (16 * h);
      const uint32_t index = codes & 0x7777;
      const uint32_t half = ptx::lop3<kLop3AndOr>(codes >> 1, 0x4444, 0x3210);
      low[h] = ptx::prmt(ptx::prmt(low_bytes[0], low_bytes[1], index),
                         ptx::prmt(low_bytes[2], low_bytes[3], index), half);
      high[h] = ptx::prmt(ptx::prmt(high_bytes[0], high_bytes[1], index),
                          ptx::prmt(high_bytes[2], high_bytes[3], index), half);
    }
    // Pair p is nibbles p and p + 4: byte p of low and high, of [0] and of [1].
#pragma unroll
    for (int p = 0; p < 4; p += 2) {
      const uint32_t even = ptx::prmt(low[0], high[0], p == 0 ? 0x5140 : 0x7362);
      const uint32_t odd = ptx::prmt(low[1], high[1], p == 0 ? 0x5140 : 0x7362);
      pairs[p] = ptx::prmt(even, odd, 0x5410);
      pairs[p + 1] = ptx::prmt(even, odd, 0x7632);
    }
  }
};

// Small floats: their exponent and mantissa bits, put where T has them, are the number times a
// power of two, subnormal numbers included.

// WeightCode::kFp4E2M1
template <class T>
struct Fp4E2M1 {
  static constexpr int kBits = 4;
  static constexpr int kWords = 1;
  static constexpr bool kHasOffsets = false;
  static constexpr bool kIsExact = true;
  // In bf16 it would be 2^-126, and products with x would lose their bits.
  static constexpr bool kScales = kIsHalf<T>;
  static constexpr float kLowFactor = 0x1p-14f, kHighFactor = kLowFactor;

  QK_DEVICE void start(const float*) {}

  QK_DEVICE void decode(const uint32_t* words, const Offsets& offsets, uint32_t (&pairs)[4]) const {
    // Bias 1 becomes 15 or 127: times 2^14 or 2^126.
    constexpr uint32_t kScale = kIsHalf<T> ? 0x74007400 : 0x7e807e80;
    decode_scaled(words, offsets, pairs);
#pragma unroll
    for (uint32_t& pair : pairs) pair = ptx::mul2<T>(pair, kScale);
  }

  QK_DEVICE void decode_scaled(const uint32_t* words, const Offsets&, uint32_t (&pairs)[4]) const {
    constexpr int kMantissa = kIsHalf<T> ? 9 : 6;  // where the code's lowest bit goes
    constexpr uint32_t kMagnitude = kIsHalf<T> ? 0x0e000e00 : 0x01c001c0;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t sign = (words[0] << (12 - 4 * p)) & 0x80008000;
      const int shift = kMantissa - 4 * p;
      const uint32_t moved = shift >= 0 ? words[0] << (shift & 31) : words[0] >> (-shift & 31);
      pairs[p] = ptx::lop3<kLop3AndOr>(moved, kMagnitude, sign);
    }
  }
};

// Both kinds of 8-bit floats; a byte in the upper half of 16 bits has its sign in place.
template <class T, int kExponentBits>
struct Fp8 {
  static constexpr int kBits = 8;
  static constexpr int kWords = 2;
  static constexpr bool kHasOffsets = false;
  static constexpr bool kIsExact = true;
  static constexpr int kWiden = (kIsHalf<T> ? 5 : 8) - kExponentBits;  // exponent bits T has more
  static constexpr int kShift = (kIsHalf<T> ? 16 : 128) - (1 << (kExponentBits - 1));  // of biases
  static constexpr bool kScales = kIsHalf<T> && kWiden > 0;
  static constexpr float kLowFactor = 0x1p-8f, kHighFactor = kLowFactor;  // 2^-kShift
  static_assert(!kScales || kShift == 8);

  QK_DEVICE void start(const float*) {}

  QK_DEVICE void decode(const uint32_t* words, const Offsets& offsets, uint32_t (&pairs)[4]) const {
    // 2^kShift, as a number of type T.
    constexpr uint32_t kPower = kIsHalf<T> ? static_cast<uint32_t>(kShift + 15) << 10
                                           : static_cast<uint32_t>(kShift + 127) << 7;
    decode_scaled(words, offsets, pairs);
    if constexpr (kWiden > 0) {
#pragma unroll
      for (uint32_t& pair : pairs) pair = ptx::mul2<T>(pair, kPower * 0x10001u);
    }
  }

  QK_DEVICE void decode_scaled(const uint32_t* words, const Offsets&, uint32_t (&pairs)[4]) const {
    constexpr uint32_t kMagnitude = (0x7f00u >> kWiden) * 0x10001u;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t bytes = ptx::prmt(words[p / 2], 0, p % 2 == 0 ? 0x2404 : 0x3414);
      if constexpr (kWiden == 0) {
        pairs[p] = bytes;
      } else {
        const uint32_t sign = bytes & 0x80008000;
        pairs[p] = ptx::lop3<kLop3AndOr>(bytes >> kWiden, kMagnitude, sign);
      }
    }
  }
};

// WeightCode::kFp8E4M3 and kFp8E5M2
template <class T>
using Fp8E4M3 = Fp8<T, 4>;
template <class T>
using Fp8E5M2 = Fp8<T, 5>;

template <template <class> class Decoder, bool kRealZeros>
struct DecoderTag {};

// `visit(DecoderTag<Decoder, kRealZeros>())` for the decoder that a weight takes.
template <class Visit>
const char* visit_decoder(const FragmentWeight& weight, Visit visit) {
  const bool real = weight.zero_type != ZeroType::kNone && weight.zero_type != ZeroType::kInteger;
  switch (weight.code) {
    case WeightCode::kInt2:
      return real ? visit(DecoderTag<Int2, true>()) : visit(DecoderTag<Int2, false>());
    case WeightCode::kInt3:
      return real ? visit(DecoderTag<Int3, true>()) : visit(DecoderTag<Int3, false>());
    case WeightCode::kInt4:
      return real ? visit(DecoderTag<Int4, true>()) : visit(DecoderTag<Int4, false>());
    case WeightCode::kInt8:
      return real ? visit(DecoderTag<Int8, true>()) : visit(DecoderTag<Int8, false>());
    case WeightCode::kTable4: return visit(DecoderTag<Table4, false>());
    case WeightCode::kFp4E2M1: return visit(DecoderTag<Fp4E2M1, false>());
    case WeightCode::kFp8E4M3: return visit(DecoderTag<Fp8E4M3, false>());
    default: return visit(DecoderTag<Fp8E5M2, false>());
  }
}

}  // namespace qkernels
