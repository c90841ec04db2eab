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

QK_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16,"
    "amx-int8")

#include "cpu/vector_avx512.h"
#include "cpu/vector_kernels.h"
//
#include "cpu/grouped_tiles.h"
#include "cpu/product_tiles.h"
#include "cpu/whole_tiles.h"

namespace qkernels::cpu {
namespace {

void float_tiles(const FloatTileJob& job, int64_t begin, int64_t end, void* scratch) {
  visit_decoder<V>(job.weight, [&](const auto& decoder) {
    if (job.rounds_weights)
      run_scaled(job, decoder, begin, end, scratch);
    else
      run_exact(job, decoder, begin, end, scratch);
  });
}

void int8_tiles(const Int8TileJob& job, int64_t begin, int64_t end, void* scratch) {
  if (job.weight.sums_are_integers())
    run_integers(job, begin, end, scratch);
  else
    run_int8_groups(job, begin, end, scratch);
}

void pack_int8_row(const int8_t* x, int64_t columns, int64_t row, int8_t* tile) {
  int8_t* out = tile + row * kInt8Step;
  for (int64_t c = 0; c < columns; c += kInt8Step, out += kTileBytes) {
    _mm512_storeu_si512(out, _mm512_loadu_si512(x + c));
  }
}

template <bool kIntegers>
int64_t tile_burst(int64_t repeats) {
  const TileRegisters registers(kTileRows);
  for (int64_t i = 0; i < repeats; ++i) {
    if constexpr (kIntegers) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t columns = kIntegers ? kInt8Step : kFloatStep;
  return repeats * 4 * kTileRows * kLanes * columns * 2;
}

int64_t tile_scratch(int64_t m, int64_t panels) {
  const int64_t whole = whole_scratch(m, panels), grouped = grouped_scratch(m);
  return whole > grouped ? whole : grouped;
}

}  // namespace

void add_bf16_kernels(Kernels& table);

Kernels amx_kernels() {
  Kernels table = vector_kernels<Avx512>();
  table.fp32_product = multiply_panels<Avx512, Fp32Step<Avx512>, 8>;
  if (has_bf16_products()) add_bf16_kernels(table);
  table.float_tiles = float_tiles;
  table.int8_tiles = int8_tiles;
  table.tile_scratch = tile_scratch;
  table.tile_panels = 4;
  table.pack_float_tile = pack_float_tile;
  table.pack_int8_row = pack_int8_row;
  table.int8_burst = tile_burst<true>;
  table.bf16_burst = tile_burst<false>;
  return table;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
