// weight_only_mma: from arguments to the kernel of their types.

#include "cuda/weight_only/parameters.cuh"
#include "cuda/weight_only/weight_only.h"
#include "cuda/weights/fragment.cuh"

namespace qkernels {

namespace {

// Columns of a group that spans all of K: more than any weight has, and whole chunks.
constexpr int kOneGroup = 0x7fffff80;

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
  p.weight = weight;
  p.bias = arguments.bias;
  p.partials = arguments.partials;
  p.counters = arguments.counters;
  p.x_stride = arguments.x_stride;
  p.rows = padded_rows(weight.n);
  p.chunks = static_cast<int>(padded_columns(weight.k, problem.bits) / kChunkColumns);
  p.stages = config.stages;
  p.groups = static_cast<int>(ceil_div(weight.k, weight.group_size));
  p.slots = static_cast<int>(group_slots(problem, config));
  p.scale_bytes = problem.scale_bytes;
  p.zero_bytes = problem.zero_bytes;
  p.bias_type = arguments.bias_type;
  const int stage_columns = config.stage_chunks(problem.bits) * kChunkColumns;
  p.group_columns = p.groups == 1 ? kOneGroup : static_cast<int>(weight.group_size);
  p.stage_groups = stage_columns / p.group_columns;
  p.stage_rest = stage_columns % p.group_columns;

  const WeightOnlyWork work = work_of(problem, config);
  const int64_t tiles = work.tiles(), span = config.each_tile ? work.units : work.all_units();
  p.x = static_cast<const unsigned char*>(arguments.x);
  p.y = arguments.y;
  p.y_is_float = arguments.y_type == FloatType::kFloat;
  p.m = arguments.m;
  p.units = static_cast<int>(work.units);
  p.unit_chunks = config.unit;
  p.row_tiles = static_cast<int>(work.row_tiles);
  p.token_tiles = static_cast<int>(work.token_tiles);
  p.span_tiles = static_cast<int>(config.each_tile ? 1 : tiles);
  p.span_blocks = config.blocks;
  p.shares = Shares(static_cast<int>(span), config.blocks);
  p.plan = arguments.experts == 0 ? nullptr : static_cast<const Plan*>(arguments.plan);
  p.by_units = Divisor(p.units);
  p.by_row_tiles = Divisor(p.row_tiles);
  p.by_token_tiles = Divisor(p.token_tiles);
  p.by_span_blocks = Divisor(p.span_blocks);
  p.by_group_columns = Divisor(p.group_columns);

  const auto blocks =
      static_cast<unsigned>(config.each_tile ? tiles * config.blocks : config.blocks);
  const int shared = static_cast<int>(shared_bytes(problem, config));
  if (arguments.experts > 0) {
    if (const char* error = plan_experts(arguments, problem, config, stream)) return error;
  }
  return visit_decoder(weight, [&](auto decoder) {
    return run(decoder, p, arguments.x_type, config.tokens, blocks, shared, stream);
  });
}

}  // namespace qkernels
