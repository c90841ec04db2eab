#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

QK_TARGET("avx2,fma,f16c")

#include "cpu/vector_avx2.h"
//
#include "cpu/product_tiles.h"
#include "cpu/vector_kernels.h"

namespace qkernels::cpu {

Kernels avx2_kernels() {
  Kernels table = vector_kernels<Avx2>();
  table.fp32_product = multiply_panels<Avx2, Fp32Step<Avx2>, 2>;
  return table;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
