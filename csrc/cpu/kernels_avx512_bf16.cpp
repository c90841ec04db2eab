#include "cpu/calibration.h"
#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the undefined vectors of its own headers for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

QK_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")

#include "cpu/product_tiles.h"
#include "cpu/vector_avx512.h"

namespace qkernels::cpu {
namespace {

struct Bf16Step {
  static QK_INLINE __m512 add(__m512 sum, __m512 x, __m512 y) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};

}  // namespace

ProductKernel avx512_bf16_product() { return multiply_panels<Avx512, Bf16Step, 8>; }

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
