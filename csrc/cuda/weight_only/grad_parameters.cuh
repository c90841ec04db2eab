// Between grad.cu, which reads arguments, and the kernels: one function for each decoder,
// instantiated in a source file of its own (instantiate.py).

#pragma once

#include "cuda/launch.cuh"
#include "cuda/weight_only/grad.h"
#include "cuda/weights/decode.cuh"
#include "cuda/weights/types.h"

namespace qkernels {

struct GradParameters {
  FragmentWeight weight;
  const unsigned char* dy;
  uint16_t* dx;
  float* partials;
  uint32_t* counters;
  int64_t dy_stride;
  int64_t m;
  int64_t rows;  // padded n
  int chunks;    // of 64 columns
  int token_tiles, parts, stages;
  // Columns of a group; of a single one, more than there are. `slots`: groups that the columns of a
  // block touch at most.
  int group_columns, groups, slots, scale_bytes, zero_bytes, stage_bytes;
};

// Starts `blocks` blocks of weight_only_grad_kernel for `tokens` tokens; stage_bytes of the
// parameters is set here. Defined in grad.cuh.
template <template <class> class Decoder, bool kRealZeros>
const char* launch_grad(GradParameters parameters, FloatType type, int tokens, unsigned blocks,
                        Stream stream);

}  // namespace qkernels
