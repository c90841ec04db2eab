// Between mma.cu, which reads arguments, and the kernels: one function for each decoder,
// instantiated in a source file of its own (instantiate.py) so that they compile side by side.

#pragma once

#include "cuda/launch.cuh"
#include "cuda/weights/decode.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

struct WeightOnlyParameters {
  FragmentWeight weight;
  const unsigned char* x;
  const void* bias;
  uint16_t* y;
  float* partials;
  uint32_t* counters;
  int64_t x_stride;
  int64_t m;
  int64_t rows;  // padded n
  int chunks, chunks_per_split, split_k, stages;
  int groups, slots, scale_bytes, zero_bytes;
  FloatType bias_type;
};

// Starts weight_only_mma_kernel for `tokens` tokens a block. Defined in mma.cuh.
template <template <class> class Decoder, bool kRealZeros>
const char* launch_decoder(const WeightOnlyParameters& parameters, FloatType x_type, int tokens,
                           dim3 grid, int shared_bytes, Stream stream);

}  // namespace qkernels
