#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/target.h"
#include "cpu/vector_portable.h"
//
#include "cpu/vector_kernels.h"

namespace qkernels::cpu {

Kernels portable_kernels() { return vector_kernels<Portable>(); }

}  // namespace qkernels::cpu
