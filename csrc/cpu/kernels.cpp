#include "cpu/kernels.h"

namespace qkernels::cpu {

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx_vnni_kernels();
Kernels avx512_kernels();
Kernels amx_kernels();
Kernels neon_kernels();
Kernels neon_dot_kernels();
Kernels neon_i8mm_kernels();

// Made where it is asked for and no sooner: the code that fills a table has its instructions too.
template <Kernels (*make)()>
const Kernels& table() {
  static const Kernels made = make();
  return made;
}

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx: return table<amx_kernels>();
    case Isa::kAvx512: return table<avx512_kernels>();
    case Isa::kAvx2:
      // The same numbers: sums of integers are exact.
      return has_avx_vnni() ? table<avx_vnni_kernels>() : table<avx2_kernels>();
#elif defined(__aarch64__)
    case Isa::kNeonI8mm: return table<neon_i8mm_kernels>();
    case Isa::kNeonDot: return table<neon_dot_kernels>();
    case Isa::kNeon: return table<neon_kernels>();
#endif
    default: return table<portable_kernels>();
  }
}

}  // namespace qkernels::cpu
