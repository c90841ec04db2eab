#include <cmath>
#include <type_traits>

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

#include "cpu/vector_avx512.h"
//
#include "cpu/product_tiles.h"
#include "cpu/scaled_panels.h"

namespace qkernels::cpu {
namespace {

struct Bf16Step {
  static QK_INLINE __m512 add(__m512 sum, __m512 x, __m512 y) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};

constexpr ProductKernel kProduct = multiply_panels<Avx512, Bf16Step, 8>;

void scaled_panels(const ScaledJob& job, int64_t begin, int64_t end, void* scratch) {
  visit_decoder<Avx512>(job.weight, [&](const auto& decoder) {
    run_scaled_panels(job, decoder, kProduct, begin, end, scratch);
  });
}

}  // namespace

void add_bf16_kernels(Kernels& table) {
  table.bf16_product = kProduct;
  table.scaled_panels = scaled_panels;
  table.scaled_scratch = scaled_scratch;
  table.pack_pairs = pack_pairs;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
