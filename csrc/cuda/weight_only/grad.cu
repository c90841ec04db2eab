// weight_only_grad: from arguments to the kernel of their types.

#include "cuda/weight_only/grad.h"
#include "cuda/weight_only/grad_parameters.cuh"
#include "cuda/weight_only/weight_only.h"
#include "cuda/weights/fragment.cuh"

namespace qkernels {

namespace {

// Columns of a group that spans all of K: more than any weight has.
constexpr int kOneGroup = 0x7fffff80;

// Groups that a block's columns touch at most: both begin at multiples of a step.
int64_t group_slots(int64_t group_size, int64_t groups) {
  if (groups == 1) return 1;
  constexpr int64_t kSteps = kGradBlockColumns / kStepColumns;
  const int64_t touched = 1 + ceil_div(kSteps - 1, group_size / kStepColumns);
  return touched < groups ? touched : groups;
}

template <template <class> class Decoder, bool kRealZeros>
const char* run(DecoderTag<Decoder, kRealZeros>, const GradParameters& parameters, FloatType type,
                int tokens, unsigned blocks, Stream stream) {
  if constexpr (kLiesInSpans<Decoder<Half>::kBits>) {
    return "weight_only_grad takes weights of 4 and 8 bits";
  } else {
    return launch_grad<Decoder, kRealZeros>(parameters, type, tokens, blocks, stream);
  }
}

}  // namespace

const char* weight_only_grad(const GradArguments& arguments, const GradSchedule& schedule,
                             Stream stream) {
  const FragmentWeight& weight = arguments.weight;
  if (arguments.m == 0 || weight.n == 0) return nullptr;
  constexpr int64_t kMostBlocks = 0x7fffffff;
  const int64_t blocks = grad_tiles(arguments.m, weight.k, schedule.tokens) * schedule.parts;
  if (blocks > kMostBlocks) return "dy and the weight have more tiles than a launch can count";
  GradParameters p{};
  p.weight = weight;
  p.dy = static_cast<const unsigned char*>(arguments.dy);
  p.dx = static_cast<uint16_t*>(arguments.dx);
  p.partials = arguments.partials;
  p.counters = arguments.counters;
  p.dy_stride = arguments.dy_stride;
  p.m = arguments.m;
  p.rows = padded_rows(weight.n);
  p.chunks = static_cast<int>(padded_columns(weight.k, code_bits(weight.code)) / kChunkColumns);
  p.token_tiles = static_cast<int>(ceil_div(arguments.m, schedule.tokens));
  p.parts = schedule.parts;
  p.stages = static_cast<int>(grad_stages(weight.n));
  p.groups = static_cast<int>(ceil_div(weight.k, weight.group_size));
  p.group_columns = p.groups == 1 ? kOneGroup : static_cast<int>(weight.group_size);
  p.slots = static_cast<int>(group_slots(weight.group_size, p.groups));
  p.scale_bytes = size_of(weight.scale_type);
  p.zero_bytes = size_of(weight.zero_type);
  return visit_decoder(weight, [&](auto decoder) {
    return run(decoder, p, arguments.type, schedule.tokens, static_cast<unsigned>(blocks), stream);
  });
}

int64_t grad_partial_bytes(int64_t m, int64_t k, const GradSchedule& schedule) {
  if (schedule.parts == 1) return 0;
  return grad_tiles(m, k, schedule.tokens) * schedule.parts * schedule.tokens * kGradBlockColumns *
         4;
}

}  // namespace qkernels
