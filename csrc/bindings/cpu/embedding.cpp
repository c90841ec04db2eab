// Rows of a weight in the plain or the vnni layout, looked up by number.

#include "cpu/embedding.h"

#include <ATen/ops/empty.h>

#include <memory>
#include <new>

#include "bindings/cpu/cpu.h"
#include "cpu/pack.h"

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

// Below it no number of bits, columns or groups overflows.
constexpr int64_t kLengthEnd = int64_t{1} << 31;

class CpuEmbedding {
 public:
  CpuEmbedding(int64_t n, int64_t k, int64_t bits, int64_t group, int64_t padded_group,
               int64_t groups, bool one_scale, bool panels, const at::Tensor& values,
               const Optional& nested_table)
      : values_(values), nested_table_(nested_table) {
    require(n < kLengthEnd && k < kLengthEnd && padded_group < kLengthEnd,
            "n, k and padded_group must be below ", kLengthEnd, ", got ", n, ", ", k, " and ",
            padded_group);
    require(n > 0 && k > 0 && group > 0 && padded_group >= group && groups == ceil_div(k, group),
            "n, k and groups must be above 0 and fit, got ", n, ", ", k, ", ", groups, " of ",
            group);
    require(bits == 8 || (bits > 0 && bits <= 4), "bits must be 1, 2, 3, 4 or 8, got ", bits);
    check("values", values, at::kCPU, {bits == 8 ? 256 : 16}, at::kFloat);
    table_.order = panels ? cpu::RowOrder::kPanels : cpu::RowOrder::kDense;
    table_.bits = static_cast<int>(bits);
    table_.n = n;
    table_.k = k;
    table_.group = group;
    table_.padded_group = panels ? padded_group : group;
    table_.groups = groups;
    table_.columns = (groups - 1) * table_.padded_group + k - (groups - 1) * group;
    table_.one_scale = one_scale;
    table_.values = values.const_data_ptr<float>();
    if (nested_table) {
      check("nested_table", *nested_table, at::kCPU, {256}, at::kFloat);
      table_.nested_table = nested_table->const_data_ptr<float>();
    }
  }

  // rows int64 [R] -> [R, K].
  at::Tensor look_up(const at::Tensor& rows, const at::Tensor& words, const at::Tensor& scales,
                     const Optional& zeros, const Optional& offsets, const Optional& channel_scales,
                     const Optional& nested_absmax, const Optional& nested_offset,
                     at::ScalarType type) const {
    check("rows", rows, at::kCPU, {rows.numel()}, at::kLong);
    cpu::EmbeddingTable table = table_;
    check_words(words);
    table.words = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
    table.scales = numbers("scales", scales);
    if (zeros) table.zeros = numbers("zeros", *zeros);
    if (offsets) table.offsets = numbers("offsets", *offsets);
    if (channel_scales) {
      check("channel_scales", *channel_scales, at::kCPU, {table.n}, at::kFloat);
      table.channel_scales = channel_scales->const_data_ptr<float>();
    }
    if (nested_absmax) {
      require(nested_offset.has_value() && nested_table_.has_value(),
              "nested scales need all parts");
      const int64_t count = table.one_scale ? 1 : table.n * table.groups;
      check("nested_absmax", *nested_absmax, at::kCPU, {ceil_div(count, 256)}, at::kFloat);
      check("nested_offset", *nested_offset, at::kCPU, {}, at::kFloat);
      table.scales.type = cpu::GroupType::kNested;
      table.nested_absmax = nested_absmax->const_data_ptr<float>();
      table.nested_offset = *nested_offset->const_data_ptr<float>();
    }
    const bool has_levels = channel_scales.has_value() || nested_absmax.has_value();
    require((scales.scalar_type() == at::kByte) == has_levels,
            "uint8 scales need channel_scales or nested ones, and no others do");
    const int64_t count = rows.numel();
    const auto* wanted = rows.const_data_ptr<int64_t>();
    const int64_t* wrong = cpu::out_of_range(wanted, count, table.n);
    TORCH_CHECK_INDEX(wrong == nullptr, "index ", wrong == nullptr ? 0 : *wrong,
                      " is out of range for an embedding of ", table.n, " rows");
    const cpu::FloatType out_type = float_type("the result", type);
    at::Tensor out = at::empty({count, table.k}, type);
    const cpu::Pool pool = torch_pool();
    try {
      const py::gil_scoped_release released;
      cpu::look_up(table, wanted, count, out.mutable_data_ptr(), out_type, pool);
    } catch (const std::bad_alloc&) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "no memory for the work of ", pool.threads,
                       " threads on ", count, " rows of ", table.k, " columns");
    }
    return out;
  }

 private:
  void check_words(const at::Tensor& words) const {
    if (table_.order == cpu::RowOrder::kDense) {
      check("words", words, at::kCPU, {table_.n, cpu::dense_words(table_.k, table_.bits)},
            at::kInt);
      return;
    }
    const int64_t steps = cpu::padded_columns(table_.columns) / (table_.bits <= 4 ? 8 : 4);
    check("words", words, at::kCPU, {ceil_div(table_.n, cpu::kLanes), steps, cpu::kLanes},
          at::kInt);
  }

  cpu::GroupNumbers numbers(const char* name, const at::Tensor& tensor) const {
    if (table_.order == cpu::RowOrder::kPanels)
      check(name, tensor, at::kCPU, {ceil_div(table_.n, cpu::kLanes), table_.groups, cpu::kLanes});
    else
      check(name, tensor, at::kCPU, {table_.one_scale ? 1 : table_.n, table_.groups});
    return {tensor.const_data_ptr(), group_type(name, tensor.scalar_type())};
  }

  cpu::EmbeddingTable table_{};
  at::Tensor values_;  // keep alive what table_ points to
  Optional nested_table_;
};

}  // namespace

void register_cpu_embedding(py::module_& m) {
  py::class_<CpuEmbedding, std::shared_ptr<CpuEmbedding>>(
      m, "CpuEmbedding", "A weight in the plain or the vnni layout, less its tensors.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool,
                    const at::Tensor&, const Optional&>(),
           py::kw_only(), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group"),
           py::arg("padded_group"), py::arg("groups"), py::arg("one_scale"), py::arg("panels"),
           py::arg("values"), py::arg("nested_table"))
      .def("look_up", &CpuEmbedding::look_up, py::arg("rows"), py::arg("words"), py::arg("scales"),
           py::arg("zeros"), py::arg("offsets"), py::arg("channel_scales"),
           py::arg("nested_absmax"), py::arg("nested_offset"), py::arg("dtype"),
           "rows int64 [R] -> [R, K]; IndexError for one out of range");
}

}  // namespace qkernels::bindings
