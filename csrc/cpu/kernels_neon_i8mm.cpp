#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__aarch64__)
#include <arm_neon.h>

QK_TARGET("arch=armv8.2-a+dotprod+i8mm")

#include "cpu/vector_neon.h"
//
#include "cpu/bursts.h"
#include "cpu/int8_matrices.h"
#include "cpu/int8_rows.h"

namespace qkernels::cpu {
namespace {

struct NeonI8mm : Neon {
  static constexpr int32_t kByteOffset = 0;

  template <bool kSmall>
  static QK_INLINE I dot(I sum, I u, I s) {
    const auto op = [](auto total, auto x, auto y) QK_LAMBDA_INLINE {
      return vusdotq_s32(total, vreinterpretq_u8_s32(x), vreinterpretq_s8_s32(y));
    };
    return integers(op, sum, u, s);
  }
};

int64_t matrix_burst(int64_t repeats) {
  constexpr int kSums = 12;
  int32x4_t sums[kSums];
  for (auto& sum : sums) sum = vdupq_n_s32(0);
  const int8x16_t codes = vdupq_n_s8(3), x = vdupq_n_s8(5);
  for (int64_t i = 0; i < repeats; ++i) {
    QK_UNROLL for (int s = 0; s < kSums; ++s) sums[s] = vmmlaq_s32(sums[s], codes, x);
  }
  keep(sums);
  return repeats * kSums * 2 * 2 * kMatrixColumns * 2;
}

}  // namespace

Kernels neon_dot_kernels();
void add_neon_bf16_kernels(Kernels& table);

Kernels neon_i8mm_kernels() {
  Kernels table = neon_dot_kernels();
  table.int8_rows = int8_rows<NeonI8mm>;
  table.int8_tiles = int8_matrices<NeonI8mm>;
  table.tile_scratch = matrix_scratch;
  table.tile_panels = 4;
  table.pack_int8_row = pack_matrix_row;
  table.int8_burst = matrix_burst;
  if (has_bf16_products()) add_neon_bf16_kernels(table);
  return table;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
