#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__aarch64__)
#include "cpu/vector_neon.h"
//
#include "cpu/vector_kernels.h"

namespace qkernels::cpu {

Kernels neon_kernels() { return vector_kernels<Neon>(); }

}  // namespace qkernels::cpu
#endif
