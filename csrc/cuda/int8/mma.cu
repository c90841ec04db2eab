// int8_mma: from arguments to the kernel of their weight.

#include "cuda/int8/int8.h"
#include "cuda/int8/parameters.cuh"

namespace qkernels {

namespace {

template <class Decoder, bool kGrouped>
const char* run(Int8Tag<Decoder, kGrouped>, const Int8Parameters& parameters, int tokens,
                unsigned blocks, int shared_bytes, Stream stream) {
  return launch_int8<Decoder, kGrouped>(parameters, tokens, blocks, shared_bytes, stream);
}

}  // namespace

WeightOnlyProblem int8_problem(const Int8Weight& weight, int64_t m) {
  WeightOnlyProblem problem{};
  problem.m = m;
  problem.n = weight.n;
  problem.k = weight.k;
  problem.group_size = weight.group_size;
  problem.bits = weight.bits;
  problem.x_bytes = 1;
  // A scale of a whole row is met behind its sum alone.
  problem.scale_bytes = weight.two_levels() ? 1
                        : weight.is_whole() ? 0
                                            : size_of(weight.scale_type);
  problem.zero_bytes = weight.zeros == nullptr ? 0 : 1;
  return problem;
}

const char* why_not_exact(const Int8Weight& weight, bool has_zeros) {
  // Numbers of x, less a zero point, go to 255 in magnitude.
  const int64_t columns = weight.is_whole() ? weight.k : weight.group_size;
  if (columns * 128 * (has_zeros ? 255 : 128) <= 0x7fffffff) return nullptr;
  return has_zeros ? "int32 sums of int8 with zero points are of 65793 columns at most"
                   : "int32 sums of int8 are of 131071 columns at most";
}

const char* int8_mma(const Int8Arguments& arguments, const WeightOnlyConfig& config,
                     Stream stream) {
  const Int8Weight& weight = arguments.weight;
  if (arguments.m == 0 || weight.n == 0) return nullptr;
  if (const char* reason = why_not_exact(weight, arguments.x_zeros != nullptr)) return reason;
  FragmentWeight fragment{};
  fragment.words = weight.words;
  fragment.scales = weight.scales;
  fragment.zeros = weight.zeros;
  fragment.n = weight.n;
  fragment.k = weight.k;
  fragment.group_size = weight.group_size;
  fragment.code = weight.bits == 4 ? WeightCode::kInt4 : WeightCode::kInt8;
  fragment.scale_type = weight.scale_type;
  fragment.zero_type = weight.zeros == nullptr ? ZeroType::kNone : ZeroType::kInteger;
  const WeightOnlyProblem problem = int8_problem(weight, arguments.m);

  Int8Parameters p;
  p.set(fragment, problem, config);
  p.x = reinterpret_cast<const unsigned char*>(arguments.x);
  p.x_stride = arguments.x_stride;
  p.partials = arguments.partials;
  p.counters = arguments.counters;
  p.plan = nullptr;
  p.filled = p.groups == 1 ? kOneGroup : static_cast<int>(weight.filled);
  p.channel_scales = weight.channel_scales;
  p.x_scales = arguments.x_scales;
  p.x_zeros = arguments.x_zeros;
  p.addend = arguments.addend;
  p.bias = arguments.bias;
  p.bias_type = arguments.bias_type;
  p.y = arguments.y;
  p.y_type = arguments.y_type;
  p.gives_int8 = arguments.reader != nullptr;
  p.reader = p.gives_int8 ? *arguments.reader : Int8Reader{};

  const unsigned blocks = grid_blocks(problem, config);
  const int shared = static_cast<int>(shared_bytes(problem, config));
  return visit_int8(weight,
                    [&](auto tag) { return run(tag, p, config.tokens, blocks, shared, stream); });
}

}  // namespace qkernels
