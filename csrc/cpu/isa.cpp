#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace qkernels::cpu {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    default: return "amx";
  }
}

namespace {

struct Detected {
  Isa isa = Isa::kPortable;
  bool bf16_products = false;
  const char* missing = "";  // what the next level needs
};

#if defined(__x86_64__)

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
  found.missing = "this CPU has no AVX-512 with VNNI";
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  if (!avx512 || !bit(c, 11) || (saved & kZmm) != kZmm) return found;
  found.isa = Isa::kAvx512;
  const bool amx = bit(d, 22) && bit(d, 24) && bit(d, 25);
  found.bf16_products = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
  found.missing = "this CPU has no AMX with bf16 and int8";
  // Conversions to bf16, which every CPU with tiles has.
  if (!amx || !found.bf16_products) return found;
  found.missing = "the operating system does not let this process use AMX tiles";
  if ((saved & kTiles) != kTiles || !tiles_permitted()) return found;
  found.isa = Isa::kAmx;
  found.missing = "";
  return found;
}

#else

Detected detect() { return {Isa::kPortable, "this build is for a CPU without x86 instructions"}; }

#endif

const Detected& detected() {
  static const Detected found = detect();
  return found;
}

}  // namespace

bool has_bf16_products() { return detected().bf16_products; }

Isa detected_isa() { return detected().isa; }

const char* why_not(Isa isa) { return isa <= detected_isa() ? nullptr : detected().missing; }

}  // namespace qkernels::cpu
