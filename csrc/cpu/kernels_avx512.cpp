#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the undefined vectors of its own headers for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

QK_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

#include "cpu/vector_avx512.h"
//
#include "cpu/integer_panels.h"
#include "cpu/product_tiles.h"
#include "cpu/vector_kernels.h"

namespace qkernels::cpu {

void add_bf16_kernels(Kernels& table);

Kernels avx512_kernels() {
  Kernels table = vector_kernels<Avx512>();
  table.fp32_product = multiply_panels<Avx512, Fp32Step<Avx512>, 8>;
  table.int8_tiles = integer_panels<Avx512>;
  table.tile_scratch = integer_scratch;
  table.tile_panels = kIntegerPanels;
  table.pack_int8_row = pack_integer_row;
  if (has_bf16_products()) add_bf16_kernels(table);
  return table;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
