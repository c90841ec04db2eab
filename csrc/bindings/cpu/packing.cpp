// Codes into words and back, on the CPU: the dense, planar and vnni orders.

#include <ATen/ops/empty.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>

#include "bindings/cpu/cpu.h"
#include "cpu/pack.h"
#include "cpu/vnni.h"

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

void require_one_of(const char* name, int64_t value, std::initializer_list<int64_t> accepted) {
  if (std::find(accepted.begin(), accepted.end(), value) != accepted.end()) return;
  std::ostringstream message;
  message << name << " must be one of";
  for (int64_t each : accepted) message << ' ' << each;
  message << ", got " << value;
  require(false, message.str());
}

// The type as Python names it: torch.uint8.
std::string name_of(at::ScalarType type) { return py::str(py::cast(type)); }

void require_matrix(const char* name, const at::Tensor& tensor, at::ScalarType type) {
  require(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device().str());
  require(tensor.scalar_type() == type, name, " must be ", name_of(type), ", got ",
          name_of(tensor.scalar_type()));
  require(tensor.dim() == 2, name, " must have 2 dimensions, got shape ", tensor.sizes());
  require(tensor.is_contiguous(), name, " must be contiguous, got shape ", tensor.sizes(),
          " with strides ", tensor.strides());
}

// `seen` is the bitwise or of all codes, so it names no code; the search is for the message only.
void require_codes_fit(const at::Tensor& codes, uint8_t seen, int64_t bits) {
  if (seen >> bits == 0) return;
  const auto* first = codes.const_data_ptr<uint8_t>();
  require(false, "codes must be below ", 1 << bits, " for ", bits, " bits, got ",
          int{*std::max_element(first, first + codes.numel())});
}

uint32_t* words_of(const at::Tensor& words) {
  return reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
}

const uint32_t* const_words_of(const at::Tensor& words) {
  return reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
}

at::Tensor pack_dense(const at::Tensor& codes, int64_t bits) {
  require_one_of("bits", bits, {1, 2, 3, 4, 8});
  require_matrix("codes", codes, at::kByte);
  const int64_t rows = codes.size(0), k = codes.size(1);
  at::Tensor words = at::empty({rows, cpu::dense_words(k, bits)}, at::kInt);
  uint8_t seen;
  {
    const py::gil_scoped_release released;
    seen = cpu::pack_dense(codes.const_data_ptr<uint8_t>(), words_of(words), rows, k, bits,
                           torch_pool().threads);
  }
  require_codes_fit(codes, seen, bits);
  return words;
}

at::Tensor unpack_dense(const at::Tensor& words, int64_t k, int64_t bits) {
  require_one_of("bits", bits, {1, 2, 3, 4, 8});
  require_matrix("words", words, at::kInt);
  require(k >= 0, "k must not be negative, got ", k);
  const int64_t rows = words.size(0), columns = cpu::dense_words(k, bits);
  require(words.size(1) == columns, "words must have shape [", rows, ", ", columns, "] for k=", k,
          " and ", bits, " bits, got ", words.sizes());
  at::Tensor codes = at::empty({rows, k}, at::kByte);
  const py::gil_scoped_release released;
  cpu::unpack_dense(const_words_of(words), codes.mutable_data_ptr<uint8_t>(), rows, k, bits,
                    torch_pool().threads);
  return codes;
}

at::Tensor pack_planar(const at::Tensor& codes, int64_t bits, int64_t plane) {
  require_one_of("bits", bits, {1, 2, 3, 4});
  require_one_of("plane", plane, {16, 32, 64});
  require_matrix("codes", codes, at::kByte);
  const int64_t n = codes.size(0), k = codes.size(1);
  at::Tensor words = at::empty({cpu::planar_rows(k, bits, plane), n}, at::kInt);
  uint8_t seen;
  {
    const py::gil_scoped_release released;
    seen = cpu::pack_planar(codes.const_data_ptr<uint8_t>(), words_of(words), n, k, bits, plane,
                            torch_pool().threads);
  }
  require_codes_fit(codes, seen, bits);
  return words;
}

at::Tensor unpack_planar(const at::Tensor& words, int64_t k, int64_t bits, int64_t plane) {
  require_one_of("bits", bits, {1, 2, 3, 4});
  require_one_of("plane", plane, {16, 32, 64});
  require_matrix("words", words, at::kInt);
  require(k >= 0, "k must not be negative, got ", k);
  const int64_t n = words.size(1), rows = cpu::planar_rows(k, bits, plane);
  require(words.size(0) == rows, "words must have shape [", rows, ", ", n, "] for k=", k, ", ",
          bits, " bits and plane ", plane, ", got ", words.sizes());
  at::Tensor codes = at::empty({n, k}, at::kByte);
  const py::gil_scoped_release released;
  cpu::unpack_planar(const_words_of(words), codes.mutable_data_ptr<uint8_t>(), n, k, bits, plane,
                     torch_pool().threads);
  return codes;
}

void pack_vnni(const at::Tensor& codes, const at::Tensor& words, int64_t first_row, bool nibbles) {
  const int64_t rows = codes.dim() == 2 ? codes.size(0) : 0, k = rows ? codes.size(1) : 0;
  check("codes", codes, at::kCPU, {rows, k}, at::kByte);
  const int64_t steps = cpu::padded_columns(k) / (nibbles ? 8 : 4);
  check("words", words, at::kCPU, {words.dim() == 3 ? words.size(0) : 0, steps, cpu::kLanes},
        at::kInt);
  const int64_t panel = first_row / cpu::kLanes;
  require(first_row % cpu::kLanes == 0 && first_row >= 0,
          "first_row must be a multiple of 16, got ", first_row);
  require(panel + ceil_div(rows, cpu::kLanes) <= words.size(0), "rows ", first_row, " to ",
          first_row + rows, " do not fit words of shape ", words.sizes());
  auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  const py::gil_scoped_release released;
  cpu::pack_vnni(codes.const_data_ptr<uint8_t>(), to + panel * steps * cpu::kLanes, rows, k,
                 nibbles, torch_pool());
}

at::Tensor unpack_vnni(const at::Tensor& words, int64_t first_row, int64_t rows, int64_t k,
                       bool nibbles) {
  const int64_t steps = cpu::padded_columns(k) / (nibbles ? 8 : 4);
  const int64_t panels = words.dim() == 3 ? words.size(0) : 0;
  check("words", words, at::kCPU, {panels, steps, cpu::kLanes}, at::kInt);
  require(first_row >= 0 && rows >= 0 && first_row + rows <= panels * cpu::kLanes, "rows ",
          first_row, " to ", first_row + rows, " are not in words of shape ", words.sizes());
  at::Tensor codes = at::empty({rows, k}, at::kByte);
  const py::gil_scoped_release released;
  cpu::unpack_vnni(reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()),
                   codes.mutable_data_ptr<uint8_t>(), first_row, rows, k, nibbles, torch_pool());
  return codes;
}

}  // namespace

void register_cpu_packing(py::module_& m) {
  m.def("pack_dense", &pack_dense, py::arg("codes"), py::arg("bits"),
        "codes uint8 [R, K] -> words int32 [R, ceil(K * bits / 32)]; bits 1, 2, 3, 4 or 8");
  m.def("unpack_dense", &unpack_dense, py::arg("words"), py::arg("k"), py::arg("bits"),
        "words int32 [R, ceil(k * bits / 32)] -> codes uint8 [R, k]; bits 1, 2, 3, 4 or 8");
  m.def("pack_planar", &pack_planar, py::arg("codes"), py::arg("bits"), py::arg("plane"),
        "codes uint8 [N, K] -> words int32 [K_pad / (32 // bits), N]; bits 1, 2, 3 or 4; "
        "plane 16, 32 or 64");
  m.def("unpack_planar", &unpack_planar, py::arg("words"), py::arg("k"), py::arg("bits"),
        py::arg("plane"),
        "words int32 [K_pad / (32 // bits), N] -> codes uint8 [N, k]; bits 1, 2, 3 or 4; "
        "plane 16, 32 or 64");
  m.def("pack_vnni", &pack_vnni, py::arg("codes"), py::arg("words"), py::arg("first_row"),
        py::arg("nibbles"), "codes uint8 [R, K] into words int32 [N/16, steps, 16]");
  m.def("unpack_vnni", &unpack_vnni, py::arg("words"), py::arg("first_row"), py::arg("rows"),
        py::arg("k"), py::arg("nibbles"), "words -> codes uint8 [rows, k]");
}

}  // namespace qkernels::bindings
