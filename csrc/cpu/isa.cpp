#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#endif
#endif

namespace qkernels::cpu {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAmx: return "amx";
    case Isa::kNeon: return "neon";
    case Isa::kNeonDot: return "neon_dot";
    default: return "neon_i8mm";
  }
}

namespace {

struct Detected {
  Isa isa = Isa::kPortable;
  bool bf16_products = false;
  bool avx_vnni = false;
  const char* missing = "";  // what the next level needs
};

#if defined(__x86_64__)

constexpr const char* kBuiltFor = "this build is for x86 CPUs";

constexpr bool is_of_this_build(Isa isa) { return isa <= Isa::kAmx; }

constexpr bool bit(unsigned word, int index) { return (word >> index & 1) != 0; }

// Which registers the operating system saves: XCR0.
uint64_t saved_registers() {
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux gives a process the tile registers only when it asks for them.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Detected detect() {
  Detected found;
  unsigned a, b, c, d;
  found.missing = "this CPU has no AVX2, FMA and F16C";
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = bit(c, 12), f16c = bit(c, 29), osxsave = bit(c, 27);
  if (!fma || !f16c || !osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const uint64_t saved = saved_registers();
  constexpr uint64_t kAvx = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  if (!bit(b, 5) || (saved & kAvx) != kAvx) return found;
  found.isa = Isa::kAvx2;
  unsigned a1, b1, c1, d1;
  const bool more = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) != 0;
  found.avx_vnni = more && bit(a1, 4);
  found.missing = "this CPU has no AVX-512 with VNNI";
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  if (!avx512 || !bit(c, 11) || (saved & kZmm) != kZmm) return found;
  found.isa = Isa::kAvx512;
#ifdef QK_AVX_VNNI_BY_AVX512
  found.avx_vnni = true;
#endif
  const bool amx = bit(d, 22) && bit(d, 24) && bit(d, 25);
  found.bf16_products = more && bit(a1, 5);
  found.missing = "this CPU has no AMX with bf16 and int8";
  // Conversions to bf16, which every CPU with tiles has.
  if (!amx || !found.bf16_products) return found;
  found.missing = "the operating system does not let this process use AMX tiles";
  if ((saved & kTiles) != kTiles || !tiles_permitted()) return found;
  found.isa = Isa::kAmx;
  found.missing = "";
  return found;
}

#elif defined(__aarch64__)

constexpr const char* kBuiltFor = "this build is for 64-bit Arm CPUs";

constexpr bool is_of_this_build(Isa isa) { return isa == Isa::kPortable || isa >= Isa::kNeon; }

struct Features {
  bool dot_products, i8mm, bf16;
};

#if defined(__linux__)

Features features() {
  // Bits that older headers have no names for.
  constexpr unsigned long kDotProducts = 1 << 20, kI8mm = 1 << 13, kBf16 = 1 << 14;
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return {(first & kDotProducts) != 0, (second & kI8mm) != 0, (second & kBf16) != 0};
}

#elif defined(__APPLE__)

bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

Features features() {
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"),
          has("hw.optional.arm.FEAT_BF16")};
}

#else

Features features() { return {}; }

#endif

Detected detect() {
  const Features here = features();
  if (!here.dot_products) return {Isa::kNeon, false, false, "this CPU has no dot products of int8"};
  if (!here.i8mm)
    return {Isa::kNeonDot, false, false, "this CPU has no products of int8 matrices (I8MM)"};
  return {Isa::kNeonI8mm, here.bf16, false, ""};
}

#else

constexpr const char* kBuiltFor = "this build is for neither x86 nor 64-bit Arm CPUs";

constexpr bool is_of_this_build(Isa isa) { return isa == Isa::kPortable; }

Detected detect() { return {}; }

#endif

const Detected& detected() {
  static const Detected found = detect();
  return found;
}

}  // namespace

bool has_bf16_products() { return detected().bf16_products; }

bool has_avx_vnni() { return detected().avx_vnni; }

Isa detected_isa() { return detected().isa; }

const char* why_not(Isa isa) {
  if (!is_of_this_build(isa)) return kBuiltFor;
  return isa <= detected_isa() ? nullptr : detected().missing;
}

}  // namespace qkernels::cpu
