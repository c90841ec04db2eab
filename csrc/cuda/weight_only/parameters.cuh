// Between mma.cu, which reads arguments, and the kernels: one function for each decoder,
// instantiated in a source file of its own (instantiate.py) so that they compile side by side.

#pragma once

#include "cuda/products/parameters.cuh"
#include "cuda/weights/decode.cuh"

namespace qkernels {

struct WeightOnlyParameters : WalkParameters {
  const void* bias;
  void* y;  // of x's type, or of fp32
  bool y_is_float;
  FloatType bias_type;
};

// Starts `blocks` blocks of weight_only_mma_kernel for `tokens` tokens. Defined in mma.cuh.
template <template <class> class Decoder, bool kRealZeros>
const char* launch_decoder(const WeightOnlyParameters& parameters, FloatType x_type, int tokens,
                           unsigned blocks, int shared_bytes, Stream stream);

}  // namespace qkernels
