// Sixteen lanes in four registers of NEON. Only for source files after QK_TARGET.

#pragma once

#include <arm_neon.h>

#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)
// gcc would decode columns far ahead of their products, and run out of registers.
#pragma GCC optimize("no-schedule-insns")
#endif

namespace qkernels::cpu {

struct Neon {
  struct F {
    float32x4_t a, b, c, d;
  };
  struct I {
    int32x4_t a, b, c, d;
  };

  static constexpr int kMostPanels = 1;
  static constexpr int kPanelsOfOneRow = 1;  // float_rows.h
  static constexpr int kSplit = 1;
  // Whether fma rounds once.
  static constexpr bool kFused = true;
  static constexpr bool kFastLookup = false;
  static constexpr int32_t kByteOffset = 128;
  static constexpr int kBurstSums = 6;

  // `op` of each register.
  template <class Op, class... X>
  static QK_INLINE F floats(const Op& op, X... x) {
    return {op(x.a...), op(x.b...), op(x.c...), op(x.d...)};
  }
  template <class Op, class... X>
  static QK_INLINE I integers(const Op& op, X... x) {
    return {op(x.a...), op(x.b...), op(x.c...), op(x.d...)};
  }

  static QK_INLINE F broadcast(float x) {
    const float32x4_t four = vdupq_n_f32(x);
    return {four, four, four, four};
  }
  static QK_INLINE I broadcast(int32_t x) {
    const int32x4_t four = vdupq_n_s32(x);
    return {four, four, four, four};
  }
  static QK_INLINE F load(const float* p) {
    return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
  }
  static QK_INLINE I load(const int32_t* p) {
    return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
  }
  static QK_INLINE I load(const uint32_t* p) { return load(reinterpret_cast<const int32_t*>(p)); }
  static QK_INLINE float32x4_t widen_half(uint16x4_t x) {
    return vcvt_f32_f16(vreinterpret_f16_u16(x));
  }
  static QK_INLINE F load_half(const uint16_t* p) {
    const uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
    return {widen_half(vget_low_u16(low)), widen_half(vget_high_u16(low)),
            widen_half(vget_low_u16(high)), widen_half(vget_high_u16(high))};
  }
  static QK_INLINE float32x4_t widen_bf16(uint16x4_t x) {
    return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
  }
  static QK_INLINE F load_bf16(const uint16_t* p) {
    const uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
    return {widen_bf16(vget_low_u16(low)), widen_bf16(vget_high_u16(low)),
            widen_bf16(vget_low_u16(high)), widen_bf16(vget_high_u16(high))};
  }
  static QK_INLINE int32x4_t widen(uint16x4_t x) { return vreinterpretq_s32_u32(vmovl_u16(x)); }
  static QK_INLINE I load_bytes(const uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return {widen(vget_low_u16(low)), widen(vget_high_u16(low)), widen(vget_low_u16(high)),
            widen(vget_high_u16(high))};
  }
  static QK_INLINE void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
  }
  static QK_INLINE void store(int32_t* p, I x) {
    vst1q_s32(p, x.a);
    vst1q_s32(p + 4, x.b);
    vst1q_s32(p + 8, x.c);
    vst1q_s32(p + 12, x.d);
  }
  static QK_INLINE uint16x8_t narrow_to_half(float32x4_t x, float32x4_t y) {
    return vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(x), vcvt_f16_f32(y)));
  }
  static QK_INLINE void store_half(uint16_t* p, F x) {
    vst1q_u16(p, narrow_to_half(x.a, x.b));
    vst1q_u16(p + 8, narrow_to_half(x.c, x.d));
  }
  static QK_INLINE uint16x4_t round_to_bf16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(x, x);
    return vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16);
  }
  static QK_INLINE void store_bf16(uint16_t* p, F x) {
    vst1q_u16(p, vcombine_u16(round_to_bf16(x.a), round_to_bf16(x.b)));
    vst1q_u16(p + 8, vcombine_u16(round_to_bf16(x.c), round_to_bf16(x.d)));
  }
  static QK_INLINE void store_bytes(int8_t* p, I x) {
    const int16x8_t low = vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b));
    const int16x8_t high = vcombine_s16(vmovn_s32(x.c), vmovn_s32(x.d));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }

  static QK_INLINE F add(F x, F y) {
    return floats([](auto u, auto v) QK_LAMBDA_INLINE { return vaddq_f32(u, v); }, x, y);
  }
  static QK_INLINE F sub(F x, F y) {
    return floats([](auto u, auto v) QK_LAMBDA_INLINE { return vsubq_f32(u, v); }, x, y);
  }
  static QK_INLINE F mul(F x, F y) {
    return floats([](auto u, auto v) QK_LAMBDA_INLINE { return vmulq_f32(u, v); }, x, y);
  }
  static QK_INLINE F div(F x, F y) {
    return floats([](auto u, auto v) QK_LAMBDA_INLINE { return vdivq_f32(u, v); }, x, y);
  }
  static QK_INLINE F fma(F x, F y, F z) {
    const auto op = [](auto u, auto v, auto w) QK_LAMBDA_INLINE { return vfmaq_f32(w, u, v); };
    return floats(op, x, y, z);
  }
  static QK_INLINE F fnma(F x, F y, F z) {
    const auto op = [](auto u, auto v, auto w) QK_LAMBDA_INLINE { return vfmsq_f32(w, u, v); };
    return floats(op, x, y, z);
  }
  static QK_INLINE F min(F x, F y) {
    return floats([](auto u, auto v) QK_LAMBDA_INLINE { return vminq_f32(u, v); }, x, y);
  }
  static QK_INLINE F max(F x, F y) {
    return floats([](auto u, auto v) QK_LAMBDA_INLINE { return vmaxq_f32(u, v); }, x, y);
  }
  // x < y ? yes : no
  static QK_INLINE F select_less(F x, F y, F yes, F no) {
    const auto op = [](auto u, auto v, auto w, auto z)
                        QK_LAMBDA_INLINE { return vbslq_f32(vcltq_f32(u, v), w, z); };
    return floats(op, x, y, yes, no);
  }
  // Whole numbers: the nearest, half to even, and the next below.
  static QK_INLINE F nearest(F x) {
    return floats([](auto u) QK_LAMBDA_INLINE { return vrndnq_f32(u); }, x);
  }
  static QK_INLINE F floor(F x) {
    return floats([](auto u) QK_LAMBDA_INLINE { return vrndmq_f32(u); }, x);
  }
  static QK_INLINE F zero_nan(F x) {
    const auto op = [](auto u) QK_LAMBDA_INLINE {
      return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(u), vceqq_f32(u, u)));
    };
    return floats(op, x);
  }
  static QK_INLINE F to_float(I x) {
    return floats([](auto u) QK_LAMBDA_INLINE { return vcvtq_f32_s32(u); }, x);
  }
  static QK_INLINE I round(F x) {
    return integers([](auto u) QK_LAMBDA_INLINE { return vcvtnq_s32_f32(u); }, x);
  }
  static QK_INLINE I bits(F x) {
    return integers([](auto u) QK_LAMBDA_INLINE { return vreinterpretq_s32_f32(u); }, x);
  }
  static QK_INLINE F from_bits(I x) {
    return floats([](auto u) QK_LAMBDA_INLINE { return vreinterpretq_f32_s32(u); }, x);
  }

  static QK_INLINE I add(I x, I y) {
    return integers([](auto u, auto v) QK_LAMBDA_INLINE { return vaddq_s32(u, v); }, x, y);
  }
  static QK_INLINE I sub(I x, I y) {
    return integers([](auto u, auto v) QK_LAMBDA_INLINE { return vsubq_s32(u, v); }, x, y);
  }
  static QK_INLINE I mul(I x, I y) {
    return integers([](auto u, auto v) QK_LAMBDA_INLINE { return vmulq_s32(u, v); }, x, y);
  }
  static QK_INLINE I max(I x, I y) {
    return integers([](auto u, auto v) QK_LAMBDA_INLINE { return vmaxq_s32(u, v); }, x, y);
  }
  static QK_INLINE I and_(I x, I y) {
    return integers([](auto u, auto v) QK_LAMBDA_INLINE { return vandq_s32(u, v); }, x, y);
  }
  static QK_INLINE I or_(I x, I y) {
    return integers([](auto u, auto v) QK_LAMBDA_INLINE { return vorrq_s32(u, v); }, x, y);
  }
  static QK_INLINE I xor_(I x, I y) {
    return integers([](auto u, auto v) QK_LAMBDA_INLINE { return veorq_s32(u, v); }, x, y);
  }
  template <int kBy>
  static QK_INLINE I left(I x) {
    return integers([](auto u) QK_LAMBDA_INLINE { return vshlq_n_s32(u, kBy); }, x);
  }
  template <int kBy>
  static QK_INLINE I right(I x) {
    const auto op = [](auto u) QK_LAMBDA_INLINE {
      return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(u), kBy));
    };
    return integers(op, x);
  }
  template <int kBy>
  static QK_INLINE I right_signed(I x) {
    return integers([](auto u) QK_LAMBDA_INLINE { return vshrq_n_s32(u, kBy); }, x);
  }

  // The lowest byte of a lane in all four.
  static QK_INLINE I spread_byte(I x) {
    constexpr uint8_t kOrder[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const uint8x16_t order = vld1q_u8(kOrder);
    const auto op = [order](auto u) QK_LAMBDA_INLINE {
      return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(u), order));
    };
    return integers(op, x);
  }
  // Whether no lane is zero.
  static QK_INLINE bool all(I x) {
    const auto least = [](auto u, auto v) QK_LAMBDA_INLINE {
      return vminq_u32(vreinterpretq_u32_s32(u), vreinterpretq_u32_s32(v));
    };
    return vminvq_u32(vminq_u32(least(x.a, x.b), least(x.c, x.d))) != 0;
  }
  // y in the lanes where x is not zero, and zero in the others.
  static QK_INLINE F where(I x, F y) {
    const auto op = [](auto u, auto v) QK_LAMBDA_INLINE {
      return vreinterpretq_f32_u32(vandq_u32(vtstq_s32(u, u), vreinterpretq_u32_f32(v)));
    };
    return floats(op, x, y);
  }

  static QK_INLINE F low_half_to_float(I x) {
    const auto op = [](auto u) QK_LAMBDA_INLINE {
      return widen_half(vmovn_u32(vreinterpretq_u32_s32(u)));
    };
    return floats(op, x);
  }

  using Table = uint8x16x4_t;
  static QK_INLINE Table load_table(const float* p) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(p);
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
  }
  static QK_INLINE F lookup(const Table& table, I index) {
    // The places of the four bytes of a number.
    const auto op = [&table](auto u) QK_LAMBDA_INLINE {
      const uint32x4_t low = vandq_u32(vreinterpretq_u32_s32(u), vdupq_n_u32(15));
      const uint32x4_t places = vmlaq_u32(vdupq_n_u32(0x03020100), low, vdupq_n_u32(0x04040404));
      return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places)));
    };
    return floats(op, index);
  }

  // Both signed: with kSmall, the first bytes are below 64, and else less 128.
  template <bool kSmall>
  static QK_INLINE int32x4_t dot(int32x4_t sum, int8x16_t u, int8x16_t s) {
    const int16x8_t low = vmull_s8(vget_low_s8(u), vget_low_s8(s));
    const int16x8_t high = vmull_high_s8(u, s);
    // Two small products fit 16 bits, and two of -128 and -128 do not.
    if constexpr (kSmall) return vpadalq_s16(sum, vpaddq_s16(low, high));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
  template <bool kSmall>
  static QK_INLINE I dot(I sum, I u, I s) {
    const auto op = [](auto total, auto x, auto y) QK_LAMBDA_INLINE {
      return dot<kSmall>(total, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y));
    };
    return integers(op, sum, u, s);
  }

  static QK_INLINE float sum_lanes(F x) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d)));
  }
  static QK_INLINE int32_t sum_lanes(I x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d)));
  }
  static QK_INLINE int32_t max_lanes(I x) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.a, x.b), vmaxq_s32(x.c, x.d)));
  }
};

}  // namespace qkernels::cpu
