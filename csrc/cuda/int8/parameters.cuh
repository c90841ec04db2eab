// Between mma.cu, which reads arguments, and the kernels: one function for each decoder, with whole
// sums or grouped ones, instantiated in a source file of its own (instantiate.py).

#pragma once

#include "cuda/int8/decode.cuh"
#include "cuda/int8/int8.h"
#include "cuda/products/parameters.cuh"

namespace qkernels {

struct Int8Parameters : WalkParameters {
  int filled;  // columns of a group that are not padding; of a single one, all
  const float* channel_scales;
  const float* x_scales;
  const int32_t* x_zeros;
  const float* addend;
  const void* bias;
  void* y;
  FloatType bias_type, y_type;
  bool gives_int8;
  Int8Reader reader;  // where it does
};

// Starts `blocks` blocks of int8_mma_kernel for `tokens` tokens. Defined in mma.cuh.
template <class Decoder, bool kGrouped>
const char* launch_int8(const Int8Parameters& parameters, int tokens, unsigned blocks,
                        int shared_bytes, Stream stream);

}  // namespace qkernels
