// The schedule of weight_only_mma and int8_mma as an operator, in every build: it is a function of
// numbers, and says what to expect of a GPU that is not here.

#include <torch/library.h>

#include <tuple>

#include "cuda/weight_only/config.h"

namespace qkernels::bindings {

namespace {

// tokens, blocks, stages and unit (config.h); the bytes of shared memory of a block; and the share
// of multiprocessors at work. zero_bytes is 0 without zero points, x_bytes 1 for int8_mma.
std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double> weight_only_schedule(
    int64_t m, int64_t n, int64_t k, int64_t group_size, int64_t bits, int64_t scale_bytes,
    int64_t zero_bytes, int64_t multiprocessors, int64_t shared, int64_t multiprocessor_shared,
    bool each_tile, int64_t x_bytes) {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (const int64_t each : {m, n, k, group_size, multiprocessors, shared, multiprocessor_shared}) {
    TORCH_CHECK_VALUE(each > 0 && each <= kMost, "sizes must be 1 to ", kMost, ", got ", each);
  }
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  TORCH_CHECK_VALUE(scale_bytes >= 0 && scale_bytes <= 4 && zero_bytes >= 0 && zero_bytes <= 4,
                    "a scale and a zero point have 0 to 4 bytes, got ", scale_bytes, " and ",
                    zero_bytes);
  TORCH_CHECK_VALUE(x_bytes == 1 || x_bytes == 2, "a number of x has 1 or 2 bytes, got ", x_bytes);
  WeightOnlyProblem problem{};
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.group_size = group_size;
  problem.bits = static_cast<int>(bits);
  problem.scale_bytes = static_cast<int>(scale_bytes);
  problem.zero_bytes = static_cast<int>(zero_bytes);
  problem.multiprocessors = static_cast<int>(multiprocessors);
  problem.shared_bytes = static_cast<int>(shared);
  problem.multiprocessor_shared_bytes = static_cast<int>(multiprocessor_shared);
  problem.each_tile = each_tile;
  problem.x_bytes = static_cast<int>(x_bytes);
  const WeightOnlyConfig config = choose_config(problem);
  return std::make_tuple(config.tokens, config.blocks, config.stages, config.unit,
                         shared_bytes(problem, config), busy_share(problem, config));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qkernels, m) {
  m.def(
      "weight_only_schedule(int m, int n, int k, int group_size, int bits, int scale_bytes, "
      "int zero_bytes, int multiprocessors, int shared_bytes, int multiprocessor_shared_bytes, "
      "bool each_tile=False, int x_bytes=2) -> (int, int, int, int, int, float)",
      &weight_only_schedule);
}

}  // namespace qkernels::bindings
