// Numbers of a weight that are beside its codes, added to a product.

#include "cpu/sparse.h"

#include <ATen/core/Tensor.h>

#include <new>

#include "bindings/cpu/cpu.h"

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

void add_sparse_product(at::Tensor y, const at::Tensor& x, const at::Tensor& ends,
                        const at::Tensor& columns, const at::Tensor& values) {
  require(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0),
          "x and y must be [M, K] and [M, N] with the same M, got ", x.sizes(), " and ", y.sizes());
  cpu::SparseProduct job{};
  job.m = x.size(0);
  job.k = x.size(1);
  job.n = y.size(1);
  require(x.device().is_cpu() && (job.k <= 1 || x.stride(1) == 1),
          "x must be on the CPU with adjacent columns, got ", x.device(), " ", x.strides());
  check("y", y, at::kCPU, y.sizes());
  check("ends", ends, at::kCPU, {job.n}, at::kInt);
  check("columns", columns, at::kCPU, {columns.numel()});
  check("values", values, at::kCPU, {columns.numel()});
  const at::ScalarType type = columns.scalar_type();
  require(type == at::kShort || type == at::kInt, "columns must be int16 or int32, got ", type);
  require(job.n == 0 || ends.const_data_ptr<int32_t>()[job.n - 1] == columns.numel(),
          "the last row must end with the last of ", columns.numel(), " entries");
  job.x = x.const_data_ptr();
  job.x_type = float_type("x", x.scalar_type());
  job.x_stride = x.stride(0);
  job.ends = ends.const_data_ptr<int32_t>();
  job.columns = columns.const_data_ptr();
  job.short_columns = type == at::kShort;
  job.values = values.const_data_ptr();
  job.value_type = float_type("values", values.scalar_type());
  job.y = y.mutable_data_ptr();
  job.y_type = float_type("y", y.scalar_type());
  try {
    const py::gil_scoped_release released;
    cpu::add_sparse_product(job, torch_pool());
  } catch (const std::bad_alloc&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "no memory for the work on x of shape ", x.sizes());
  }
}

}  // namespace

void register_cpu_sparse(py::module_& m) {
  m.def("add_sparse_product_cpu", &add_sparse_product,
        "adds x S^T to y [M, N], of rows of S with 16-bit values at columns");
}

}  // namespace qkernels::bindings
