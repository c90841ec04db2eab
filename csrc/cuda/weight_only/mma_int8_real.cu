#include "cuda/weight_only/mma.cuh"

namespace qkernels {

template const char* launch_decoder<Int8, true>(const WeightOnlyParameters&, FloatType, int, dim3,
                                                int, Stream);

}  // namespace qkernels
