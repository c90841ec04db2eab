// The gradient of x from a weight in the fragment layout, as an operator.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings/cuda/device.h"
#include "bindings/cuda/fragment.h"
#include "bindings/preparation.h"

namespace qkernels::bindings {

namespace {

// Rows of dy as the kernel reads them: whole 16 bytes, aligned.
Rows rows_of(const at::Tensor& dy, int64_t n) {
  Preparation wanted;
  wanted.k = wanted.group = wanted.padded_group = n;
  wanted.column_multiple = 8;
  wanted.row_bytes = 16;
  return prepare(dy, Buffers{}, wanted);
}

// dx [m, k]. schedule_m: the rows that the schedule is chosen for, where they are not those of dy:
// a fixed number of them makes a row's result independent of how many there are. tokens and parts:
// the schedule itself, where tokens is not 0.
at::Tensor weight_only_grad_op(const at::Tensor& dy, const at::Tensor& words,
                               const at::Tensor& scales, const Optional& zeros,
                               const Optional& table, int64_t n, int64_t k, int64_t group_size,
                               std::string_view code, int64_t schedule_m, int64_t tokens,
                               int64_t parts) {
  const FragmentWeight weight = fragment_weight(fragment_shape(n, k, group_size, code), words,
                                                scales, pointer(zeros), pointer(table));
  require(dy.device() == words.device(), "dy is on ", dy.device(), ", the weight on ",
          words.device());
  require(dy.scalar_type() == at::kHalf || dy.scalar_type() == at::kBFloat16,
          "dy must be fp16 or bf16, got ", dy.scalar_type());
  require(dy.dim() == 2 && dy.size(1) == n, "dy must have shape [M, ", n, "], got ", dy.sizes());
  require(schedule_m >= 0, "schedule_m must be 0 or more, got ", schedule_m);
  require(tokens == 0 || tokens == 16 || tokens == 64, "a block computes 16 or 64 tokens, got ",
          tokens);
  require(parts >= 1 && parts <= grad_stages(n), "N has 1 to ", grad_stages(n), " parts, got ",
          parts);
  at::Tensor dx = empty_output(dy, k, dy.scalar_type());
  if (dy.size(0) == 0) return dx;
  const DeviceScope scope(dy);
  const Rows rows = rows_of(dy, n);
  const GradSchedule schedule =
      tokens != 0 ? GradSchedule{static_cast<int>(tokens), static_cast<int>(parts)}
                  : choose_grad_schedule(schedule_m > 0 ? schedule_m : rows.m, n, k,
                                         scope.facts().multiprocessors);
  GradArguments arguments{};
  arguments.weight = weight;
  arguments.dy = rows.tensor.const_data_ptr();
  arguments.dy_stride = rows.stride;
  arguments.dx = dx.mutable_data_ptr();
  arguments.m = rows.m;
  arguments.type = float_type("dy", dy);
  at::Tensor partials;
  if (const int64_t bytes = grad_partial_bytes(rows.m, k, schedule); bytes > 0) {
    partials = at::empty({bytes / 4}, dy.options().dtype(at::kFloat));
    arguments.partials = partials.mutable_data_ptr<float>();
    arguments.counters = scope.counters(grad_tiles(rows.m, k, schedule.tokens));
  }
  succeed(weight_only_grad(arguments, schedule, scope.stream()));
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(QKERNELS_LIBRARY, m) {
  m.def(
      "weight_only_grad(Tensor dy, Tensor words, Tensor scales, Tensor? zeros, Tensor? table, "
      "int n, int k, int group_size, str code, int schedule_m=0, int tokens=0, int parts=1) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(QKERNELS_LIBRARY, QKERNELS_DISPATCH_KEY, m) {
  m.impl("weight_only_grad", &weight_only_grad_op);
}

}  // namespace qkernels::bindings
