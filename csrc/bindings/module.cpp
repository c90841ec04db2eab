// qkernels._C: checks what Python passes in and calls the kernels, which take raw pointers.
// The CPU kernels are called in cpu.cpp, the CUDA kernels in cuda/. A user's mistake is a
// ValueError with the values.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/cpu.h"
#include "cpu/pack.h"

namespace py = pybind11;

namespace {

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw py::value_error(message.str());
}

void require_one_of(const char* name, int64_t value, std::initializer_list<int64_t> accepted) {
  if (std::find(accepted.begin(), accepted.end(), value) != accepted.end()) return;
  std::ostringstream message;
  message << name << " must be one of";
  for (int64_t each : accepted) message << ' ' << each;
  message << ", got " << value;
  throw py::value_error(message.str());
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
  at::Tensor words = at::empty({rows, qkernels::cpu::dense_words(k, bits)}, at::kInt);
  uint8_t seen;
  {
    py::gil_scoped_release released;
    seen = qkernels::cpu::pack_dense(codes.const_data_ptr<uint8_t>(), words_of(words), rows, k,
                                     bits, qkernels::bindings::torch_pool().threads);
  }
  require_codes_fit(codes, seen, bits);
  return words;
}

at::Tensor unpack_dense(const at::Tensor& words, int64_t k, int64_t bits) {
  require_one_of("bits", bits, {1, 2, 3, 4, 8});
  require_matrix("words", words, at::kInt);
  require(k >= 0, "k must not be negative, got ", k);
  const int64_t rows = words.size(0), columns = qkernels::cpu::dense_words(k, bits);
  require(words.size(1) == columns, "words must have shape [", rows, ", ", columns, "] for k=", k,
          " and ", bits, " bits, got ", words.sizes());
  at::Tensor codes = at::empty({rows, k}, at::kByte);
  py::gil_scoped_release released;
  qkernels::cpu::unpack_dense(const_words_of(words), codes.mutable_data_ptr<uint8_t>(), rows, k,
                              bits, qkernels::bindings::torch_pool().threads);
  return codes;
}

at::Tensor pack_planar(const at::Tensor& codes, int64_t bits, int64_t plane) {
  require_one_of("bits", bits, {1, 2, 3, 4});
  require_one_of("plane", plane, {16, 32, 64});
  require_matrix("codes", codes, at::kByte);
  const int64_t n = codes.size(0), k = codes.size(1);
  at::Tensor words = at::empty({qkernels::cpu::planar_rows(k, bits, plane), n}, at::kInt);
  uint8_t seen;
  {
    py::gil_scoped_release released;
    seen = qkernels::cpu::pack_planar(codes.const_data_ptr<uint8_t>(), words_of(words), n, k, bits,
                                      plane, qkernels::bindings::torch_pool().threads);
  }
  require_codes_fit(codes, seen, bits);
  return words;
}

at::Tensor unpack_planar(const at::Tensor& words, int64_t k, int64_t bits, int64_t plane) {
  require_one_of("bits", bits, {1, 2, 3, 4});
  require_one_of("plane", plane, {16, 32, 64});
  require_matrix("words", words, at::kInt);
  require(k >= 0, "k must not be negative, got ", k);
  const int64_t n = words.size(1), rows = qkernels::cpu::planar_rows(k, bits, plane);
  require(words.size(0) == rows, "words must have shape [", rows, ", ", n, "] for k=", k, ", ",
          bits, " bits and plane ", plane, ", got ", words.sizes());
  at::Tensor codes = at::empty({n, k}, at::kByte);
  py::gil_scoped_release released;
  qkernels::cpu::unpack_planar(const_words_of(words), codes.mutable_data_ptr<uint8_t>(), n, k, bits,
                               plane, qkernels::bindings::torch_pool().threads);
  return codes;
}

py::dict build_info() {
  std::vector<std::string> architectures;
#ifdef QKERNELS_CUDA_ARCHITECTURES
  const bool cuda = true;
  std::istringstream listed(QKERNELS_CUDA_ARCHITECTURES);
  for (std::string each; listed >> each;) architectures.push_back(each);
#else
  const bool cuda = false;
#endif
#ifdef _OPENMP
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
#ifdef __clang__
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  py::dict info;
  info["version"] = QKERNELS_VERSION;
  info["compiler"] = compiler;
  info["cpp_standard"] = static_cast<int>(__cplusplus / 100 % 100);
  info["torch_version"] = TORCH_VERSION;
  info["cuda"] = cuda;
  info["cuda_architectures"] = architectures;
  info["openmp"] = openmp;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of qkernels. Import torch first: its libraries are needed.";
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
  m.def("build_info", &build_info,
        "version, compiler, cpp_standard, torch_version, cuda, cuda_architectures, openmp");
  qkernels::bindings::register_cpu(m);
}
