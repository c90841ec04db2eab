#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__aarch64__)
#include <arm_neon.h>

QK_TARGET("arch=armv8.2-a+dotprod")

#include "cpu/vector_neon.h"
//
#include "cpu/bursts.h"
#include "cpu/int8_rows.h"

namespace qkernels::cpu {
namespace {

struct NeonDot : Neon {
  template <bool kSmall>
  static QK_INLINE I dot(I sum, I u, I s) {
    const auto op = [](auto total, auto x, auto y) QK_LAMBDA_INLINE {
      return vdotq_s32(total, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y));
    };
    return integers(op, sum, u, s);
  }
};

}  // namespace

Kernels neon_kernels();

// Floats are those of every NEON.
Kernels neon_dot_kernels() {
  Kernels table = neon_kernels();
  table.int8_rows = int8_rows<NeonDot>;
  table.int8_sums = int8_sums<NeonDot>;
  table.int8_burst = int8_burst<NeonDot>;
  return table;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
