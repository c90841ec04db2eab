#include "cuda/weight_only/mma.cuh"

namespace qkernels {

template const char* launch_decoder<Int4, true>(const WeightOnlyParameters&, FloatType, int, dim3,
                                                int, Stream);

}  // namespace qkernels
