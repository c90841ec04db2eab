// weight_only_mma: from arguments to the kernel of their types.

#include "cuda/weight_only/parameters.cuh"
#include "cuda/weight_only/weight_only.h"
#include "cuda/weights/fragment.cuh"

namespace qkernels {

namespace {

template <template <class> class Decoder, bool kRealZeros>
const char* run(DecoderTag<Decoder, kRealZeros>, const WeightOnlyParameters& parameters,
                FloatType x_type, int tokens, dim3 grid, int shared_bytes, Stream stream) {
  return launch_decoder<Decoder, kRealZeros>(parameters, x_type, tokens, grid, shared_bytes,
                                             stream);
}

}  // namespace

const char* weight_only_mma(const WeightOnlyArguments& arguments, const WeightOnlyConfig& config,
                            Stream stream) {
  const FragmentWeight& weight = arguments.weight;
  if (arguments.m == 0 || weight.n == 0) return nullptr;
  const int chunks = static_cast<int>(ceil_div(weight.k, kChunkColumns));
  WeightOnlyProblem problem;
  problem.m = arguments.m;
  problem.n = weight.n;
  problem.k = weight.k;
  problem.group_size = weight.group_size;
  problem.bits = code_bits(weight.code);
  problem.scale_bytes = size_of(weight.scale_type);
  problem.zero_bytes = size_of(weight.zero_type);

  WeightOnlyParameters p;
  p.weight = weight;
  p.x = static_cast<const unsigned char*>(arguments.x);
  p.bias = arguments.bias;
  p.y = static_cast<uint16_t*>(arguments.y);
  p.partials = arguments.partials;
  p.counters = arguments.counters;
  p.x_stride = arguments.x_stride;
  p.m = arguments.m;
  p.rows = padded_rows(weight.n);
  p.chunks = chunks;
  // Whole stages, and no block without any.
  const int stage = config.stage_chunks(problem.bits);
  const int stages = static_cast<int>(ceil_div(chunks, stage));
  p.chunks_per_split = static_cast<int>(ceil_div(stages, config.split_k)) * stage;
  p.split_k = static_cast<int>(ceil_div(chunks, p.chunks_per_split));
  p.stages = config.stages;
  p.groups = static_cast<int>(ceil_div(weight.k, weight.group_size));
  p.slots = static_cast<int>(group_slots(problem, config));
  p.scale_bytes = problem.scale_bytes;
  p.zero_bytes = problem.zero_bytes;
  p.bias_type = arguments.bias_type;

  dim3 grid;
  grid.x = static_cast<unsigned>(ceil_div(weight.n, config.block_rows()));
  grid.y = static_cast<unsigned>(p.split_k);
  grid.z = static_cast<unsigned>(ceil_div(arguments.m, config.tokens));
  const int shared = static_cast<int>(shared_bytes(problem, config));
  return visit_decoder(weight, [&](auto decoder) {
    return run(decoder, p, arguments.x_type, config.tokens, grid, shared, stream);
  });
}

}  // namespace qkernels
