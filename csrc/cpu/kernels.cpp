#include "cpu/kernels.h"

namespace qkernels::cpu {

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels amx_kernels();

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  static const Kernels tables[kIsaCount] = {portable_kernels(), avx2_kernels(), avx512_kernels(),
                                            amx_kernels()};
  return tables[static_cast<int>(isa)];
#else
  static const Kernels table = portable_kernels();
  return table;
#endif
}

}  // namespace qkernels::cpu
