#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

// Tests run the same instruction in the encoding of AVX-512, which more machines have.
#ifdef QK_AVX_VNNI_BY_AVX512
QK_TARGET("avx2,fma,f16c,avx512vl,avx512vnni")
#else
QK_TARGET("avx2,fma,f16c,avxvnni")
#endif

#include "cpu/vector_avx2.h"
//
#include "cpu/bursts.h"
#include "cpu/int8_rows.h"

namespace qkernels::cpu {
namespace {

struct AvxVnni : Avx2 {
  static QK_INLINE __m256i dot_four(__m256i sum, __m256i u, __m256i s) {
#ifdef QK_AVX_VNNI_BY_AVX512
    return _mm256_dpbusd_epi32(sum, u, s);
#else
    return _mm256_dpbusd_avx_epi32(sum, u, s);
#endif
  }
  template <bool kSmall>
  static QK_INLINE I dot(I sum, I u, I s) {
    return {dot_four(sum.a, u.a, s.a), dot_four(sum.b, u.b, s.b)};
  }
};

}  // namespace

Kernels avx2_kernels();

// All else is what it is with AVX2 alone.
Kernels avx_vnni_kernels() {
  Kernels table = avx2_kernels();
  table.int8_rows = int8_rows<AvxVnni>;
  table.int8_sums = int8_sums<AvxVnni>;
  table.int8_burst = int8_burst<AvxVnni>;
  return table;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
