// weight_only_mma: from arguments to the kernel of their types.

#include "cuda/weight_only/parameters.cuh"
#include "cuda/weight_only/weight_only.h"
#include "cuda/weights/fragment.cuh"

namespace qkernels {

namespace {

template <template <class> class Decoder, bool kRealZeros>
const char* run(DecoderTag<Decoder, kRealZeros>, const WeightOnlyParameters& parameters,
                FloatType x_type, int tokens, unsigned blocks, int shared_bytes, Stream stream) {
  return launch_decoder<Decoder, kRealZeros>(parameters, x_type, tokens, blocks, shared_bytes,
                                             stream);
}

}  // namespace

const char* weight_only_mma(const WeightOnlyArguments& arguments, const WeightOnlyConfig& config,
                            Stream stream) {
  const FragmentWeight& weight = arguments.weight;
  if (arguments.m == 0 || weight.n == 0) return nullptr;
  WeightOnlyProblem problem{};
  problem.m = arguments.m;
  problem.n = weight.n;
  problem.k = weight.k;
  problem.group_size = weight.group_size;
  problem.bits = code_bits(weight.code);
  problem.scale_bytes = size_of(weight.scale_type);
  problem.zero_bytes = size_of(weight.zero_type);
  problem.experts = arguments.experts;

  WeightOnlyParameters p;
  p.set(weight, problem, config);
  p.x = static_cast<const unsigned char*>(arguments.x);
  p.x_stride = arguments.x_stride;
  p.partials = arguments.partials;
  p.counters = arguments.counters;
  p.plan = arguments.experts == 0 ? nullptr : static_cast<const Plan*>(arguments.plan);
  p.bias = arguments.bias;
  p.bias_type = arguments.bias_type;
  p.y = arguments.y;
  p.y_is_float = arguments.y_type == FloatType::kFloat;

  const unsigned blocks = grid_blocks(problem, config);
  const int shared = static_cast<int>(shared_bytes(problem, config));
  if (arguments.experts > 0) {
    if (const char* error = plan_experts(arguments, problem, config, stream)) return error;
  }
  return visit_decoder(weight, [&](auto decoder) {
    return run(decoder, p, arguments.x_type, config.tokens, blocks, shared, stream);
  });
}

}  // namespace qkernels
